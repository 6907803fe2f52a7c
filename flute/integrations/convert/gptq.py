"""GPTQ checkpoints (AutoGPTQ, GPTQModel, transformers): W = s * (q - z), inputs first.

::

    NAME.qweight  int32 (K b / 32, N)     packed along K        NAME.scales  float16 (G, N)
    NAME.qzeros   int32 (G, N b / 32)     packed along N        NAME.g_idx   int32 (K,): group of every input

Format "gptq" (v1, also where none is named) holds z - 1, "gptq_v2" holds z. In v1 a stored 2^b - 1 may mean 2^b or,
after an overflow that also spoiled its neighbours, 0; such a layer is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError
from .exact import Format, Stored
from .uniform import uniform, whole_number, words


def read_format(config: dict[str, Any]) -> Format:
    """The format of a checkpoint with this ``quantization_config``."""
    bits, group = whole_number(config, "bits"), whole_number(config, "group_size", -1)
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"GPTQ checkpoint_format={version!r} is not read; gptq and gptq_v2 are")
    if bits not in (2, 3, 4, 8):
        raise CheckpointError(f"GPTQ with bits={bits} is not read; 2, 3, 4 and 8 are")
    if config.get("planar"):
        raise CheckpointError("GPTQ with planar words is not read; save it without")
    kind = f"GPTQ {'v2' if version == 'gptq_v2' else 'v1'} {bits} bit"
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")
    return Format(kind, parts, lambda name, found: stored(found, bits, group, v1=version == "gptq"))


def stored(parts: Mapping[str, torch.Tensor], bits: int, group_size: int, *, v1: bool) -> Stored:
    """One layer.

    Raises:
        CheckpointError: shapes or dtypes do not fit together.
    """
    qweight, scales = parts[".qweight"], parts[".scales"].t()
    width = qweight.shape[0] * 32 // bits
    q = words(qweight.t(), bits, width)
    zeros = words(parts[".qzeros"], bits, len(scales)).t().to(torch.int16) + v1
    made = uniform(q, zeros, scales, width if group_size == -1 else group_size, bits, parts.get(".g_idx"))
    overflowed = int((zeros > (1 << bits) - 1).sum())
    if overflowed:
        return Stored(made.weight, None, f"{overflowed:,} of its zero points have overflowed, as v1 may")
    return made
