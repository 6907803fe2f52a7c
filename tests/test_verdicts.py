"""Measured plans: who may win and who may not, by made-up times and answers."""

from collections.abc import Sequence

import pytest
import torch
from gpus import GPUS
from torch import nn

from flute import QuantSpec
from flute.bench import tuning
from flute.errors import TuneError
from flute.kernels import choice, cuda, layout, reference, tuned

PROBLEM = tuned.Problem(16, 4096, 4096, 4, 64, "float16")
FOUND = choice.contestants(GPUS["H100"], *PROBLEM[:-1])


def decided(times: dict[str, float], right: Sequence[choice.Launch]) -> tuple[tuned.Verdict, list[tuple[int, int]]]:
    """The verdict where launches take these times, others 10; and how many were measured with how many replays."""
    rounds = []

    def measure(some: Sequence[choice.Launch], replays: int) -> list[float]:
        rounds.append((len(some), replays))
        return [times.get(one.label, 10.0) for one in some]

    return tuning.decide(right, FOUND[0], measure), rounds


def test_the_fastest_wins_by_a_margin() -> None:
    right = tuning.shortlist(FOUND, 8)
    verdict, rounds = decided({FOUND[0].label: 9.0, right[7].label: 8.0, right[5].label: 8.5}, right)
    assert verdict == tuned.Verdict(right[7].label, 8.0, 9.0)
    assert [count for count, _ in rounds] == [len(right), 4] and rounds[0][1] < rounds[1][1]
    for close in (9.0, 8.9, 9.0 / 1.0199):  # noise must not move a plan
        verdict, _ = decided({FOUND[0].label: 9.0, right[3].label: close}, right)
        assert verdict == tuned.Verdict(None, 9.0, 9.0)
    assert decided({}, right[:1])[0] == tuned.Verdict(None, 10.0, 10.0)


def test_a_wrong_analytic_choice_cannot_stay() -> None:
    right = FOUND[1:5]
    verdict, _ = decided({FOUND[0].label: 1.0, right[2].label: 9.0}, right)
    assert verdict == tuned.Verdict(right[2].label, 9.0, 9.0)


class PretendedTrial:
    """Answers and times as a test wants them."""

    def __init__(self, problem: tuned.Problem, winner: str, us: float, right: bool = True) -> None:
        self.problem, self.winner, self.us, self.right = problem, winner, us, right
        self.asked: list[int] = []

    def is_right(self, one: choice.Launch, tokens: int) -> bool:
        return self.right or one.label != self.winner

    def times(self, some: Sequence[choice.Launch], replays: int, tokens: int) -> list[float]:
        self.asked.append(tokens)
        return [self.us if one.label == self.winner else 9.0 for one in some]


def test_a_winner_must_win_at_both_ends_of_its_bucket() -> None:
    verdict = tuned.Verdict(FOUND[3].label, 8.0, 9.0)
    for us, right, first in ((8.0, True, 1), (9.5, True, 16), (8.0, False, 16), (float("nan"), True, 16)):
        trial = PretendedTrial(PROBLEM, FOUND[3].label, us, right)
        assert tuning.confirm(verdict, trial, GPUS["H100"]) == verdict._replace(first=first)  # type: ignore[arg-type]
        assert trial.asked == ([9] if right else [])
    trial = PretendedTrial(PROBLEM, FOUND[0].label, 99.0)
    stays = tuned.Verdict(None, 9.0, 9.0)
    assert tuning.confirm(stays, trial, GPUS["H100"]) == stays and not trial.asked  # type: ignore[arg-type]
    unknown = verdict._replace(plan="a plan that is not legal at 9 tokens")
    assert tuning.confirm(unknown, trial, GPUS["H100"]).first == 16  # type: ignore[arg-type]
    trial = PretendedTrial(PROBLEM._replace(m=1), FOUND[0].label, 99.0)
    assert tuning.confirm(verdict, trial, GPUS["H100"]) == verdict and not trial.asked  # type: ignore[arg-type]


