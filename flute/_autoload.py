"""Makes transformers know flute's checkpoints, also for a program that never imports flute.

Without registration transformers does not fail on our checkpoints: it warns and draws the weights at random. So torch's
entry point ``torch.backends`` calls `register` at the end of every ``import torch``, and `register` leaves a note on
``sys.meta_path`` to be read when ``transformers.quantizers`` is imported. An exception here would break ``import
torch`` for a whole environment: nothing heavy is imported, everything is caught. FLUTE_NO_AUTOREGISTER=1 switches it
off.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

# The second is imported later than the first: it serves when torch is imported from within the first.
_TARGETS = ("transformers.quantizers", "transformers.modeling_utils")


def register() -> None:
    """Register now if transformers is there, else when it comes. Idempotent; never raises."""
    try:
        from flute.settings import autoregister

        if not autoregister():
            return
        from flute.integrations import distribution

        distribution.provide()
        module = sys.modules.get(_TARGETS[0])
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register_now()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:  # noqa: BLE001  (`import torch` must go on)
        warnings.warn(f"flute could not register with transformers: {error!r}", stacklevel=2)


def _register_now() -> None:
    try:
        for name in ("huggingface", "flatquant"):  # which register, or are about to if half imported
            importlib.import_module(f"flute.integrations.{name}")
    except Exception as error:  # noqa: BLE001  (`import transformers` must go on)
        warnings.warn(
            f"flute could not register with transformers, so models with quant_method 'flute' will not load: {error!r}",
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the targets and has a word after they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _TARGETS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The original loader, which takes over again (for source and resources) as soon as it runs."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        quantizers = sys.modules.get(_TARGETS[0])
        if quantizers is not None and (
            quantizers is module or not getattr(quantizers.__spec__, "_initializing", False)
        ):
            _register_now()
