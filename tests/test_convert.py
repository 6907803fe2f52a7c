"""Other owners' checkpoints: converted, loaded, and compared weight by weight with what their owners' formulas give.

Layers are packed in `foreign` from the published layouts; `test_convert_owners` asks the owners' own libraries.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from foreign import Parts, integers
from tiny_models import load, prompt
from torch import nn

from flute import LutLinear, QuantSpec
from flute.errors import CheckpointError
from flute.integrations import folders
from flute.integrations.convert import folder as convert_folder
from flute.integrations.convert import gptq, uniform, upstream
from flute.integrations.convert.exact import Exact, Levels, Stored, represent
from flute.integrations.convert.source import open_source
from flute.tables import named_table

Weights = dict[str, torch.Tensor]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
SYMMETRIC = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {"weights": SYMMETRIC}}}


def run(source: Path, out: Path, *, tile: int | None = None, **options: Any) -> Any:
    """What `flute convert` does, without the command line."""
    with open_source(folders.find(str(source)), out.parent, tile=tile) as opened:
        return convert_folder.convert(opened, out, **options)


def uniform_layer(weights: Weights, pack: Callable[..., Parts], group: int, bits: int, zeros: Any) -> Any:
    """For `foreign.checkpoint`: random integers in place of each layer, whose weights it notes."""

    def layer(name: str, linear: nn.Linear) -> Parts:
        q, z, s, weights[name] = integers(*linear.weight.shape, group, bits, zeros)
        return pack(q, z, s)

    return layer


def equal(model: Any, weights: Weights) -> bool:
    """Whether each layer of a loaded model is quantized and decodes to these weights."""
    layers = {name: model.get_submodule(name) for name in weights}
    assert all(isinstance(layer, LutLinear) for layer in layers.values())
    return all(torch.equal(layer.dequantize(), weights[name]) for name, layer in layers.items())


@pytest.mark.parametrize(
    ("pack", "config", "bits", "group", "zeros", "spec"),
    [
        (lambda *a: foreign.gptq(*a, 4), GPTQ, 4, 64, [8], QuantSpec(4, 64, "int4")),
        (lambda *a: foreign.gptq(*a, 4, v1=False), {**GPTQ, "checkpoint_format": "gptq_v2"}, 4, 64, [8],
         QuantSpec(4, 64, "int4")),
        (lambda *a: foreign.gptq(*a, 3), {**GPTQ, "bits": 3}, 3, 64, [4], QuantSpec(3, 64, "int3")),
        (lambda *a: foreign.gptq(*a, 2), {**GPTQ, "bits": 2}, 2, 64, [1], QuantSpec(2, 64, "custom")),
        (lambda *a: foreign.gptq(*a, 3), {**GPTQ, "bits": 3}, 3, 32, range(1, 8), QuantSpec(4, 32, "int4")),
        (lambda *a: foreign.gptq(*a, 2), {**GPTQ, "bits": 2}, 2, 32, range(1, 4), QuantSpec(3, 32, "int3")),
        (foreign.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, 4, 32, [5],
         QuantSpec(4, 32, "custom")),
        (lambda q, z, s: foreign.compressed(q, None, s, 4), CT, 4, 32, [8], QuantSpec(4, 32, "int4")),
        (lambda q, z, s: foreign.compressed(q, None, s, 3), CT, 3, 64, [4], QuantSpec(3, 64, "int3")),
        (lambda *a: foreign.compressed(*a, 2), CT, 2, 32, range(4), QuantSpec(3, 32, "int3")),
    ],
)  # fmt: skip
def test_integers_with_zero_points(
    pack: Any, config: dict[str, Any], bits: int, group: int, zeros: Any, spec: QuantSpec, tmp_path: Path
) -> None:
    weights: Weights = {}
    layer = uniform_layer(weights, pack, group, bits, list(zeros))
    # act-order settings are a matter of g_idx, not of what the config says
    config = {**config, "group_size": group, "desc_act": True}
    source = foreign.checkpoint(tmp_path / "a", layer, config, shards=3, num_hidden_layers=1)
    made = run(source, tmp_path / "b")
    assert {layer.spec for layer in made.layers} == {spec} and not any(layer.rounded for layer in made.layers)
    model = load(tmp_path / "b")
    assert model.dtype == torch.float16 and len(weights) == 7 and equal(model, weights)
    assert torch.isfinite(model(prompt()).logits).all()
    assert not (tmp_path / "b.partial").exists()


ASYMMETRIC = [
    (foreign.awq, {"quant_method": "awq", "bits": 4, "group_size": 64}, list(range(16))),
    (lambda *a: foreign.gptq(*a, 4), GPTQ, list(range(1, 16))),
    (lambda *a: foreign.compressed(*a, 4), CT, [3, 8, 14]),
]


@pytest.mark.parametrize(("pack", "config", "zeros"), ASYMMETRIC, ids=["awq", "gptq", "compressed-tensors"])
def test_a_zero_point_for_each_group_at_4_bits(
    pack: Any, config: dict[str, Any], zeros: list[int], tmp_path: Path
) -> None:
    weights: Weights = {}
    layer = uniform_layer(weights, pack, 64, 4, zeros)
    source = foreign.checkpoint(tmp_path / "a", layer, config, num_hidden_layers=1)
    made = run(source, tmp_path / "b")
    assert {layer.spec for layer in made.layers} == {QuantSpec(4, 64, "int4", zero_points=True)}
    assert not any(layer.rounded for layer in made.layers)
    model = load(tmp_path / "b")
    assert len(weights) == 7 and equal(model, weights)
    dense = load(tmp_path / "b").dequantize()
    expected = dense(prompt()).logits
    assert (model(prompt()).logits - expected).norm() < 0.01 * expected.norm()
    model.save_pretrained(tmp_path / "again")
    assert equal(load(tmp_path / "again"), weights)


def test_what_is_not_exact_is_refused_by_name_or_kept_dense(tmp_path: Path) -> None:
    weights: Weights = {}
    varied = "model.layers.1.mlp.up_proj"

    def layer(name: str, linear: nn.Linear) -> Parts:
        q, z, s, weights[name] = integers(*linear.weight.shape, 64, 4, [8])
        if name == varied:  # act-order: groups scattered over the inputs
            scattered = torch.arange(q.shape[1]) % z.shape[1]
            weights[name] = (q - 8).half() * s[:, scattered]
            return {**foreign.gptq(q, z, s, 4), ".g_idx": scattered.int()}
        return foreign.gptq(q, z, s, 4)

    source = foreign.checkpoint(tmp_path / "a", layer, GPTQ)
    with pytest.raises(CheckpointError, match=rf"1 of 14 layers.*--dense-fallback.*act-order.*\({varied}\)"):
        run(source, tmp_path / "b")
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.partial").exists()
    made = run(source, tmp_path / "b", dense_fallback=True)
    assert [layer.name for layer in made.layers if layer.spec is None] == [varied]
    model = load(tmp_path / "b")
    assert torch.equal(model.get_submodule(varied).weight, weights.pop(varied)) and equal(model, weights)


def test_act_order() -> None:
    q, z, s, _ = integers(16, 128, 32, 4, [8])
    parts = foreign.gptq(q, z, s, 4)
    order = torch.tensor([2, 0, 3, 1])  # static groups: runs of inputs, whose scales lie in another order
    moved = {**parts, ".g_idx": order[parts[".g_idx"].long()].int()}
    found = gptq.stored(moved, 4, 32, v1=True)
    made = represent(found)
    assert torch.equal(found.weight, s[:, order].repeat_interleave(32, 1) * (q - 8))
    assert isinstance(made, Exact) and torch.equal(made.scales, s[:, order])
    scattered = torch.randperm(128) // 32
    found = gptq.stored({**parts, ".g_idx": scattered.int()}, 4, 32, v1=True)
    assert torch.equal(found.weight, s[:, scattered] * (q - 8)) and found.levels is None
    assert "act-order" in str(represent(found))
    with pytest.raises(CheckpointError, match="g_idx"):
        gptq.stored({**parts, ".g_idx": parts[".g_idx"] + 1}, 4, 32, v1=True)


def test_overflowed_zero_points_of_gptq_v1() -> None:
    q, z, s, _ = integers(16, 128, 32, 4, [8])
    parts = foreign.gptq(q, z.index_fill(0, torch.tensor([3]), 16), s, 4)
    assert "4 of its zero points have overflowed" in str(represent(gptq.stored(parts, 4, 32, v1=True)))


def test_no_format_is_trusted() -> None:
    levels = Levels(torch.randint(16, (8, 64)), named_table("nf4"), torch.rand(8, 2).half(), 32, 4)
    weight = (named_table("nf4")[levels.codes] * levels.scales.float().repeat_interleave(32, 1)).half()
    made = represent(Stored(weight, levels))
    assert isinstance(made, Exact) and made.spec == QuantSpec(4, 32, "nf4")
    assert torch.equal(made.decoded(torch.float16), weight)
    weight[3, 5] += 1
    assert "1 of 512 weights" in str(represent(Stored(weight, levels)))
    assert "NaN" in str(represent(Stored(weight, levels._replace(scales=levels.scales / 0))))


def test_blocks_over_the_ends_of_rows() -> None:
    scales = torch.arange(6.0)
    found = uniform.by_row(scales, 4, 96, 64)
    assert isinstance(found, tuple) and found[1] == 32
    assert torch.equal(found[0].repeat_interleave(32, 1).flatten(), scales.repeat_interleave(64))
    assert "run over the ends of rows of 72" in str(uniform.by_row(torch.ones(9), 8, 72, 64))
    with pytest.raises(CheckpointError, match="5 scales"):
        uniform.by_row(torch.ones(5), 4, 96, 64)


# ---- upstream FLUTE and HIGGS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "tile", "rows", "words"),
    [
        (4, 32, 128, {0: (0x1807, 0x3A29), 1: (0x4B3A, 0x6D5C), 31: (0xE5D4, 0x07F6)}),
        (4, 64, 256, {0: (0x2907, 0x6D4B), 1: (0x5C3A, 0x907E), 63: (0x07E5, 0x4B29)}),
        (2, 32, 256, {0: (0xE943, 0xE943), 1: (0x3E94, 0x3E94), 31: (0x943E, 0x943E)}),
        (3, 32, 512, {0: (0x3605, 0x213B), 1: (0xECD8, 0xFC84), 31: (0x816A, 0x4ECD), 32: (0xC84E, 0xEA5F),
                      64: (0x5A97, 0xF360), 95: (0xA5FC, 0x9816)}),
    ],
)  # fmt: skip
def test_words_of_upstream(bits: int, tile: int, rows: int, words: dict[int, tuple[int, int]]) -> None:
    """Words that upstream's packer makes of a formula; the test's own packer and the reader agree with them."""
    n, k = torch.arange(rows).unsqueeze(1), torch.arange(2)
    codes = ({4: 7, 3: 5, 2: 3}[bits] * k + {4: 3, 3: 3, 2: 1}[bits] * n + n // 32) % (1 << bits)
    packed = foreign.flute_words(codes, bits, tile)
    assert {row: tuple((packed[row].int() & 0xFFFF).tolist()) for row in words} == words
    assert torch.equal(upstream.unpack(packed, bits, tile), codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("bits", "tile", "rows"), [(4, 32, 256), (4, 64, 512), (3, 32, 1024), (2, 32, 512), (2, 64, 512)]
)
def test_any_codes_of_upstream(bits: int, tile: int, rows: int) -> None:
    codes = torch.randint(1 << bits, (rows, 6))
    assert torch.equal(upstream.unpack(foreign.flute_words(codes, bits, tile), bits, tile), codes.to(torch.uint8))


def test_tiles_by_template() -> None:
    assert [upstream.tile_of(4, number) for number in (0, 15, 16, 47, 48, 143)] == [64, 64, 32, 32, 64, 32]
    assert [upstream.tile_of(2, number) for number in (0, 3, 4, 11, 12, 35)] == [64, 64, 32, 32, 64, 32]
    assert upstream.tile_of(3, 0) == 32


WIDTHS = {4: 128, 3: 512, 2: 256}  # of which upstream's outputs are multiples, with tile 32


def zoo_layer(weights: Weights, bits: int, tile: int = 32) -> Any:
    table = named_table(f"nf{bits}").half()

    def layer(name: str, linear: nn.Linear) -> Parts:
        rows, width = linear.weight.shape
        codes = torch.randint(1 << bits, (rows, width))
        scales = (0.05 + 0.1 * torch.rand(rows, width // 64)).half()
        weights[name] = (table.double()[codes] * scales.double().repeat_interleave(64, 1)).half()
        pairs = torch.stack(torch.meshgrid(table, table, indexing="ij"), -1).contiguous().view(torch.float32)
        return {
            ".weight": foreign.flute_words(codes, bits, tile), ".scales": scales, ".tables": table, ".tables2": pairs,
        }  # fmt: skip

    return layer


def zoo(folder: Path, weights: Weights, bits: int = 4, tile: int = 32, config: Any = None) -> Path:
    """A checkpoint as in upstream's model zoo."""
    width = WIDTHS[bits] * tile // 32
    sizes = {"hidden_size": width, "intermediate_size": width, "num_key_value_heads": 4, "head_dim": width // 4}
    made = foreign.checkpoint(folder, zoo_layer(weights, bits, tile), None, num_hidden_layers=1, **sizes)
    text = {"num_sms": 108, "num_bits": bits, "group_size": 64} if config is None else config
    (made / "flute_config.json").write_text(json.dumps(text))
    return made


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_model_zoo(bits: int, tmp_path: Path) -> None:
    from flute.integrations.huggingface import from_pretrained

    weights: Weights = {}
    source = zoo(tmp_path / "zoo", weights, bits)
    model = from_pretrained(str(source), example_batch_size=1)
    assert model.dtype == torch.float16 and equal(model, weights)
    run(source, tmp_path / "out")
    assert not (tmp_path / "out" / "flute_config.json").exists()
    assert equal(load(tmp_path / "out"), weights)
    assert torch.equal(load(tmp_path / "out")(prompt()).logits, model(prompt()).logits)


def test_tiles_of_a_zoo_checkpoint(tmp_path: Path) -> None:
    weights: Weights = {}
    newer = {"version": "0.4.2", "num_bits": 4, "group_size": 64}
    source = zoo(tmp_path / "zoo", weights, tile=64, config=newer)
    with pytest.raises(CheckpointError, match=r"no num_sms.*give --tile 32 or --tile 64"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", tile=64)
    assert equal(load(tmp_path / "out"), weights)
    small = zoo(tmp_path / "small", {}, config={**newer, "num_bits": 3})
    with pytest.raises(CheckpointError, match="no upstream kernel has 3 bits and tile 64"):
        run(small, tmp_path / "no", tile=64)
    named = zoo(tmp_path / "named", {})
    with pytest.raises(CheckpointError, match=r"has num_sms, so it was packed with tile 32, not 64.*leave --tile out"):
        run(named, tmp_path / "no", tile=64)
    packed = foreign.flute_words(torch.zeros(128, 2, dtype=torch.int64), 4, 32)
    with pytest.raises(CheckpointError, match=r"tile 64 at 4 bits: its 128 outputs.*multiple of 256.*another tile"):
        upstream.unpack(packed, 4, 64)


@pytest.mark.parametrize(
    ("bits", "vector", "dtype"), [(4, 2, torch.bfloat16), (3, 2, torch.float16), (2, 1, torch.float16)]
)
def test_higgs_of_transformers(bits: int, vector: int, dtype: torch.dtype, tmp_path: Path) -> None:
    from flute.hadamard import transform

    weights: Weights = {}
    grid = torch.randn((1 << bits * vector), vector).to(dtype)
    template, names = {4: 16, 3: 7, 2: 4}[bits], {}

    def layer(name: str, linear: nn.Linear) -> Parts:
        rows, width = linear.weight.shape
        codes = torch.randint(1 << bits * vector, (rows, width // vector))
        scales = (0.05 + 0.1 * torch.rand(rows, width // 64)).to(dtype)
        weights[name] = (grid[codes].flatten(1).double() * scales.double().repeat_interleave(64, 1)).to(dtype)
        halves = codes if vector == 1 else torch.stack((codes >> bits, codes & ((1 << bits) - 1)), -1).flatten(1)
        pairs = grid if vector == 2 else torch.zeros(1 << 2 * bits, 2, dtype=dtype)
        names[name] = {"template_id": template, "num_sms": 108}
        return {
            ".weight": foreign.flute_words(halves, bits, upstream.tile_of(bits, template)),
            ".scales": scales,
            ".tables": grid.flatten()[: 1 << bits],
            ".tables2": pairs.view(torch.float16).view(1 << bits, 1 << bits, 2),  # whatever the bits mean
        }

    config = {"quant_method": "higgs", "bits": bits, "p": vector, "group_size": 64, "hadamard_size": 128}
    config["tune_metadata"] = names
    width = WIDTHS[bits]
    sizes = {"hidden_size": width, "intermediate_size": width, "num_key_value_heads": 4, "head_dim": width // 4}
    source = foreign.checkpoint(tmp_path / "a", layer, config, dtype=dtype, num_hidden_layers=1, **sizes)
    made = run(source, tmp_path / "b")
    assert {layer.spec for layer in made.layers} == {QuantSpec(bits, 64, "custom", vector, 128)}
    model = load(tmp_path / "b")
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).dequantize(), transform(weight, 128))
    assert model.dtype == dtype and torch.isfinite(model(prompt()).logits).all()


def test_higgs_of_unknown_kernels() -> None:
    form = upstream.higgs_format({"tune_metadata": {"a": {"template_id": 10_000}}})
    with pytest.raises(CheckpointError, match="an order of flute's"):
        form.read("a", {})
    with pytest.raises(CheckpointError, match="tile is unknown"):
        form.read("b", {})
    with pytest.raises(CheckpointError, match="HIGGS with bits=4, p=3"):
        upstream.higgs_format({"p": 3})
