"""Upstream's way to start vLLM: ``python -m flute.integrations.vllm vllm.entrypoints.openai.api_server --model ...``

Registers the plugin, then runs the module that the first argument names as ``python -m`` would. With the entry point of
an installed flute it is not needed; from a bare checkout, whose metadata vLLM cannot find, it is.
"""

from __future__ import annotations

import runpy
import sys

from . import register


def main() -> None:
    """Run ``sys.argv[1]`` with the arguments behind it."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(
            "usage: python -m flute.integrations.vllm MODULE [ARGUMENTS], such as vllm.entrypoints.openai.api_server"
        )
    register()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
