"""`flute eval`: against the dense model on a text, and on a task of lm-eval, with the quantized embedded model."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from test_cli import flute

from flute.checkpoint import streaming
from flute.checkpoint.plan import make_plan
from flute.commands import flat_published
from flute.config import ModelSpec
from flute.errors import FluteError
from flute.evaluate import tasks
from flute.evaluate.divergence import divergence
from flute.evaluate.perplexity import encode, perplexity
from flute.integrations import folders
from flute.linear import LutLinear
from flute.spec import QuantSpec

WINDOWS = ("--seq-len", "128", "--windows", "2")
# the task: which of two words comes next; two where the dense model is wrong keep the score from being 1
QUESTIONS = (
    ("def f(self, x):\n    return", (" x", " zebra"), 0),
    ("for i in", (" purple", " range"), 1),
    ("import", (" quietly", " os"), 1),
    ("if x is not", (" None", " river"), 0),
    ("return", (" None", " zebra"), 1),
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, record = tmp_path_factory.mktemp("evaluate") / "nf3", ModelSpec(QuantSpec(3, 64, "nf3"))
    streaming.run(make_plan(folders.embedded(), folders.architecture(folders.embedded(), record), record), out)
    return out


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": q, "choices": choices, "label": label} for q, choices, label in QUESTIONS]
    (folder / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "next.yaml").write_text(
        f"""
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "next.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    return folder


def test_against(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = folders.embedded() / "heldout.txt"
    options = ("eval", quantized, "--text", text, *WINDOWS, "--against", "tiny", "-o", tmp_path / "figures.json")
    code, out, err = flute(*options, "--json", capsys=capsys)
    figures = json.loads(out)
    assert code == 0, err
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    (model, tokenizer), (dense, _) = (
        folders.load(found, dtype=torch.float32) for found in (folders.Found(quantized), folders.find("tiny"))
    )
    found = divergence(model, dense, encode(tokenizer, text.read_text()), seq_len=128, max_windows=2)
    assert (figures["kl"], figures["agreement"]) == (found.kl, found.agreement)
    assert (figures["perplexity"], figures["dense_perplexity"]) == (found.model.perplexity, found.dense.perplexity)
    assert 0 < found.kl < 0.5 < found.agreement < 1
    code, out, _ = flute(*options, capsys=capsys)
    assert f"dense perplexity {found.dense.perplexity:.4f}; KL divergence {found.kl:.5f} nats" in out


@pytest.mark.parametrize("seq_len", [32, 256], ids=["the kernel for few tokens", "for many"])
def test_kernels_agree_with_decoded_weights(seq_len: int, quantized: Path) -> None:
    model, tokenizer = folders.load(folders.Found(quantized), dtype=torch.float32)
    dense, _ = folders.load(folders.find("tiny"), dtype=torch.float32)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LutLinear)}
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    tokens = encode(tokenizer, (folders.embedded() / "heldout.txt").read_text())
    found, expected = (perplexity(one, tokens, seq_len=seq_len, max_windows=2).perplexity for one in (model, dense))
    assert len(layers) == 56 and found == pytest.approx(expected, rel=1e-3)


def test_a_task_of_ones_own(quantized: Path, task_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval's accuracy with the quantized model is that of its own log-likelihoods."""
    pytest.importorskip("lm_eval")
    arguments = ("eval", quantized, "--tasks", "next_word", "--task-dir", task_dir)
    code, out, err = flute(*arguments, "--json", "--quiet", capsys=capsys)
    assert code == 0, err
    figures = json.loads(out)
    model, tokenizer = folders.load(folders.Found(quantized), dtype=torch.float32)
    right = 0
    for question, choices, label in QUESTIONS:
        scores = []
        for choice in choices:
            ids, start = encode(tokenizer, question + choice), len(encode(tokenizer, question))
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[i]].detach()) for i in range(start, len(ids))))
        right += scores.index(max(scores)) == label
    assert 0 < right < len(QUESTIONS)
    task = figures["tasks"]["next_word"]
    assert task["metrics"]["acc"]["value"] == pytest.approx(right / len(QUESTIONS)) and task["shots"] == 0
    assert task["examples"] == len(QUESTIONS) and figures["lm_eval"] and "perplexity" not in figures
    code, out, _ = flute(*arguments, "--limit", 2, capsys=capsys)
    row = next(line.split() for line in out.splitlines() if "next_word" in line)
    assert code == 0 and row[:4] == ["next_word", "0", "2", "acc"]


