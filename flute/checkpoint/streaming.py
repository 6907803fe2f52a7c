"""Quantize a model folder that need not fit into memory: shard by shard, tensor by tensor.

Every output file holds what the input file of the same name held, with the linear layers' weights replaced by codes and
scales. In memory are one memory-mapped input shard, one tensor, and the scratch of quantizing it. A finished shard is
never made again: a run that was killed goes on where it was when it is repeated, and ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import QuantizeError, SpecError
from ..packing import pack_codes
from ..quantize import quantize
from ..spec import CUSTOM_TABLE
from ..tables import resolve_table
from .atomic import Workplace, check_space, copy_files, write_json
from .files import CONFIG
from .plan import Layer, Plan
from .shards import INDEX, ShardWriter, index_json, open_shard, read_header, write_shard

Progress = Callable[[str, int], None]  # name of a layer, and how many of its weights are now done


def run(
    plan: Plan,
    out: Path,
    *,
    table: torch.Tensor | None = None,
    scale: str = "auto",
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda name, weights: None,
    version: str = "",
) -> bool:
    """Write the checkpoint that ``plan`` describes to ``out``.

    Args:
        plan: from `make_plan`.
        out: the folder to make; it appears when everything is on the disk.
        table: the custom table of every layer whose spec asks for one.
        scale: as in `flute.quantize.quantize`.
        device: where the arithmetic is done.
        force: replace an existing checkpoint, ignore another run's leftovers.
        progress: called after every layer.
        version: of flute; another version does not take up an interrupted run.

    Returns:
        Whether an interrupted run was taken up.

    Raises:
        FluteError: bad weights, a spec that does not fit, a full disk, an existing folder. ``out`` is then as it was.
    """
    # `out` may be a bare name, a link's parent, ...: decide once where it is
    out = Path(out).expanduser().absolute()
    for spec in {layer.spec for layers in plan.layers.values() for layer in layers}:
        resolve_table(spec, table if spec.table == CUSTOM_TABLE else None)  # refused now, not after an hour
    values = None if table is None else table.tolist()
    job = plan.fingerprint(table=values, scale=scale, device=torch.device(device).type, flute=version)
    with Workplace(out, job, force=force) as work:
        try:
            there = sum(path.stat().st_size for path in work.folder.iterdir())
            check_space(work.root, plan.nbytes - there)
            for file in plan.files:
                _make_shard(plan, work.folder / file, table, scale, device, progress)
            write_small_files(plan, work.folder)
        except (QuantizeError, SpecError):
            work.discard()  # these weights will be no better next time
            raise
        work.finish()
        return work.resumed


def _make_shard(
    plan: Plan, path: Path, table: torch.Tensor | None, scale: str, device: str, progress: Progress
) -> None:
    tensors = {name: entry for name, entry in plan.tensors.items() if entry.file == path.name}
    layers = plan.layers.get(path.name, [])
    if path.exists() and read_header(path) == tensors:
        for layer in layers:
            progress(layer.name, layer.weights)
        return
    with open_shard(plan.source / path.name) as source, write_shard(path, tensors) as target:
        for name, entry in tensors.items():
            if plan.headers.get(name) == entry:  # not a layer's: the bytes as they are
                target.write(name, source.get_tensor(name))
        for layer in layers:
            weight = source.get_tensor(layer.source).to(device)
            _write_layer(target, layer, weight, table, scale, plan.scale_dtype)
            progress(layer.name, weight.numel())


def _write_layer(
    target: ShardWriter, layer: Layer, weight: torch.Tensor, table: torch.Tensor | None, scale: str, dtype: torch.dtype
) -> None:
    own = table if layer.spec.table == CUSTOM_TABLE else None
    *lead, width = weight.shape
    made = quantize(weight.reshape(-1, width), layer.spec, table=own, scale=scale, scale_dtype=dtype, name=layer.name)
    target.write(layer.made.codes, pack_codes(made.codes, layer.spec.code_bits).view(*lead, -1))
    target.write(layer.made.scales, made.scales.view(*lead, -1))
    if own is not None and layer.first:
        target.write(layer.made.table, resolve_table(layer.spec, own).to(dtype))


def write_small_files(plan: Plan, folder: Path) -> None:
    """Everything but the safetensors: tokenizer and the like, the index, config.json."""
    copy_files(plan.source, plan.small_files, folder)
    if plan.has_index():
        write_json(folder / INDEX, index_json(plan.tensors))
    write_json(folder / CONFIG, plan.config)
