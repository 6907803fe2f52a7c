"""Benchmarks around calibration, at shapes that a CPU does in seconds."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import flatness_peaks, flatquant_calibration, flatquant_traffic, nfl_blocks, nfl_rates, temperature
from benchmarks.flatquant_calibration import Row, random_folder
from flute.bench.results import read_rows
from flute.evaluate.perplexity import encode, perplexity
from flute.flatquant.spec import PRESETS
from flute.integrations import folders
from flute.integrations.folders import embedded
from flute.spec import QuantSpec


def config() -> AutoConfig:
    return AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=4096, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip


def test_a_random_folder_loads(tmp_path: Path) -> None:
    random_folder(config(), tmp_path, "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    weight = model.model.layers[4].mlp.down_proj.weight
    assert (
        float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        and model.lm_head.weight is model.model.embed_tokens.weight
    )
    assert (model.model.norm.weight == 1).all()


def test_calibration_is_timed_and_projected(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path / "small")
    out = tmp_path / "rows.csv"
    flags = "--layers 3 --nsamples 4 --window 16 --cali_bsz 2 --epoch 2"
    flatquant_calibration.main([str(tmp_path / "small"), *flags.split(), "-o", str(out)])
    origin, (row,) = read_rows(out, Row)
    assert f"benchmarks.flatquant_calibration {tmp_path / 'small'} --layers 3" in origin
    assert (row.model, row.blocks, row.full_blocks, row.arithmetic) == ("small", 3, 5, "float32")
    assert (row.samples, row.window, row.batch, row.epochs, row.gpu_allocated_gb) == (4, 16, 2, 2, None)
    assert 0 < row.step_ms < 1e3 * row.block_seconds / 4 and row.host_gb > 0.1
    assert row.projected_minutes * 60 == pytest.approx(5 * row.block_seconds + row.rest_seconds * 5 / 3, rel=1e-3)


def test_learning_scales_is_timed_and_projected(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path / "small")
    out = tmp_path / "rows.csv"
    nfl_blocks.main([str(tmp_path / "small"), "--layers=3", "--samples=4", "--window=16", "--bits=3", "-o", str(out)])
    origin, (row,) = read_rows(out, nfl_blocks.Row)
    assert f"benchmarks.nfl_blocks {tmp_path / 'small'} --layers=3" in origin
    assert (row.model, row.blocks, row.full_blocks, row.spec) == ("small", 3, 5, str(QuantSpec(3, 64, "nf3")))
    assert row.block_seconds > 0 and row.projected_gb is None
    assert row.projected_minutes * 60 == pytest.approx(5 * row.block_seconds + row.rest_seconds * 5 / 3, rel=1e-3)


def test_first_steps_of_learning_are_compared(tmp_path: Path) -> None:
    random_folder(config(), tmp_path / "small", "cpu")
    out, text = tmp_path / "rates.csv", str(embedded() / "heldout.txt")
    given = [str(tmp_path / "small"), "--calibration", text, "--text", text, "--rates=5e-4,50", "-o", str(out)]
    given += ["--bits=3", "--samples=2", "--window=32", "--epochs=1", "--eval-windows=1", "--eval-length=64"]
    for method in ("gptq+nfl", "gptq"):
        nfl_rates.main([*given, "--method", method])
    _, rows = read_rows(out, nfl_rates.Row)
    assert [(row.method, row.rate) for row in rows] == [("gptq+nfl", 5e-4), ("gptq+nfl", 50.0), ("gptq", None)]
    small, wild, without = rows
    assert small.before == wild.before == wild.after and small.after is not None and small.after <= wild.after
    assert wild.best_step == 0 and without.after is None and without.perplexity == wild.perplexity


def test_a_step_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Products by hand: each weight meets each token forwards and twice backwards."""
    layers = 3 * 2 * (4 * 32) * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    attention = 2 * 2 * (4 * 4) * 32 * 32 * 16
    found = flatquant_traffic.count(config(), PRESETS["w4a4kv4"], 4, 32, amp=False)
    assert layers + attention < found.flop["float32"] < 2 * layers  # transforms of layers as small as these count, too
    config().save_pretrained(tmp_path)
    flatquant_traffic.main([str(tmp_path), "--window", "32", "--amp"])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in printed] == ["float32", "bfloat16", "products", "operators", "launches", "once"]
    assert layers < 1e12 * float(printed[1][0]) < found.flop["float32"]


def test_peaks_of_three_blocks(tmp_path: Path) -> None:
    flags = [
        "--text",
        str(embedded() / "heldout.txt"),
        "--samples",
        "1",
        "--window",
        "32",
        "-o",
        str(tmp_path / "p.csv"),
    ]
    flatness_peaks.main(["tiny", *flags])
    _, rows = read_rows(tmp_path / "p.csv", flatness_peaks.Row)
    assert len(rows) == 3 * 8 and {row.block for row in rows} == {0, 4, 7}
    assert all(row.plain >= 1 and row.hadamard >= 1 for row in rows)
    flattened = [row for row in rows if row.matrix == "down: activations"]
    assert all(row.hadamard < row.plain / 2 for row in flattened)


def test_temperature_of_logits(tmp_path: Path) -> None:
    """At 1 it is the perplexity."""
    text = embedded() / "heldout.txt"
    temperature.main(["tiny", "--text", str(text), "--windows", "2", "--length", "64", "-o", str(tmp_path / "t.csv")])
    _, rows = read_rows(tmp_path / "t.csv", temperature.Row)
    model, tokenizer = folders.load(folders.find("tiny"), dtype=torch.float32)
    truth = perplexity(model, encode(tokenizer, text.read_text()), seq_len=64, max_windows=2).perplexity
    found = {row.temperature: row.perplexity for row in rows}
    assert found[1.0] == pytest.approx(truth, rel=1e-3)
    assert found[1.0] < min(found[0.95], found[1.15])
