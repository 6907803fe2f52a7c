"""Imported first by scripts that vLLM's own Python runs (see test_vllm.py): which vLLM it is, and one rank.

``SCRIPT [SOURCES]``: the Python files of another version of vLLM, without compiled parts, from that folder (an
unpacked wheel). A GPU's version is so tried on a CPU.
"""

import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    (found,) = [name for name in os.listdir(sys.argv[1]) if re.fullmatch(r"vllm-.*\.dist-info", name)]
    number, plain = found.removeprefix("vllm-").removesuffix(".dist-info"), importlib.metadata.version
    importlib.metadata.version = lambda name: f"{number}+cpu" if name == "vllm" else plain(name)

import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel

from flute.integrations.vllm import register

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def say(words: object) -> None:
    """A line that the test counts."""
    print(f"vLLM {vllm.__version__}: {words}")


@contextmanager
def one_rank() -> Iterator[None]:
    """Our methods registered, and what layers want to find when they are made."""
    register()
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
