"""Other owners' checkpoints: converted, loaded, and compared weight by weight with what their owners' formulas give.

Layers are packed in `foreign` from the published layouts; `test_convert_owners` asks the owners' own libraries.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from foreign import Parts, integers
from safetensors.torch import load_file, save_file
from tiny_models import load, prompt
from torch import nn

from flute import LutLinear, QuantSpec
from flute.errors import CheckpointError, FluteError, IntegrationError
from flute.integrations import folders
from flute.integrations.convert import folder as convert_folder
from flute.integrations.convert import gptq, uniform, upstream
from flute.integrations.convert.exact import Exact, Levels, Stored, represent
from flute.integrations.convert.source import format_of, open_source
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


# ---- what is wrong with a folder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = uniform_layer({}, lambda *a: foreign.gptq(*a, 4), 64, 4, [8])
    return foreign.checkpoint(tmp_path_factory.mktemp("plain") / "gptq", layer, GPTQ, shards=2)


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy whose first shard was changed, index and all."""
    shutil.copytree(source, folder)
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    others = {name: place for name, place in index["weight_map"].items() if place != file.name}
    index["weight_map"] = {**others, **dict.fromkeys(tensors, file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_damaged_checkpoints_are_refused_in_one_line(plain: Path, tmp_path: Path) -> None:
    half = shutil.copytree(plain, tmp_path / "half")
    sorted(half.glob("*.safetensors"))[1].unlink()
    cut = shutil.copytree(plain, tmp_path / "cut")
    file = sorted(cut.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1000])
    name = next(name for name in load_file(sorted(plain.glob("*.safetensors"))[0]) if name.endswith("qzeros"))
    lost = changed(plain, tmp_path / "lost", lambda tensors: tensors.pop(name))
    other = changed(plain, tmp_path / "other", lambda tensors: tensors.update({"model.x.weight": torch.ones(3)}))
    wrong = changed(plain, tmp_path / "wrong", lambda tensors: tensors.update({name: tensors[name][:1, :1]}))
    for folder, said in [
        (half, "00002-of-00002.safetensors is missing"),
        (cut, "its header promises"),
        (lost, rf"GPTQ v1 4 bit\) has no {name}"),
        (other, r"model\.x\.weight is not part of this model"),
        (wrong, rf"{name.removesuffix('.qzeros')}.*packed integers"),
    ]:
        with pytest.raises(FluteError, match=said) as error:
            run(folder, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "is not quantized; flute quantize takes dense models"),
        ({"quant_method": []}, "which is not read; flute convert takes bitsandbytes"),
        ({"quant_method": "quip"}, "'quip', which is not read; flute convert takes bitsandbytes, gptq"),
        ({"quant_method": "flute"}, "a checkpoint of flute already"),
        ({**GPTQ, "bits": 5}, "GPTQ with bits=5"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}, "'gemv' with 4 bits is not read"),
        ({**CT, "format": "float-quantized"}, "format='float-quantized' of 'a' is not read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits is not read"),
        ({"quant_method": "higgs", "bits": 5}, "HIGGS with bits=5"),
    ],
)
def test_formats_that_are_not_read(plain: Path, config: Any, said: str, tmp_path: Path) -> None:
    source = shutil.copytree(plain, tmp_path / "a")
    values = json.loads((source / "config.json").read_text())
    del values["quantization_config"]
    (source / "config.json").write_text(json.dumps(values | ({"quantization_config": config} if config else {})))
    with pytest.raises(FluteError, match=said):
        run(source, tmp_path / "b")
    if config is not None:
        with pytest.raises(IntegrationError, match="leave --tile out"):
            run(source, tmp_path / "b", tile=32)


def test_settings_where_old_versions_wrote_them(plain: Path, tmp_path: Path) -> None:
    source = shutil.copytree(plain, tmp_path / "a")
    values = json.loads((source / "config.json").read_text())
    settings = values.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(values))
    (source / "quantize_config.json").write_text(json.dumps({"bits": settings["bits"], "group_size": 64}))
    zeros = "model.layers.0.mlp.up_proj.bias"
    source = changed(source, tmp_path / "c", lambda tensors: tensors.update({zeros: torch.zeros(192).half()}))
    run(source, tmp_path / "b")
    assert not (tmp_path / "b" / "quantize_config.json").exists()
    assert load(tmp_path / "b").model.layers[0].mlp.up_proj.bias is None


