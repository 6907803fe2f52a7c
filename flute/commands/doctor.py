"""``flute doctor``: what this machine offers, and whether the operator computes exactly here."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import typer

from .. import __version__
from ..errors import FluteError
from .common import JsonOption, print_json


def doctor(as_json: JsonOption = False) -> None:
    """Show GPU, driver, torch, NVRTC, caches and the C kernel, and test the operator exactly on each backend.

    Exit code 1 if a test fails; something that is merely absent is no failure.
    """
    facts = {
        "flute": __version__,
        "python": f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        **_versions(),
        "gpu": _told(_gpu),
        "driver": _told(_driver),
        "nvrtc": _told(_nvrtc),
        "kernel cache": _told(_cache),
        "C kernel": _told(_c_kernel),
        "self-test cpu": _told(lambda: _self_test("cpu", (1, 5, 100))),
        "self-test cuda": _told(_self_test_cuda),
    }
    if as_json:
        print_json(facts)
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {value}")
    if any(str(value).startswith("FAILED") for value in facts.values()):
        raise typer.Exit(1)


def _told(check: Callable[[], str]) -> str:
    """The answer of ``check``, or why there is none."""
    try:
        return check()
    except FluteError as error:
        return f"no: {error}"
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return f"no: {' '.join(str(error).split())[:200]}"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "safetensors", "huggingface_hub", "cuda-core", "gguf", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "none seen by torch" + ("" if built else ", which was built without CUDA")
    parts = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        parts.append(f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB")
    return "; ".join(parts)


def _driver() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none in use"
    from cuda.bindings import driver

    error, number = driver.cuDriverGetVersion()
    if int(error):
        return f"does not answer (error {int(error)})"
    return f"speaks CUDA {number // 1000}.{number % 1000 // 10}; torch was built for {torch.version.cuda}"


def _nvrtc() -> str:
    from ..kernels import jit

    number = jit.nvrtc_version()
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return f"{number}, {load_nvidia_dynamic_lib('nvrtc').abs_path}"
    except ImportError:
        return number


def _cache() -> str:
    from ..settings import cache_dir

    folder = cache_dir()
    files = [path.stat().st_size for path in folder.rglob("*.cubin")]
    return f"{folder}, {len(files)} kernels, {sum(files) / 1e6:.1f} MB"


def _c_kernel() -> str:
    from ..kernels import cpu

    return "yes" if cpu.available() else f"no: {cpu.build_hint()}"


def _self_test_cuda() -> str:
    import torch

    return _self_test("cuda", (1, 5, 16, 100)) if torch.cuda.is_available() else "not run: no GPU"


def _self_test(device: str, tokens: tuple[int, ...]) -> str:
    """Small integers with scales that are powers of two: every path must give exactly the integer result."""
    import torch

    from ..bench.correctness import Case, check_integers
    from ..spec import QuantSpec

    case = Case(72, 192, QuantSpec(bits=4, group_size=64, table="custom"), torch.float16, device)
    wrong = [str(m) for m in tokens if check_integers(case, m)]
    if wrong:
        return f"FAILED for {', '.join(wrong)} tokens: the operator does not give the exact integer result"
    return f"exact for {', '.join(map(str, tokens))} tokens"
