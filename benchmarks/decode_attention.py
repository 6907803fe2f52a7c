"""Attention of a decode step: ``flute::decode_attention`` beside torch's, on a Llama-3-8B's heads, as one CSV.

    python benchmarks/decode_attention.py --output benchmarks/results/decode_attention_h100.csv

A static cache in bfloat16 of which ``context`` tokens are there; a mask hides the rest, as transformers makes it.
torch's is asked as `flute.bench.decoder` does, with heads that share keys as rows of one query, so that no key is
copied for each. CUDA graphs over as many caches as leave the L2 cache behind, in turns; medians.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from flute.bench.machine import describe
from flute.bench.timing import compare, copies_beyond_l2, read_ceiling
from flute.kernels.decode_attention import decode_attention

HEADS, GROUP, DIM = 8, 4, 128
CONTEXTS = (17, 128, 512, 2048, 4096, 8192, 32768)
ROOM = 64  # of the cache, behind the context
_MOST_BYTES = 1 << 34


@dataclass(frozen=True)
class Row:
    """Microseconds of a call; ``share``: of what this GPU reads in that time, keys and values."""

    batch: int
    context: int
    flute_us: float
    torch_us: float
    ratio: float
    share: float


def rows(ceiling: float) -> Iterator[Row]:
    """Every batch and context whose caches fit."""
    for batch in (1, 4, 16, 64):
        for context in CONTEXTS:
            shape = (2, batch, HEADS, context + ROOM, DIM)
            nbytes = 2 * torch.Size(shape).numel()
            if nbytes > _MOST_BYTES:
                continue
            copies = max(1, min(copies_beyond_l2(nbytes), _MOST_BYTES // nbytes))
            caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            query = torch.randn(batch, HEADS * GROUP, 1, DIM, device="cuda", dtype=torch.bfloat16)
            mask = (torch.arange(context + ROOM, device="cuda") < context).expand(batch, 1, 1, -1).contiguous()

            def ours(kv: torch.Tensor) -> torch.Tensor:
                return decode_attention(query, kv[0], kv[1], mask, DIM**-0.5)  # noqa: B023

            def theirs(kv: torch.Tensor) -> torch.Tensor:
                shared = query.view(batch, HEADS, GROUP, DIM)  # noqa: B023
                return F.scaled_dot_product_attention(shared, kv[0], kv[1], attn_mask=mask)  # noqa: B023

            error = (ours(caches[0]).float() - theirs(caches[0]).reshape(batch, 1, -1, DIM).float()).abs().max()
            assert error < 0.02, f"batch {batch}, context {context}: {error} apart"
            contestants = [[lambda f=f, kv=kv: f(kv) for kv in caches] for f in (ours, theirs)]
            us, torch_us = compare(*contestants, replays=10)
            read = nbytes * context / (context + ROOM)
            yield Row(
                batch,
                context,
                round(us, 2),
                round(torch_us, 2),
                round(torch_us / us, 2),
                round(read / us / 1e-6 / ceiling, 3),
            )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="CSV to write")
    path = parser.parse_args().output
    ceiling = read_ceiling()
    with path.open("w", newline="") as file:
        file.write(f"# {describe()}; reads {ceiling / 1e12:.2f} TB/s\n")
        file.write(f"# python benchmarks/decode_attention.py --output {path}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows(ceiling):
            writer.writerow(asdict(row))
            file.flush()
            print(row)


if __name__ == "__main__":
    main()
