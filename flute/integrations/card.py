"""The README.md of a checkpoint: what it is, what it costs in quality where somebody measured that, how to run it.

A card that flute wrote carries a digest of its text. It is written anew only while the digest fits; once edited it is
its owner's, like any other README.md, and stays (``force`` replaces it all the same). Of a card that is replaced the
metadata are kept, and ours added: licence, languages and the base model are not forgotten.

``flute quantize``, ``convert`` and ``flatquant`` write a card, and `saving` for models that transformers saves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from yaml import YAMLError

from ..checkpoint.atomic import whole_file
from ..config import QUANT_METHOD
from ..errors import CheckpointError
from ..flatquant.spec import QUANT_METHOD as FLATQUANT
from . import folders
from .described import HIGGS, Described

FILE = "README.md"
_MARK = re.compile(r"<!-- written by flute, ([0-9a-f]{16}): [^\n]*-->\n")
_OUR_TAGS = re.compile(rf"\d+-bit|{FLATQUANT}|{HIGGS}")  # of the checkpoint that the card was of before
_PYTHON = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # after: pip install flute-engine

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The lookup table", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```
"""
_SHELL = {
    QUANT_METHOD: (
        'flute generate {name} --prompt "The lookup table"',
        "flute inspect {name}        # layer by layer",
        "vllm serve {name}           # vLLM finds flute's plugin by itself",
    ),
    FLATQUANT: (
        'flute generate {name} --prompt "The lookup table"',
        "vllm serve {name}           # keys and values in 16 bits; vLLM finds flute's plugin by itself",
    ),
}


def write(
    described: Described, *, base: str | None = None, quality: Sequence[Mapping[str, Any]] = (), force: bool = False
) -> Path:
    """Write README.md into a checkpoint's folder. Returns its path.

    Args:
        described: the checkpoint, from `described`.
        base: the hub id (name/model) of the dense model; anything else, such as a path, is not told.
        quality: what ``flute eval --json`` printed for it, one for each text; the key "text" names the text.
        force: replace a README.md that is somebody's own.

    Raises:
        CheckpointError: somebody's own README.md is there; quality is no such thing.
    """
    path = described.folder / FILE
    if not force and not is_ours(path):
        raise CheckpointError(f"{path} was not written by flute, or edited since; keep it, or replace it with --force")
    name = described.folder.resolve().name
    return put(path, text(described, name, base=base, quality=quality, replaced=content(path)).encode())


def put(path: Path, made: bytes) -> Path:
    """Write the file, whole or not at all."""
    with whole_file(path) as file:
        file.write(made)
    return path


def content(path: Path) -> str:
    """What the file holds, line ends as "\\n"; empty if it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def metadata(found: str) -> dict[str, Any]:
    """What a card tells the hub; nothing if it has no such part, or a damaged one."""
    try:
        return dict(ModelCard(found).data.to_dict()) if found.startswith("---") else {}
    except (ValueError, TypeError, YAMLError):
        return {}


def without_metadata(found: str) -> str:
    """A card without what it tells the hub."""
    return REGEX_YAML_BLOCK.sub("", found, count=1)


def is_ours(path: Path) -> bool:
    """Whether nothing of anybody's is lost by writing ``path``: it is not there, or as flute wrote it.

    Metadata may have changed, since they are kept; where they cannot be read, they would be lost.
    """
    found = content(path)
    mark = _MARK.search(found)
    if mark is None:
        return not path.exists()
    return _digest(_MARK.sub("", without_metadata(found))) == mark[1] and bool(metadata(found))


def text(
    described: Described,
    name: str,
    *,
    base: str | None = None,
    quality: Sequence[Mapping[str, Any]] = (),
    replaced: str = "",
) -> str:
    """The whole text: metadata for the hub, then what people read.

    Args:
        name: of the checkpoint, in its title and in what to type. For the rest see `write`.
        replaced: the card that this one takes the place of; what its metadata say besides is kept.
    """
    kept = metadata(replaced)
    base = base if base and folders.is_hub_id(base) else kept.get("base_model")
    told = [tag for tag in kept.get("tags", ()) if tag in described.tags or not _OUR_TAGS.fullmatch(tag)]
    kept |= {"library_name": "transformers", "tags": list(dict.fromkeys([*told, *described.tags]))}
    if described.causal:
        kept["pipeline_tag"] = "text-generation"
    if base:
        kept |= {"base_model": base, "base_model_relation": "quantized"}
    of = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else "A language model"
    shell = "\n".join(_SHELL.get(described.method, ()))
    run = _PYTHON + (f"\n```sh\n{shell}\n```\n" if shell else "")
    parts = [f"{of} {described.text}\n", quality_table(quality), f"## How to run it\n\n{run.format(name=name)}"]
    body = "\n".join(part for part in parts if part)
    title = f"\n# {name}\n\n"
    mark = f"<!-- written by flute, {_digest(title + body)}: once edited it is yours, and stays as it is -->\n"
    return f"---\n{ModelCardData(**kept).to_yaml()}\n---\n{title}{mark}{body}"


def _digest(body: str) -> str:
    return hashlib.sha256("".join(body.split()).encode()).hexdigest()[:16]


def quality_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """The part about quality; empty if nothing was measured.

    Raises:
        CheckpointError: that is not what ``flute eval --json`` prints.
    """
    rows = []
    for found in measured:
        try:
            rows.append(
                f"| {found.get('text', 'unnamed')} | {float(found['perplexity']):.4f} "
                f"| {int(found['windows'])} x {int(found['seq_len'])} | {found['dtype']} |"
            )
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"quality {dict(found)!r} is not what flute eval --json prints: it needs perplexity, windows, seq_len "
                "and dtype"
            ) from None
    head = "| text | perplexity | windows x tokens | computed in |\n|---|---|---|---|"
    return "\n".join(["## Quality\n", head, *rows, ""]) if rows else ""
