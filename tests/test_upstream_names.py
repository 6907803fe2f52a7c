"""What upstream FLUTE documents works by name: its command, prepare_model_flute, its loader."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import build, dense_linears, equal_states, load, prompt, saved
from torch import nn

from flute import FluteConfig, LutLinear, QuantSpec
from flute.errors import CheckpointError, IntegrationError, SpecError
from flute.integrations import huggingface
from flute.integrations.base import main, prepare_model_flute


def prepared(model: Any, **keywords: Any) -> Any:
    arguments = {"num_bits": 4, "group_size": 32, "fake": False, "handle_hooks": True, **keywords}
    prepare_model_flute(name="model.layers", module=model.model.layers, **arguments)
    return model


def test_prepare_model_in_place(tmp_path: Path) -> None:
    folder = saved(tmp_path, "Qwen2", torch.bfloat16)
    model = prepared(load(folder), example_batch_size=1)
    expected = load(folder, quantization_config=FluteConfig(group_size=32))
    assert equal_states(model, expected) and type(model.lm_head) is nn.Linear
    assert torch.equal(model(prompt()).logits, expected(prompt()).logits)


def test_fake_keeps_linears_with_quantized_values() -> None:
    real, fake = prepared(build(), num_bits=3), prepared(build(), num_bits=3, fake=True)
    assert not any(isinstance(module, LutLinear) for module in fake.modules())
    for name, linear in dense_linears(fake.model.layers).items():
        assert torch.equal(linear.weight, real.model.layers.get_submodule(name).dequantize())


def test_custom_scales() -> None:
    name = "model.layers.0.mlp.up_proj"
    plain = prepared(build()).get_submodule(name)
    same = prepared(build(), custom_scales_dict={name: plain.scales.unsqueeze(-1)}).get_submodule(name)
    assert torch.equal(same.weight, plain.weight) and torch.equal(same.scales, plain.scales)
    wider = prepared(build(), custom_scales_dict={name: 2 * plain.scales}).get_submodule(name)
    assert torch.equal(wider.scales, 2 * plain.scales) and not torch.equal(wider.weight, plain.weight)
    with pytest.raises(IntegrationError, match=rf"{name}.*do not fit"):
        prepared(build(), custom_scales_dict={name: plain.scales[:1]})
    with pytest.raises(IntegrationError, match="no such linear"):
        prepared(build(), custom_scales_dict={"model.layers.7.x": plain.scales})


def test_hooks_move_to_the_new_layers() -> None:
    expected = prepared(build())(prompt()).logits
    device_map = {"model": "cpu", "lm_head": "cpu"}
    model = prepared(dispatch_model(build(), device_map, main_device="cpu", force_hooks=True))
    assert torch.equal(model(prompt()).logits, expected)
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    offloaded = build()
    for linear in dense_linears(offloaded.model.layers).values():
        add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(IntegrationError, match="offloaded"):
        prepared(offloaded, handle_hooks=False)
    prepared(offloaded)
    layer = offloaded.model.layers[0].mlp.up_proj
    assert isinstance(layer, LutLinear) and layer.weight.is_meta and layer._hf_hook.offload
    assert torch.equal(offloaded(prompt()).logits, expected)


def test_layers_that_cannot_be_converted_are_refused() -> None:
    model = build()
    foreign = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(72, 120)
    model.model.layers[1].mlp.up_proj = foreign
    with pytest.raises(IntegrationError, match=r"model\.layers\.1\.mlp\.up_proj.*bitsandbytes Linear4bit"):
        prepared(model)
    left = build()
    left.model.layers[1].mlp.up_proj = foreign
    assert prepared(left, prepare_bnb_layers=False).model.layers[1].mlp.up_proj is foreign
    with pytest.raises(SpecError, match="bits=5"):
        prepared(build(), num_bits=5)


def words(source: str, target: Path, **values: object) -> list[str]:
    given = {"pretrained_model_name_or_path": source, "save_directory": target, **values}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


@pytest.mark.filterwarnings("ignore:'flute.integrations.base' found in sys.modules")
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = saved(tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "out"
    given = words(source, target, num_bits=4, group_size=64, torch_dtype="float16", example_batch_size=1)
    monkeypatch.setattr(sys, "argv", ["flute.integrations.base", *given])
    runpy.run_module("flute.integrations.base", run_name="__main__")
    made = huggingface.from_pretrained(str(target), example_batch_size=1)
    expected = load(source, dtype=torch.float16, quantization_config=FluteConfig(QuantSpec(4, 64, "nf4")))
    assert equal_states(made, expected)
    assert json.loads((target / "flute_config.json").read_text())["num_bits"] == 4
    main([*words(source, tmp_path / "fake", num_bits=4, group_size=64, torch_dtype="float16"), "--fake"])
    assert equal_states(load(tmp_path / "fake"), expected.dequantize())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "fake", "out"]


def test_command_says_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    source = saved(tmp_path / "dense")
    capsys.readouterr()
    for bits, target, message in (("5", "new", "bits=5"), ("4", "out", "not an empty folder")):
        with pytest.raises(SystemExit) as caught:
            main(words(source, tmp_path / target, num_bits=bits, group_size=64))
        error = capsys.readouterr().err
        assert caught.value.code == 1 and message in error and error.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_checkpoints_of_upstream_that_are_none(tmp_path: Path) -> None:
    """Those that are one are loaded in test_convert."""
    folder = saved(tmp_path)
    (tmp_path / "flute_config.json").write_text('{"num_sms": 108, "num_bits": 4, "group_size": 64}')
    with pytest.raises(CheckpointError, match="no layer quantized by FLUTE 4 bit, tile 32"):
        huggingface.from_pretrained(folder)
