"""Checkpoints: what streaming writes, that it is what quantizing in memory gives, and how it survives interruption."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, build, equal_states, load, prompt

from flute import FluteConfig, LutLinear, QuantSpec, quantize
from flute.checkpoint import streaming
from flute.checkpoint.atomic import Workplace
from flute.checkpoint.plan import make_plan
from flute.checkpoint.shards import read_headers
from flute.config import ModelSpec
from flute.errors import CheckpointError
from flute.integrations import folders
from flute.packing import pack_codes

SPEC = QuantSpec(4, 32, "nf4")


def make(source: Path, out: Path, record: ModelSpec | QuantSpec = SPEC, **options: Any) -> Path:
    """What `flute quantize` does, without the command line."""
    record = record if isinstance(record, ModelSpec) else ModelSpec(record)
    streaming.run(make_plan(source, folders.architecture(source, record), record), out, **options)
    return out


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense bf16 model with biases in several shards, with small files beside it."""
    folder = tmp_path_factory.mktemp("sharded")
    build("Qwen2", torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b\n")
    (folder / "LICENSE").write_text("free\n")
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')\n")
    (folder / "README.md").write_text("not copied\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Phi"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streaming_is_quantizing_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(family, dtype).save_pretrained(tmp_path / "dense")
    streamed = load(make(tmp_path / "dense", tmp_path / "out"))
    at_load = load(tmp_path / "dense", quantization_config=FluteConfig(bits=4, group_size=32))
    assert streamed.dtype == dtype
    assert equal_states(streamed, at_load)
    assert streamed.config.quantization_config.to_dict() == at_load.config.quantization_config.to_dict()
    assert torch.equal(streamed(prompt()).logits, at_load(prompt()).logits)


def save_base(folder: Path) -> None:
    build("Llama", torch.float16, tie_word_embeddings=True).model.save_pretrained(folder)


def save_experts(folder: Path) -> None:
    build("Mixtral", torch.float16, num_local_experts=4).save_pretrained(folder)


def save_multimodal(folder: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=dict(SIZES), vision_config=vision, **tokens)
    transformers.Gemma3ForConditionalGeneration(config).to(torch.float16).save_pretrained(folder)


@pytest.mark.parametrize(("save", "layers"), [(save_base, 14), (save_experts, 8), (save_multimodal, 14)])
def test_names_on_disk_may_differ_from_the_models(save: Callable[[Path], None], layers: int, tmp_path: Path) -> None:
    """A base model without prefix, experts that are fused at load, a decoder inside a model of images and text."""
    save(tmp_path / "dense")
    out = make(tmp_path / "dense", tmp_path / "out")
    assert len(folders.validate(out).layers) == layers
    streamed = load(out)
    at_load = load(tmp_path / "dense", quantization_config=FluteConfig(bits=4, group_size=32, experts=False))
    assert sum(isinstance(module, LutLinear) for module in streamed.modules()) == layers
    assert equal_states(streamed, at_load)


def test_every_tensor_is_as_promised(sharded: Path, tmp_path: Path) -> None:
    out = make(sharded, tmp_path / "out")
    before, after = tensors(sharded), tensors(out)
    name = "model.layers.1.mlp.down_proj"
    codes, scales = quantize(before[f"{name}.weight"], SPEC)
    assert torch.equal(after[f"{name}.weight"], pack_codes(codes, 4))
    assert torch.equal(after[f"{name}.scales"], scales) and scales.dtype == torch.bfloat16
    dense = [key for key in before if after[key].dtype != torch.uint8]
    assert "model.embed_tokens.weight" in dense and "model.layers.0.self_attn.q_proj.bias" in dense
    assert all(torch.equal(before[key], after[key]) for key in dense)
    scales_of = {key.removesuffix("weight") + "scales" for key in before if key not in dense}
    assert set(after) - set(before) == scales_of


def test_files_of_a_checkpoint(sharded: Path, tmp_path: Path) -> None:
    out = make(sharded, tmp_path / "out")
    shards = {path.name for path in sharded.glob("*.safetensors")}
    expected = shards | {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == expected | {"merges.txt", "LICENSE"}
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config and config["dtype"] == "bfloat16"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    for shard in shards:
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry.file for name, entry in read_headers(out).items()}
    assert not (tmp_path / "out.partial").exists()
    assert (out / "config.json").stat().st_mode & 0o777 == (out.stat().st_mode & 0o666)


def test_our_writer_writes_what_safetensors_writes(sharded: Path, tmp_path: Path) -> None:
    out = make(sharded, tmp_path / "out")
    for path in sorted(out.glob("*.safetensors")):
        save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_skip_and_override(sharded: Path, tmp_path: Path) -> None:
    record = ModelSpec(SPEC, {"*.o_proj": {"bits": 3, "group_size": 24}}, ("*.layers.0.*",))
    report = folders.validate(make(sharded, tmp_path / "out", record))
    assert {layer.name.split(".")[2] for layer in report.layers} == {"1"}
    specs = {layer.name.rpartition(".")[2]: layer.spec for layer in report.layers}
    assert specs["o_proj"] == QuantSpec(3, 24, "nf3") and specs["q_proj"] == SPEC
    layer = load(tmp_path / "out").model.layers[1].self_attn.o_proj
    assert isinstance(layer, LutLinear) and layer.spec == QuantSpec(3, 24, "nf3")


@pytest.mark.parametrize("vector_size", [1, 2])
def test_custom_table(vector_size: int, sharded: Path, tmp_path: Path) -> None:
    spec = QuantSpec(3, 24, "custom", vector_size)
    torch.manual_seed(1)
    table = torch.randn(spec.table_shape)
    out = make(sharded, tmp_path / "out", spec, table=table)
    model = load(out)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.table, table.to(torch.bfloat16))
    assert torch.isfinite(model(prompt()).logits).all()
    with pytest.raises(CheckpointError, match="table is missing"):
        cut(out, f"{'model.layers.0.mlp.up_proj'}.table")
        folders.validate(out)


def cut(folder: Path, name: str) -> None:
    """Remove a tensor from a checkpoint, and from its index."""
    for path in folder.glob("*.safetensors"):
        found = load_file(path)
        if found.pop(name, None) is not None:
            save_file(found, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"].pop(name, None)
        index.write_text(json.dumps(values))


def test_tied_head_is_untied(tmp_path: Path) -> None:
    build("Llama", torch.float16, tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    assert "lm_head.weight" not in read_headers(tmp_path / "dense")
    dense = make(tmp_path / "dense", tmp_path / "without")
    assert load(dense).config.tie_word_embeddings
    out = make(tmp_path / "dense", tmp_path / "with", ModelSpec(SPEC, lm_head=True))
    model = load(out)
    assert isinstance(model.lm_head, LutLinear) and not model.config.tie_word_embeddings
    embedding = tensors(tmp_path / "dense")["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.lm_head.weight, pack_codes(quantize(embedding, SPEC).codes, 4))
    assert folders.validate(out).layers[-1].name == "lm_head"


def test_float32_model_becomes_float16(tmp_path: Path) -> None:
    build("Llama", torch.float32).save_pretrained(tmp_path / "dense")
    out = make(tmp_path / "dense", tmp_path / "out")
    assert tensors(out)["model.norm.weight"].dtype == torch.float32  # dense tensors keep their bytes
    assert load(out).dtype == torch.float16


def test_report_counts_bytes(sharded: Path, tmp_path: Path) -> None:
    report = folders.validate(make(sharded, tmp_path / "out"))
    assert report.nbytes == sum(t.numel() * t.element_size() for t in tensors(tmp_path / "out").values())
    layer = next(layer for layer in report.layers if layer.name.endswith("0.mlp.down_proj"))
    assert layer.shape == (72, 120) and layer.nbytes == 72 * (60 + 2 * 4)
    assert report.to_dict()["bytes"] == report.nbytes


class Stop(BaseException):
    """As abrupt as can be in one process."""


def interrupted(source: Path, out: Path, after: int) -> None:
    """A run that ends after so many layers."""
    left = [after]

    def progress(name: str, weights: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        make(source, out, progress=progress)


@pytest.mark.parametrize("after", [1, 6, 14])
def test_resumes_to_the_same_bytes(after: int, sharded: Path, tmp_path: Path) -> None:
    make(sharded, tmp_path / "whole")
    interrupted(sharded, tmp_path / "out", after)
    assert not (tmp_path / "out").exists()
    done = {path: path.stat().st_ino for path in (tmp_path / "out.partial" / "folder").glob("*.safetensors")}
    make(sharded, tmp_path / "out")
    assert all((tmp_path / "out" / path.name).stat().st_ino == inode for path, inode in done.items())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_another_job_does_not_take_over(sharded: Path, tmp_path: Path) -> None:
    interrupted(sharded, tmp_path / "out", 6)
    with pytest.raises(CheckpointError, match="another model, other options") as refusal:
        make(sharded, tmp_path / "out", QuantSpec(3, 32, "nf3"))
    assert "\n" not in str(refusal.value)
    make(sharded, tmp_path / "out", QuantSpec(3, 32, "nf3"), force=True)
    assert folders.validate(tmp_path / "out").record.spec.bits == 3


def test_changed_source_does_not_take_over(tmp_path: Path) -> None:
    model = build("Qwen2", torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    interrupted(tmp_path / "dense", tmp_path / "out", 6)
    model.model.layers[1].mlp.up_proj.weight.data.neg_()
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    with pytest.raises(CheckpointError, match="another model"):
        make(tmp_path / "dense", tmp_path / "out")


def test_two_writers(sharded: Path, tmp_path: Path) -> None:
    with Workplace(tmp_path / "out", {"job": 1}), pytest.raises(CheckpointError, match="in use"):
        make(sharded, tmp_path / "out")


def test_force_replaces_only_checkpoints(sharded: Path, tmp_path: Path) -> None:
    out = make(sharded, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        make(sharded, out)
    make(sharded, out, QuantSpec(2, 32, "nf2"), force=True)
    assert folders.validate(out).record.spec.bits == 2
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="leaves it alone"):
        make(sharded, precious, force=True)
    assert (precious / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


_MEASURE = """
import resource, sys, threading, torch
torch.set_num_threads(1)
from collections.abc import Callable
from pathlib import Path
from flute.checkpoint import streaming
from flute.checkpoint.plan import make_plan
from flute.config import ModelSpec
from flute.integrations import folders
source, record = Path(sys.argv[1]), ModelSpec()
plan = make_plan(source, folders.architecture(source, record), record)
page = resource.getpagesize()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * page
before = peak = resident()
over = threading.Event()
def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, resident())
watcher = threading.Thread(target=watch)
watcher.start()
streaming.run(plan, Path(sys.argv[2]))
over.set(); watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_one_shard_and_scratch(tmp_path: Path) -> None:
    """160 MB of weights in shards of 40 MB: the rise must stay below the model, at a shard and scratch."""
    source = tmp_path / "dense"
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 20, "vocab_size": 512}
    transformers.LlamaConfig(**sizes, num_attention_heads=8).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    shapes = folders.architecture(source, ModelSpec()).tensors
    names = sorted(shapes)
    shards = [names[part::4] for part in range(4)]
    for number, shard in enumerate(shards):
        made = {name: torch.full(shapes[name], 0.01, dtype=torch.float16) for name in shard}
        save_file(made, source / f"model-{number}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"model-{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    command = [sys.executable, "-c", _MEASURE, str(source), str(tmp_path / "out")]
    print(f"largest shard {largest >> 20} MiB")
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    print(f"rise {int(done.stdout) >> 20} MiB")
    assert int(done.stdout) <= largest + (64 << 20), f"{int(done.stdout) >> 20} MiB, shard {largest >> 20} MiB"
