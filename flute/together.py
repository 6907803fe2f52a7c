"""Layers that a model gives the same x, such as q, k and v of an attention: one launch for all of them.

Their codes are put one behind the other in memory, and each layer's parameters become views of its part: names, state
dict, saving and adapters see nothing of it. The model's code is not touched either; it goes on calling one layer after
the other. Whoever is called first runs the launch for all, and the others hand out their part of its result:

* eager: the parts wait here, for the very same x (the object and its version, so a write to x in between is noticed),
  thread, stream and autocast, and unchanged weights. They are let go when all are taken or another x comes.
  Writes that torch does not count (through ``.data``, by a replayed CUDA graph) between two calls of one group are not
  seen; no model writes to an attention's input there.
* torch.compile: every layer calls ``flute::lut_linears``, and tracing makes equal calls one (see `kernels.joined`).

Layers of a group that do not get the same x after all (cross attention) are noticed and left apart from then on. Apart
they are, too: where gradients are recorded (there are many tokens, and a backward pass of one product each is cheaper);
for x made under ``torch.inference_mode`` outside of torch.compile, since such tensors have no version; under functorch
and other modes of torch. A copied or pickled model has groups of its own; a layer copied alone is alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from .kernels import direct, joined, ops
from .kernels.hadamard import hadamard
from .parallel import is_cut
from .spec import QuantSpec

_PATIENCE = 3  # launches in a row of which not all parts were taken, until a group is left apart
_NAMES = ("weight", "scales", "bias")


class _Kept(NamedTuple):
    """Parts of one launch that nobody has taken yet (None: taken), and what must still be as it was."""

    x: torch.Tensor
    surroundings: tuple[Any, ...]
    parts: list[torch.Tensor | None]


class Together:
    """A group of layers with one spec, K, dtype and device. Holds their dictionaries of parameters, not the layers.

    Args:
        parameters, buffers: of each layer; ``weight``, ``scales`` and ``bias``, and ``table``.
        sizes: out_features of each layer; all but the last multiples of 16.
        spec: how all are stored.
        anywhere: join them on the CPU too (exact there as well; the gain is on GPUs).

    Attributes:
        joined: whether the layers are neighbours in memory now.
        has_clusters: and on a GPU whose blocks can form clusters.
    """

    def __init__(
        self,
        parameters: Sequence[dict[str, Any]],
        buffers: Sequence[dict[str, Any]],
        sizes: Sequence[int],
        spec: QuantSpec,
        *,
        anywhere: bool = False,
    ) -> None:
        self.parameters, self.buffers = list(parameters), list(buffers)
        self.sizes, self.spec, self.anywhere = tuple(sizes), spec, anywhere
        self.starts = tuple(sum(self.sizes[:place]) for place in range(len(self.sizes)))
        self.joined = self.has_clusters = False
        self._whole: dict[str, torch.Tensor | None] = {}
        self._kept: dict[int, _Kept] = {}  # by thread
        self._misses = 0
        self._states: list[tuple[int, ...]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or pickled, a group is empty until its layers `adopt` it: none is copied for the sake of another."""
        nobody: list[dict[str, Any]] = [{} for _ in self.sizes]
        return partial(Together, nobody, nobody, self.sizes, self.spec, anywhere=self.anywhere), ()

    def adopt(self, place: int, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
        """Layer number ``place`` was copied; the last one of them joins all."""
        self.parameters[place], self.buffers[place] = parameters, buffers
        self.join()

    # ---- memory ----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Make neighbours of the layers' parameters if they are fit for it; to be called whenever one has changed."""
        self._kept.clear()
        self._whole = {}
        self.joined = self._fit()
        if not self.joined:
            return
        for name in _NAMES:
            tensors = [parameters[name] for parameters in self.parameters]
            if tensors[0] is None:
                self._whole[name] = None
                continue
            plain = [tensor.detach() for tensor in tensors]
            whole = joined.neighbours(plain)
            if whole is None:
                whole = torch.cat(plain)
                parts = whole.split([tensor.shape[0] for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.data = part
            self._whole[name] = whole
        device = self.parameters[0]["weight"].device
        self.has_clusters = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._states = [self._state(place) for place in range(len(self.sizes))]

    def _fit(self) -> bool:
        if not all(self.buffers):  # of a copy that lacks layers
            return False
        first, table = self.parameters[0], self.buffers[0]["table"]
        for parameters, buffers in zip(self.parameters, self.buffers, strict=True):
            for name in _NAMES:
                tensor, model = parameters.get(name), first.get(name)
                if tensor is None or model is None:
                    if name != "bias" or tensor is not model:
                        return False
                elif not _alike(tensor, model):
                    return False
            mine = buffers["table"]
            if mine.dtype != first["scales"].dtype or mine.is_inference() or not torch.equal(mine, table):
                return False
        if first["bias"] is not None and first["bias"].dtype != first["scales"].dtype:
            return False
        return first["weight"].dim() == 3 or self.anywhere

    def apart(self) -> None:
        """Leave the layers alone until `join`; what they hold stays valid."""
        self.joined = False
        self._whole = {}
        self._kept.clear()

    # ---- the product -----------------------------------------------------------------------------------------------

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        """y (..., N) of layer number ``place`` for x (..., K); None when it must be computed by itself."""
        if not self.joined:
            return None
        if torch.compiler.is_compiling():
            return self._traced(place, x)
        if not direct.possible(x) or x.is_inference() or self._trains():
            return None
        thread, surroundings = threading.get_ident(), _surroundings(x)
        unchanged = self._state(place) == self._states[place]
        kept = self._kept.get(thread)
        if kept is not None:
            if kept.x is x and kept.surroundings == surroundings and unchanged:
                y = kept.parts[place]
                if y is not None:
                    kept.parts[place] = None
                    if not any(part is not None for part in kept.parts):
                        self._kept.pop(thread, None)
                        self._misses = 0
                    return y
            self._kept.pop(thread, None)
            self._misses += 1
        if self._misses >= _PATIENCE or not ((unchanged and self._state(0) == self._states[0]) or self._refreshed()):
            self.apart()
            return None
        weight, scales, bias = (self._whole[name] for name in _NAMES)
        assert weight is not None and scales is not None
        cast = _cast(x, scales.dtype)
        if cast is None:
            return None
        table, spec = self.buffers[0]["table"], self.spec
        if spec.hadamard_size:
            cast = hadamard(cast, spec.hadamard_size)
        y = ops.backend(x)(cast, weight, scales, table, bias, sum(self.sizes), spec.bits, spec.group_size)
        parts: list[torch.Tensor | None] = list(y.split_with_sizes(self.sizes, -1))
        mine, parts[place] = parts[place], None
        self._kept[thread] = _Kept(x, surroundings, parts)
        return mine

    def _traced(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        weights = [parameters["weight"] for parameters in self.parameters]
        scales = [parameters["scales"] for parameters in self.parameters]
        biases = [parameters["bias"] for parameters in self.parameters if parameters["bias"] is not None]
        table, spec, sizes = self.buffers[0]["table"], self.spec, self.sizes
        if torch.is_grad_enabled() and (x.requires_grad or any(bias.requires_grad for bias in biases)):
            return None
        if any(tensor.device != x.device or tensor.dtype != table.dtype for tensor in (*scales, *biases)):
            return None
        cast = _cast(x, table.dtype)
        if cast is None:
            return None
        if spec.hadamard_size:  # equal calls, too
            cast = hadamard(cast, spec.hadamard_size)
        y = torch.ops.flute.lut_linears(cast, weights, scales, table, biases, sizes, spec.bits, spec.group_size)
        return y.narrow(-1, self.starts[place], sizes[place])

    # ---- whether all is as it was ------------------------------------------------------------------------------------

    def _state(self, place: int) -> tuple[int, ...]:
        """Addresses and versions of what the layer computes with."""
        parameters, table = self.parameters[place], self.buffers[place]["table"]
        weight, scales, bias = parameters["weight"], parameters["scales"], parameters["bias"]
        state = (weight.data_ptr(), weight._version, scales.data_ptr(), scales._version, id(table), table._version)
        return state if bias is None else (*state, bias.data_ptr(), bias._version)

    def whole(self) -> dict[str, torch.Tensor | None] | None:
        """Codes, scales and biases of all layers, one tensor of each; None where one has changed since `join`."""
        for place, state in enumerate(self._states):
            if self._state(place) != state:
                return None
        return self._whole

    def _refreshed(self) -> bool:
        """Something has changed: codes, scales, bias in place, which is noted; anything else ends the group."""
        for place, state in enumerate(self._states):
            if state[4:6] != self._state(place)[4:6]:  # the table
                return False
        for name, whole in self._whole.items():
            address = 0 if whole is None else whole.data_ptr()
            for parameters in self.parameters:
                tensor = parameters[name]
                if whole is not None:
                    if tensor.data_ptr() != address or tensor.dtype != whole.dtype:
                        return False
                    address += tensor.nbytes
        self.join()
        return self.joined

    def _trains(self) -> bool:
        if not torch.is_grad_enabled() or self._whole["bias"] is None:
            return False
        return any(parameters["bias"].requires_grad for parameters in self.parameters)


def _alike(tensor: torch.Tensor, model: torch.Tensor) -> bool:
    if tensor.is_meta or tensor.is_inference() or is_cut(tensor):
        return False
    return (tensor.device, tensor.dtype, tensor.shape[1:]) == (model.device, model.dtype, model.shape[1:])


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """x as layers of ``dtype`` take it (see `LutLinear.forward`); None when they would be cast themselves."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x
    wanted = torch.get_autocast_dtype(kind) if dtype == torch.float32 else dtype
    return x.to(dtype) if wanted == dtype else None


def _surroundings(x: torch.Tensor) -> tuple[Any, ...]:
    """What a result depends on besides x and the weights: x's version, autocast, stream and whether it is captured."""
    kind, cast = "cuda" if x.is_cuda else "cpu", None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind):
        cast = torch.get_autocast_dtype(kind)
    if kind != "cuda":
        return (x._version, cast)
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    return (x._version, cast, stream, torch.cuda.is_current_stream_capturing())
