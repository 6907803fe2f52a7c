"""A foreign checkpoint to one of ours: every layer is examined before a byte is written, then shard by shard.

Of a mixture's experts a layer here is one matrix of one expert, as it is on disk; the loader stacks them.
Each layer is read twice: once to know its spec, and that its weights are its owner's, and once to write it. That costs
time and saves memory: one layer is held at a time, and a refusal names all layers at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...checkpoint.architecture import Architecture, TensorNames, tensor_names
from ...checkpoint.atomic import Workplace, check_space
from ...checkpoint.files import CONFIG, read_json, refuse
from ...checkpoint.plan import Plan, made_config, small_files
from ...checkpoint.shards import info, read_header, write_shard
from ...checkpoint.streaming import write_small_files
from ...checkpoint.validate import Report
from ...config import ModelSpec
from ...errors import CheckpointError
from ...packing import pack_codes
from ...spec import CUSTOM_TABLE, QuantSpec
from .. import folders, mixtures, modules
from .exact import Exact, Form, Stored, fit, represent
from .source import OWNERS_FILES, Source

Progress = Callable[[str, int], None]  # name of a layer, and how many weights were examined or written
_NOT_OURS = "flute leaves layers of its kind dense"
_SHOWN = 4  # names for each reason, in a refusal of one line


@dataclass(frozen=True)
class Converted:
    """One layer: its name on disk and in the model, (N, K), and the dtype of its owner's weight.

    ``spec``: None if it stays dense, and ``why`` says why. ``rounded``: weights that differ from the owner's once
    scales and table are rounded to the model's dtype at load. ``scales``: their dtype on disk. ``table``: its values,
    if it has its own. ``expert``: ``name`` is that of a stack of experts' matrices, and this is one of them;
    ``others``: forms that it could have, too; ``first``: the one with which the table of all is written.
    """

    disk: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: QuantSpec | None = None
    why: str = ""
    rounded: int = 0
    scales: torch.dtype | None = None
    table: tuple[Any, ...] = ()
    expert: bool = False
    others: tuple[Form, ...] = ()
    first: bool = True

    @property
    def names(self) -> TensorNames:
        """Its tensors on disk."""
        own = tensor_names(self.disk, self.shape)
        return own._replace(table=tensor_names(self.name, (0, *self.shape)).table) if self.expert else own

    @property
    def forms(self) -> tuple[Form, ...]:
        """What it can be, the best first."""
        return () if self.spec is None else ((self.spec, self.table), *self.others)

    @property
    def weights(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


class Refused(CheckpointError):
    """Layers cannot be represented exactly; ``layers`` are all that were examined, as they would be."""

    def __init__(self, origin: Path, layers: tuple[Converted, ...], refused: list[Converted]) -> None:
        self.layers = layers
        names: dict[str, list[str]] = {}
        for layer in refused:
            names.setdefault(layer.why, []).append(layer.disk)
        shown = "; ".join(
            f"{why} ({', '.join(found[:_SHOWN])}{f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''})"
            for why, found in names.items()
        )
        cost = sum(layer.weights * layer.dtype.itemsize for layer in refused) / 1e6
        super().__init__(
            f"{origin}: {len(refused)} of {len(layers)} layers cannot be represented exactly; --dense-fallback would "
            f"keep them dense ({cost:.1f} MB): {shown}"
        )


class Conversion(NamedTuple):
    """What was made: its layers, the dtype that the model is loaded in by default, and what the new folder holds."""

    layers: tuple[Converted, ...]
    dtype: torch.dtype
    report: Report


def convert(
    source: Source,
    out: Path,
    *,
    dense_fallback: bool = False,
    force: bool = False,
    progress: Progress = lambda name, weights: None,
    version: str = "",
) -> Conversion:
    """Write the checkpoint that ``source`` is in our format to the new folder ``out``.

    Args:
        source: from `open_source`. out: the folder to make; it appears when everything is on the disk.
        dense_fallback: write layers that cannot be represented exactly as dense weights in their owner's dtype.
        force: replace an existing checkpoint.
        progress: called after every layer, twice for each.
        version: of flute.

    Raises:
        Refused: layers cannot be represented exactly. CheckpointError: something is missing or damaged.
    """
    out = Path(out).expanduser().absolute()
    model = folders.architecture(source.folder, ModelSpec(lm_head=True, experts=True))
    config = read_json(source.folder / CONFIG)
    _check_names(source, model)
    examined = _examine(source, model, config, progress)
    layers = agreed(examined, model.linears, lambda layer, form: _as(layer, source.read(layer.disk), config, form))
    refused = [layer for layer in layers if layer.spec is None and layer.why != _NOT_OURS]
    if refused and not dense_fallback:
        raise Refused(source.origin, layers, refused)
    plan = _plan(source, model, config, layers)
    job = plan.fingerprint(kind=source.kind, dense_fallback=dense_fallback, flute=version)
    with Workplace(out, job, force=force) as work, work.filled():
        check_space(work.root, plan.nbytes)
        by_name = {layer.disk: layer for layer in layers}
        for file in plan.files:
            _write(source, plan, work.folder / file, by_name, progress)
        write_small_files(plan, work.folder)
        report = folders.validate(work.folder)
    return Conversion(layers, plan.scale_dtype, replace(report, folder=out))


def _check_names(source: Source, model: Architecture) -> None:
    """Refuse what is missing or belongs to another model before any weight is read."""
    there = {f"{layer}.weight" for layer in source.layers} | source.others
    targets = {model.rename(name)[0] for name in there}
    problems = [f"{name} is missing" for name in model.tensors if not {name, model.tied.get(name)} & targets]
    problems += [
        f"{name} is not part of this model"
        for name in sorted(source.others)
        if model.rename(name)[0] not in model.tensors and not model.ignored(name) and not _spare(source, name)
    ]
    if not source.layers:
        problems.append(f"it has no layer quantized by {source.kind}")
    if problems:
        refuse(source.origin, problems)


def _spare(source: Source, name: str) -> bool:
    """A bias of zeros, which old quantizers gave to layers of models that have none."""
    layer = name.removesuffix(".bias")
    return layer in source.layers and layer != name and not bool(source.tensor(name).any())


def _examine(source: Source, model: Architecture, config: dict[str, Any], progress: Progress) -> list[Converted]:
    found = []
    for disk in source.layers:
        stored = source.read(disk)
        target, part = model.rename(f"{disk}.weight")
        name, shape, dtype = target.removesuffix(".weight"), tuple(stored.weight.shape), stored.weight.dtype
        expert = part and len(model.linears.get(name, ())) == 3
        layer = Converted(disk, name, shape, dtype, why=_NOT_OURS, expert=expert)
        if part and not expert:
            why = model.left.get(mixtures.owner(name)[0], "it is a part of another tensor in transformers")
            layer = replace(layer, why=why)
        elif not part and model.tensors.get(target) != shape:
            raise CheckpointError(
                f"{source.origin}: layer {disk!r} has {shape} weights; the model of config.json needs "
                f"{model.tensors.get(target)}"
            )
        elif name in model.linears:
            layer = _as(layer, stored, config)
        found.append(layer)
        progress(disk, layer.weights)
    return found


def _as(layer: Converted, stored: Stored, config: dict[str, Any], form: Form | None = None) -> Converted:
    """``layer``, which ``stored`` is, in its best form, or in one of its others."""
    made = represent(stored, form)
    if isinstance(made, str):
        return replace(layer, spec=None, why=made)
    rounded = made.rounded(stored.weight, _load_dtype(config, layer.dtype))
    others = tuple(one.form for one in stored.apart) if layer.expert else ()
    spec, table = made.form
    return replace(layer, why="", spec=spec, rounded=rounded, scales=made.scales.dtype, table=table, others=others)


def agreed(
    layers: Sequence[Converted],
    linears: Mapping[str, tuple[int, ...]],
    again: Callable[[Converted, Form], Converted],
) -> tuple[Converted, ...]:
    """The same, with one spec and one table for all matrices of a stack of experts: the best that all can have.

    Where there is none the experts stay dense, as they do where one matrix has to.

    Args:
        layers: what was examined. linears: (E, N, K) of every stack, by its name.
        again: examines a matrix in another of its forms.

    Raises:
        CheckpointError: matrices of experts are missing, or have another shape.
    """
    stacks: dict[str, list[Converted]] = {}
    for layer in layers:
        if layer.expert:
            stacks.setdefault(layer.name, []).append(layer)
    odd, forms = {}, {}
    for name, parts in stacks.items():
        shape, whole = linears[name], sum(part.weights for part in parts) == math.prod(linears[name])
        if not whole or {part.shape[1] for part in parts} != {shape[-1]}:
            raise CheckpointError(
                f"experts {name!r} need {shape} weights, and the files have {len(parts)} matrices such as "
                f"{parts[0].disk!r} {parts[0].shape}; download them again"
            )
        common = [form for form in parts[0].forms if all(form in part.forms for part in parts)]
        if common:
            forms[name] = common[0]
        elif any(part.spec is None for part in parts):
            odd[mixtures.owner(name)[0]] = "another matrix of these experts stays dense"
        else:
            odd[mixtures.owner(name)[0]] = "the matrices of these experts differ in bits, groups or levels"
    first = {parts[0].disk for parts in stacks.values()}

    def settled(layer: Converted) -> Converted:
        if not layer.expert:
            return layer
        why = odd.get(mixtures.owner(layer.name)[0], "")
        if why:
            return replace(layer, spec=None, why=layer.why or why, rounded=0)
        form = forms[layer.name]
        return replace(layer if layer.forms[0] == form else again(layer, form), first=layer.disk in first)

    return tuple(settled(layer) for layer in layers)


def _load_dtype(config: dict[str, Any], owners: torch.dtype) -> torch.dtype:
    """The dtype in which our model is exact: the owner's; for float32, what config.json says, else float16."""
    named = config.get("dtype") or config.get("torch_dtype")
    return owners if owners != torch.float32 else {"bfloat16": torch.bfloat16}.get(str(named), torch.float16)