def test_a_whole_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the GPU: plain torch answers, and one launch, the fastest, answers wrong."""
    problem = tuned.Problem(16, 96, 256, 4, 64, "float16")
    launches = tuning.shortlist(choice.contestants(GPUS["H100"], *problem[:-1]), 3)
    liar, winner = launches[1].label, launches[2].label

    def weights(n: int, k: int, spec: QuantSpec, dtype: torch.dtype, most: int) -> tuple[list, torch.Tensor]:
        shape = layout.packed_shape(n, k, spec.bits)
        packed = torch.randint(0, 256, shape, dtype=torch.uint8), torch.rand(shape[0], k // 64, 16).to(dtype)
        return [packed, packed], torch.randn(16).to(dtype)

    def answer(
        x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, bias: None, n: int, bits: int,
        group: int, *, forced: choice.Launch,
    ) -> torch.Tensor:  # fmt: skip
        plain = layout.unpack_weight(weight, bits, n, x.shape[1]), layout.unpack_scales(scales, n)
        y = reference.lut_linear(x, *plain, table, bias, bits, group).to(x.dtype)
        return y.flip(0) if forced.label == liar else y

    def compare(*contestants: list, replays: int) -> list[float]:
        assert all(call().shape[1] == 96 for calls in contestants for call in calls)
        return [{liar: 1.0, winner: 5.0}.get(calls[0].args[0].label, 6.0) for calls in contestants]

    monkeypatch.setattr(tuning.timing, "rotating_weights", weights)
    monkeypatch.setattr(tuning.timing, "compare", compare)
    monkeypatch.setattr(cuda, "lut_linear", answer)
    monkeypatch.setattr(cuda, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(cuda, "gpu", lambda device: GPUS["H100"])
    result = tuning._measured(problem, launches, 0)
    assert result.wrong == (liar,) and result.measured == len(launches) and result.analytic == launches[0].label
    assert result.verdict == tuned.Verdict(winner, 5.0, 6.0, 1)


def test_the_shortlist_has_the_best_of_each_kernel() -> None:
    short = tuning.shortlist(FOUND, 5)
    assert short[0] == FOUND[0] and [type(one) for one in short].count(type(FOUND[0])) == 5 and len(short) == 10
    for kernel in {type(one) for one in FOUND}:
        best = sorted((one for one in FOUND if type(one) is kernel), key=lambda one: one.cycles)[:5]
        assert [one for one in short if type(one) is kernel] == best


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("n", "k", "bits", "group"), [(5000, 96, 4, 32), (333, 777, 3, 777), (100, 640, 2, 64)])
def test_a_single_wrong_output_is_noticed(n: int, k: int, bits: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = layout.packed_shape(n, k, bits)
    groups = -(-k // group)
    weight = torch.randint(0, 256, shape, dtype=torch.uint8), torch.rand(shape[0], groups, 16).to(dtype)
    table, x = torch.randn(1 << bits).to(dtype), torch.randn(7, k).to(dtype)
    plain = layout.unpack_weight(weight[0], bits, n, k), layout.unpack_scales(weight[1], n)
    exact = reference.lut_linear(x, *plain, table, None, bits, group)
    is_right = tuning.checker(x, weight, table, tuned.Problem(8, n, k, bits, group, "any"))
    rounded = nn.functional.linear(x.float(), reference.decode(*plain, table, k, bits, group).float()).to(dtype)
    assert is_right(exact.to(dtype)) and is_right(rounded) and is_right(rounded[:3]) and not is_right(rounded[1:4])
    spread = 3 * float(exact.std())
    for row, column in ((0, 0), (6, n - 1), (3, n // 2)):
        for bad in (float("nan"), float("inf"), exact[row, column] + spread, exact[row, column] - spread):
            y = exact.to(dtype)
            y[row, column] = bad
            assert not is_right(y), (row, column, bad)
    assert not is_right(torch.zeros_like(rounded)) and not is_right(rounded * 1.05)


def test_problems_are_distinct_buckets() -> None:
    shapes = [(64, 128), (64, 128), (32, 64)]
    found = tuning.problems(shapes, [1, 3, 4, 700, 1000], QuantSpec(3, -1, "nf3"), torch.bfloat16)
    assert found == [tuned.Problem(m, n, k, 3, k, "bfloat16") for n, k in shapes[1:] for m in (1, 4, 1024)]
    assert found[0].group == 128
    for arguments, message in (
        (([(64, 128)], [1], QuantSpec(4, 48), torch.float16), "group_size=48 at K=128"),
        (([(64, 128)], [1], QuantSpec(), torch.float32), "float32"),
        (([(64, 128)], [0], QuantSpec(), torch.float16), "0 tokens"),
        (([(0, 128)], [1], QuantSpec(), torch.float16), "0x128"),
    ):
        with pytest.raises(TuneError, match=message) as refusal:
            tuning.problems(*arguments)
        assert "\n" not in str(refusal.value)
