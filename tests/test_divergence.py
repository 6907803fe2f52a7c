"""KL divergence and agreement: exact in small cases, the definition in a model."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build

from flute.errors import FluteError
from flute.evaluate.divergence import compare_logits, divergence
from flute.evaluate.perplexity import perplexity

TOKENS = torch.randint(3, 97, (150,), generator=torch.Generator().manual_seed(0)).tolist()


class Fixed(torch.nn.Module):
    """A model that gives the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.device, self.dtype = logits, torch.device("cpu"), torch.float32

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_equal_logits_have_no_divergence() -> None:
    logits = torch.randn(700, 97, generator=torch.Generator().manual_seed(0))
    assert compare_logits(logits, logits) == (0.0, 700)
    assert compare_logits(logits + 3, logits)[0] == pytest.approx(0, abs=1e-3)  # a shift changes no probability


def test_two_classes() -> None:
    """KL(dense || model): the dense model's probabilities are the weights, so the order matters."""
    dense, model = (0.75, 0.25), (0.5, 0.5)
    kl, agreed = compare_logits(log(*model), log(*dense))
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6) and agreed == 1
    assert compare_logits(log(*dense), log(*model))[0] == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert compare_logits(log(0.25, 0.75), log(*dense)) == (pytest.approx(0.5 * math.log(3), rel=1e-6), 0)


def test_excluded_tokens() -> None:
    """What the dense model excludes costs nothing; to exclude what it allows is infinitely bad."""
    assert compare_logits(log(0.5, 0.5), log(1, 0))[0] == pytest.approx(math.log(2), rel=1e-6)
    assert compare_logits(log(1, 0), log(1, 0)) == (0.0, 1)
    assert compare_logits(log(1, 0), log(0.5, 0.5))[0] == math.inf


def test_sums_over_slices() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(600, 31), torch.randn(600, 31)
    p, q = other.double().log_softmax(-1), one.double().log_softmax(-1)
    kl, agreed = compare_logits(one, other)
    assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
    assert agreed == int((one.argmax(-1) == other.argmax(-1)).sum())


def test_of_two_models_is_the_definition() -> None:
    dense, model = build("Llama"), build("Llama")
    with torch.no_grad():
        model.lm_head.weight.add_(0.05 * torch.randn(model.lm_head.weight.shape))
    calls: list[tuple[int, int]] = []
    found = divergence(model, dense, TOKENS, seq_len=64, progress=lambda *call: calls.append(call))
    kl, same = 0.0, 0
    for start in (0, 64):
        ids = torch.tensor(TOKENS[start : start + 64])[None]
        p, q = (one(ids).logits[0, :-1].detach().double().log_softmax(-1) for one in (dense, model))
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert found.kl == pytest.approx(kl / 126, rel=1e-4) and found.kl > 0
    assert found.agreement == same / 126 < 1
    for one, result in ((model, found.model), (dense, found.dense)):
        assert result.perplexity == perplexity(one, TOKENS, seq_len=64).perplexity and result.windows == 2
    assert calls == [(1, 2), (2, 2)]


def test_refuses() -> None:
    with pytest.raises(FluteError, match="97 tokens in its vocabulary, the other 96"):
        divergence(Fixed(torch.zeros(97)), Fixed(torch.zeros(96)), [i % 90 for i in TOKENS], seq_len=50)
    with pytest.raises(FluteError, match="NaN"):
        divergence(Fixed(torch.full((97,), math.nan)), Fixed(torch.zeros(97)), TOKENS, seq_len=50)
    with pytest.raises(FluteError, match="nothing to predict"):
        divergence(Fixed(torch.zeros(97)), Fixed(torch.zeros(97)), [5])
