"""Everything is declared in pyproject.toml; this file only adds the optional C extension of the CPU path.

Without a compiler the build still succeeds and the pure-torch path is used.
FLUTE_PURE=1 leaves the extension out on purpose: that is the wheel for every platform (py3-none-any).
"""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel


class AnyPython(bdist_wheel):
    """The extension is loaded by ctypes and knows nothing of Python: one wheel per platform serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


cpu_kernel = Extension(
    "flute.kernels._cpu",
    sources=["flute/kernels/_cpu.c"],
    depends=["flute/kernels/_cpu_block.h", "flute/kernels/_cpu_sets.h"],
    extra_compile_args=["/O2"] if sys.platform == "win32" else ["-O3", "-g0"],
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
    optional=True,
)

setup(
    cmdclass={"bdist_wheel": AnyPython},
    ext_modules=[] if os.environ.get("FLUTE_PURE") == "1" else [cpu_kernel],
)