def _plan(source: Source, model: Architecture, config: dict[str, Any], layers: tuple[Converted, ...]) -> Plan:
    """Every output tensor with its file, and config.json."""
    tensors = {name: source.headers[name] for name in source.others if model.rename(name)[0] in model.tensors}
    for layer in layers:
        file, names = source.layers[layer.disk], layer.names
        if layer.spec is None or layer.scales is None:
            tensors[names.codes] = info(layer.dtype, layer.shape, file)
            continue
        rows, width = layer.shape
        tensors[names.codes] = info(torch.uint8, (rows, layer.spec.row_bytes(width)), file)
        tensors[names.scales] = info(layer.scales, (rows, layer.spec.num_groups(width)), file)
        if layer.spec.zero_points:
            tensors[names.zeros] = tensors[names.scales]
        if layer.spec.table == CUSTOM_TABLE and layer.first:
            tensors[names.table] = info(torch.float32, layer.spec.table_shape, file)
    specs = {layer.name: layer.spec for layer in layers if layer.spec is not None}
    if not specs:
        raise CheckpointError(f"{source.origin}: no layer can be represented; load it with its owner's library")
    default = Counter(specs.values()).most_common(1)[0][0]
    head = modules.output_head(folders.skeleton(source.folder))
    left = [name for name in model.linears if name not in specs]
    dense = [mixtures.owner(name)[0] if len(model.linears[name]) == 3 else name for name in left]
    experts = any(layer.expert and layer.spec is not None for layer in layers)
    record = ModelSpec(default, lm_head=head in specs)
    record = record.resolved(specs, dict.fromkeys([*model.dense_linears, *dense]), experts=experts)
    dtype = Counter(_load_dtype(config, layer.dtype) for layer in layers).most_common(1)[0][0]
    made = made_config(config, record, dtype, untied=head in specs)
    small = tuple(name for name in small_files(source.folder) if name not in OWNERS_FILES)
    return Plan(source.folder, source.headers, {}, tensors, dtype, made, small)


def _write(source: Source, plan: Plan, path: Path, layers: dict[str, Converted], progress: Progress) -> None:
    tensors = {name: entry for name, entry in plan.tensors.items() if entry.file == path.name}
    mine = [layer for layer in layers.values() if source.layers[layer.disk] == path.name]
    if path.exists() and read_header(path) == tensors:  # of a run that was killed
        for layer in mine:
            progress(layer.disk, layer.weights)
        return
    with write_shard(path, tensors) as target:
        for name in sorted(tensors.keys() & source.others):
            target.write(name, source.tensor(name))
        for layer in mine:
            stored = source.read(layer.disk)
            names = layer.names
            made = fit(stored, layer.forms[0]) if layer.spec is not None else None
            if isinstance(made, Exact):
                target.write(names.codes, pack_codes(made.codes, made.spec.code_bits))
                target.write(names.scales, made.scales)
                if made.zeros is not None:
                    target.write(names.zeros, made.zeros)
                if made.table is not None and layer.first:
                    target.write(names.table, made.table)
            else:
                target.write(names.codes, stored.weight)
            progress(layer.disk, layer.weights)
