"""What a checkpoint is, in the words of its card: of the three methods that run on this package.

A report (`folders.validate`) tells most; a model that was just saved, or a folder of FlatQuant or of transformers' own
HIGGS, tells its bits and the size of its files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import CONFIG, inside, read_json
from ..checkpoint.validate import Report
from ..config import QUANT_METHOD
from ..errors import CheckpointError
from ..experts import LutExperts
from ..flatquant.spec import QUANT_METHOD as FLATQUANT
from ..flatquant.spec import FlatSpec
from ..linear import LutLinear
from ..spec import CUSTOM_TABLE, QuantSpec
from . import folders

HIGGS = "higgs"


@dataclass(frozen=True)
class Described:
    """A checkpoint for its card.

    Args:
        folder: where it lies.
        method: its ``quant_method``.
        bits: of most weights.
        text: what it is, from "with the weights ..." on, and a table.
        causal: whether it is a causal language model, which generates text.
    """

    folder: Path
    method: str
    bits: int
    text: str
    causal: bool

    @property
    def tags(self) -> list[str]:
        """What a hub lists it under."""
        return tags(self.method, self.bits)


@dataclass(frozen=True)
class _Layer:
    """A quantized layer: spec, number of weights, bytes of codes, scales, zero points and a table of its own."""

    spec: QuantSpec
    weights: int
    nbytes: int


def tags(method: str, bits: int) -> list[str]:
    """What a hub lists a checkpoint of ``method`` under."""
    return ["flute", *([] if method == QUANT_METHOD else [method]), f"{bits}-bit", "quantized"]


def of_folder(folder: Path) -> Described:
    """A checkpoint on disk, of any of the three methods; one of flute's is checked strictly.

    Raises:
        CheckpointError: it is damaged, dense, or of another method.
    """
    values = read_json(inside(folder, CONFIG)).get("quantization_config")
    method = values.get("quant_method") if isinstance(values, dict) else None
    if method in (FLATQUANT, HIGGS):
        return _by_config(folder, method)
    return of_report(folders.validate(folder))


def of_report(report: Report) -> Described:
    """A checkpoint of flute's that was checked."""
    layers = [_Layer(layer.spec, layer.weights, layer.nbytes) for layer in report.layers]
    return _by_layers(report.folder, report.record.spec.bits, layers)


def of_model(model: Any, folder: Path) -> Described:
    """A quantized model in memory, which was just saved to ``folder``."""
    config = model.config.quantization_config
    if config.quant_method in (FLATQUANT, HIGGS):
        return _by_config(folder, str(getattr(config.quant_method, "value", config.quant_method)))
    return _by_layers(folder, config.spec.bits, list(_layers(model)))


def _layers(model: Any) -> Iterable[_Layer]:
    for module in model.modules():
        if isinstance(module, LutLinear):
            yield _layer(module.spec, 1, (module.out_features, module.in_features), module.scales.element_size())
        elif isinstance(module, LutExperts):
            for role, spec in module.specs.items():
                scales = getattr(module, f"{role}_scales")
                yield _layer(spec, module.num_experts, module.shapes[role], scales.element_size())


def _layer(spec: QuantSpec, stacked: int, shape: tuple[int, int], element: int) -> _Layer:
    rows, width = stacked * shape[0], shape[1]
    table = element * math.prod(spec.table_shape) if spec.table == CUSTOM_TABLE else 0
    of_groups = element * spec.num_groups(width) * (1 + spec.zero_points)
    return _Layer(spec, rows * width, rows * (spec.row_bytes(width) + of_groups) + table)


def _by_layers(folder: Path, bits: int, layers: list[_Layer]) -> Described:
    """``bits``: of the spec that layers have unless an override names them."""
    weights = Counter({bits: 0})
    for layer in layers:
        weights[layer.spec.bits] += layer.weights
    per_weight = 8 * sum(layer.nbytes for layer in layers) / max(1, weights.total())
    formula, included = "table[codes] * scale", "scales and tables"
    if any(layer.spec.zero_points for layer in layers):
        formula, included = "(table[codes] - zero) * scale", "scales, zero points and tables"
    rows = [
        f"| {count} | {spec.bits} | {'row' if spec.group_size < 0 else spec.group_size} "
        f"| {spec.table}{' and zero points' if spec.zero_points else ''} | {spec.vector_size} "
        f"| {spec.hadamard_size or 'none'} |"
        for spec, count in Counter(layer.spec for layer in layers).most_common()
    ]
    lines = [
        "with the weights of its linear layers stored as codes, a lookup table and scales "
        f"(`W ~ {formula}`): {per_weight:.3f} bits per quantized weight, {included} included, "
        f"{_megabytes(folder)} in all.\n",
        "| layers | bits | weights per scale | table | weights per code | rotated in blocks of |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    return Described(folder, QUANT_METHOD, weights.most_common(1)[0][0], "\n".join(lines), _causal(folder))


def _by_config(folder: Path, method: str) -> Described:
    values = read_json(inside(folder, CONFIG))["quantization_config"]
    bits, *parts = _flatquant(FlatSpec.from_dict(values)) if method == FLATQUANT else _higgs(folder, values)
    what, *table = parts
    text = "\n".join([f"{what}, {_megabytes(folder)} in all.\n", *table])
    return Described(folder, method, bits, text, _causal(folder))


def _flatquant(spec: FlatSpec) -> tuple[int, str, str, str, str]:
    down = "as the others" if spec.down_bits is None else f"{spec.down_bits} (weights and activations)"
    return (
        spec.w_bits,
        "with learned transforms (FlatQuant) and few bits for weights and activations (16: not rounded)",
        "| bits of weights | activations | keys | values | `down_proj` |",
        "|---|---|---|---|---|",
        f"| {spec.w_bits} | {spec.a_bits} | {spec.k_bits} | {spec.v_bits} | {down} |",
    )


def _higgs(folder: Path, values: dict[str, Any]) -> tuple[int, str, str, str, str]:
    try:
        bits, per_code, group, block = (values[key] for key in ("bits", "p", "group_size", "hadamard_size"))
    except KeyError as error:
        raise CheckpointError(f"{folder / CONFIG}: quantization_config of HIGGS lacks {error}; save it again") from None
    return (
        bits,
        "with rotated weights on MSE-optimal grids (transformers' `HiggsConfig`)",
        "| bits | weights per code | weights per scale | rotated in blocks of |",
        "|---|---|---|---|",
        f"| {bits} | {per_code} | {group} | {block} |",
    )


def _megabytes(folder: Path) -> str:
    """Of all weight files."""
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:,.1f} MB"


def _causal(folder: Path) -> bool:
    config = read_json(inside(folder, CONFIG))
    return any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
