"""Parameters that wait for a checkpoint's tensors: each rank copies its slice of rows and columns, nothing is repacked.

vLLM's layers say which part of a fused module a tensor is, and which rows of it belong to this rank; `slicing` knows
the columns. Parts may differ in bits and groups: each has as many columns of the common buffer as it needs. vLLM lets
tensors of quantized models be missing. So every parameter counts the tensors that it still waits for, floating ones are
full of NaN before they come, and `check_came` looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.parameter import BasevLLMParameter

from ...errors import CheckpointError
from ...spec import QuantSpec
from .slicing import Share

ShardId = int | str | tuple[int, ...] | None
_PLACES = {"q": 0, "k": 1, "v": 2}


def blank(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A buffer on the default device: NaN, or 0 for integers."""
    return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else 0, dtype=dtype)


def fixed(tensor: torch.Tensor) -> nn.Parameter:
    """What came, as a plain parameter."""
    return nn.Parameter(tensor, requires_grad=False)


class Part(NamedTuple):
    """One layer of the checkpoint in a module of vLLM.

    ``rows`` and ``columns`` are this rank's, ``whole`` the columns of the file, ``take`` leads from those to these.
    """

    rows: int
    columns: int
    whole: int
    take: Callable[[torch.Tensor], torch.Tensor]

    def copy(self, name: str, loaded: torch.Tensor, share: int, target: torch.Tensor) -> None:
        """Copy share number ``share`` of the rows of ``loaded``, a tensor (N, whole) of the file, to ``target``.

        Raises:
            CheckpointError: it has another shape or dtype; the line names the module ``name``.
        """
        floating, start = target.is_floating_point(), share * self.rows
        if loaded.is_floating_point() != floating or (not floating and loaded.dtype != target.dtype):
            raise CheckpointError(f"layer {name!r}: the file has {loaded.dtype} in the place of {target.dtype}")
        if loaded.dim() != 2 or loaded.shape[1] != self.whole or loaded.shape[0] < start + self.rows:
            raise CheckpointError(
                f"layer {name!r}: the file has a tensor {tuple(loaded.shape)} where config.json promises {self.whole} "
                f"columns and at least {start + self.rows} rows"
            )
        target.copy_(self.take(loaded.narrow(0, start, self.rows)))


def pair(rows: int, spec: QuantSpec, in_features: int, own: Share) -> tuple[Part, Part]:
    """Codes and scales of a layer of ``rows`` rows, stored as ``spec`` with K = ``in_features``, cut to ``own``."""
    here = own.spec.row_bytes(own.in_features), len(own.groups)
    whole = spec.row_bytes(in_features), spec.num_groups(in_features)
    return Part(rows, here[0], whole[0], own.take_codes), Part(rows, here[1], whole[1], own.take_scales)


class PartsParameter(BasevLLMParameter):
    """Codes (uint8) or scales of a module's parts: (rows of all parts, columns of the widest).

    Args:
        parts: one below the other.
        dtype: of the buffer.
        weight_loader: of vLLM's layer, which calls the ``load_`` methods.
        name: of the module, for messages.
    """

    output_dim = 0

    def __new__(cls, parts: Sequence[Part], dtype: torch.dtype, **_: Any) -> PartsParameter:
        """The buffer, as a Parameter."""
        shape = sum(part.rows for part in parts), max(part.columns for part in parts)
        return super().__new__(cls, data=blank(shape, dtype))

    def __init__(
        self, parts: Sequence[Part], dtype: torch.dtype, *, weight_loader: Callable[..., None], name: str
    ) -> None:
        super().__init__(data=self.data, weight_loader=_counting(weight_loader))
        self.owner, self.parts, self.waiting = name, tuple(parts), len(parts)
        self.starts = [sum(part.rows for part in parts[:place]) for place in range(len(parts))]

    def part(self, place: int) -> torch.Tensor:
        """This rank's rows and columns of part number ``place``."""
        return self.data.narrow(0, self.starts[place], self.parts[place].rows)[:, : self.parts[place].columns]

    def held(self) -> Iterator[torch.Tensor]:
        """All parts."""
        return map(self.part, range(len(self.parts)))

    def _copy(self, place: int, loaded: torch.Tensor, share: int) -> None:
        self.parts[place].copy(self.owner, loaded, share, self.part(place))

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """As vLLM calls it: rows are shared."""
        self._copy(0, loaded_weight, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """As vLLM calls it: columns are shared."""
        self._copy(0, loaded_weight, 0)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, *, shard_offset: int, **_: Any) -> None:
        """As vLLM calls it: one part of a fused module."""
        self._copy(self.starts.index(shard_offset), loaded_weight, self.tp_rank)

    def load_qkv_weight(
        self, loaded_weight: torch.Tensor, *, shard_id: str, shard_offset: int, num_heads: int, **_: Any
    ) -> None:
        """As vLLM calls it: q, k or v; ``num_heads`` neighbouring ranks have the same k and v."""
        share = self.tp_rank if shard_id == "q" else self.tp_rank // num_heads
        self._copy(self.starts.index(shard_offset), loaded_weight, share)


