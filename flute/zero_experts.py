"""`ZeroPointExperts`: a mixture's experts whose groups have a zero point beside their scale (AWQ, GPTQ, HQQ).

What `zero_points` is for a layer, for stacks (E, N, K), with the expert e(t) of row t:

    y[t] = x[t] . (table[codes[e]] * scales[e])^T + m[t] . s[e]^T          m (M, G), s (E, N, G) = -g * zeros * scales

The first term is one `flute::lut_grouped_linear`, as in `LutExperts`; the second is `by_expert`, a few of torch's own
operators that ask the host nothing, so that a CUDA graph may be replayed with other routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .experts import LutExperts, Routes
from .kernels import layout
from .parallel import local
from .spec import QuantSpec
from .zero_points import decoded, group_means, shift, working_dtype


def lut_experts(
    num_experts: int, hidden: int, intermediate: int, specs: Mapping[str, QuantSpec], **keywords: Any
) -> LutExperts:
    """The experts that hold ``specs``; arguments as of `LutExperts`."""
    kind = ZeroPointExperts if any(spec.zero_points for spec in specs.values()) else LutExperts
    return kind(num_experts, hidden, intermediate, specs, **keywords)


def by_expert(x: torch.Tensor, weight: torch.Tensor, routes: Routes) -> torch.Tensor:
    """x[t] . W[e(t)]^T for x (M, K), its rows sorted by expert, and W (E, N, K) -> (M, N) in the dtype of x.

    Rows are spread over blocks of B = M / E that each have one expert, the last of an expert filled up with zeros. So
    there are fewer than 2 E blocks however rows are routed, which bounds the memory: for each block a copy of its
    expert's W is made, which is meant to be small.
    """
    (rows, width), experts = x.shape, weight.shape[0]
    size = rows // experts
    if size < 2:  # a block for each row
        return torch.bmm(weight[routes.experts].to(x.dtype), x.unsqueeze(2)).squeeze(2)
    counts = routes.ends.diff(prepend=routes.ends.new_zeros(1))
    blocks = (counts + (size - 1)) // size
    last = blocks.cumsum(0)
    moved = (last - blocks) * size - (routes.ends - counts)  # from an expert's first row to its first block
    place = moved[routes.experts] + torch.arange(rows, device=x.device)
    most = (rows + experts * (size - 1)) // size
    owner = torch.searchsorted(last, torch.arange(most, device=x.device), right=True).clamp(max=experts - 1)
    spread = x.new_zeros(most * size, width).index_copy_(0, place, x)
    y = torch.bmm(spread.view(most, size, width), weight[owner].to(x.dtype).transpose(1, 2))
    return y.flatten(0, 1)[place]


class ZeroPointExperts(LutExperts):
    """`LutExperts` of which W1, W2 or both have zero points.

    Attributes:
        gate_up_zeros, down_zeros: Parameters (E, N, G) in the dtype of the scales, in the checkpoint's order on any
            device; None where there are none. Never trained.
        gate_up_shift, down_shift: buffers (E, N, G), s above, as `ZeroPointLinear.shift`.
    """

    _holds_zeros = True

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, specs: Mapping[str, QuantSpec], **keywords: Any
    ) -> None:
        super().__init__(num_experts, hidden, intermediate, specs, **keywords)
        for role, spec in self.specs.items():
            zeros = torch.zeros_like(getattr(self, f"{role}_scales"))
            held = nn.Parameter(zeros, requires_grad=False) if spec.zero_points else None
            self.register_parameter(f"{role}_zeros", held)
            self.register_buffer(f"{role}_shift", None, persistent=False)

    def dequantize(self, role: str) -> torch.Tensor:
        """As `LutExperts.dequantize`: the owner's weights, bit for bit."""
        spec = self.specs[role]
        if not spec.zero_points:
            return super().dequantize(role)
        weight, scales, table = (getattr(self, f"{role}_{part}") for part in ("proj", "scales", "table"))
        ones, sizes = torch.ones_like(scales[0]), (*self.shapes[role], spec.bits, spec.group_size)
        levels = torch.stack([torch.ops.flute.dequantize(w, ones, table.to(scales.dtype), *sizes) for w in weight])
        return decoded(levels, getattr(self, f"{role}_zeros"), self._row_scales(role), self._group(role))

    def arrange(self) -> LutExperts:
        """As `LutExperts.arrange`."""
        super().arrange()
        for role, spec in self.specs.items():
            if spec.zero_points:
                here = not getattr(self, f"{role}_zeros").is_meta
                setattr(self, f"{role}_shift", self._shift(role) if here else None)
        return self

    def _product(self, role: str, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        y = super()._product(role, x, routes)
        if not self.specs[role].zero_points:
            return y
        held: torch.Tensor | None = getattr(self, f"{role}_shift")
        held = self._shift(role) if held is None else held
        means = group_means(x, self._group(role))
        return y + by_expert(means.to(working_dtype(y)), held, routes).to(y.dtype)

    def _shift(self, role: str) -> torch.Tensor:
        zeros: torch.Tensor = getattr(self, f"{role}_zeros")
        return shift(local(zeros.detach()), self._row_scales(role), self._group(role))

    def _group(self, role: str) -> int:
        return self.specs[role].group(self.shapes[role][1])

    def _row_scales(self, role: str) -> torch.Tensor:
        """(E, N, G), whatever the order here."""
        held, rows = local(getattr(self, f"{role}_scales").detach()), self.shapes[role][0]
        return torch.stack([layout.unpack_scales(part, rows) for part in held]) if held.dim() == 4 else held
