"""What a FlatQuant decode step of Llama-3.1-8B spends its time on: kernels of one replayed step by name, as text.

    python -m benchmarks.flatquant_step --batch 1,16 --prompt 2048 > benchmarks/results/flatquant_step_h100.txt

Times are those of the kernels alone; kernels overlap where one is launched before the one ahead ends, so their sum may
exceed the step, whose time stands beside it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from flute.bench import model as bench
from flute.bench.decoder import Decoder, share_layer_step
from flute.bench.machine import describe
from flute.kernels.tokens_cuda import Problem

TRANSFORMS = ("kronecker", "quantize", "turn_heads")


def kernels(replay: object, steps: int) -> dict[str, tuple[float, float]]:
    """Microseconds and launches a step, by name."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            replay()  # type: ignore[operator]
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name][0] += event.time_range.elapsed_us() / steps
            found[event.name][1] += 1 / steps
    return {name: (us, count) for name, (us, count) in found.items()}


def report(model: object, batch: int, prompt: int, steps: int) -> None:
    """Print the table of one decode step."""
    with torch.no_grad():
        decoder = Decoder(model, batch, prompt, room=4 * steps, compiled=True)
        replay = bench._captured(decoder.step, warm_ups=2)
        decoder.rewind()
        step = 1e3 * bench._milliseconds(replay, 2 * steps)
        table = kernels(replay, steps)
    total = sum(us for us, _ in table.values())
    share = sum(us for name, (us, _) in table.items() if name in TRANSFORMS)
    print(f"batch {batch}, {prompt} tokens behind it: step {step:.0f} us, kernels {total:.0f} us")
    print(f"transforms {share:.0f} us, {share / total:.1%} of kernels, {share / step:.1%} of the step")
    for name, (us, count) in sorted(table.items(), key=lambda item: -item[1][0])[:20]:
        print(f"{us:9.1f} us {us / total:6.1%} {count:6.1f} launches {us / count:7.2f} us each  {name[:90]}")


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="llama-3.1-8b")
    parser.add_argument("--method", default="flatquant")
    parser.add_argument("--batch", default="1,16", help="numbers of sequences, with commas")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="then again with one block a token")
    options = parser.parse_args()
    model = bench.build(bench.Plan(options.config, dtype=torch.float16), options.method)
    share_layer_step(model, compiled=True)
    print(f"{describe()}; {options.config}, {options.method}, float16")
    for alone in (False, True) if options.alone else (False,):
        if alone:
            print("one block a token:")
            Problem.shared_among = lambda self, tokens, gpu: self  # type: ignore[method-assign]
        for batch in map(int, options.batch.split(",")):
            report(model, batch, options.prompt, options.steps)


if __name__ == "__main__":
    main()
