"""What a streaming run will write: every output tensor with its file, and config.json, before a weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import ModelSpec
from ..errors import CheckpointError
from ..spec import CUSTOM_TABLE, QuantSpec
from .architecture import Architecture, TensorNames, tensor_names
from .files import CONFIG, inside, read_json, refuse
from .shards import DTYPES, SINGLE, TensorInfo, info, joined, read_headers

_COPIED = (".json", ".txt", ".model", ".jinja")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_NOT_COPIED = (CONFIG, "model.safetensors.index.json")
_SIXTEEN_BITS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SOURCE_DTYPES = ("F16", "BF16", "F32", "F64")
# Keys by which a config.json could choose code; they mean nothing for a checkpoint of ours.
_CODE_KEYS = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "_attn_implementation",
    "_attn_implementation_internal",
)
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Layer:
    """A tensor to quantize: its layer's name and spec, its shape (..., N, K), its name on disk, and what it becomes.

    Of a stack of experts this is one of the tensors that make it up, often one matrix of one expert; the stack's table
    is written with the first.
    """

    name: str
    spec: QuantSpec
    shape: tuple[int, ...]
    source: str
    made: TensorNames
    first: bool = True

    @property
    def weights(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Args:
        source: folder of the dense model; ``headers`` its tensors.
        layers: the layers to quantize, by output file.
        tensors: every output tensor.
        scale_dtype: of scales and tables, and the dtype of the model.
        config: the output's config.json.
        small_files: names of tokenizer and other files that are copied.
    """

    source: Path
    headers: Mapping[str, TensorInfo]
    layers: Mapping[str, list[Layer]]
    tensors: Mapping[str, TensorInfo]
    scale_dtype: torch.dtype
    config: Mapping[str, Any]
    small_files: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """Names of the output's safetensors files."""
        return sorted({entry.file for entry in self.tensors.values()})

    @property
    def weights(self) -> int:
        """Weights to quantize."""
        return sum(layer.weights for layers in self.layers.values() for layer in layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the output, headers estimated."""
        small = sum((self.source / name).stat().st_size for name in self.small_files)
        return sum(entry.nbytes + 200 for entry in self.tensors.values()) + small

    def has_index(self) -> bool:
        """Whether the output is sharded."""
        return self.files != [SINGLE]

    def fingerprint(self, **options: Any) -> dict[str, Any]:
        """Plain JSON that changes whenever the output would: source, config with its spec, and ``options``.

        Big files are known by their size, header and 64 samples of 4 KiB, so this costs no second pass over them.
        """
        names = sorted({entry.file for entry in self.headers.values()} | set(self.small_files) | {CONFIG})
        return {
            "source": {name: _file_digest(self.source / name) for name in names},
            "config": json.loads(json.dumps(self.config)),
            "options": options,
        }


def make_plan(source: Path, architecture: Architecture, record: ModelSpec) -> Plan:
    """Decide what a dense model folder becomes.

    Args:
        source: the folder; only headers and config.json are read.
        architecture: its layers, chosen by ``record``.
        record: how it is to be quantized; patterns allowed.

    Raises:
        CheckpointError: something in the folder is missing, damaged or already quantized.
        SpecError: a spec does not fit.
    """
    config = dense_config(source)
    headers = read_headers(source)
    layers, problems = _find_layers(headers, architecture)
    if problems:
        refuse(source, problems)
    dtype = _model_dtype(config, [headers[layer.source].dtype for layer in layers])
    tensors = {name: entry for name, entry in headers.items() if name not in _replaced(layers)}
    by_file: dict[str, list[Layer]] = {}
    for layer in layers:
        layer.spec.check_layer(layer.name, *layer.shape[-2:])
        file = headers[layer.source].file
        by_file.setdefault(file, []).append(layer)
        *rows, width = layer.shape
        tensors[layer.made.codes] = info(torch.uint8, (*rows, layer.spec.row_bytes(width)), file)
        tensors[layer.made.scales] = info(dtype, (*rows, layer.spec.num_groups(width)), file)
        if layer.spec.table == CUSTOM_TABLE and layer.first:
            tensors[layer.made.table] = info(dtype, layer.spec.table_shape, file)
    stacked = any(len(shape) > 2 for shape in architecture.linears.values())
    resolved = record.resolved(architecture.specs, architecture.dense_linears, experts=stacked)
    untied = any(layer.source != layer.made.codes for layer in layers)
    made = made_config(config, resolved, dtype, untied=untied)
    return Plan(source, headers, by_file, tensors, dtype, made, small_files(source))


def dense_config(source: Path) -> dict[str, Any]:
    """config.json of a model that can be quantized.

    Raises:
        CheckpointError: there is none, or the model is quantized already.
    """
    config = read_json(inside(source, CONFIG))
    already = config.get("quantization_config")
    if already is not None:
        method = already.get("quant_method") if isinstance(already, dict) else already
        raise CheckpointError(
            f"{source} is quantized already (quant_method={method!r}); give the dense model, or flute convert it"
        )
    return config


def _find_layers(headers: Mapping[str, TensorInfo], architecture: Architecture) -> tuple[list[Layer], list[str]]:
    """The layers in the order of their shards, and what is wrong with them."""
    on_disk: dict[str, list[str]] = {}
    for name in headers:
        on_disk.setdefault(architecture.rename(name)[0], []).append(name)
    layers, problems = [], []
    for name, shape in architecture.linears.items():
        weight = architecture.names(name).codes
        sources = on_disk.get(weight) or on_disk.get(architecture.tied.get(weight, ""))
        if sources is None:
            problems.append(f"layer {name!r} has no tensor {weight!r}")
            continue
        found = joined([headers[source] for source in sources], shape)
        if found.shape != shape or found.dtype not in _SOURCE_DTYPES:
            problems.append(f"layer {name!r}: {sources[0]!r} is {found.dtype} {found.shape}, expected floats {shape}")
            continue
        for source in sources:
            made = _made_names(architecture, name, source if on_disk.get(weight) else weight)
            layers.append(
                Layer(name, architecture.specs[name], headers[source].shape, source, made, source == sources[0])
            )
    return sorted(layers, key=lambda layer: headers[layer.source].file), problems


def _made_names(architecture: Architecture, name: str, source: str) -> TensorNames:
    """What a source tensor of a layer becomes, by names that the loader takes for what they are.

    The name on disk may differ from the model's (a prefix, say); what loads the one loads the other. Experts' scales
    lie beside their matrix, if there is one for each, else they have the model's name.
    """
    own, shape = architecture.names(name), architecture.linears[name]
    if len(shape) == 2 or not source.endswith(".weight"):
        return tensor_names(source.removesuffix(".weight"), shape)
    scales = source.removesuffix(".weight") + ".scales"
    return own._replace(codes=source, scales=scales if architecture.rename(scales)[0] == own.scales else own.scales)


def _replaced(layers: list[Layer]) -> set[str]:
    return {layer.source for layer in layers if layer.source == layer.made.codes}


def _model_dtype(config: Mapping[str, Any], found: list[str]) -> torch.dtype:
    """The 16-bit dtype of the model: what its config says, else what its weights have, else float16."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        named = place.get("dtype") or place.get("torch_dtype")
        if isinstance(named, str) and named in _SIXTEEN_BITS:
            return _SIXTEEN_BITS[named]
    kinds = {DTYPES[dtype] for dtype in found}
    return kinds.pop() if len(kinds) == 1 and kinds <= set(_SIXTEEN_BITS.values()) else torch.float16


def made_config(config: Mapping[str, Any], record: ModelSpec, dtype: torch.dtype, *, untied: bool) -> dict[str, Any]:
    """The config.json of a model of ``config`` that is quantized by ``record`` and loaded in ``dtype``."""
    made = {key: value for key, value in config.items() if key not in _CODE_KEYS and key != "torch_dtype"}
    made["dtype"] = str(dtype).removeprefix("torch.")
    for part in (made, made.get("text_config")):
        if untied and isinstance(part, dict) and (part is made or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    made["quantization_config"] = record.to_dict()
    return made


def small_files(source: Path) -> tuple[str, ...]:
    """Tokenizer, generation settings, licence: plain files that mean something beside the weights."""
    names = []
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED or path.name.startswith(_COPIED_NAMES)
        if wanted and path.name not in _NOT_COPIED and path.is_file():
            names.append(inside(source, path.name).name)
    return tuple(names)


def _file_digest(path: Path) -> str:
    """Size and samples of a file as one hash; small files wholly."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        head = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else size
        file.seek(0)
        digest.update(file.read(min(size, head + 8)))
        for sample in range(_SAMPLES):
            file.seek(size * sample // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
