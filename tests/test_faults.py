"""Bad input: one FluteError line that names the layer or file and the rule, and nothing half-written.

Bad machines are in test_bad_machine.py, files that mean harm in test_untrusted.py.
"""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import make
from tiny_models import load

from flute import FluteConfig, QuantSpec
from flute.checkpoint.shards import INDEX, read_headers
from flute.cli import main
from flute.config import ModelSpec
from flute.errors import CheckpointError, FluteError, SpecError
from flute.integrations import folders

ROOT = Path(__file__).resolve().parent.parent
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(dense, tmp_path_factory.mktemp("faults") / "quantized")


def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "damaged")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder with one file."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def refused(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and out == "" and len(err.splitlines()) == 1 and err.startswith("flute: error: ")
    return err


def nothing_left(folder: Path) -> bool:
    """No output, no temporary files."""
    return not [path for path in folder.iterdir() if path.name.startswith("out")]


# ---- bad options and bad weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--bits", 5], "use 2, 3 or 4"),
        (["--group-size", 0], "group_size=0"),
        (["--table", "nf9"], "table='nf9'"),
        (["--bits", 3, "--table", "nf4"], "does not have bits=3"),
        (["--table", "missing.json"], "missing.json"),
        (["--scale", "best"], "--scale best"),
        (["--method", "magic"], "--method magic"),
        (["--device", "tpu"], "--device tpu"),
        (["--skip", "model.layers.0"], "names no linear layer"),
        (["--skip", "*"], "no layer is left"),
        (["--override", "*.o_proj=bits:7"], "bits=7"),
        (["--override", "nonsense"], "PATTERN=field:value"),
        (["--override", "*.o_proj=bits:4,table:custom"], "custom"),
    ],
)
def test_bad_options(
    options: list[Any], rule: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rule in refused("quantize", dense, "-o", tmp_path / "out", *options, capsys=capsys)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_name_the_layer(
    bad: float, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copied(dense, tmp_path)
    name = "model.layers.1.mlp.up_proj"
    edit(source, lambda tensors: tensors[f"{name}.weight"][3, 5].fill_(bad))
    line = refused("quantize", source, "-o", tmp_path / "out", capsys=capsys)
    assert name in line and "[3, 5]" in line and nothing_left(tmp_path)
    make(source, tmp_path / "out", ModelSpec(modules_to_not_convert=(name,)))


def test_a_zero_group_decodes_to_zero(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path)
    edit(source, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][7, :32].zero_())
    layer = load(make(source, tmp_path / "out")).model.layers[0].mlp.up_proj
    assert torch.equal(layer.dequantize()[7, :32], torch.zeros(32, dtype=torch.float16))
    assert bool(layer.dequantize()[7, 32:].any()) and bool(torch.isfinite(layer.scales).all())


# ---- damaged sources -------------------------------------------------------------------------------------------------


def test_truncated_anywhere(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path)
    whole = (dense / SINGLE).read_bytes()
    lengths = {0, 1, 7, 8, 9, len(whole) - 1, *range(0, len(whole), len(whole) // 200)}
    for length in sorted(lengths):
        (source / SINGLE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=SINGLE) as refusal:
            make(source, tmp_path / "out")
        assert "\n" not in str(refusal.value)
    (source / SINGLE).write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=f"{len(whole) + 1:,} bytes and its header promises {len(whole):,}"):
        make(source, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_damaged_headers(dense: Path, tmp_path: Path) -> None:
    """Bytes of the header changed at random: refused with our error, or still a header."""
    source, draw = copied(dense, tmp_path), random.Random(0)
    whole = (dense / SINGLE).read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))):
            damaged[draw.randrange(header)] = draw.randrange(256)
        (source / SINGLE).write_bytes(damaged)
        try:
            read_headers(source)
        except CheckpointError as error:
            assert SINGLE in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "command", [["quantize", "-o", "OUT"], ["eval", "--text", "TEXT"], ["generate", "--prompt", "x"]]
)
def test_missing_shard(command: list[str], sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copied(sharded, tmp_path)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    (source / shards[1]).unlink()
    (tmp_path / "text").write_text("x")
    places = {"OUT": str(tmp_path / "out"), "TEXT": str(tmp_path / "text")}
    if command[0] != "quantize":
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = ModelSpec().to_dict()
        (source / "config.json").write_text(json.dumps(config))
    line = refused(command[0], source, *(places.get(word, word) for word in command[1:]), capsys=capsys)
    assert shards[1] in line and nothing_left(tmp_path)


def test_a_layer_without_tensor(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path)
    edit(source, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        make(source, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_quantized_already(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "quantized already" in refused("quantize", quantized, "-o", tmp_path / "out", capsys=capsys)


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def shorter(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()})


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: t.pop(f"{LAYER}.scales"), f"{LAYER}.scales is missing"),
        (lambda t: t.pop(f"{LAYER}.weight"), f"{LAYER}.weight is missing"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({f"{LAYER}.table": torch.ones(16)}), f"{LAYER}.table is not part"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(3)}), "model.layers.9.x is not part"),
        (lambda t: t.update({"lm_head.scales": torch.ones(97, 2)}), "lm_head.scales is not part"),
        (shorter(f"{LAYER}.weight"), f"{LAYER}.weight is U8 (120, 35), expected U8 (120, 36)"),
        (shorter(f"{LAYER}.scales"), f"{LAYER}.scales is F16 (120, 2)"),
        (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].int()}), f"{LAYER}.scales is I32"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].half()}), f"{LAYER}.weight is F16"),
        (lambda t: t.update({"model.norm.weight": torch.ones(71)}), "model.norm.weight is F32 (71,)"),
    ],
)
def test_wrong_tensors(
    change: Callable[[dict[str, torch.Tensor]], Any],
    rule: str,
    quantized: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(quantized, tmp_path)
    edit(folder, change)
    assert rule in refused("inspect", folder, capsys=capsys)
    assert rule in refused("generate", folder, "--prompt", "x", capsys=capsys)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HALF: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "a shard is missing": (lambda folder, shard: (folder / shard).unlink(), "SHARD is missing; download or copy it"),
    "a shard is cut": (
        lambda folder, shard: (folder / shard).write_bytes((folder / shard).read_bytes()[:-9]),
        "SHARD cannot be read: it has",
    ),
    "a shard is empty": (lambda folder, shard: (folder / shard).write_bytes(b""), "SHARD cannot be read: damaged"),
    "a pointer of Git LFS": (lambda folder, shard: (folder / shard).write_bytes(LFS), "SHARD cannot be read: it is"),
    "a shard of other bits": (
        lambda folder, shard: shutil.copy(folder.parent / "other" / shard, folder), "in SHARD is (120, 27) of U8, not",
    ),
    "another shard's content": (
        lambda folder, shard: shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / shard), "is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", HALF)
