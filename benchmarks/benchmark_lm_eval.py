"""Tasks of lm-eval on quantized FlatQuant checkpoints, and on the dense models beside them; the published flags.

    python benchmarks/benchmark_lm_eval.py --lm_eval_batch_size 16 --model meta-llama/Meta-Llama-3-8B

Evaluates every OUTPUT_DIR/*/w4a4/exp/quantized, which ``python -m flute.flatquant ... --quantized_save`` wrote, with
its integer weights, codes and rounded keys and values; and each dense MODEL, where there is one. ``flute eval --tasks``
does the same for any one model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from flute.commands.common import print_table, quiet_libraries
from flute.commands.flat_published import TASKS
from flute.errors import FluteError
from flute.evaluate.tasks import accuracy, require, run_tasks
from flute.integrations import folders


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = made.add_argument
    add("--tasks", nargs="+", default=list(TASKS))
    add("--lm_eval_batch_size", type=int, default=128)
    add("--hf_token", help="of the hub, for models that ask for one")
    add("--model", nargs="*", default=[], help="(not upstream's) dense models to put beside them")
    add("--output_dir", type=Path, default=Path("outputs"), help="(not upstream's) where checkpoints are")
    add("--task_dir", type=Path, help="(not upstream's) a folder of task YAML files of your own")
    return made


def evaluated(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Accuracies in percent by task, and their mean."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if where == "cpu" else None
    model, tokenizer = folders.load(folders.find(name, token=options.hf_token), device=where, dtype=dtype)
    scores = run_tasks(
        model, tokenizer, options.tasks, task_dir=options.task_dir, batch_size=options.lm_eval_batch_size
    )
    found = {one.task: 100 * accuracy(one) for one in scores}
    return found | {"mean": sum(found.values()) / len(found)}


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 done, 1 refused."""
    options = parser().parse_args(arguments)
    quiet_libraries()
    made = sorted(options.output_dir.glob("*/w4a4/exp/quantized"))
    try:
        require()
        if not made:
            raise FluteError(
                f"{options.output_dir} has no */w4a4/exp/quantized; run python -m flute.flatquant with --quantized_save"
            )
        rows = {str(name): evaluated(str(name), options) for name in (*options.model, *made)}
    except FluteError as error:
        print(f"flute: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    tasks = list(rows[str(made[0])])
    print_table(["model", *tasks], [[name, *(f"{row[task]:.2f}" for task in tasks)] for name, row in rows.items()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
