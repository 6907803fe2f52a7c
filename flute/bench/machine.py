"""One line that says what a figure was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "cuda-core", "bitsandbytes")


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def describe() -> str:
    """GPU and driver (or processor and threads), Python, versions of the packages that matter, and the date."""
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, driver {_driver()}"
    else:
        where = f"{processor()}, {torch.get_num_threads()} threads"
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{where}; Python {platform.python_version()}; {', '.join(versions)}; {today}"
