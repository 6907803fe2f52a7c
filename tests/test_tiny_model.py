"""The embedded default model: it is small, it loads, it has learned something, and not on its held-out text."""

import importlib.util
import math
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "flute" / "data" / "tiny"
MAX_BYTES = 16_000_000
WINDOW, WINDOWS = 512, 16  # the first part of the held-out text: a few seconds on two cores
MEASURED_PERPLEXITY = 25.893  # of that part, float32 on a CPU

TEXTS = [
    "The with statement",
    "def read(self, size=-1):\n    Read up to size bytes.\n\n\tA tab, trailing blanks   \n",
    "No English: naïve café, 漢字, ∑ 🎼 \x00 <s>",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    """training/corpus.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("tiny_corpus", ROOT / "training" / "corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) < MAX_BYTES


def test_is_a_plain_llama(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = model.config
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("llama", 4096, 256)
    assert config.tie_word_embeddings and len(tokenizer) == config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    assert AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").dtype == torch.float16


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_the_text_back(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_heldout_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text).input_ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in ids.split(4)]
    perplexity = math.exp(sum(losses) / len(losses))
    assert perplexity < MEASURED_PERPLEXITY * 1.02


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_writes_text(sample: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    prompt = tokenizer("This module provides", return_tensors="pt")
    result = model.generate(
        **prompt, max_new_tokens=40, do_sample=sample, output_scores=True, return_dict_in_generate=True
    )
    assert all(torch.isfinite(scores).any() and not scores.isnan().any() for scores in result.scores)
    new = result.sequences[0][prompt.input_ids.shape[1] :]
    assert len(str(tokenizer.decode(new, skip_special_tokens=True)).split()) > 3


def test_position_limit_holds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """It was trained on windows as long as its configuration promises."""
    length = model.config.max_position_embeddings
    ids = torch.tensor(tokenizer((TINY / "heldout.txt").read_text(encoding="utf-8")).input_ids[: 2 * length])
    with torch.no_grad():
        logits = model(input_ids=ids.view(2, length)).logits[:, :-1]
    targets = ids.view(2, length)[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert losses[:, length // 2 :].mean() < losses[:, : length // 2].mean() + 0.5


def test_corpus_does_not_depend_on_the_order_of_documents(corpus: ModuleType) -> None:
    documents = [corpus.Document(f"source:{n}.py", f"Some words, and then number {n}.") for n in range(200)]
    split = corpus.build(documents)
    assert split == corpus.build(documents[::-1])
    assert list(split) == ["heldout", "validation", "train"] and all(split.values())
    assert sum(map(len, split.values())) == len(documents)
    assert corpus.split_of("topic:with") == "train" and corpus.split_of("topic:sequence-types") == "heldout"


def test_corpus_files_come_back(corpus: ModuleType, tmp_path: Path) -> None:
    split = {"train": ["one\n\ntwo", "three"], "validation": ["four"], "heldout": ["five"]}
    corpus.write(split, tmp_path)
    assert {name: corpus.read(tmp_path, name) for name in split} == split
    with pytest.raises(FileNotFoundError, match="build the corpus first"):
        corpus.read(tmp_path / "nowhere", "train")


PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "unittest")


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["packages", "whole"])
def test_corpus_holds_out_what_it_says(whole: bool, corpus: ModuleType) -> None:
    """On the running Python's own text: no distinctive paragraph stands in two splits, or twice in one."""
    library = Path(sysconfig.get_paths()["stdlib"])
    some = [*corpus.topic_documents(), *(one for name in PACKAGES for one in corpus.source_documents(library / name))]
    split = corpus.build(corpus.documents() if whole else some)
    keys = {
        name: [
            corpus.fingerprint(paragraph)
            for text in texts
            for paragraph in text.split(corpus.PARAGRAPH_BREAK)
            if corpus.is_distinctive(paragraph)
        ]
        for name, texts in split.items()
    }
    together = [key for found in keys.values() for key in found]
    assert len(together) == len(set(together))
    assert len(keys["train"]) > 10 * len(keys["heldout"]) > 0
