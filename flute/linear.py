"""`LutLinear`: an nn.Linear whose weight is codes, scales and a table.

With ``spec.hadamard_size`` these stand for the rotated weight W H, and x is rotated before the product:
x W^T = (x H) (W H)^T.

It *is* an ``nn.Linear`` with a parameter called ``weight``, because that is what PEFT, accelerate and loaders look for;
only the weight is uint8 codes and no gradient goes to it. On a GPU the codes and scales lie in kernel order, anywhere
else in the checkpoint's order; moving the module converts them, and a state dict always shows the checkpoint's order,
so what is saved never depends on where the model was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import SpecError
from .kernels import layout, ops
from .kernels.hadamard import hadamard
from .packing import pack_codes
from .parallel import is_cut, local, placed_like
from .quantize import Quantized, quantize
from .spec import CUSTOM_TABLE, QuantSpec
from .tables import named_table, resolve_table
from .together import Together


class LutLinear(nn.Linear):
    """y = x . W^T + bias, W ~ table[codes] * scales.

    Args:
        in_features, out_features: K and N, any sizes.
        spec: how W is stored.
        bias: whether there is a bias (N,).
        device, dtype: as in nn.Linear; ``dtype`` is that of scales, table and bias (float16, bfloat16; on CPU float32).

    Attributes:
        weight: Parameter uint8, codes; (N, row_bytes) or, on CUDA, kernel order. Never trained.
        scales: Parameter (N, G) or, on CUDA, kernel order. Never trained by default.
        table: buffer of ``spec.table_shape``; saved only when it is a custom one.
        rows: rows of the weight that this process holds: N, or this rank's part of it under tensor parallelism.
        together, place: the group of layers with which it shares launches, if any, and its number there.
    """

    table: torch.Tensor
    together: Together | None = None
    place: int = 0

    _holds_zeros = False

    # transformers' tensor-parallel wrapper hands this module plain local tensors instead of DTensors
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        spec.check_layer("LutLinear", out_features, in_features)
        if spec.zero_points != self._holds_zeros:
            raise SpecError(f"{spec}: a {type(self).__name__} does not hold this; use flute.zero_points.lut_linear")
        dtype = dtype or torch.get_default_dtype()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.rows = out_features
        codes = torch.zeros(out_features, spec.row_bytes(in_features), dtype=torch.uint8, device=device)
        scales = torch.zeros(out_features, spec.num_groups(in_features), dtype=dtype, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        custom = spec.table == CUSTOM_TABLE
        table = torch.zeros(spec.table_shape) if custom else named_table(spec.table)
        self.register_buffer("table", table.to(device=device, dtype=dtype), persistent=custom)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: QuantSpec,
        *,
        table: torch.Tensor | None = None,
        scale: str = "auto",
        name: str = "linear",
    ) -> LutLinear:
        """Quantize a dense layer; the result lies on the same device with the same dtype and bias."""
        weight = linear.weight.detach()
        quantized = quantize(weight, spec, table=table, scale=scale, scale_dtype=weight.dtype, name=name)
        made = cls(
            linear.in_features, linear.out_features, spec,
            bias=linear.bias is not None, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        made.table.copy_(resolve_table(spec, table))
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return made.store(quantized)

    def store(self, quantized: Quantized) -> LutLinear:
        """Take codes (N, K / vector_size) and scales (N, G) in the place of those here. Returns self."""
        self.weight.data = pack_codes(quantized.codes, self.spec.code_bits)
        self.scales.data = quantized.scales
        return self.arrange()

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N). Under autocast in 16 bits: the layer's own type if it is one, else autocast's."""
        if self.together is not None:
            y = self.together.part(self.place, x)
            if y is not None:
                return y
        # torch looks a module's attributes up in Python: each is read once, and casts are skipped where nothing changes
        weight, table, spec = self.weight, self.table, self.spec
        scales: torch.Tensor = self.scales
        bias: torch.Tensor | None = self.bias
        dtype = scales.dtype
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type) if dtype == torch.float32 else dtype
            x = x.to(dtype)
        # PEFT's prepare_model_for_kbit_training makes every 16-bit parameter float32, and leaves buffers alone
        if not scales.dtype == table.dtype == dtype:
            scales, table = scales.to(dtype), table.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        if spec.hadamard_size:
            x = hadamard(x, spec.hadamard_size)
        return ops.apply(x, weight, scales, table, bias, self.rows, spec.bits, spec.group_size)

    def dequantize(self) -> torch.Tensor:
        """The weight (N, K) in the dtype of the scales, as the kernels see it; rotated back, where it is rotated."""
        scales, table, spec = self.scales, self.table, self.spec
        weight = torch.ops.flute.dequantize(
            self.weight, scales, table.to(scales.dtype), self.out_features, self.in_features, spec.bits, spec.group_size
        )
        return hadamard(weight, spec.hadamard_size) if spec.hadamard_size else weight

    # ---- where the codes lie -----------------------------------------------------------------------------------------

    @property
    def in_kernel_order(self) -> bool:
        """Whether codes and scales are arranged for the CUDA kernels."""
        return self.weight.dim() == 3

    def checkpoint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (N, row_bytes) and scales (N, G) in the checkpoint's order, whatever the order here."""
        weight, scales = self.weight.detach(), self.scales.detach()
        if not self.in_kernel_order:
            return weight, scales
        held = local(scales)
        codes = layout.unpack_weight(local(weight), self.spec.bits, self.rows, self._columns(held))
        return placed_like(weight, codes), placed_like(scales, layout.unpack_scales(held, self.rows))

    def _columns(self, scales: torch.Tensor) -> int:
        """K, or this rank's part of it, which is whole groups; the last group of a whole row may be a partial one."""
        return min(self.in_features, scales.shape[1] * self.spec.group(self.in_features))

    def arrange(self) -> LutLinear:
        """Put codes and scales into the order that suits their device; exact, and idempotent. Returns self.

        Under tensor parallelism every rank does so with its part; a state dict turns it back before ranks gather it.
        """
        self._order()
        if self.together is not None:
            self.together.join()
        return self

    def _order(self) -> None:
        if not self.in_kernel_order:
            self.rows = local(self.weight).shape[0]
        wanted = self._suits_kernels()
        if wanted and not self.in_kernel_order:
            weight, scales = local(self.weight.detach()), local(self.scales.detach())
            packed = layout.pack_weight(weight, self.spec.bits, self._columns(scales))
            self._hold(packed, layout.pack_scales(scales))
        elif self.in_kernel_order and not wanted:
            self._hold(*self.checkpoint_tensors())

    def _suits_kernels(self) -> bool:
        return self.weight.is_cuda and layout.supports(self.spec.group_size, self._columns(local(self.scales)))

    def _hold(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        """Take codes and scales of another shape."""
        if is_cut(self.weight):  # of a DTensor, ``data`` keeps its shape
            self.weight = nn.Parameter(placed_like(self.weight, weight), requires_grad=False)
            self.scales = nn.Parameter(placed_like(self.scales, scales), requires_grad=self.scales.requires_grad)
        else:
            self.weight.data, self.scales.data = weight, scales

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LutLinear:
        before = self.table.dtype
        super()._apply(fn, recurse)
        if self.table.dtype != before and self.spec.table != CUSTOM_TABLE and not self.table.is_meta:
            # a named table is rounded once, from float32, not from one 16-bit type to the other
            self.table = named_table(self.spec.table).to(device=self.table.device, dtype=self.table.dtype)
        if not self.weight.is_meta:
            self.arrange()
        elif self.together is not None:
            self.together.apart()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, too
        super().__setstate__(state)
        if self.together is not None:
            self.together.adopt(self.place, self._parameters, self._buffers)

    def _replicate_for_data_parallel(self) -> LutLinear:
        replica = super()._replicate_for_data_parallel()
        replica.together = None  # the group's memory is on another GPU
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_kernel_order:
            # copies, so they go to host memory: a GPU that holds the model need not hold it twice
            for name, tensor in zip(("weight", "scales"), self.checkpoint_tensors(), strict=True):
                destination[prefix + name] = tensor if is_cut(tensor) else tensor.cpu()  # ranks gather on their GPUs
        if self.together is not None and not keep_vars:
            for name in ("weight", "scales", "bias"):  # views of memory that others view too, which files do not take
                held: torch.Tensor | None = destination.get(prefix + name)
                if held is not None and held.untyped_storage().nbytes() > held.nbytes:
                    destination[prefix + name] = held.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.in_kernel_order:
            self._hold(*self.checkpoint_tensors())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.weight.is_meta:
            self.arrange()

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, spec={self.spec}"