def test_command(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flute.cli import main

    def flute(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code, *capsys.readouterr()

    code, out, err = flute("convert", str(plain), "-o", str(tmp_path / "out"))
    assert not code and not err and "14 layers from GPTQ v1 4 bit, equal to their owner's weights" in out
    assert out.count("int4 4bit g64") == 14 and "model.layers.1.mlp.down_proj" in out
    assert (tmp_path / "out" / "README.md").exists()
    code, out, err = flute("convert", str(plain), "-o", str(tmp_path / "out"))
    assert code == 1 and "exists" in err and err.count("\n") == 1
    code, out, err = flute("convert", str(plain), "-o", str(tmp_path / "out"), "--force", "--json")
    figures = json.loads(out)
    assert figures["from"] == "GPTQ v1 4 bit" and len(figures["layers"]) == 14
    assert figures["layers"][0]["spec"] == QuantSpec(4, 64, "int4").to_dict()


def test_refusals_show_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flute.cli import main

    layer = uniform_layer({}, lambda *a: {**foreign.gptq(*a, 4), ".g_idx": torch.arange(a[0].shape[1]).int() % 2},
                          64, 4, [8])  # fmt: skip
    source = foreign.checkpoint(tmp_path / "a", layer, GPTQ)
    with pytest.raises(SystemExit) as end:
        main(["convert", str(source), "-o", str(tmp_path / "b")])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and err.count("\n") == 1 and "and 10 more" in err
    assert out.count("dense: act-order (desc_act) scatters its groups") == 14


FORMATS: list[tuple[dict[str, Any], Parts]] = [
    (GPTQ, foreign.gptq(*integers(16, 128, 64, 4, [8])[:3], 4)),
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, foreign.awq(*integers(16, 128, 64, 4, [8])[:3])),
    (CT, foreign.compressed(*integers(16, 128, 64, 4, [8])[:3], 4)),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True},
     foreign.nf4_like(torch.randint(16, (16, 128)), torch.rand(32), torch.rand(16), "nf4", 64, "float16")),
    ({"quant_method": "higgs", "bits": 4, "p": 1, "group_size": 64, "tune_metadata": {"layer": {"template_id": 16}}},
     {".weight": foreign.flute_words(torch.randint(16, (128, 128)), 4, 32), ".scales": torch.rand(128, 2).half(),
      ".tables": torch.rand(16).half(), ".tables2": torch.rand(16, 16, 2).half()}),
    ({"quant_method": "hqq"}, foreign.hqq(torch.randint(16, (32, 64)), torch.full((32, 1), 7.5).half(),
                                          torch.rand(32, 1).half(), (16, 128))),
]  # fmt: skip


@pytest.mark.parametrize(("config", "parts"), FORMATS, ids=[config["quant_method"] for config, _ in FORMATS])
def test_tensors_of_another_kind_are_refused_in_one_line(config: dict[str, Any], parts: Parts, tmp_path: Path) -> None:
    """Each tensor of each format: cut, flattened, of another dtype, or not there. Never another library's traceback."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({}, tmp_path / "model.safetensors")
    form = format_of(tmp_path)
    assert isinstance(represent(form.read("layer", parts)), Exact)
    optional = {".g_idx", ".weight_zero_point", ".tables2", ".nbits", ".view_as_float"}
    for part, tensor in parts.items():
        for wrong in (tensor.flatten()[:-1], tensor.flatten()[:1], tensor.double() * 0.3, tensor[None], None):
            tensors = {f"layer{name}": value for name, value in {**parts, part: wrong}.items() if value is not None}
            save_file(tensors, tmp_path / "model.safetensors")
            with open_source(folders.find(str(tmp_path)), tmp_path) as source:
                if part == form.parts[0] and wrong is None:
                    assert not source.layers
                    continue
                try:
                    made = represent(source.read("layer"))
                except FluteError as error:
                    assert "\n" not in str(error) and "'layer'" in str(error)
                    continue
                assert part in optional or isinstance(made, str) or wrong is not None


def test_revisions_of_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import huggingface_hub

    from flute.cli import main

    weights: Weights = {}
    source = zoo(tmp_path / "zoo", weights)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(SystemExit) as end:
        main(["convert", "somebody/Model-FLUTE", "--revision", "nfl_w3g64", "-o", str(tmp_path / "out"), "-q"])
    assert not end.value.code and asked == [("somebody/Model-FLUTE", "nfl_w3g64")]
    assert equal(load(tmp_path / "out"), weights)
