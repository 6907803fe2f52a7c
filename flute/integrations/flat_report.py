"""What a FlatQuant checkpoint holds, from its config.json and its files' headers: no tensor is read.

The folder is held against the model that its config describes, as the loader does it: built on the meta device,
flattened, and compared tensor by tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..checkpoint.files import CONFIG, inside, read_json
from ..checkpoint.shards import read_headers
from ..errors import CheckpointError, SpecError
from ..flatquant.fold import MODULE_OF, SITE_OF
from ..flatquant.modules import Heads, Site
from ..flatquant.spec import FlatSpec
from .flatblocks import blocks_of, flatten
from .flatquant import check_files
from .folders import skeleton

_PARTS = ("weight", "weight_scale", "weight_zero", "scales")


@dataclass(frozen=True)
class FlatLayer:
    """One layer: its name, (N, K), bits of its weights and of what goes into it, sizes of the factors in front of it,
    bytes on disk of its integers, scales and zeros."""

    name: str
    shape: tuple[int, int]
    weight_bits: int
    activation_bits: int
    transform: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class FlatReport:
    """``layers``: those of all blocks. ``head_transform``: size of the matrix behind the rotary embedding, 0: none.
    ``transform_bytes``: of factors, clips and offsets. ``dense_bytes``: of everything else."""

    folder: Path
    spec: FlatSpec
    layers: tuple[FlatLayer, ...]
    head_transform: int
    transform_bytes: int
    dense_bytes: int

    @property
    def weights(self) -> int:
        """How many the layers have."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def layer_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.layer_bytes + self.transform_bytes + self.dense_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder),
            "quantization_config": self.spec.to_dict(),
            "layers": [
                {"name": layer.name, "shape": list(layer.shape), "weight_bits": layer.weight_bits,
                 "activation_bits": layer.activation_bits, "transform": list(layer.transform), "bytes": layer.nbytes}
                for layer in self.layers
            ],
            "head_transform": self.head_transform,
            "weights": self.weights,
            "layer_bytes": self.layer_bytes,
            "transform_bytes": self.transform_bytes,
            "dense_bytes": self.dense_bytes,
            "bytes": self.nbytes,
        }  # fmt: skip


def report(folder: Path) -> FlatReport:
    """Check a FlatQuant checkpoint strictly and say what it holds.

    Raises:
        CheckpointError: config.json or a header breaks a rule; one line.
        IntegrationError: transformers cannot build the model, or its blocks are of another kind.
    """
    try:
        spec = FlatSpec.from_dict(read_json(inside(folder, CONFIG))["quantization_config"])
        spec.check_storable()
    except SpecError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    headers, model = read_headers(folder), skeleton(folder)
    prefix, blocks = blocks_of(model)
    for block in blocks:
        flatten(block, spec, real=True)
    check_files(model, sorted({str(inside(folder, entry.file)) for entry in headers.values()}))
    left = {name: entry.nbytes for name, entry in headers.items()}
    layers, transforms = [], 0
    for index, block in enumerate(blocks):
        sites = {name: cast(Site, block.get_submodule(MODULE_OF[site])) for name, site in SITE_OF.items()}
        for name, site in sites.items():
            layer = cast(Any, block.get_submodule(name))
            whole = f"{prefix}.{index}.{name}"
            nbytes = sum(left.pop(f"{whole}.{part}", 0) for part in _PARTS)
            factors = tuple(len(each) for each in (site.left, site.right) if each is not None)
            shape = (layer.out_features, layer.in_features)
            layers.append(FlatLayer(whole, shape, spec.weight_bits(name), spec.activation_bits(name), factors, nbytes))
        held = [f"{prefix}.{index}.{path}." for path in (*MODULE_OF.values(), "self_attn.heads")]
        transforms += sum(left.pop(name) for name in list(left) if name.startswith(tuple(held)))
    heads = cast(Heads, blocks[0].get_submodule("self_attn.heads"))
    size = 0 if heads.key is None else len(heads.key)
    return FlatReport(folder, spec, tuple(layers), size, transforms, sum(left.values()))
