"""Perplexity by its definition, and the protocol around it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build

from flute.errors import FluteError
from flute.evaluate.perplexity import context_length, encode, perplexity
from flute.evaluate.speed import generate

TOKENS = torch.randint(3, 97, (150,), generator=torch.Generator().manual_seed(0)).tolist()


class Fixed(torch.nn.Module):
    """A model that gives the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.device, self.dtype = logits, torch.device("cpu"), torch.float32
        self.seen: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))


def test_a_model_that_knows_nothing() -> None:
    found = perplexity(Fixed(torch.zeros(97)), TOKENS, seq_len=50)
    assert found.perplexity == pytest.approx(97, rel=1e-6)
    assert (found.tokens, found.windows, found.seq_len) == (3 * 49, 3, 50)


def test_is_the_definition() -> None:
    model = build("Llama")
    total, count = 0.0, 0
    for start in (0, 64):
        ids = torch.tensor(TOKENS[start : start + 64])
        logits = model(ids[None]).logits[0].detach().double().log_softmax(-1)
        total -= float(logits[:-1].gather(1, ids[1:, None]).sum())
        count += 63
    found = perplexity(model, TOKENS, seq_len=64)
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_windows_do_not_overlap_and_the_rest_is_dropped() -> None:
    model = Fixed(torch.zeros(97))
    perplexity(model, TOKENS, seq_len=40)
    assert model.seen == [TOKENS[0:40], TOKENS[40:80], TOKENS[80:120]]


def test_only_the_first_windows() -> None:
    calls: list[tuple[int, int]] = []
    found = perplexity(
        Fixed(torch.zeros(97)), TOKENS, seq_len=40, max_windows=2, progress=lambda *call: calls.append(call)
    )
    assert found.windows == 2 and calls == [(1, 2), (2, 2)]


def test_a_short_text_is_one_window() -> None:
    found = perplexity(Fixed(torch.zeros(97)), TOKENS[:10], seq_len=2048)
    assert (found.tokens, found.windows, found.seq_len) == (9, 1, 10)


def test_long_windows_are_summed_in_slices() -> None:
    torch.manual_seed(0)
    logits = torch.randn(97)
    tokens = TOKENS * 5
    expected = -sum(float(logits.double().log_softmax(-1)[t]) for t in tokens[1:]) / (len(tokens) - 1)
    found = perplexity(Fixed(logits), tokens, seq_len=len(tokens))
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


@pytest.mark.parametrize(("tokens", "seq_len"), [([], 8), ([5], 8), (TOKENS, 1)])
def test_nothing_to_predict(tokens: list[int], seq_len: int) -> None:
    with pytest.raises(FluteError, match="nothing to predict"):
        perplexity(Fixed(torch.zeros(97)), tokens, seq_len=seq_len)


def test_nan_is_an_error_and_not_a_figure() -> None:
    with pytest.raises(FluteError, match="NaN"):
        perplexity(Fixed(torch.full((97,), math.nan)), TOKENS, seq_len=50)


def test_hopeless_is_infinite() -> None:
    logits = torch.full((97,), -1e9)
    logits[0] = 0
    assert perplexity(Fixed(logits), TOKENS, seq_len=50).perplexity == math.inf


def test_context_length_is_the_models() -> None:
    model = build("Llama")
    assert context_length(model, 2048) == 64
    assert context_length(model, 32) == 32


class Letters:
    """A tokenizer: one token a letter, BOS in front."""

    pad_token_id, eos_token_id = None, 2

    def __call__(self, text: str, **options: Any) -> Any:
        ids = [1, *(3 + ord(letter) % 90 for letter in text)]
        made = {"input_ids": torch.tensor([ids]) if "return_tensors" in options else ids}
        return made

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(map(str, ids.tolist()))


def test_encode_adds_what_the_tokenizer_adds() -> None:
    assert encode(Letters(), "ab") == [1, 3 + 97 % 90, 3 + 98 % 90]


def test_generate_is_greedy_and_repeatable() -> None:
    model = build("Llama")
    one, two = (generate(model, Letters(), "ab", 12, stop_early=False) for _ in range(2))
    assert one.tokens == 12 and one.text == two.text
    assert one.tokens_per_second == pytest.approx(12 / one.seconds)
    ids = torch.tensor([[1, 10, 11]])
    first = int(model(ids).logits[0, -1].argmax())
    assert one.text.split()[0] == str(first)
