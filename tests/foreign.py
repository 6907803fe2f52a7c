"""Checkpoints as other owners write them, packed here from their published layouts, bit by bit, without their code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
_NOT_LAYERS = ("embed_tokens", "lm_head", "gate", "shared_expert_gate")
Parts = dict[str, torch.Tensor]


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of integers as rows of int32, the first value in the lowest bits."""
    count = -(-values.shape[1] * bits // 32)
    ones = (values.numpy()[:, :, None] >> np.arange(bits)) & 1  # every bit for itself, in the order of the stream
    stream = np.zeros((len(values), 32 * count), dtype=np.uint8)
    stream[:, : values.shape[1] * bits] = ones.reshape(len(values), -1)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


def integers(rows: int, width: int, group: int, bits: int, zeros: Any, dtype: torch.dtype = torch.float16) -> Any:
    """Random q (N, K), z (N, G) drawn from ``zeros``, s (N, G), and W = (q - z) * s one by one."""
    q = torch.randint(1 << bits, (rows, width))
    z = torch.tensor(zeros)[torch.randint(len(zeros), (rows, width // group))]
    s = (0.002 + 0.02 * torch.rand(rows, width // group)).to(dtype)
    exact = (q - z.repeat_interleave(group, 1)).double() * s.repeat_interleave(group, 1).double()
    return q, z, s, exact.to(dtype)


def gptq(q: torch.Tensor, z: torch.Tensor, s: torch.Tensor, bits: int, *, v1: bool = True) -> Parts:
    """GPTQ's tensors of a layer, groups in order."""
    group = q.shape[1] // z.shape[1]
    return {
        ".qweight": words(q, bits).t().contiguous(),
        ".qzeros": words(z.t() - int(v1), bits),
        ".scales": s.t().contiguous(),
        ".g_idx": (torch.arange(q.shape[1]) // group).int(),
    }


def awq(q: torch.Tensor, z: torch.Tensor, s: torch.Tensor) -> Parts:
    """AWQ's tensors of a layer: of eight outputs the even ones lie in the lower half of a word."""
    order = [8 * block + place for block in range(len(q) // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    return {
        ".qweight": words(q.t()[:, order], 4), ".qzeros": words(z.t()[:, order], 4), ".scales": s.t().contiguous(),
    }  # fmt: skip


def compressed(q: torch.Tensor, z: torch.Tensor | None, s: torch.Tensor, bits: int) -> Parts:
    """compressed-tensors' tensors of a layer; z None: symmetric."""
    parts = {".weight_packed": words(q, bits), ".weight_scale": s, ".weight_shape": torch.tensor(q.shape)}
    return parts if z is None else {**parts, ".weight_zero_point": words(z.t(), bits).t().contiguous()}


def nf4_like(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, kind: str, block: int, dtype: str
) -> Parts:
    """bitsandbytes' tensors of a layer without double quantization."""
    flat = codes.flatten().to(torch.uint8)
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(codes.shape)}
    return {
        ".weight": (flat[0::2] << 4 | flat[1::2]).unsqueeze(1),
        ".weight.absmax": absmax,
        ".weight.quant_map": table,
        f".weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def hqq(q: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int]) -> Parts:
    """HQQ's tensors of a layer at 4 bits: groups (B, g), the first half of them in the high bits."""
    half = len(q) // 2
    text = {".packing": "4bit_u8", ".compute_dtype": "torch.float16"}
    numbers = {".nbits": 4, ".group_size": q.shape[1], ".axis": 1, ".view_as_float": 0}
    return {
        ".W_q": (q[:half] << 4 | q[half:]).byte(), ".scale": scale, ".zero": zero, ".shape": torch.tensor(shape),
        **{name: torch.tensor(list(value.encode()), dtype=torch.uint8) for name, value in text.items()},
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
    }  # fmt: skip


def flute_words(codes: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    """Codes (N, K) as upstream FLUTE packs them: int16 (N b / 16, K)."""
    code, (rows, width) = codes.numpy().astype(np.int64), codes.shape
    packed = np.zeros((rows * bits // 16, width), dtype=np.int64)
    if bits == 3:
        n, k = np.ogrid[:rows, :width:2]
        chunk, block, t = n // 512, n % 512 // 32, n % 32
        six = code[:, 1::2] | code[:, 0::2] << 3

        def put(plane: Any, shift: Any, value: Any, where: Any) -> None:
            row = np.where(plane == 0, 32 * chunk + t, rows // 16 + 64 * chunk + 32 * (plane - 1) + t)
            row, column, value = (part[where[:, 0]] for part in np.broadcast_arrays(row, k, value << shift))
            np.bitwise_or.at(packed, (row, column), value & 0xFFFF)
            np.bitwise_or.at(packed, (row, column + 1), value >> 16)

        put(block % 3, 6 * (block // 3), six, block < 15)
        for plane in range(3):
            put(np.full_like(block, plane), 30, six >> 2 * plane & 3, block == 15)
    else:
        slots = 16 // bits
        p, column = np.ogrid[: packed.shape[0], :width]
        for s in range(slots):
            k = column // 2 * 2 + 1 - s % 2
            n = p // tile * slots * tile + (slots // 2 * (column % 2) + s // 2) * tile + p % tile
            packed |= code[n, k] << bits * s
    return torch.from_numpy(packed.astype(np.uint16).view(np.int16))


def gguf_writer(path: Path, architecture: str) -> Any:
    """Of a file of llama.cpp for a model of `SIZES` with one layer and 97 tokens; tensors are to be added."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(128)
    writer.add_block_count(1)
    writer.add_feed_forward_length(192)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(97)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", "AB", *(chr(33 + i) for i in range(93))])
    writer.add_token_types([3, 3, 3] + [1] * 94)
    writer.add_token_merges(["A B"])
    for name, number in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    return writer


def written(writer: Any) -> None:
    """Finish such a file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def checkpoint(
    folder: Path,
    layer: Callable[[str, nn.Linear], Parts],
    config: dict[str, Any] | None,
    *,
    dtype: torch.dtype = torch.float16,
    shards: int = 1,
    family: str = "Llama",
    **sizes: Any,
) -> Path:
    """A tiny model in ``folder`` whose decoder layers have the tensors that ``layer`` makes, in so many files.

    ``layer``: the name of a matrix on disk, and a linear layer of its shape.
    """
    build(family, dtype, **{**SIZES, **sizes}).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key, weight in list(tensors.items()):  # as they are on disk: matrices of experts one by one
        name = key.removesuffix(".weight")
        if weight.dim() == 2 and name.rpartition(".")[2] not in _NOT_LAYERS:
            linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            parts = layer(name, linear)
            del tensors[key]
            tensors |= {name + part: tensor.clone().contiguous() for part, tensor in parts.items()}
    values = json.loads((folder / "config.json").read_text())
    if config is not None:
        values["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").unlink()
    names = (
        [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    placed = {name: names[place % len(names)] for place, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in placed if placed[name] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder
