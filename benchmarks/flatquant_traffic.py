"""What one step of FlatQuant's calibration does, counted on tensors without data: nothing runs, no GPU is needed.

    python -m benchmarks.flatquant_traffic llama-3.1-8b --amp > benchmarks/results/flatquant_traffic.txt

Products in FLOP by the operands' dtype; bytes that operators read and write, those of products apart; launches; and the
most bytes that are alive at once, besides the block's own weights. A step is the loss of one batch and its gradient.
What a GPU keeps in its caches, or a compiler fuses, is not told apart, so bytes are an upper bound of memory traffic.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from flute.bench.model import load_config
from flute.flatquant.fold import FACTORS_OF
from flute.flatquant.initial import identity
from flute.flatquant.learned import Learned
from flute.flatquant.sizes import factor_sizes
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations.flatblocks import flatten, shape_of
from flute.methods.capture import Call
from flute.methods.flat_train import Job

_PRODUCTS = ("mm", "bmm", "addmm")


class Traffic(TorchDispatchMode):
    """Adds up what operators do. ``flop`` by dtype, ``bytes`` and ``launches`` by operator, ``most`` bytes alive."""

    def __init__(self) -> None:
        super().__init__()
        self.flop: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.launches, self.most = 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        if func.overloadpacket in flop_registry:
            flop = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            self.flop[str(given[0].dtype).removeprefix("torch.")] += flop
        if made and not func.is_view and "empty" not in func.overloadpacket.__name__:
            self.launches += 1
            self.bytes[func.overloadpacket.__name__] += sum(map(_touched, given + made))
        if made and not func.is_view:
            self._look(made)
        return out

    def _look(self, made: list[torch.Tensor]) -> None:
        for tensor in made:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of different elements: of what is expanded, one each."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


class Step(Job):
    """A job of one batch without data."""

    def __init__(self, config: Any, spec: FlatSpec, batch: int, window: int, amp: bool) -> None:
        config.num_hidden_layers = 1
        block = AutoModelForCausalLM.from_config(config, dtype=torch.float32).get_decoder().layers[0]
        block.requires_grad_(False)
        dense, shape = dict(block.named_parameters()), shape_of(block)
        flatten(block, spec)
        sizes = {"key": shape.head_dim}
        for site, names in FACTORS_OF.items():
            pair = (shape.heads, shape.head_dim) if site == "out" else factor_sizes(shape.features(site))
            sizes |= dict(zip(names, pair, strict=True))
        scales = {site: torch.ones(shape.features(site)) for site in ("attn", "mlp", "down")}
        scales["value"] = torch.ones(shape.kv_heads * shape.head_dim)
        self.learned = Learned(spec, shape, {name: identity(size) for name, size in sizes.items()}, scales)
        hidden = torch.zeros(batch, window, shape.hidden)
        turns = torch.zeros(1, window, shape.head_dim)
        self.block, self.dense, self.hidden, self.truth, self.amp = block, dense, [hidden], [hidden], amp
        self.call, self.device = (
            Call((), {"attention_mask": None, "position_embeddings": (turns, turns)}),
            hidden.device,
        )


def count(config: Any, spec: FlatSpec, batch: int, window: int, amp: bool) -> Traffic:
    """The traffic of one step."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step, traffic = Step(config, spec, batch, window, amp), Traffic()
        with traffic:
            step.loss(step.learned, 0).backward()
    return traffic


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="llama-3.1-8b", help="a name of flute bench model, or a config")
    parser.add_argument("--preset", default="w4a4kv4", choices=PRESETS)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--cali_bsz", type=int, default=4)
    parser.add_argument("--amp", action="store_true")
    options = parser.parse_args(arguments)
    made = count(load_config(options.model), PRESETS[options.preset], options.cali_bsz, options.window, options.amp)
    products = sum(made.bytes[name] for name in _PRODUCTS)
    for dtype, flop in made.flop.items():
        print(f"{flop / 1e12:8.4g} TFLOP of products in {dtype}")
    print(f"{products / 1e9:8.1f} GB read and written by products")
    print(f"{(made.bytes.total() - products) / 1e9:8.1f} GB by other operators")
    print(f"{made.launches:8d} launches")
    print(f"{made.most / 1e9:8.1f} GB alive at once")


if __name__ == "__main__":
    main()
