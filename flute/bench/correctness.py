"""Is the operator right? The strongest questions first, each against something that cannot share its mistakes.

1. *Decoding*: one-hot rows of x must give back columns of the decoded weight, bit for bit, whatever the table.
2. *Integers*: a table of small integers, scales that are powers of two and small integers in x make every sum exact in
   float32; the answer must equal the float64 product rounded once, bit for bit.
3. *Error*: on random data the relative Frobenius error against float64 stays below 1e-3 (float16), 8e-3 (bfloat16) or
   1e-5 (float32), and in 16 bits below 1.1 times that of torch's own matmul on the dequantized weights. Fewer than 256
   outputs may all cancel to almost nothing, and which of two sound sums rounds better is luck there: then no ratio is
   asked, and the error is taken relative to |x| . |W|^T.

Codes are drawn from all of 0 .. 2**bits - 1, and the top one is always there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels import layout, ops, reference
from ..packing import pack_codes
from ..spec import CUSTOM_TABLE, QuantSpec

BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
_RATIO = 1.1
_MANY_OUTPUTS = 256


@dataclass(frozen=True)
class Case:
    """One weight matrix: shape, spec and dtype."""

    n: int
    k: int
    spec: QuantSpec
    dtype: torch.dtype
    device: str = "cuda"
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What one case gave at ``m`` tokens; ``reason`` is empty when it passed."""

    m: int
    error: float
    torch_error: float
    reason: str


class Problem:
    """A random weight of a case in both layouts, and its decoded values."""

    def __init__(self, case: Case, *, integers: bool = False) -> None:
        spec, n, k = case.spec, case.n, case.k
        made = torch.Generator(device=case.device).manual_seed(case.seed)
        count = spec.row_codes(k)
        codes = torch.randint(0, 1 << spec.code_bits, (n, count), generator=made, device=case.device, dtype=torch.uint8)
        codes[-1, -1] = (1 << spec.code_bits) - 1
        groups = spec.num_groups(k)
        if integers:
            table = torch.randint(-4, 5, spec.table_shape, generator=made, device=case.device).to(case.dtype)
            power = torch.randint(-2, 3, (n, groups), generator=made, device=case.device)
            scales = torch.exp2(power.to(torch.float32)).to(case.dtype)
        else:
            table = torch.randn(spec.table_shape, generator=made, device=case.device).to(case.dtype)
            scales = (torch.rand(n, groups, generator=made, device=case.device) + 0.5).to(case.dtype)
        self.case, self.spec, self.table = case, spec, table
        self.weight, self.scales = pack_codes(codes, spec.code_bits), scales
        self.given = (self.weight, self.scales)
        if case.device != "cpu" and layout.supports(spec.group_size, k):
            self.given = (layout.pack_weight(self.weight, spec.bits, k), layout.pack_scales(scales))
        self.dense = self.decoded(case.dtype)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K), by plain torch."""
        case = self.case
        return reference.decode(
            self.weight, self.scales, self.table, case.k, self.spec.bits, self.spec.group_size, dtype=dtype
        )

    def exact(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The answer in float64."""
        return reference.lut_linear(x, self.weight, self.scales, self.table, bias, self.spec.bits, self.spec.group_size)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The operator under test."""
        return ops.lut_linear(x, *self.given, self.table, bias, spec=self.spec, out_features=self.case.n)

    def dequantized(self) -> torch.Tensor:
        """The dequantization under test."""
        case = self.case
        return torch.ops.flute.dequantize(*self.given, self.table, case.n, case.k, self.spec.bits, self.spec.group_size)


def relative(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Relative Frobenius error, a scalar tensor (float64)."""
    return (y.to(torch.float64) - exact).norm() / exact.norm()


def check_decoding(problem: Problem, tokens: int = 8) -> str:
    """One-hot rows of x; returns what is wrong, or nothing."""
    case = problem.case
    picks = torch.linspace(0, case.k - 1, tokens, device=case.device).long()
    x = torch.zeros(tokens, case.k, dtype=case.dtype, device=case.device)
    x[torch.arange(tokens, device=case.device), picks] = 1
    if not torch.equal(problem.run(x), problem.dense[:, picks].T):
        return f"one-hot x of {tokens} tokens does not give back the decoded weight"
    if not torch.equal(problem.dequantized(), problem.dense):
        return "dequantize() differs from the decoded weight"
    return ""


def check_integers(case: Case, tokens: int) -> str:
    """Exact sums of small integers; returns what is wrong, or nothing."""
    problem = Problem(case, integers=True)
    made = torch.Generator(device=case.device).manual_seed(case.seed + 1)
    x = torch.randint(-3, 4, (tokens, case.k), generator=made, device=case.device).to(case.dtype)
    bias = torch.randint(-8, 9, (case.n,), generator=made, device=case.device).to(case.dtype)
    exact = problem.exact(x, bias)
    y = problem.run(x, bias)
    if not bool((exact != 0).any()):
        return "the integer problem is all zero and proves nothing"
    # one rounding, of the exact sum: float64 -> float32 is exact for these sizes, so this is it
    return (
        ""
        if torch.equal(y, exact.to(torch.float32).to(case.dtype))
        else f"integer sums of {tokens} tokens are not exact"
    )


def check_errors(problem: Problem, tokens: list[int]) -> list[Answer]:
    """Random x of every number of tokens; one answer each."""
    case = problem.case
    made = torch.Generator(device=case.device).manual_seed(case.seed + 2)
    x = torch.randn(sum(tokens), case.k, generator=made, device=case.device).to(case.dtype)
    wide = problem.decoded(torch.float64)
    exact = x.double() @ wide.T
    errors = []
    for part, right in zip(x.split(tokens), exact.split(tokens), strict=True):
        size = right.norm() if right.numel() >= _MANY_OUTPUTS else (part.double().abs() @ wide.abs().T).norm()
        both = (problem.run(part), F.linear(part, problem.dense))
        errors.append(torch.stack([(y.double() - right).norm() / size for y in both]))
    answers = []
    for m, (error, torch_error) in zip(tokens, torch.stack(errors).tolist(), strict=True):
        reason = ""
        if not error <= BOUNDS[case.dtype]:  # also when it is NaN
            reason = f"error {error:.2e} above {BOUNDS[case.dtype]:.0e}"
        elif case.dtype != torch.float32 and m * case.n >= _MANY_OUTPUTS and error > _RATIO * torch_error:
            reason = f"error {error:.2e} above {_RATIO} x torch's {torch_error:.2e}"
        answers.append(Answer(m, error, torch_error, reason))
    return answers


def specs(bits: int, groups: tuple[int, ...], vectors: bool = True) -> list[QuantSpec]:
    """Custom-table specs of every group size, scalar and (where the group is even) of pairs."""
    scalar = [QuantSpec(bits, group, CUSTOM_TABLE) for group in groups]
    pairs = [QuantSpec(bits, group, CUSTOM_TABLE, 2) for group in groups if group % 2 == 0 or group == -1]
    return scalar + (pairs if vectors else [])
