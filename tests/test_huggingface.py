"""transformers: quantize while loading, save, load, refuse."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, dense_linears, equal_states, load, prompt, saved
from torch import nn

from flute import FluteConfig, LutLinear, QuantSpec
from flute.errors import CheckpointError, FluteError, IntegrationError, QuantizeError, SpecError
from flute.integrations import versions

WARNED = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("dense"), "Qwen2")


@pytest.fixture(scope="module")
def quantized(dense: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    load(dense, quantization_config=FluteConfig(bits=4, group_size=32)).save_pretrained(folder)
    return folder


@pytest.fixture
def tampered(quantized: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with changed tensors or a changed quantization_config."""

    def change(edit: Callable[[dict[str, torch.Tensor]], Any] | None = None, **record: Any) -> Path:
        folder = tmp_path / "tampered"
        shutil.copytree(quantized, folder)
        if edit is not None:
            tensors = load_file(folder / "model.safetensors")
            edit(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(record)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# ---- quantize while loading ------------------------------------------------------------------------------------------

PAIRS = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)).tolist()
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "group_size": 64, "table": "nf4"},
    "int3 mse": {"bits": 3, "group_size": 32, "table": "int3", "scale": "mse"},
    "fp2 row": {"bits": 2, "group_size": -1, "table": "fp2"},
    "spec": {"bits": QuantSpec(3, 24, "nf3")},
    "custom": {"bits": 2, "table": "custom", "table_values": [-1.0, -0.25, 0.25, 1.0]},
    "pairs": {"bits": 2, "vector_size": 2, "group_size": 36, "table_values": PAIRS},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_quantizes_like_quantizing_the_loaded(
    name: str, dtype: torch.dtype, dense: str, tmp_path: Path
) -> None:
    config = FluteConfig(**CONFIGS[name])
    values = None if config.table_values is None else torch.tensor(config.table_values)
    model = load(dense, dtype=dtype, quantization_config=config)
    for layer_name, linear in dense_linears(load(dense, dtype=dtype)).items():
        found = model.get_submodule(layer_name)
        if layer_name == "lm_head":
            assert type(found) is nn.Linear and torch.equal(found.weight, linear.weight)
            continue
        expected = LutLinear.from_linear(linear, config.spec, table=values, scale=config.scale)
        for part in ("weight", "scales", "table", "bias"):
            want, have = getattr(expected, part), getattr(found, part)
            assert (want is None and have is None) or (want.dtype == have.dtype and torch.equal(want, have)), part
        assert not found.weight.requires_grad and not found.scales.requires_grad
    model.save_pretrained(tmp_path)
    assert equal_states(model, load(tmp_path)) and record_of(tmp_path) == model.config.quantization_config.to_dict()


def test_overrides_skips_and_resolved_names(dense: str, tmp_path: Path) -> None:
    config = FluteConfig(
        modules_to_not_convert=["model.layers.0.mlp.up_proj", "*.k_proj", r"re:model\.layers\.1\.self_attn\.[qv]_proj"],
        overrides={"*.down_proj": {"bits": 3}, "model.layers.1.mlp.down_proj": QuantSpec(2, 24, "int2")},
    )
    model = load(dense, quantization_config=config)
    skipped = {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"}
    skipped |= {f"model.layers.1.self_attn.{role}_proj" for role in "qkv"}
    assert dense_linears(model).keys() == skipped
    assert model.model.layers[0].mlp.down_proj.spec == QuantSpec(3, 64, "nf3")
    assert model.model.layers[1].mlp.down_proj.spec == QuantSpec(2, 24, "int2")
    model.save_pretrained(tmp_path)
    record = record_of(tmp_path)
    assert set(record["modules_to_not_convert"]) == skipped
    assert record["overrides"] == {
        "model.layers.0.mlp.down_proj": {"bits": 3, "table": "nf3"},
        "model.layers.1.mlp.down_proj": {"bits": 2, "group_size": 24, "table": "int2"},
    }
    assert equal_states(model, load(tmp_path))
    assert "*.k_proj" in config.record.modules_to_not_convert  # the caller's config is the caller's


def test_a_pattern_for_nothing_is_refused(dense: str) -> None:
    with pytest.raises(SpecError, match=r"'model\.layers\.1', which names no linear layer.*'model\.layers\.1\.\*'"):
        load(dense, quantization_config=FluteConfig(modules_to_not_convert=["model.layers.1"]))
    with pytest.raises(SpecError, match="disagree"):
        load(dense, quantization_config=FluteConfig(overrides={"*.q_proj": {"bits": 3}, "*layers.1.*": {"bits": 2}}))
    with pytest.raises(SpecError, match="table_values"):
        load(dense, quantization_config=FluteConfig(table="custom"))
    with pytest.raises(SpecError, match="scale='best'"):
        FluteConfig(scale="best")
    with pytest.raises(IntegrationError, match="no linear layer to quantize"):
        load(dense, quantization_config=FluteConfig(modules_to_not_convert=["*"]))


def test_weights_that_cannot_be_quantized_are_named(tmp_path: Path) -> None:
    model = build()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantizeError, match=r"model\.layers\.1\.mlp\.up_proj.*\[3, 4\]"):
        load(tmp_path, quantization_config=FluteConfig())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(tmp_path, quantization_config=FluteConfig())


