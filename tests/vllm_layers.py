"""Run by vLLM's own Python (see test_vllm.py): its layers, one by one, load weights and multiply with them.

``vllm_layers.py [SOURCES]``, as `vllm_sources` takes them.
"""

import torch
from vllm_sources import PACKED, one_rank, say

import flute
from flute import QuantSpec
from flute.config import ModelSpec
from flute.packing import pack_codes

FOUR, THREE, OWN = QuantSpec(4, 32, "nf4"), QuantSpec(3, 32, "nf3"), QuantSpec(4, 32, "custom")
ZEROS = QuantSpec(4, 32, "int4", zero_points=True)
TABLE = torch.linspace(-1, 1, 16)


def weight(n: int, k: int, spec: QuantSpec = FOUR) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales as in a file, and W."""
    table = TABLE if spec is OWN else None
    made = flute.quantize(torch.randn(n, k), spec, table=table, scale_dtype=torch.float32)
    return pack_codes(made.codes, spec.code_bits), made.scales, flute.dequantize(*made, spec, table=table)


def with_zeros(n: int, k: int, _: QuantSpec = ZEROS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, W and zero points."""
    codes = torch.randint(16, (n, k), dtype=torch.uint8)
    scales, zeros = 0.1 * torch.rand(n, k // 32), torch.randint(-8, 8, (n, k // 32)).float()
    return pack_codes(codes, 4), scales, flute.dequantize(codes, scales, ZEROS, zeros=zeros), zeros


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of float32 in another order: the error is small beside the largest number."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def linears(config: object) -> None:
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    keywords = {"quant_config": config, "params_dtype": torch.float32}
    plain = {**keywords, "bias": False}
    cases = [
        (linear.QKVParallelLinear(128, 32, 4, 2, prefix="a.qkv_proj", **plain),
         {"q": weight(128, 128), "k": weight(64, 128), "v": weight(64, 128, THREE)}),
        (linear.MergedColumnParallelLinear(128, [96, 96], prefix="a.gate_up_proj", **plain),
         {0: weight(96, 128), 1: weight(96, 128)}),
        (linear.QKVParallelLinear(128, 32, 4, 2, prefix="b.qkv_proj", **plain),
         {"q": with_zeros(128, 128), "k": with_zeros(64, 128), "v": weight(64, 128, THREE)}),
        (linear.RowParallelLinear(128, 96, prefix="a.o_proj", **plain), {None: weight(96, 128, OWN)}),
        (linear.ReplicatedLinear(128, 96, prefix="a.other_proj", **plain), {None: weight(96, 128)}),
        (ParallelLMHead(100, 128, prefix="lm_head", **keywords), {None: weight(100, 128)}),
    ]  # fmt: skip
    for layer, parts in cases:
        for part, (codes, scales, _, *zeros) in parts.items():
            which = () if part is None else (part,)
            layer.weight.weight_loader(layer.weight, codes, *which)
            layer.scales.weight_loader(layer.scales, scales, *which)
            for held in zeros:
                layer.zeros.weight_loader(layer.zeros, held, *which)
        if layer.table is not None:
            layer.table.weight_loader(layer.table, TABLE)
        layer.quant_method.process_weights_after_loading(layer)
        x, dense = torch.randn(3, 128), torch.cat([part[2] for part in parts.values()])
        y = layer.quant_method.apply(layer, x)[:, : len(dense)]
        check(y, x @ dense.T)
        say(f"{type(layer).__name__}, {len(layer.runs)} launch(es)")


def experts(config: object, prefix: str, *, zeros: bool) -> None:
    from vllm.model_executor.layers.fused_moe import layer as module

    make = getattr(module, "FusedMoEFactory", None) or module.FusedMoE  # the older name
    layer = make(
        num_experts=4, top_k=2, hidden_size=128, intermediate_size=64, params_dtype=torch.float32, quant_config=config,
        prefix=prefix,
    ).routed_experts  # fmt: skip
    shapes = {"gate_proj": (64, 128, FOUR), "up_proj": (64, 128, FOUR), "down_proj": (128, 64, THREE)}
    kinds = {name: with_zeros if zeros and spec is FOUR else weight for name, (*_, spec) in shapes.items()}
    made = {(e, name): kinds[name](*shape) for e in range(4) for name, shape in shapes.items()}
    ends = {"weight": 0, "scales": 1, "zeros": 3}
    files = [(f"{e}.{name}.{end}", parts[i]) for (e, name), parts in made.items() for end, i in ends.items()
             if i < len(parts)]  # fmt: skip
    list(layer.load_weights(files))
    layer.quant_method.process_weights_after_loading(layer)
    x, chosen = torch.randn(3, 128), torch.tensor([[0, 1], [2, 3], [1, 3]], dtype=torch.int32)
    shares, expected = torch.rand(3, 2), torch.zeros(3, 128)
    for token, place in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        gate, up, down = (made[int(chosen[token, place]), name][2] for name in shapes)
        inner = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
        expected[token] += shares[token, place] * (down @ inner)
    y = layer.forward_modular(x=x, topk_weights=shares, topk_ids=chosen, shared_experts=None, shared_experts_input=None)
    check(y, expected)
    say(f"{type(layer).__name__}, {type(layer.lut).__name__}")


def main() -> None:
    torch.manual_seed(0)
    asymmetric = {"table": "int4", "zero_points": True}
    overrides = {
        "b.q_proj": asymmetric,
        "b.k_proj": asymmetric,
        "*.v_proj": {"bits": 3},
        "*.o_proj": {"table": "custom"},
        "*.experts.down_proj": {"bits": 3},
        "z.experts.gate_up_proj": asymmetric,
    }
    with one_rank():
        from vllm.model_executor.layers.quantization import get_quantization_config

        record = ModelSpec(FOUR, overrides, lm_head=True, experts=True)
        config = get_quantization_config("flute").from_config(record.to_dict())
        config.packed_modules_mapping = PACKED
        linears(config)
        experts(config, "m.experts", zeros=False)
        experts(config, "z.experts", zeros=True)


if __name__ == "__main__":
    main()
