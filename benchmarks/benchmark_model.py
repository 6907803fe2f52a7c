"""The published program's benchmark of a whole model, with its flags: FlatQuant's speed beside torch's 16-bit model.

    python -m benchmarks.benchmark_model --batch_size 1 --random_mode

A front for ``flute bench model --methods dense,flatquant`` (`flute.bench.model` says what is timed and how): for each
batch size one prefill of --prefill_seq_len tokens, decode steps behind as many, and both together, in milliseconds and
as how many times faster. Time does not depend on what weights and tokens are, so both are random; --random_mode is
taken and changes nothing. For perplexity use ``flute eval``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flute.bench import model as bench
from flute.bench.flat import FLATQUANT
from flute.bench.machine import describe
from flute.bench.results import write_rows
from flute.commands.common import parse_dtype, print_table

_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def parser() -> argparse.ArgumentParser:
    """All flags; those that were not published say so."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", default="llama-3.1-8b", help="a name of flute bench model, or a folder")
    made.add_argument("--batch_size", type=int, help="left out: 1, 2, 4, ... 64")
    made.add_argument("--prefill_seq_len", type=int, default=2048)
    made.add_argument("--decode_steps", type=int, default=256)
    made.add_argument("--random_mode", action="store_true", help="random weights and tokens, as always here")
    made.add_argument("--preset", default="w4a4kv4", help="(not published) bits; as in flute flatquant")
    made.add_argument("--dtype", default="float16", help="(not published)")
    made.add_argument("--device", default="cuda", help="(not published) cpu is for trying this out")
    made.add_argument("--output", type=Path, help="(not published) a .csv file of all figures")
    return made


def speedups(rows: Sequence[bench.ModelRow], steps: int) -> list[list[str]]:
    """Of each batch size: milliseconds of the dense and the quantized model, and their ratio; by what was timed."""
    dense = {row.batch: row for row in rows if row.method == bench.DENSE}
    lines = []
    for row in rows:
        other = dense.get(row.batch)
        if row.method == bench.DENSE or other is None or not row.decode_ms or not other.decode_ms:
            continue
        pairs = {"prefill": (other.prefill_ms, row.prefill_ms), "decode step": (other.decode_ms, row.decode_ms)}
        if row.prefill_ms and other.prefill_ms:
            whole = (each.prefill_ms + steps * each.decode_ms for each in (other, row))  # type: ignore[operator]
            pairs["both"] = tuple(whole)  # type: ignore[assignment]
        for what, (theirs, ours) in pairs.items():
            if theirs and ours:
                lines.append([str(row.batch), what, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}"])
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write where asked."""
    options = parser().parse_args(arguments)
    batches, prompt = [options.batch_size] if options.batch_size else list(_BATCHES), options.prefill_seq_len
    dtype = parse_dtype(options.dtype)
    assert dtype is not None
    plan = bench.Plan(
        options.model, [bench.DENSE, f"{FLATQUANT}-{options.preset}"], batches, [prompt], dtype=dtype,
        device=options.device, compiled=options.device == "cuda", steps=options.decode_steps,
        prefill_tokens=max(batches) * prompt,
    )  # fmt: skip
    rows = bench.measure(plan)
    print(describe())
    print_table(["batch", "what", "16-bit ms", f"{options.preset} ms", "times faster"], speedups(rows, plan.steps))
    for row in rows:
        if row.note:
            print(f"{row.method}, batch {row.batch}: {row.note}")
    if options.output:
        write_rows(options.output, f"{describe()}; python -m benchmarks.benchmark_model; {options.model}", rows)


if __name__ == "__main__":
    main()
