"""What may be wrong with an owner's folder: one line of error, and nothing half-written; and the command."""

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
from test_convert import CT, GPTQ, Weights, equal, run, uniform_layer, zoo
from tiny_models import load

from flute import QuantSpec
from flute.errors import FluteError, IntegrationError
from flute.integrations import folders
from flute.integrations.convert.exact import Exact, represent
from flute.integrations.convert.source import format_of, open_source


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
