"""`flute bench model`: a decode step and a prefill are the model's own; what is measured, written and left out."""

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import flute
from transformers import AutoConfig

from benchmarks import benchmark_model
from flute.bench import caches, decoder, model, results, shapes
from flute.bench.model import ModelRow, Plan
from flute.flatquant.modules import IntLinear
from flute.integrations.attention import ATTENTION
from flute.integrations.flatblocks import int4_cache
from flute.linear import LutLinear
from flute.quantize import quantize
from flute.spec import QuantSpec


def test_a_config_by_name_is_the_real_one() -> None:
    config = model.load_config("llama-3.1-8b")
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("llama", 32, 128256)
    assert config.rope_parameters["rope_type"] == "llama3" and config.rope_parameters["rope_theta"] == 5e5
    for name in shapes.MODELS:
        made = model.load_config(name)
        assert made.hidden_size == shapes.MODELS[name].hidden_size
        assert made.head_dim == shapes.MODELS[name].head_dim


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a Llama of two layers."""
    folder = tmp_path_factory.mktemp("bench") / "small"
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def small_plan(small: Path, **changes: Any) -> Plan:
    values: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "compiled": False, "steps": 2, "group_size": 32}
    return Plan(str(small), **values | changes)


def stepped(made: Any, prompt: torch.Tensor, attention: bool = False) -> tuple[Any, torch.Tensor]:
    """The decoder after six steps behind ``prompt`` (2, 5), and the last token of it and those that came (2, 7)."""
    decoder.share_layer_step(made, compiled=False, attention=attention)
    steps = decoder.Decoder(made, 2, 4, room=8)
    decoder.set_length(steps.cache, 0)
    made(prompt[:, :4], past_key_values=steps.cache, use_cache=True)
    steps.tokens.copy_(prompt[:, 4:])
    seen = [steps.tokens.clone()]
    for _ in range(6):
        steps.step()
        seen.append(steps.tokens.clone())
    return steps, torch.cat(seen, 1)


@pytest.mark.parametrize("method", ["dense", "nf4", "nf4+attention"])
def test_a_decode_step_is_the_models_own(small: Path, method: str) -> None:
    """The shared step writes the cache and computes what transformers does, token by token."""
    made = model.build(small_plan(small), method)
    assert any(isinstance(module, LutLinear) for module in made.modules()) == (method != "dense")
    prompt = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = made.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        steps, seen = stepped(made, prompt, method.endswith("+attention"))
    assert (made.config._attn_implementation == ATTENTION) == method.endswith("+attention")
    assert torch.equal(seen, expected[:, 4:])
    assert [int(layer.cumulative_length) for layer in steps.cache.layers] == [10, 10]
    with torch.inference_mode():
        steps.rewind()
    assert [int(layer.cumulative_length) for layer in steps.cache.layers] == [4, 4]


@torch.inference_mode()
def test_a_flatquant_step_is_the_models_own(small: Path) -> None:
    """Codes of random integers, appended and read as `Int4Cache` does it, token by token."""
    made = model.build(small_plan(small), "flatquant")
    assert sum(isinstance(part, IntLinear) for part in made.modules()) == 2 * 7
    made.set_attn_implementation(ATTENTION)
    prompt = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = made.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
        past_key_values=int4_cache(made, 16),
    )  # fmt: skip
    steps, seen = stepped(made, prompt)
    assert torch.equal(seen, expected[:, 4:]) and len(set(expected.flatten().tolist())) > 4
    assert int(steps.cache.get_seq_length()) == 10
    steps.rewind()
    assert int(steps.cache.get_seq_length()) == 4


@pytest.mark.parametrize("method", ["dense", "flatquant", "flatquant-w8a8"])
@torch.inference_mode()
def test_a_prefill_is_the_models_own(small: Path, method: str) -> None:
    made, prompt = model.build(small_plan(small), method), torch.randint(0, 50, (2, 9))
    wanted = made(prompt, use_cache=False).logits
    decoder.share_layer_step(made, compiled=False)
    for length in (9, 12):  # a cache that the prompt fills, and a longer one
        cache = caches.empty_cache(made, 2, length)
        assert torch.allclose(made(prompt, past_key_values=cache, use_cache=True).logits, wanted, atol=1e-4)


def test_flatquant_is_measured_beside_dense(small: Path) -> None:
    methods = ["dense", "flatquant", "flatquant-w8a8"]
    dense, four, eight = model.measure(small_plan(small, methods=methods, batches=(2,), prompts=(5,)))
    assert four.decode_speedup == pytest.approx(dense.decode_ms / four.decode_ms) and four.prefill_ms > 0
    assert dense.cache_gb == eight.cache_gb == 2 * 2 * 2 * 2 * 9 * 16 * 4 / 1e9  # layers, k and v, ..., float32
    assert four.cache_gb == pytest.approx(dense.cache_gb * (8 + 4) / 64)
    assert four.weight_gb < eight.weight_gb < dense.weight_gb


def test_the_published_benchmark(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--random_mode --batch_size 2 --prefill_seq_len 5 --decode_steps 2 --dtype float32 --device cpu"
    benchmark_model.main([*flags.split(), "--model", str(small), "--output", str(tmp_path / "m.csv")])
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["2"]]
    assert [line[1] for line in printed] == ["prefill", "decode", "both"]
    _, (dense, flat) = results.read_rows(tmp_path / "m.csv", ModelRow)
    assert (dense.method, flat.method, flat.prompt) == ("dense", "flatquant-w4a4kv4", 5)
    assert float(printed[0][-1]) == pytest.approx(dense.prefill_ms / flat.prefill_ms, rel=0.02, abs=0.01)


def test_the_head_is_quantized_when_asked(small: Path) -> None:
    assert not isinstance(model.build(small_plan(small), "nf3").lm_head, LutLinear)
    made = model.build(small_plan(small), "nf3+head")
    assert isinstance(made.lm_head, LutLinear) and made.lm_head.spec == QuantSpec(3, 32, "nf3")
    random = model.build(small_plan(small), "dense").lm_head.weight  # the same seed, so the same weights
    codes = quantize(random, made.lm_head.spec, scale_dtype=torch.float32).codes
    assert torch.equal(quantize(made.lm_head.dequantize(), made.lm_head.spec, scale_dtype=torch.float32).codes, codes)


def test_bench_model_end_to_end(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = flute(
        "bench", "model", "--config", small, "--device", "cpu", "--dtype", "float32", "--no-compile", "--steps", 2,
        "--methods", "dense,nf2", "--batch", "1,3", "--prompts", "1,6", "--prefill-tokens", 12, "--group-size", 32,
        "-o", tmp_path, "--plot", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[-1] == f"written: {tmp_path / 'model.csv'}, {tmp_path / 'model.png'}"
    assert "prefill of more than 12 tokens left out" in err
    lines = (tmp_path / "model.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines[1:]))
    assert lines[0].startswith("# ") and list(rows[0]) == [field.name for field in fields(ModelRow)]
    assert [(row["method"], row["batch"], row["prompt"]) for row in rows] == [
        (method, batch, prompt) for method in ("dense", "nf2") for batch in "13" for prompt in "16"
    ]
    for row in rows:
        per_second = 1e3 * int(row["batch"]) / float(row["decode_ms"])
        assert float(row["decode_tokens_per_s"]) == pytest.approx(per_second, rel=1e-2)
        assert (row["prefill_ms"] == "") == (row["batch"] == "3" and row["prompt"] == "6")
    ratio = float(rows[0]["decode_ms"]) / float(rows[4]["decode_ms"])
    assert float(rows[4]["decode_speedup"]) == pytest.approx(ratio, rel=1e-2)
    assert float(rows[4]["weight_gb"]) < float(rows[0]["weight_gb"])
    assert (tmp_path / "model.png").read_bytes()[:4] == b"\x89PNG"


def test_a_missing_bitsandbytes_is_reported(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (row,) = model.measure(small_plan(small, methods=["bitsandbytes"]))
    assert row.note == "not installed; pip install bitsandbytes" and row.decode_ms is None and row.batch == 0


def test_a_model_that_does_not_fit_is_reported(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(plan: Plan, method: str) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    monkeypatch.setattr(model, "build", refuse)
    rows = model.measure(small_plan(small, methods=["dense", "nf4"]))
    assert [row.method for row in rows] == ["dense", "nf4"] and "out of memory" in rows[0].note


def test_small_config_is_read_from_the_file_too(small: Path) -> None:
    assert json.loads((small / "config.json").read_text())["hidden_size"] == 64
    assert model.load_config(str(small)).num_hidden_layers == 2


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_model_on_a_gpu(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled layers, CUDA graphs, the head too."""
    code, _, err = flute(
        "bench", "model", "--config", small, "--methods", "dense,nf4+head+attention,flatquant", "--batch", "1,3",
        "--prompts", "1,9", "--steps", 4, "--group-size", 32, "-o", tmp_path / "m.csv", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    _, rows = results.read_rows(tmp_path / "m.csv", ModelRow)
    assert len(rows) == 12
    for row in rows:
        assert row.note == "" and row.decode_ms > 0 and row.prefill_ms > 0 and row.peak_gb >= row.weight_gb