class NumbersParameter(PartsParameter):
    """A number for each row of a module's parts, (rows, 1); in the files (rows,). Arguments as of `PartsParameter`."""

    def _copy(self, place: int, loaded: torch.Tensor, share: int) -> None:
        super()._copy(place, loaded.unsqueeze(-1), share)


class WholeParameter(nn.Parameter):
    """A tensor of the checkpoint that every rank holds whole.

    Args:
        shape, dtype: of the buffer; what comes must have this shape, and float in the place of float.
        name: of the tensor in the checkpoint, for messages.
    """

    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, **_: Any) -> WholeParameter:
        """The buffer, as a Parameter."""
        return super().__new__(cls, blank(shape, dtype), requires_grad=False)

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, *, name: str) -> None:
        self.owner, self.waiting = name, 1
        self.weight_loader = _counting(self._load)

    def held(self) -> Iterator[torch.Tensor]:
        """Everything."""
        yield self.data

    def _load(self, _: nn.Parameter, loaded: torch.Tensor) -> None:
        if loaded.shape != self.shape or loaded.is_floating_point() != self.is_floating_point():
            raise CheckpointError(
                f"tensor {self.owner!r}: the file has {tuple(loaded.shape)} of {loaded.dtype} where config.json "
                f"promises {tuple(self.shape)} of {self.dtype}"
            )
        self.data.copy_(loaded)


class TablesParameter(nn.Parameter):
    """Tables of a module's parts, (parts, entries of the largest table).

    Args:
        shapes: of each part's table; None for parts whose table has a name.
        dtype: of the buffer.
        name: of the module, for messages.
    """

    def __new__(cls, shapes: Sequence[tuple[int, ...] | None], dtype: torch.dtype, **_: Any) -> TablesParameter:
        """The buffer, as a Parameter."""
        most = max(torch.Size(shape or ()).numel() for shape in shapes)
        return super().__new__(cls, blank((len(shapes), most), dtype), requires_grad=False)

    def __init__(self, shapes: Sequence[tuple[int, ...] | None], dtype: torch.dtype, *, name: str) -> None:
        self.owner, self.shapes, self.waiting = name, tuple(shapes), sum(shape is not None for shape in shapes)
        self.weight_loader = _counting(self._load)

    def part(self, place: int) -> torch.Tensor | None:
        """The table of part number ``place``, None if it has a name."""
        shape = self.shapes[place]
        return None if shape is None else self.data[place, : torch.Size(shape).numel()].view(shape)

    def held(self) -> Iterator[torch.Tensor]:
        """All tables without names."""
        return (table for table in map(self.part, range(len(self.shapes))) if table is not None)

    def _load(self, _: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        places: Sequence[int] = range(len(self.shapes))
        if shard_id is not None:
            ids = shard_id if isinstance(shard_id, tuple) else (shard_id,)
            places = [_PLACES[one] if isinstance(one, str) else one for one in ids]
        for place in places:
            table = self.part(place)
            if table is None or not loaded.is_floating_point() or loaded.shape != table.shape:
                promised = "none" if table is None else f"floats {tuple(table.shape)}"
                raise CheckpointError(
                    f"layer {self.owner!r}: the file has a table {tuple(loaded.shape)} of {loaded.dtype} where "
                    f"config.json promises {promised}"
                )
            table.copy_(loaded)


def _counting(load: Callable[..., None]) -> Callable[..., None]:
    """``load``, after which the parameter waits for fewer parts: none if the file has them all in one tensor."""

    def counted(param: Any, loaded_weight: torch.Tensor, shard_id: ShardId = None) -> None:
        if shard_id is None:
            load(param, loaded_weight)
            param.waiting = 0
        else:
            load(param, loaded_weight, shard_id)
            param.waiting -= len(shard_id) if isinstance(shard_id, tuple) else 1

    return counted


def check_came(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse what is missing or not finite in the parameters of module ``name``, by their names in the checkpoint.

    Where nothing was loaded at all (``--load-format dummy`` draws floats at random), codes are drawn at random, too.

    Raises:
        CheckpointError: one line.
    """
    missing = [key for key, parameter in parameters.items() if parameter.waiting > 0]
    odd = [
        key
        for key, parameter in parameters.items()
        if parameter.is_floating_point() and not all(bool(torch.isfinite(held).all()) for held in parameter.held())
    ]
    if len(missing) == len(parameters) and not odd:
        for parameter in parameters.values():
            if not parameter.is_floating_point():
                parameter.data.random_()
    elif missing:
        raise CheckpointError(f"layer {name!r}: the checkpoint lacks its {' and '.join(missing)}; download it again")
    elif odd:
        dtype = next(iter(parameters[odd[0]].held())).dtype
        raise CheckpointError(f"layer {name!r}: {' and '.join(odd)} hold NaN or Inf in {dtype}")
