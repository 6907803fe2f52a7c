"""FlatQuant's published program: its flags mean the same here; what it writes is read and converted."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from test_flatquant_model import SHORT, WINDOWS

from flute.commands import flat_published
from flute.errors import CheckpointError
from flute.flatquant.fold import MODULE_OF, SITE_OF
from flute.flatquant.matrices import Matrices
from flute.flatquant.spec import FlatSpec
from flute.integrations import flat_upstream
from flute.integrations.flatblocks import blocks_of
from flute.methods.flat_folder import load_matrices
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import apply, calibrate

SITES = {"attn": "self_attn.ln_trans", "mlp": "mlp.up_gate_trans", "down": "mlp.down_trans"}


def published_block(matrices: Matrices, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A block by their names: matrices, inverse transposes, diagonals, logits of clips."""
    made: dict[str, torch.Tensor] = {}
    factors = matrices.factors
    for site, name in SITES.items():
        made[f"{name}.diag_scale"] = matrices.scales[site]
        for side in ("left", "right"):
            made[f"{name}.matrix_{side}"] = factors[f"{site}_{side}"]
            made[f"{name}.matrix_{side}_inv"] = torch.linalg.inv(factors[f"{site}_{side}"]).T
    for theirs, name in (("o_trans", "out_left"), ("vcache_trans", "out_right"), ("kcache_trans", "key")):
        made[f"self_attn.{theirs}.matrix"] = factors[name]
        made[f"self_attn.{theirs}.matrix_inv_t"] = torch.linalg.inv(factors[name]).T
    for letter, name in (("k", "key"), ("v", "value")):
        for side, ratio in zip(("max", "min"), matrices.clips[name], strict=True):
            made[f"self_attn.{letter}_cache_quantizer.clip_factor_a_{side}"] = ratio.logit().view(1)
    counted = dict.fromkeys(MODULE_OF, 0)
    for name, site in SITE_OF.items():
        row = matrices.clips[site][counted[site]]
        counted[site] += 1
        for index, side in enumerate(("max", "min")):
            made[f"{name}.act_quantizer.clip_factor_a_{side}"] = row[index].logit().view(1)
            made[f"{name}.clip_factor_w_{side}"] = matrices.row_clips[name][:, index : index + 1].logit()
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def test_published_matrices_are_read(tmp_path: Path) -> None:
    model, spec = tiny_models.build(), FlatSpec(separate_clips=True)
    matrices, _ = calibrate(model, spec, WINDOWS, None, SHORT, batch=2)
    for each in matrices:
        del each.scales["value"]  # not theirs
    path = tmp_path / "flat_matrices.pth"
    torch.save({index: published_block(each) for index, each in enumerate(matrices)}, path)
    found, said = load_matrices(path)
    assert said is None
    for one, other in zip(found, matrices, strict=True):
        a, b = one.to_tensors(), other.to_tensors()
        assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    for damage in ([1, 2], {0: {"weight": torch.zeros(2)}}, {1: {}}):
        torch.save(damage, path)
        with pytest.raises(CheckpointError, match=r"flat_matrices|transform"):
            load_matrices(path)
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that runs a command
    with pytest.raises(CheckpointError, match="no flat_matrices"):
        load_matrices(path)


def test_published_checkpoints_are_converted(tmp_path: Path) -> None:
    model, spec = tiny_models.build(), FlatSpec(separate_clips=True)
    matrices, _ = calibrate(model, spec, WINDOWS, None, Schedule(epochs=0), batch=2)
    apply(model, spec, matrices)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "layers" not in name}
    for index, (block, each) in enumerate(zip(blocks_of(model)[1], matrices, strict=True)):
        theirs = published_block(each)
        for name in SITE_OF:
            layer = block.get_submodule(name)
            theirs[f"{name}.linear.weight"] = layer.weight.data
            tensors[f"quantizer.model.layers.{index}.{name}.linear.scale"] = layer.weight_scale.data.view(-1, 1)
        theirs |= {name: tensor for name, tensor in block.state_dict().items() if "layernorm" in name}
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in theirs.items()}
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads(model.config.to_json_string()) | {"model_type": "llama_FlatQuant", "auto_map": {"A": "b.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantization_config.json").write_text(json.dumps({"format": "packed_int4", "w_bits": 4}))
    assert flat_upstream.is_published(folder)
    assert flat_upstream.convert(folder, tmp_path / "ours") == 2
    loaded, ids = tiny_models.load(tmp_path / "ours", dtype=torch.float32), tiny_models.prompt()
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
    del tensors["model.layers.1.self_attn.o_trans.matrix"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="o_trans"):
        flat_upstream.convert(folder, tmp_path / "other")


def test_published_flags(shallow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a function of the module returns the value that it was given. " * 30)
    flags = """--w_bits 4 --a_bits 4 --k_bits 4 --k_asym --k_groupsize 128 --v_bits 4 --v_asym --v_groupsize 128
        --cali_bsz 4 --epoch 1 --flat_lr 5e-3 --lwc --lac --cali_trans --add_diag --save_matrix --quantized_save"""
    ours = f"--nsamples 2 --seqlen 32 --cali_dataset {text} --eval_text {text} --eval_windows 1 --output_dir {tmp_path}"
    model = ["--model", str(shallow)]
    assert flat_published.main([*model, *flags.split(), *ours.split()]) == 0
    out = tmp_path / "tiny" / "w4a4" / "exp"
    results = json.loads((out / "results.json").read_text())
    assert len(results) == 3 and all(value > 1 for value in results.values())
    spec = FlatSpec.from_dict(json.loads((out / "quantized" / "config.json").read_text())["quantization_config"])
    assert spec == FlatSpec(separate_clips=True)
    capsys.readouterr()
    again = f"--reload_matrix --matrix_path {out} --exp_name again".split()
    assert flat_published.main([*model, *flags.split(), *ours.split(), *again]) == 0
    other = json.loads((tmp_path / "tiny" / "w4a4" / "again" / "results.json").read_text())
    assert other == results
    assert flat_published.main([*model, "--reload_matrix"]) == 1
    assert "--matrix_path" in capsys.readouterr().err
