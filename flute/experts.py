"""`LutExperts`: the experts of a mixture (transformers' fused 3-D weights) as codes, scales and a table.

    h = gate(x W1[e]^T)     y = h W2[e]^T     out[t] = sum over the token's experts e of p[t, e] y

W1 ``gate_up_proj`` (E, 2 I, H) and W2 ``down_proj`` (E, H, I) keep their names; each is held as uint8 codes beside
``gate_up_scales`` and ``down_scales``, so that whatever finds the dense parameters by name finds the codes. Tokens are
sorted by expert and each of the two products is one `flute::lut_grouped_linear`. Nothing is read back by the host and
nothing is added up in an order that may change.

As in `LutLinear`, codes and scales lie in kernel order on a GPU and in the checkpoint's order anywhere else, and a
state dict always shows the checkpoint's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import SpecError
from .kernels import grouped, layout
from .kernels.hadamard import hadamard
from .packing import pack_codes
from .parallel import is_cut, local, placed_like
from .quantize import quantize
from .spec import CUSTOM_TABLE, QuantSpec
from .tables import named_table, resolve_table

ROLES = ("gate_up", "down")


def silu_gate(pair: torch.Tensor) -> torch.Tensor:
    """(..., 2 I) -> (..., I): silu of the first half times the second."""
    gate, up = pair.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class Routes(NamedTuple):
    """Which expert rows go to, sorted: ``experts`` (M,) of each row, ``ends`` int32 (E,) where each expert's end."""

    experts: torch.Tensor
    ends: torch.Tensor


