"""vLLM serves our checkpoints: an out-of-tree plugin, found through the entry point ``vllm.general_plugins``.

    vllm serve DIR                                       config.json says "flute" or "flatquant": no flag is needed
    python -m flute.integrations.vllm MODULE ARGUMENTS   upstream's wrapper: the same, for any module of vLLM

`register` is called in the front end, in the engine and in every worker, so it is quick and may be called again. Only
`config`, `flat_config` and what they load import vLLM. Versions outside `SUPPORTED` are left alone until somebody wants
to serve one of our checkpoints with them: that is refused in one line, by `refused`.
"""

from __future__ import annotations

import importlib

from packaging.version import InvalidVersion, Version

SUPPORTED = (Version("0.26"), Version("0.33"))  # from the first to before the second; both ends' interfaces were read
NAMES = "vLLM 0.26 to 0.32"


def supported(version: str) -> bool:
    """Whether this version of vLLM has the interfaces that the plugin is written for."""
    try:
        return SUPPORTED[0] <= Version(Version(version).base_version) < SUPPORTED[1]
    except InvalidVersion:
        return False


def register() -> None:
    """Make ``flute`` and ``flatquant`` quantization methods of vLLM, in this process."""
    known = supported(importlib.import_module("vllm").__version__)
    for module in ("config", "flat_config") if known else ("refused",):
        importlib.import_module(f"{__name__}.{module}")