def test_half_downloaded_and_mixed_shards(damage: str, dense: Path, tmp_path: Path) -> None:
    for name, config in (("damaged", FluteConfig(bits=4)), ("other", FluteConfig(bits=3))):
        load(dense, quantization_config=config).save_pretrained(tmp_path / name, max_shard_size="40KB")
    shard = sorted(path.name for path in (tmp_path / "damaged").glob("*.safetensors"))[1]
    change, words = HALF[damage]
    change(tmp_path / "damaged", shard)
    with pytest.raises(CheckpointError) as refusal:
        load(tmp_path / "damaged")
    assert words.replace("SHARD", shard) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "damaged"))):
        folders.validate(tmp_path / "damaged")


def test_shards_without_their_index(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copied(sharded, tmp_path)
    (source / INDEX).unlink()
    assert "its download is not complete" in refused("quantize", source, "-o", tmp_path / "out", capsys=capsys)


@pytest.mark.parametrize("entries", [15, 17, 8])
def test_tables_of_a_wrong_length(entries: int, dense: Path, tmp_path: Path) -> None:
    config = FluteConfig(QuantSpec(4, 64, "custom"), table_values=torch.linspace(-1, 1, 16))
    load(dense, quantization_config=config).save_pretrained(tmp_path / "damaged")
    edit(tmp_path / "damaged", lambda tensors: tensors.update({f"{LAYER}.table": torch.ones(entries)}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.table.*\({entries},\) of F32, not \(16,\)") as refusal:
        load(tmp_path / "damaged")
    assert "\n" not in str(refusal.value)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.table is F32 \({entries},\), expected .* \(16,\)"):
        folders.validate(tmp_path / "damaged")
    with pytest.raises(SpecError, match=rf"table.*\({entries},\)"):
        load(dense, quantization_config=FluteConfig(config.spec, table_values=torch.ones(entries)))


def test_all_problems_at_once(quantized: Path, tmp_path: Path) -> None:
    folder = copied(quantized, tmp_path)
    edit(folder, lambda t: [t.pop(f"{LAYER}.scales"), t.pop("model.norm.weight"), t.update(extra=torch.ones(2))])
    with pytest.raises(CheckpointError, match="3 problems") as refusal:
        folders.validate(folder)
    assert all(name in str(refusal.value) for name in (f"{LAYER}.scales", "model.norm.weight", "extra"))


@pytest.mark.parametrize(
    "record",
    [
        {"bits": 5}, {"bits": "4"}, {"bits": 4.0}, {"bits": True}, {"bits": None}, {"group_size": 0},
        {"group_size": 2**40}, {"table": "nf3"}, {"table": ["x"]}, {"vector_size": 2}, {"format_version": 2},
        {"surprise": 1}, {"quant_method": "gptq"}, {"overrides": []}, {"overrides": {"a": {"bits": 9}}},
        {"modules_to_not_convert": "x"}, {"modules_to_not_convert": [1]}, {"lm_head": 1},
        {"overrides": {LAYER: {"bits": 3}}}, {"group_size": 16},
        {"lm_head": True, "modules_to_not_convert": []},
    ],
)  # fmt: skip
def test_tampered_record(record: dict[str, Any], quantized: Path, tmp_path: Path) -> None:
    folder = copied(quantized, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(record)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FluteError) as refusal:
        folders.validate(folder)
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": "2"}, {"num_hidden_layers": -1}, {"hidden_size": "72"},
        {"model_type": "nonsense"}, {"model_type": 7}, {"vocab_size": None}, {"num_attention_heads": 0},
    ],
)  # fmt: skip
def test_tampered_config(config: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path)
    values = {**json.loads((source / "config.json").read_text()), **config}
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(FluteError, match=r"config\.json|damaged") as refusal:
        make(source, tmp_path / "out")
    assert "\n" not in str(refusal.value) and nothing_left(tmp_path)


def test_index_and_shards_disagree(sharded: Path, tmp_path: Path) -> None:
    source = copied(sharded, tmp_path)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["phantom"] = index["weight_map"].pop("model.norm.weight")
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as refusal:
        make(source, tmp_path / "out")
    assert "phantom" in str(refusal.value) and "model.norm.weight" in str(refusal.value)
