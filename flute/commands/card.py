"""``flute card``: the README.md of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import FluteError
from .common import quiet_libraries, read_text


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of flute.", show_default=False)],
    base: Annotated[str | None, typer.Option(metavar="NAME/MODEL", help="Hub id of the dense model.")] = None,
    quality: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What flute eval --json printed; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md of your own too.")] = False,
) -> None:
    """Write DIR/README.md for people and for the hub: the spec, the quality that was measured, how to run it."""
    quiet_libraries()
    from ..checkpoint.files import read_json
    from ..integrations import card as cards
    from ..integrations import described
    from ..integrations.folders import is_hub_id

    if base is not None and not is_hub_id(base):
        raise FluteError(f"--base {base!r} is no hub id; give name/model, or leave it out")
    for path in quality or []:
        read_text(path)  # says better what is wrong with a file that is not there
    measured = [{"text": path.stem, **read_json(path)} for path in quality or []]
    print(cards.write(described.of_folder(folder.expanduser()), base=base, quality=measured, force=force))