class LutExperts(nn.Module):
    """E gated experts, W1 (E, 2 I, H) and W2 (E, H, I), both ~ table[codes] * scales.

    Args:
        num_experts, hidden, intermediate: E, H and I, any sizes.
        specs: how W1 (``"gate_up"``) and W2 (``"down"``) are stored.
        gate: (S, 2 I) -> (S, I), what comes between the two.
        device, dtype: ``dtype`` is that of scales and tables (float16, bfloat16; on CPU float32).

    Attributes:
        gate_up_proj, down_proj: Parameters uint8, codes; (E, N, row_bytes) or, on CUDA, kernel order. Never trained.
        gate_up_scales, down_scales: Parameters (E, N, G) or, on CUDA, kernel order.
        gate_up_table, down_table: buffers, one for all experts; saved only when they are custom ones.
        shapes: (N, K) of W1 and W2 as this process holds them: under tensor parallelism with a part of the I.
    """

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    _holds_zeros = False

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        specs: Mapping[str, QuantSpec],
        *,
        gate: Callable[[torch.Tensor], torch.Tensor] = silu_gate,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        self.num_experts, self.gate, self.specs = num_experts, gate, {role: specs[role] for role in ROLES}
        self.intermediate = intermediate
        self.shapes = {"gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}
        if any(spec.zero_points for spec in self.specs.values()) != self._holds_zeros:
            told = " and ".join(map(str, self.specs.values()))
            raise SpecError(f"{told}: {type(self).__name__} do not hold this; use flute.zero_experts.lut_experts")
        for role, spec in self.specs.items():
            n, k = self.shapes[role]
            spec.check_layer(f"LutExperts.{role}_proj", n, k)
            codes = torch.zeros(num_experts, n, spec.row_bytes(k), dtype=torch.uint8, device=device)
            scales = torch.zeros(num_experts, n, spec.num_groups(k), dtype=dtype, device=device)
            custom = spec.table == CUSTOM_TABLE
            table = torch.zeros(spec.table_shape) if custom else named_table(spec.table)
            self.put(role, codes, scales)
            self.register_buffer(f"{role}_table", table.to(device=device, dtype=dtype), persistent=custom)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) -> (T, H), as transformers' experts are called.

        Args:
            hidden_states: (T, H). top_k_index: (T, top_k), below E. top_k_weights: (T, top_k), p above.
        """
        tokens, top_k = top_k_index.shape
        if tokens == 0:
            return torch.zeros_like(hidden_states)
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        experts = torch.arange(self.num_experts, device=chosen.device, dtype=chosen.dtype)
        routes = Routes(chosen, torch.searchsorted(chosen, experts, right=True, out_int32=True))
        inner = self.gate(self._product("gate_up", hidden_states[order // top_k], routes))
        out = self._product("down", inner, routes) * top_k_weights.reshape(-1, 1)[order]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * top_k, device=order.device))
        return out[back].view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)

    def _product(self, role: str, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        weight, scales, table = (getattr(self, f"{role}_{part}") for part in ("proj", "scales", "table"))
        spec, dtype = self.specs[role], scales.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(x.device.type)
        x = hadamard(x.to(dtype), spec.hadamard_size) if spec.hadamard_size else x.to(dtype)
        given = (x, weight, scales.to(dtype), table.to(dtype), None, routes.ends)
        return torch.ops.flute.lut_grouped_linear(*given, self.shapes[role][0], spec.bits, spec.group_size)

    # ---- weights -----------------------------------------------------------------------------------------------------

    def put(self, role: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Take these codes and scales, in either order, as W1's or W2's."""
        setattr(self, f"{role}_proj", nn.Parameter(codes, requires_grad=False))
        setattr(self, f"{role}_scales", nn.Parameter(scales, requires_grad=False))

    @torch.no_grad()
    def fill(
        self,
        role: str,
        dense: torch.Tensor,
        *,
        table: torch.Tensor | None = None,
        scale: str = "auto",
        name: str = "",
    ) -> None:
        """Quantize W1 or W2, (E, N, K), and take the result; tables and scales get the dense dtype.

        Raises:
            QuantizeError: NaN or Inf weights.
        """
        spec = self.specs[role]
        own = table if spec.table == CUSTOM_TABLE else None
        made = quantize(dense.flatten(0, 1), spec, table=own, scale=scale, scale_dtype=dense.dtype, name=name or role)
        codes, waiting = pack_codes(made.codes, spec.code_bits), getattr(self, f"{role}_proj")
        parts = (placed_like(waiting, part.view(*dense.shape[:2], -1)) for part in (codes, made.scales))
        self.put(role, *parts)
        values = resolve_table(spec, own).to(device=dense.device, dtype=dense.dtype)
        self.register_buffer(f"{role}_table", values, persistent=spec.table == CUSTOM_TABLE)
        self.arrange()

    def dequantize(self, role: str) -> torch.Tensor:
        """W1 or W2 in the dtype of its scales, (E, N, K), as the kernels see it; rotated back, where it is rotated."""
        weight, scales, table = (getattr(self, f"{role}_{part}") for part in ("proj", "scales", "table"))
        spec = self.specs[role]
        sizes = (*self.shapes[role], spec.bits, spec.group_size)
        parts = zip(weight, scales, strict=True)
        stack = torch.stack([torch.ops.flute.dequantize(*part, table.to(scales.dtype), *sizes) for part in parts])
        return hadamard(stack, spec.hadamard_size) if spec.hadamard_size else stack

    # ---- where the codes lie -----------------------------------------------------------------------------------------

    def in_kernel_order(self, role: str) -> bool:
        """Whether W1's or W2's codes and scales are arranged for the CUDA kernels."""
        return getattr(self, f"{role}_proj").dim() == 4

    def checkpoint_tensors(self, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (E, N, row_bytes) and scales (E, N, G) in the checkpoint's order, whatever the order here."""
        weight, scales = getattr(self, f"{role}_proj").detach(), getattr(self, f"{role}_scales").detach()
        if not self.in_kernel_order(role):
            return weight, scales
        parts = grouped.unpack_stack(local(weight), local(scales), self.specs[role].bits, *self.shapes[role])
        return placed_like(weight, parts[0]), placed_like(scales, parts[1])

    def arrange(self) -> LutExperts:
        """Put codes and scales into the order that suits their device; exact, and idempotent. Returns self.

        Under tensor parallelism every rank does so with its part; a state dict turns it back before ranks gather it.
        """
        if not self.in_kernel_order("gate_up"):
            two, hidden = local(self.gate_up_proj).shape[1], self.shapes["down"][0]
            self.shapes = {"gate_up": (two, hidden), "down": (hidden, two // 2)}
        for role, spec in self.specs.items():
            weight, scales = getattr(self, f"{role}_proj"), getattr(self, f"{role}_scales")
            if weight.dtype != torch.uint8 or weight.is_meta:  # still waiting for its codes
                continue
            wanted = self._suits_kernels(role)
            if wanted and not self.in_kernel_order(role):
                self._hold(role, *grouped.pack_stack(local(weight), local(scales), spec.bits, self.shapes[role][1]))
            elif self.in_kernel_order(role) and not wanted:
                self._hold(role, *self.checkpoint_tensors(role))
        return self

    def _suits_kernels(self, role: str) -> bool:
        return self.gate_up_proj.is_cuda and layout.supports(self.specs[role].group_size, self.shapes[role][1])

    def _hold(self, role: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Take codes and scales of another shape."""
        weight, old = getattr(self, f"{role}_proj"), getattr(self, f"{role}_scales")
        if is_cut(weight):  # of a DTensor, ``data`` keeps its shape
            self.put(role, placed_like(weight, codes), placed_like(old, scales))
        else:
            weight.data, old.data = codes, scales

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LutExperts:
        before = {role: getattr(self, f"{role}_table").dtype for role in ROLES}
        super()._apply(fn, recurse)
        for role, spec in self.specs.items():
            table = getattr(self, f"{role}_table")
            if table.dtype != before[role] and spec.table != CUSTOM_TABLE and not table.is_meta:  # see LutLinear
                setattr(self, f"{role}_table", named_table(spec.table).to(device=table.device, dtype=table.dtype))
        return self.arrange()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for role in ROLES:
            if self.in_kernel_order(role):
                for part, tensor in zip(("proj", "scales"), self.checkpoint_tensors(role), strict=True):
                    # ranks gather on their GPUs
                    destination[f"{prefix}{role}_{part}"] = tensor if is_cut(tensor) else tensor.cpu()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for role in ROLES:
            if self.in_kernel_order(role):
                self.put(role, *self.checkpoint_tensors(role))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.arrange()

    def extra_repr(self) -> str:
        """Sizes and specs."""
        (two, hidden), specs = self.shapes["gate_up"], ", ".join(f"{role}={spec}" for role, spec in self.specs.items())
        return f"num_experts={self.num_experts}, hidden={hidden}, intermediate={two // 2}, {specs}"