def test_what_lm_eval_cannot_do_is_one_line(task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    text = (task_dir / "next.yaml").read_text()
    (task_dir / "next.yaml").write_text(text.replace("next.jsonl", "gone.jsonl"))
    model, tokenizer = folders.load(folders.find("tiny"), dtype=torch.float32)
    with pytest.raises(FluteError, match=r"lm-eval stopped: .*gone\.jsonl"):
        tasks.run_tasks(model, tokenizer, ["next_word"], task_dir=task_dir)
    with pytest.raises(FluteError, match="is not a folder"):
        tasks.run_tasks(model, tokenizer, ["next_word"], task_dir=task_dir / "nowhere")


def test_an_unknown_task_is_one_line(task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    # lm-eval's own fourteen thousand take it 15 seconds to read
    own = manager(include_path=str(task_dir), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: own)
    with pytest.raises(FluteError, match=r"no task nonsense and .*tasks has none of that name"):
        tasks.run_tasks(None, None, ["next_word", "nonsense"], task_dir=task_dir)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --text FILE, or --tasks"),
        (["--against", "tiny"], "give --text FILE, or --tasks"),
        (["--tasks", "piqa", "--against", "tiny"], "--against compares on a text"),
    ],
)
def test_nothing_to_evaluate_on(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = flute("eval", "tiny", *options, capsys=capsys)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1


def test_the_published_benchmark(task_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dense model and a FlatQuant checkpoint, its integer layers in use, in one table."""
    pytest.importorskip("lm_eval")
    from flute.flatquant.matrices import Matrices
    from flute.flatquant.spec import PRESETS
    from flute.integrations.flatquant import mark_flat
    from flute.methods.flatquant import apply

    main = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "benchmark_lm_eval.py"))["main"]
    flags = ["--lm_eval_batch_size", "4", "--tasks", "next_word", "--task_dir", str(task_dir)]
    flags += ["--output_dir", str(tmp_path / "outputs")]
    assert main(flags) == 1 and "--quantized_save" in capsys.readouterr().err
    out = tmp_path / "outputs" / "tiny" / "w4a4" / "exp" / "quantized"
    model, tokenizer = folders.load(folders.find("tiny"), dtype=torch.float32)
    apply(model, PRESETS["w8a8"], [Matrices()] * 8)
    mark_flat(model, PRESETS["w8a8"])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    assert main([*flags, "--model", "tiny"]) == 0
    table = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    (wanted,) = tasks.run_tasks(model, tokenizer, ["next_word"], task_dir=task_dir, quiet=True)
    assert table["model"] == ["next_word", "mean"] and "tiny" in table
    assert table[str(out)] == 2 * [f"{100 * tasks.accuracy(wanted):.2f}"]


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = flute("eval", "tiny", "--tasks", "piqa", capsys=capsys)
    assert code == 1 and "flute-engine[eval]" in err
    published = ["--model", "tiny", "--lm_eval", "--cali_dataset", "nowhere", "--output_dir", str(tmp_path)]
    assert flat_published.main(published) == 1  # before anything is read or calibrated
    assert "flute-engine[eval]" in capsys.readouterr().err


def test_the_accuracy_of_papers() -> None:
    both = tasks.TaskScores("t", 0, 9, {"acc": (0.5, None), "acc_norm": (0.6, 0.1)})
    assert tasks.accuracy(both) == 0.6
    assert tasks.accuracy(tasks.TaskScores("t", 0, 9, {"acc": (0.5, None)})) == 0.5
    with pytest.raises(FluteError, match="has no accuracy but word_perplexity"):
        tasks.accuracy(tasks.TaskScores("t", 0, 9, {"word_perplexity": (30.0, None)}))