# ---- the output head -------------------------------------------------------------------------------------------------


def test_quantized_output_head(dense: str, tmp_path: Path) -> None:
    model = load(dense, quantization_config=FluteConfig(lm_head=True, group_size=32))
    assert isinstance(model.lm_head, LutLinear)
    model.save_pretrained(tmp_path)
    assert record_of(tmp_path)["lm_head"] is True and equal_states(model, load(tmp_path))


def test_a_tied_head_is_untied_and_the_user_told(tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="shared its weight with the embedding"):
        model = load(source, quantization_config=FluteConfig(lm_head=True))
    embedding = load(source).model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    head = nn.Linear(72, 97, bias=False)
    head.weight = embedding
    assert torch.equal(model.lm_head.weight, LutLinear.from_linear(head, QuantSpec()).weight)
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert equal_states(model, again) and torch.equal(again.model.embed_tokens.weight, embedding)
    assert torch.equal(model(prompt()).logits, again(prompt()).logits)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "dense", tie_word_embeddings=True), quantization_config=FluteConfig())
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert again.lm_head.weight is again.model.embed_tokens.weight and equal_states(model, again)


# ---- save and load ---------------------------------------------------------------------------------------------------

OFFLOAD = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"),
    "model.layers.1": "disk",
}


@WARNED
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "auto", OFFLOAD], ids=["none", "cpu", "auto", "disk"])
def test_device_maps_and_saving_again(device_map: Any, quantized: Path, tmp_path: Path) -> None:
    reference = load(quantized)
    model = load(quantized, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(model(prompt()).logits, reference(prompt()).logits)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert equal_states(load(tmp_path / "again"), reference)


def test_dense_model_onto_disk_is_refused(dense: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrationError, match="'disk' while a dense model is quantized"):
        load(dense, device_map=OFFLOAD, offload_folder=tmp_path, quantization_config=FluteConfig())


def test_another_dtype(quantized: Path, tmp_path: Path) -> None:
    half = load(quantized, dtype=torch.bfloat16)
    layer = half.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8 and layer.scales.dtype == layer.table.dtype == torch.bfloat16
    moved = load(quantized).to(torch.bfloat16)
    assert equal_states(half, moved) and torch.equal(moved.model.layers[0].mlp.up_proj.table, layer.table)
    moved.save_pretrained(tmp_path)
    assert equal_states(load(tmp_path), half) and load(tmp_path).dtype == torch.bfloat16


def test_the_headless_model_and_other_heads(quantized: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    whole, base = load(quantized), AutoModel.from_pretrained(quantized)
    assert equal_states(whole.model, base)
    base.save_pretrained(tmp_path)
    assert equal_states(AutoModel.from_pretrained(tmp_path), base)
    classifier = AutoModelForSequenceClassification.from_pretrained(quantized, num_labels=3)
    assert equal_states(whole.model, classifier.model) and type(classifier.score) is nn.Linear


def test_compile_and_dequantize(quantized: Path) -> None:
    model = load(quantized)
    logits = model(prompt()).logits
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(prompt()).logits, logits)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable
    torch.compiler.reset()
    model.config.dtype = "float32"  # a config made by hand may hold the name
    plain = model.dequantize()
    assert not any(isinstance(module, LutLinear) for module in plain.modules())
    torch.testing.assert_close(plain(prompt()).logits, logits, rtol=1e-4, atol=1e-4)


# ---- strict ----------------------------------------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{UP}.scales"), rf"tensor '{UP}\.scales' is missing"),
    "no weight": (lambda t: t.pop(f"{UP}.weight"), rf"tensor '{UP}\.weight' is missing"),
    "no bias": (lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"), r"q_proj\.bias' is missing"),
    "no head": (lambda t: t.pop("lm_head.weight"), r"'lm_head\.weight' is missing"),
    "no norm": (lambda t: t.pop("model.norm.weight"), r"'model\.norm\.weight' is missing"),
    "shape": (
        lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:, :-1].contiguous()}),
        rf"{UP}\.weight.*\(120, 36\)",
    ),
    "groups": (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :2].contiguous()}), r"\(120, 3\) of F16"),
    "dtype": (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.int8)}), r"of I8, not .* of U8"),
    "scale dtype": (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].to(torch.int32)}), "of I32"),
    "dense": (lambda t: t.update({f"{UP}.weight": torch.zeros(120, 72)}), r"of F32, not"),
    "NaN": (lambda t: t[f"{UP}.scales"].fill_(torch.nan), rf"layer '{UP}': scales hold NaN"),
    "quantized head": (lambda t: t.update({"lm_head.scales": torch.zeros(97, 1)}), "'lm_head' is quantized, but"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_tensors_are_one_line(damage: str, tampered: Callable[..., Path]) -> None:
    edit, message = DAMAGES[damage]
    folder = tampered(edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_all_problems_at_once(tampered: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"2 problems: .*up_proj.*norm"):
        load(tampered(lambda t: (t.pop(f"{UP}.scales"), t.pop("model.norm.weight"))))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file(share: float, tampered: Callable[..., Path]) -> None:
    file = tampered() / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        load(file.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": True}, "bits=True"),
        ({"group_size": 0}, "group_size=0"),
        ({"table": "nf3"}, "table='nf3'"),
        ({"format_version": 2}, "format_version=2"),
        ({"colour": "red"}, "unknown key colour"),
        ({"num_bits": 4, "num_sms_packed": 108}, "original FLUTE"),
        ({"overrides": {UP: {"bits": 9}}}, "bits=9"),
        ({"overrides": {UP: {"depth": 9}}}, "depth"),
        ({"modules_to_not_convert": "lm_head"}, "not a list"),
        ({"lm_head": 1}, "lm_head=1"),
    ],
)
def test_bad_config_is_one_line(record: dict[str, Any], message: str, tampered: Callable[..., Path]) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        load(tampered(**record))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [{"group_size": 64}, {"bits": 3, "table": "nf3"}, {"modules_to_not_convert": [UP]}])
def test_config_and_tensors_that_disagree(record: dict[str, Any], tampered: Callable[..., Path]) -> None:
    with pytest.raises(FluteError, match=re.escape(UP)):
        load(tampered(**record))


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0rc1", "5.7.3"])
def test_another_transformers_is_refused(
    version: str, dense: str, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", version)  # in sys.modules, which may hold a later copy
    said = rf"this is transformers {version}; flute [\w.+]+ loads models with transformers 5\.8 or later; run: pip"
    for folder, options in ((quantized, {}), (dense, {"quantization_config": FluteConfig()})):
        with pytest.raises(IntegrationError, match=said):
            load(folder, **options)


@pytest.mark.parametrize("version", ["5.8.0", "5.9.0.dev0", "6.1"])
def test_later_ones_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    versions.check_transformers()


# ---- on a GPU --------------------------------------------------------------------------------------------------------

SPLIT = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), 0),
    "model.layers.1": "cpu",
}


