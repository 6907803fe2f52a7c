"""What the published FlatQuant writes: ``flat_matrices.pth``, and packed_int4 checkpoints. Both are read, not written.

Names and layouts are theirs: a transform is called ``<site>_trans`` with ``matrix`` or ``matrix_left`` and
``matrix_right`` (multiplied out, the inverse transposes beside them, which are not needed) and ``diag_scale``; clips
are logits, two for each layer's rows and two for each layer's input. The nibbles of packed weights lie as ours do, so
that a checkpoint only changes names. Two things are not theirs to the last bit: they clip rows of v_proj before P_v is
folded in, we after; and their cache ignores its clips, ours applies them.

A .pth file is a pickle: it is read with ``weights_only``, which builds tensors and containers and runs no code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..checkpoint.atomic import Workplace, whole_file, write_json
from ..checkpoint.files import CONFIG, inside, read_json
from ..checkpoint.shards import INDEX, SINGLE, open_shard, read_headers
from ..errors import CheckpointError
from ..flatquant.fold import MODULE_OF, SITE_OF, Tensors, parameter_of_clip
from ..flatquant.matrices import Matrices
from ..flatquant.spec import FlatSpec

_SITES = {"attn": "self_attn.ln_trans", "mlp": "mlp.up_gate_trans", "down": "mlp.down_trans"}
_HEADS = {"out_left": "self_attn.o_trans", "out_right": "self_attn.vcache_trans", "key": "self_attn.kcache_trans"}
_SIDES = ("max", "min")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


def read_matrices(path: Path) -> list[Matrices]:
    """Matrices of all blocks from a ``flat_matrices.pth``; they want a spec with ``separate_clips``.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than tensors by block.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give upstream's flat_matrices.pth") from None
    except Exception as error:  # whatever a file of unknown origin makes the unpickler do
        raise CheckpointError(f"{path} is no flat_matrices.pth: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict) or sorted(found) != list(range(len(found))) or not found:
        raise CheckpointError(f"{path} does not hold blocks 0, 1, 2, ...; give upstream's flat_matrices.pth")
    return [_matrices(path, index, found[index]) for index in range(len(found))]


def _matrices(path: Path, index: int, values: Any) -> Matrices:
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise CheckpointError(f"{path}: block {index} is no dict of tensors; give upstream's flat_matrices.pth")
    tensors: Tensors = {name: value.detach().float() for name, value in values.items()}
    made = Matrices()
    for site, theirs in _SITES.items():
        for side in ("left", "right"):
            if f"{theirs}.matrix_{side}" in tensors:
                made.factors[f"{site}_{side}"] = tensors[f"{theirs}.matrix_{side}"]
        if f"{theirs}.diag_scale" in tensors:
            made.scales[site] = tensors[f"{theirs}.diag_scale"].flatten()
    for name, theirs in _HEADS.items():
        if f"{theirs}.matrix" in tensors:
            made.factors[name] = tensors[f"{theirs}.matrix"]
    if not made.factors:
        raise CheckpointError(f"{path}: block {index} has no transform; it was saved before calibration")
    for name in SITE_OF:
        ratios = _ratios(tensors, f"{name}.clip_factor_w")
        if ratios is not None:
            made.row_clips[name] = ratios
    made.clips = _clips(tensors)
    return Matrices.from_tensors(made.to_tensors())


def _ratios(tensors: Mapping[str, torch.Tensor], stem: str) -> torch.Tensor | None:
    """(..., 2) of (max, min) from their logits, None if there are none."""
    if f"{stem}_max" not in tensors:
        return None
    return torch.stack([tensors[f"{stem}_{side}"].float().flatten().sigmoid() for side in _SIDES], -1)


def _clips(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Clips of sites, one for each of their layers, and of queries, keys and values."""
    found: Tensors = {}
    for site in MODULE_OF:
        each = [
            _ratios(tensors, f"{name}.act_quantizer.clip_factor_a") for name, where in SITE_OF.items() if where == site
        ]
        rows = [ratios for ratios in each if ratios is not None]
        if len(rows) == len(each):
            found[site] = torch.cat(rows)
    for name in ("query", "key", "value"):
        ratios = _ratios(tensors, f"self_attn.{name[0]}_cache_quantizer.clip_factor_a")
        if ratios is not None:
            found[name] = ratios.view(2)
    return found


# ---- packed_int4 checkpoints -----------------------------------------------------------------------------------------


def is_published(folder: Path) -> bool:
    """Whether a folder holds the published program's packed_int4 weights."""
    config = folder / "quantization_config.json"
    return config.exists() and read_json(config).get("format") == "packed_int4"


def convert(folder: Path, out: Path, *, force: bool = False) -> int:
    """Write a published packed_int4 checkpoint of a Llama model as one of ours; returns the number of blocks.

    The model must fit into memory once. k and v are asymmetric, as the published checkpoints' are.

    Raises:
        CheckpointError: tensors are missing, or of a kind that is not known here.
    """
    headers = read_headers(folder)
    blocks: dict[int, Tensors] = {}
    rest: Tensors = {}
    for file in sorted({entry.file for entry in headers.values()}):
        with open_shard(inside(folder, file)) as shard:
            for name in shard.keys():  # noqa: SIM118  (not a dict)
                scale = name.startswith("quantizer.model.")
                match = _LAYER.fullmatch(name.removeprefix("quantizer."))
                if match is None:
                    rest[name] = shard.get_tensor(name)
                else:
                    key = f"quantizer.{match[2]}" if scale else match[2]
                    blocks.setdefault(int(match[1]), {})[key] = shard.get_tensor(name)
    config = read_json(inside(folder, CONFIG))
    spec = FlatSpec(separate_clips=True)
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": spec.to_dict()}
    config.pop("auto_map", None)
    tensors = dict(rest)
    for index, block in sorted(blocks.items()):
        tensors |= {f"model.layers.{index}.{name}": t for name, t in _converted(folder, index, block).items()}
    with Workplace(Path(out).expanduser().absolute(), {"source": str(folder)}, force=force) as work:
        with whole_file(work.folder / SINGLE) as target:
            target.write(save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"}))
        write_json(work.folder / CONFIG, config)
        for path in folder.glob("*.json"):
            if path.name not in (CONFIG, INDEX, "quantization_config.json"):
                with whole_file(work.folder / path.name) as target:
                    target.write(path.read_bytes())
        work.finish()
    return len(blocks)


def _converted(folder: Path, index: int, block: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of one block by our names."""
    made: Tensors = {name: block[name] for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    try:
        for name in SITE_OF:
            made[f"{name}.weight"] = block[f"{name}.linear.weight"]
            made[f"{name}.weight_scale"] = block[f"quantizer.{name}.linear.scale"].float().flatten()
            if f"{name}.linear.bias" in block:
                made[f"{name}.bias"] = block[f"{name}.linear.bias"]
        for site, theirs in _SITES.items():
            for side in ("left", "right"):
                made[f"{MODULE_OF[site]}.{side}"] = block[f"{theirs}.matrix_{side}"]
        made[f"{MODULE_OF['out']}.left"] = block["self_attn.o_trans.matrix"]
        made["self_attn.heads.key"] = block["self_attn.kcache_trans.matrix"]
        made["self_attn.heads.query"] = block["self_attn.kcache_trans.matrix_inv_t"]
    except KeyError as error:
        raise CheckpointError(
            f"{folder}: block {index} has no {error.args[0]!r}; it is no packed_int4 FlatQuant model"
        ) from None
    clips = {"attn": 3, "out": 1, "mlp": 2, "down": 1}
    ratios: Tensors = {site: torch.ones(count, 2) for site, count in clips.items()}
    ratios |= {"key": torch.ones(2), "value": torch.ones(2)} | _clips(block)
    return made | {parameter_of_clip(name): ratio for name, ratio in ratios.items()}
