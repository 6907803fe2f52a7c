"""GGUF files of llama.cpp: blocks of 32 weights of a row, each with a float16 scale d.

::

    Q4_0     W = d * (q - 8)            block: d, then 16 bytes; byte i holds weight i low and weight i + 16 high
    IQ4_NL   W = d * kvalues[q]         the same with a table of 16 integers
    Q4_1     W = d * q + m              a minimum in every block: no table times scale
    Q8_0, K-quants, IQ2, ...            256 levels, scales of scales and minima, codebooks: not ours either

transformers unpacks the file, renames tensors and reorders rows where llama.cpp has them in another order (q and k of
the Llama family). The order of rows is asked from transformers by letting it reorder row numbers, so that codes end
where the weights end; `represent` compares both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...checkpoint.files import refuse
from ...errors import IntegrationError
from .exact import Levels, Stored

_BLOCK = 32
_INTEGERS = tuple(range(-8, 8))
_STACK = re.compile(r"\.ffn_(gate|up|down)_exps\.weight$")  # experts' matrices, one tensor for all
_PLAIN = ("F16", "F32", "BF16", "F64")
_REASONS = {"Q4_1": "its blocks have a minimum beside the scale", "Q8_0": "it has 8 bits, a table at most 4"}


class Blocks(NamedTuple):
    """A quantized matrix: name of its type, its bytes (N, row_bytes) in the file, and which of them is row n of W."""

    kind: str
    packed: Any
    rows: Any


def layers(file: Path, folder: Path) -> dict[str, Blocks]:
    """The quantized matrices of a GGUF file by the names of their layers in transformers.

    Args:
        file: the GGUF file. folder: the dense model that transformers made of it, for its config.json.

    Raises:
        CheckpointError: the file lacks a tensor of the model, for which transformers would draw random numbers.
        IntegrationError: the file cannot be read.
    """
    import numpy
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as theirs

    from ..folders import skeleton

    try:
        reader = GGUFReader(file)
        settings: dict[str, Any] = theirs.load_gguf_checkpoint(str(file))["config"]
        kind = str(reader.fields["general.architecture"].contents())
        processor = theirs.TENSOR_PROCESSORS.get(kind, theirs.TensorProcessor)(config=settings)
        model = skeleton(folder)
        names = theirs.get_gguf_hf_weights_map(model, processor)
        # parameters that are stacks have no ".weight" in transformers
        names |= {f"{theirs_}.weight": name for theirs_, name in names.items() if not theirs_.endswith(".weight")}
        there = {names.get(tensor.name) for tensor in reader.tensors} | set(getattr(model, "all_tied_weights_keys", ()))
        missing = [name for name in names.values() if name not in there]
        found = {}
        for tensor in reader.tensors:
            name, type_ = names.get(tensor.name, ""), tensor.tensor_type.name
            if type_ in _PLAIN:
                continue
            stack = _STACK.search(tensor.name)
            if stack and len(tensor.shape) == 3:
                for expert, packed in enumerate(tensor.data):
                    layer = f"{name.rpartition('.')[0]}.{expert}.{stack[1]}_proj"
                    found[layer] = Blocks(type_, packed, numpy.arange(len(packed)))
            if not name.endswith(".weight") or len(tensor.shape) != 2:
                continue
            numbers = numpy.arange(len(tensor.data), dtype=numpy.int64)[:, None]
            rows = processor.process(weights=numbers, name=tensor.name).weights.flatten()
            found[name.removesuffix(".weight")] = Blocks(type_, tensor.data, rows)
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise IntegrationError(f"{file} cannot be read: {type(error).__name__} {line}") from error
    if missing:
        refuse(file, [f"{name} is missing" for name in missing])
    return found


def stored(blocks: Blocks, weight: torch.Tensor) -> Stored:
    """One layer, whose dequantized weight (N, K) is known."""
    if blocks.kind == "Q4_0":
        levels = _INTEGERS
    elif blocks.kind == "IQ4_NL":
        from gguf.quants import IQ4_NL

        levels = IQ4_NL.kvalues
    else:
        return Stored(weight, None, f"{blocks.kind}: {_REASONS.get(blocks.kind, 'it is no table times scale')}")
    packed = torch.from_numpy(blocks.packed[blocks.rows]).view(len(weight), -1, 2 + _BLOCK // 2)
    scales = packed[..., :2].contiguous().view(torch.float16).squeeze(-1)
    codes = torch.cat((packed[..., 2:] & 15, packed[..., 2:] >> 4), -1).flatten(1)
    return Stored(weight, Levels(codes, torch.tensor(levels, dtype=torch.float32), scales, _BLOCK, 4))