@pytest.mark.gpu
@WARNED
@pytest.mark.parametrize("device_map", ["cuda", "auto", SPLIT], ids=["cuda", "auto", "offload"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_gives_what_the_cpu_gives(dtype: torch.dtype, device_map: Any, quantized: Path, tmp_path: Path) -> None:
    expected = load(quantized, dtype=dtype)
    model = load(quantized, dtype=dtype, device_map=device_map)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.in_kernel_order and layer.weight.is_cuda
    logits = model(prompt().cuda()).logits.cpu()
    assert (logits - expected(prompt()).logits).norm() < 0.03 * logits.norm()
    keywords = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(prompt().cuda(), **keywords).shape == expected.generate(prompt(), **keywords).shape
    model.save_pretrained(tmp_path)
    assert equal_states(load(tmp_path), expected)


@pytest.mark.gpu
def test_quantizing_onto_cuda(dense: str, tmp_path: Path) -> None:
    keywords = {"dtype": torch.float16, "quantization_config": FluteConfig(group_size=32)}
    model, expected = load(dense, device_map="cuda", **keywords), load(dense, **keywords)
    assert model.model.layers[1].mlp.down_proj.in_kernel_order
    assert equal_states(model.cpu(), expected) and not model.model.layers[1].mlp.down_proj.in_kernel_order
    logits = expected(prompt()).logits
    compiled = torch.compile(model.cuda(), fullgraph=True)
    assert (compiled(prompt().cuda()).logits.cpu() - logits).norm() < 0.03 * logits.norm()


def test_pickles_are_not_read(tampered: Callable[..., Path]) -> None:
    folder = tampered()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors only"):
        load(folder)
