"""A name for what is installed: this package is what the distribution ``flute-kernel`` was, the module ``flute``.

transformers 4.57 lets HIGGS run if the module ``flute`` is there and the *distribution* ``flute-kernel`` has a version
of 0.4.1 or later (compared as text). Later versions of transformers ask whose the module is and find us. So
``importlib.metadata`` gets a finder, its documented way to extend the search, that answers to this one name where no
such distribution is installed. It is not listed among what is installed, and installers do not see it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import Any

NAME = "flute-kernel"
VERSION = "0.4.2"  # the release of upstream whose interface for HIGGS is here


class _FluteKernel(Distribution):
    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parents[2] / path


class _Finder(DistributionFinder):
    """Finds no module, and one distribution."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        return [_FluteKernel()] if context is not None and context.name == NAME else []


def provide() -> None:
    """Answer to ``flute-kernel`` from now on, behind all finders that are there. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
