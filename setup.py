"""Everything is declared in pyproject.toml; this file only adds the optional C extension of the CPU path.

Without a compiler the build still succeeds and the pure-torch path is used.
FLUTE_PURE=1 leaves the extension out on purpose: that is the wheel for every platform (py3-none-any).
"""

import os
import sys

from setuptools import Extension, setup

cpu_kernel = Extension(
    "flute.kernels._cpu",
    sources=["flute/kernels/_cpu.c"],
    extra_compile_args=["/O2"] if sys.platform == "win32" else ["-O3"],
    optional=True,
)

setup(ext_modules=[] if os.environ.get("FLUTE_PURE") == "1" else [cpu_kernel])
