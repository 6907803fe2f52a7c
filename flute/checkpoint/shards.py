"""The safetensors files of a folder: their headers, checked, and a writer that holds one tensor at a time.

``safetensors`` itself writes a file from tensors that are all in memory. Here shapes and dtypes of everything are known
before the first tensor is made, so the header is written first and each tensor goes to its place when it is ready.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, FluteError
from .atomic import whole_file
from .files import inside, read_json, refuse

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_POINTER = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.pkl", "*.ckpt")

# Names of dtypes in a safetensors header -> torch. Only what a model in this engine can consist of.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """One line of a header: dtype in safetensors' spelling, shape, and the file that holds the tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def joined(parts: Sequence[TensorInfo], shape: tuple[int, ...]) -> TensorInfo:
    """The header line of the tensor of ``shape`` that the rows of ``parts`` make up; if they do not, the first's."""
    first = parts[0]
    alike = all(part.dtype == first.dtype and part.shape[-1:] == shape[-1:] for part in parts)
    fits = alike and len(parts) > 1 and sum(math.prod(part.shape) for part in parts) == math.prod(shape)
    return first._replace(shape=shape) if fits else first


def info(dtype: torch.dtype, shape: tuple[int, ...], file: str) -> TensorInfo:
    """The header line of a tensor of this dtype and shape."""
    return TensorInfo(_NAMES[dtype], tuple(shape), file)


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """The safetensors file ``path``, opened for reading tensors one by one (memory-mapped).

    Raises:
        CheckpointError: the file is missing, truncated or damaged; the line names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FluteError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download or copy it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_why(path, error)}; download or copy it again") from None


def _why(path: Path, error: Exception) -> str:
    """Expected and found size when the header tells, else the library's own words."""
    text = " ".join(str(error).split()) or type(error).__name__
    try:
        with open(path, "rb") as file:
            found = file.seek(0, 2)
            file.seek(0)
            if file.read(len(_POINTER)) == _POINTER:
                return "it is a pointer of Git LFS, without the file (git lfs pull)"
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, found)))
        header.pop("__metadata__", None)
        expected = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"damaged or truncated ({text})"
    return text if expected == found else f"it has {found:,} bytes and its header promises {expected:,}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in one safetensors file; no tensor is read.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or has a dtype that is not used here.
    """
    with open_shard(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        found = {
            name: TensorInfo(part.get_dtype(), tuple(part.get_shape()), path.name) for name, part in slices.items()
        }
    odd = [f"tensor {name!r} is {entry.dtype}" for name, entry in found.items() if entry.dtype not in DTYPES]
    if odd:
        refuse(path, [*odd, f"use one of {', '.join(DTYPES)}"])
    return found


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model folder: one ``model.safetensors``, or the shards that its index names.

    Raises:
        CheckpointError: no safetensors, a damaged or missing shard, or index and shards disagree; all problems at once.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a folder that holds a model")
    if (folder / SINGLE).exists():  # before an index, as transformers does
        return read_header(inside(folder, SINGLE))
    if not (folder / INDEX).exists():
        _refuse_without_index(folder)
    weight_map = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download or copy it again")
    names = sorted({inside(folder, name).name for name in weight_map.values()})
    problems: list[str] = []
    found: dict[str, TensorInfo] = {}
    for name in names:
        try:
            header = read_header(inside(folder, name))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        placed = {tensor for tensor, file in weight_map.items() if file == name}
        problems += [
            f"{name} holds {tensor!r}, which the index does not place there" for tensor in header.keys() - placed
        ]
        problems += [
            f"{name} does not hold {tensor!r}, which the index places there" for tensor in placed - header.keys()
        ]
        found.update(header)
    if len(problems) == 1:
        raise CheckpointError(problems[0] if str(folder) in problems[0] else f"{folder}: {problems[0]}")
    if problems:
        refuse(folder, problems)
    return found


def _refuse_without_index(folder: Path) -> NoReturn:
    lacking = f"{folder} has no {SINGLE} and no {INDEX}"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise CheckpointError(f"{lacking}, but {shards[0]}: its download is not complete; download it again")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    hint = f"; {pickles[0]} is a pickle, which can run code and is never read: " if pickles else "; "
    raise CheckpointError(f"{lacking}{hint}save the model as safetensors first")


def index_json(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The index of a folder with these tensors."""
    total = sum(entry.nbytes for entry in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": {name: tensors[name].file for name in sorted(tensors)}}


class ShardWriter:
    """Writes one safetensors file whose tensors come one at a time, in any order. Made by `write_shard`."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, TensorInfo]) -> None:
        # widest dtype first, then by name, as safetensors does: every tensor is then aligned to its own width
        order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            dtype, shape, _ = tensors[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + tensors[name].nbytes]}
            end += tensors[name].nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._file, self._start = file, 8 + len(text)
        self._left = {name: (tensors[name], header[name]["data_offsets"][0]) for name in order}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its place; it must be what the header announced."""
        entry, offset = self._left.pop(name)
        found = (_NAMES.get(tensor.dtype), tuple(tensor.shape))
        if found != (entry.dtype, entry.shape):
            raise CheckpointError(f"tensor {name!r} is {found}, announced as {(entry.dtype, entry.shape)}")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(self._start + offset)
        self._file.write(raw.data)

    def close(self) -> None:
        """Refuse a file in which something announced is missing."""
        if self._left:
            raise CheckpointError(f"tensor {next(iter(self._left))!r} was announced and not written")


@contextmanager
def write_shard(path: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[ShardWriter]:
    """A safetensors file with these tensors, to be filled one by one; it appears whole or not at all."""
    with whole_file(path) as file:
        writer = ShardWriter(file, tensors)
        yield writer
        writer.close()
