"""Run by vLLM's own Python (see test_vllm.py): layers of a FlatQuant block, filled by vLLM's loader from a checkpoint's
names, give the bits of the modules that these tensors were taken from.

``vllm_flat_layers.py [SOURCES]``, as `vllm_sources` takes them. In float16 on a GPU where there is one, so that the
kernels run, in float32 elsewhere.
"""

import torch
from vllm_sources import PACKED, one_rank, say

from flute.errors import CheckpointError, SpecError
from flute.flatquant.fold import MODULE_OF, SITE_OF
from flute.flatquant.learned import clips, site_bits
from flute.flatquant.modules import IntLinear, Site
from flute.flatquant.spec import FlatSpec

DTYPE = torch.float16 if torch.cuda.is_available() else torch.float32
SPECS = {
    "W4A4": FlatSpec(),
    "all that differs": FlatSpec(4, 8, down_bits=8, a_asym=True, separate_clips=True, separate_vtrans=True),
    "zeros of weights": FlatSpec(8, 8, w_asym=True),
}
FACTORS = {"attn": (8, 16), "out": (4, 32), "mlp": (8, 16), "down": (8, 12)}  # 4 heads of 32 channels
ROWS = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 128, "gate_proj": 96, "up_proj": 96, "down_proj": 128}


def transform(spec: FlatSpec, site: str) -> Site:
    """One with random factors and clips."""
    rows, columns = FACTORS[site]
    columns = 0 if site == "out" and not spec.separate_vtrans else columns
    made = Site(
        rows, columns, site_bits(spec, site), symmetric=not spec.a_asym, clips=clips(spec, site), real=True,
        dtype=DTYPE,
    )  # fmt: skip
    for name, part in made.named_parameters():
        part.data += -0.2 * torch.rand_like(part) if name == "clip" else 0.1 * torch.randn_like(part)
    return made


def integers(spec: FlatSpec, name: str, features: int) -> IntLinear:
    """A layer with random numbers everywhere."""
    bits, zeros = spec.weight_bits(name), {"w_asym": spec.w_asym, "a_asym": spec.a_asym}
    made = IntLinear(features, ROWS[name.rpartition(".")[2]], bits, bias=True, dtype=DTYPE, **zeros)
    made.weight.data.random_(256 if bits <= 4 else 128)
    made.weight_scale.data.uniform_(0.001, 0.01)
    made.bias.data.normal_()
    if made.weight_zero is not None:
        made.weight_zero.data.random_(-100, 100)
    made.arrange()
    return made


def block(spec: FlatSpec, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A block's tensors by their names in a checkpoint, and what the layers of each site make of its input."""
    names = ("key", "query", "offset", "k_clip", "v_clip", "q_clip")  # vLLM has no place for these
    files, made = {f"self_attn.heads.{name}": torch.ones(32) for name in names}, {}
    for site, x in inputs.items():
        before = transform(spec, site)
        for name, part in before.named_parameters():
            values = site == "out" and name == "right"
            files["self_attn.heads.value" if values else f"{MODULE_OF[site]}.{name}"] = part.data
        layers = {name: integers(spec, name, x.shape[-1]) for name, each in SITE_OF.items() if each == site}
        files |= {f"{name}.{part}": held for name, layer in layers.items() for part, held in layer.state_dict().items()}
        given = before(x)
        made[site] = torch.cat([layer(given[i % len(given)]) for i, layer in enumerate(layers.values())], -1)
    return files, made


def empty(spec: FlatSpec) -> torch.nn.Module:
    """vLLM's linear modules of a block, under the names that its Llama gives them."""
    from transformers import LlamaConfig
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config("flatquant").from_config(spec.to_dict())
    config.packed_modules_mapping = PACKED
    config.maybe_update_config("nowhere", LlamaConfig(num_attention_heads=4))
    keywords = {"quant_config": config, "params_dtype": DTYPE, "bias": True}
    made = torch.nn.Module()
    made.quant_config, made.self_attn, made.mlp = config, torch.nn.Module(), torch.nn.Module()
    made.self_attn.qkv_proj = linear.QKVParallelLinear(128, 32, 4, 2, prefix="0.self_attn.qkv_proj", **keywords)
    made.self_attn.o_proj = linear.RowParallelLinear(128, 128, prefix="0.self_attn.o_proj", **keywords)
    made.mlp.gate_up_proj = linear.MergedColumnParallelLinear(
        128, [96, 96], prefix="0.mlp.gate_up_proj", **keywords
    )  # fmt: skip
    made.mlp.down_proj = linear.RowParallelLinear(96, 128, prefix="0.mlp.down_proj", **keywords)
    return made


def loaded(spec: FlatSpec, files: dict[str, torch.Tensor]) -> dict[str, torch.nn.Module]:
    """These modules by the site before them, filled by vLLM's loader with the rules of its Llama."""
    from vllm.model_executor.models.llama import LlamaModel
    from vllm.model_executor.models.utils import AutoWeightsLoader

    model = torch.nn.Module()
    model.add_module("0", empty(spec))
    named = [(f"0.{name}", tensor) for name, tensor in files.items()]
    AutoWeightsLoader(model).load_weights(named, mapper=LlamaModel.hf_to_vllm_mapper)
    attention, mlp = model.get_submodule("0.self_attn"), model.get_submodule("0.mlp")
    layers = {"attn": attention.qkv_proj, "out": attention.o_proj, "mlp": mlp.gate_up_proj, "down": mlp.down_proj}
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    return layers


def refused(error: type[Exception], words: str, make: object, *arguments: object, **keywords: object) -> None:
    try:
        make(*arguments, **keywords)
    except error as found:
        assert words in str(found), found
        say(found)
    else:
        raise AssertionError(f"not refused: {words}")


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = {site: torch.randn(3, rows * columns, dtype=DTYPE) for site, (rows, columns) in FACTORS.items()}
    with one_rank():
        for kind, spec in SPECS.items():
            files, expected = block(spec, inputs)
            for site, layer in loaded(spec, files).items():
                assert torch.equal(layer(inputs[site])[0], expected[site]), (kind, site)
                assert bool(torch.isfinite(expected[site]).all())
            say(f"a FlatQuant block, {kind}: the same bits")
        left = "mlp.input_transform.left"
        lacking = {name: tensor for name, tensor in files.items() if name != left}
        refused(CheckpointError, "mlp.input_transform': the checkpoint lacks its left", loaded, spec, lacking)
        wrong = {**files, left: torch.ones(4, 4)}
        refused(CheckpointError, f"{left}': the file has (4, 4) of torch.float32 where", loaded, spec, wrong)
        layer = empty(SPECS["W4A4"]).self_attn.o_proj
        refused(
            SpecError, "33 of 66 columns per rank do not fill whole bytes at 4 bits; use fewer ranks",
            layer.quant_method.create_weights, layer, 33, [128], 66, 128, torch.float32, weight_loader=None,
        )  # fmt: skip


if __name__ == "__main__":
    main()
