"""A foreign checkpoint as layers and other tensors, whoever made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...checkpoint.files import CONFIG, inside, read_json
from ...checkpoint.shards import TensorInfo, open_shard, read_headers
from ...config import QUANT_METHOD
from ...errors import CheckpointError, FluteError, IntegrationError
from ..folders import Found, dense_folder
from . import awq, bitsandbytes, compressed, gguf, gptq, hqq, upstream
from .exact import Format, Stored

ZOO_CONFIG = "flute_config.json"
_FORMATS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "bitsandbytes": bitsandbytes.read_format,
    "gptq": gptq.read_format,
    "awq": awq.read_format,
    "hqq": hqq.read_format,
    "compressed-tensors": compressed.read_format,
    "higgs": upstream.higgs_format,
}
# where AutoGPTQ and AutoAWQ wrote their settings before config.json had a place for them
_OLD_CONFIGS = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
OWNERS_FILES = (ZOO_CONFIG, *_OLD_CONFIGS.values())


class Source(NamedTuple):
    """A foreign checkpoint.

    ``origin`` is what the user knows it by. ``folder`` holds config.json, small files and the tensors of ``headers``.
    ``kind`` for the report. ``layers``: the quantized layers by their names on disk, with the file each is in.
    ``others``: names of the tensors that belong to no layer. ``read``: a layer.
    """

    origin: Path
    folder: Path
    kind: str
    headers: Mapping[str, TensorInfo]
    layers: Mapping[str, str]
    others: frozenset[str]
    read: Callable[[str], Stored]

    def tensor(self, name: str) -> torch.Tensor:
        """One of the tensors in ``headers``."""
        return _tensors(self.folder, self.headers, [name])[name]


@contextmanager
def open_source(found: Found, beside: Path, *, tile: int | None = None) -> Iterator[Source]:
    """The checkpoint at ``found``, for as long as the context lasts.

    Args:
        found: a folder or GGUF file. beside: where a GGUF model may be unpacked for the time being.
        tile: of an upstream FLUTE checkpoint that does not tell.

    Raises:
        CheckpointError: files are missing or damaged. IntegrationError: nobody's format, or not one that is read.
    """
    with dense_folder(found, beside) as folder:
        headers = read_headers(folder)
        if found.gguf is not None:
            yield _gguf_source(found.folder / found.gguf, folder, headers)
        else:
            yield _folder_source(folder, headers, format_of(folder, tile))


def format_of(folder: Path, tile: int | None = None) -> Format:
    """Whose format a folder's config.json, or the file beside it, speaks of.

    Raises:
        IntegrationError: nobody's, or one that is not read.
    """
    config = read_json(inside(folder, CONFIG)).get("quantization_config")
    if config is None and (folder / ZOO_CONFIG).exists():
        return upstream.zoo_format(read_json(inside(folder, ZOO_CONFIG)), tile)
    if tile is not None:
        raise IntegrationError(f"{folder} has no {ZOO_CONFIG}, so there is no tile to choose; leave --tile out")
    for owner, name in _OLD_CONFIGS.items():
        if config is None and (folder / name).exists():
            config = {"quant_method": owner, **read_json(inside(folder, name))}
    known = ", ".join((*_FORMATS, "GGUF files", f"upstream FLUTE ({ZOO_CONFIG})"))
    if not isinstance(config, dict):
        raise IntegrationError(f"{folder} is not quantized; flute quantize takes dense models, flute convert {known}")
    method = config.get("quant_method")
    if method == QUANT_METHOD:
        raise IntegrationError(f"{folder} is a checkpoint of flute already; it can be loaded as it is")
    if not isinstance(method, str) or method not in _FORMATS:
        raise IntegrationError(f"{folder} has quant_method={method!r}, which is not read; flute convert takes {known}")
    return _FORMATS[method](config)


def _tensors(folder: Path, headers: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some tensors by name; each of their files is opened once."""
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(headers[name].file, []).append(name)
    found = {}
    for file, wanted in by_file.items():
        with open_shard(folder / file) as shard:
            found.update({name: shard.get_tensor(name) for name in wanted})
    return found


def _folder_source(folder: Path, headers: Mapping[str, TensorInfo], form: Format) -> Source:
    mark = form.parts[0]
    layers = {name.removesuffix(mark): entry.file for name, entry in headers.items() if name.endswith(mark)}
    others = headers.keys() - {layer + part for layer in layers for part in form.parts}

    def read(layer: str) -> Stored:
        names = [layer + part for part in form.parts if layer + part in headers]
        parts = {name.removeprefix(layer): value for name, value in _tensors(folder, headers, names).items()}
        try:
            return form.read(layer, parts)
        except KeyError as error:
            raise CheckpointError(f"{folder}: layer {layer!r} ({form.name}) has no {layer}{error.args[0]}") from None
        except (FluteError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            line = " ".join(str(error).split())[:300]  # of torch, where a tensor is of quite another kind
            raise CheckpointError(f"{folder}: layer {layer!r} ({form.name}): {line}") from None

    return Source(folder, folder, form.name, headers, layers, frozenset(others), read)


def _gguf_source(file: Path, folder: Path, headers: Mapping[str, TensorInfo]) -> Source:
    """A GGUF file, of which transformers has made the dense model in ``folder``: what its dequantization gives."""
    blocks = gguf.layers(file, folder)
    layers = {name: headers[f"{name}.weight"].file for name in blocks if f"{name}.weight" in headers}
    others = headers.keys() - {f"{name}.weight" for name in layers}

    def read(layer: str) -> Stored:
        weight = f"{layer}.weight"
        return gguf.stored(blocks[layer], _tensors(folder, headers, [weight])[weight])

    return Source(file, folder, "GGUF", headers, layers, frozenset(others), read)
