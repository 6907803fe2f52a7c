"""How the tensor copy engine finds boxes of x: descriptors made by cuda-core and remembered, 128-byte swizzle."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


class _Address:
    """Device memory as an array interface that owns nothing: a cached tensor map must not keep a tensor alive."""

    def __init__(self, pointer: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {"data": (pointer, False), "shape": shape, "typestr": "<u2", "version": 3}


@lru_cache(maxsize=4096)
def tensor_map(device: int, pointer: int, m: int, k: int, tokens: int) -> Any:
    """How to find boxes of 64 k x ``tokens`` in x (m, k), 16 bits each; only numbers, so it is good for any such x."""
    from cuda.core import Device
    from cuda.core._tensor_map import TensorMapDescriptorOptions, TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    options = TensorMapDescriptorOptions(
        box_dim=(tokens, 64),
        swizzle=TensorMapSwizzle.SWIZZLE_128B,
        l2_promotion=TensorMapL2Promotion.L2_256B,
    )
    with torch.cuda.device(device):  # made in the context it is used in, which a new thread has not yet
        Device(device).set_current()
        view = StridedMemoryView.from_cuda_array_interface(_Address(pointer, (m, k)), stream_ptr=-1)
        return view.as_tensor_map(options=options)
