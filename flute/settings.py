"""The one place that reads the environment and decides where files of our own may live.

FLUTE_CACHE_DIR         where compiled kernels and tuned plans are kept; default $XDG_CACHE_HOME/flute or ~/.cache/flute
FLUTE_NO_AUTOREGISTER   set to 1: flute does not register itself with transformers
CUDA_HOME, CUDA_PATH    where to look for NVRTC and CUDA headers that did not come with torch or pip
"""

import os
import stat
from pathlib import Path

from flute.errors import FluteError

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def autoregister() -> bool:
    """Whether flute may register itself with transformers."""
    return os.environ.get("FLUTE_NO_AUTOREGISTER", "0") in ("", "0")


def cuda_home() -> Path | None:
    """The CUDA toolkit the user points at, if any."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(home) if home else None


def cache_dir() -> Path:
    """Our private cache directory, created on first use.

    Compiled kernels are code: whoever can write this directory can run code as us. So it is ours, with rights 0700 when
    we make it, and refused with a FluteError when another user owns it or may write to it. Callers go on in memory.
    """
    chosen = os.environ.get("FLUTE_CACHE_DIR")
    try:
        path = Path(chosen).expanduser() if chosen else _cache_home() / "flute"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.resolve(strict=True)  # the checks below are about the directory itself, not a link to it
        found = path.stat()
    except (OSError, RuntimeError) as error:
        raise FluteError(f"cache directory cannot be used: {error}; set FLUTE_CACHE_DIR to another") from None
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            raise FluteError(f"cache directory {path} belongs to user {found.st_uid}; set FLUTE_CACHE_DIR to yours")
        if found.st_mode & _WRITABLE_BY_OTHERS:
            raise FluteError(
                f"cache directory {path} has rights {stat.S_IMODE(found.st_mode):04o}, so others may write to it; "
                f"run: chmod go-w {path}"
            )
    return path


def _cache_home() -> Path:
    """$XDG_CACHE_HOME if it is absolute (the XDG rule: a relative one is ignored), else ~/.cache."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
