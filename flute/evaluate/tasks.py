"""Tasks such as piqa or arc_easy by EleutherAI's lm-eval (the extra ``eval``): the field's own prompts and scores.

Nothing of it is made again here. A loaded model, quantized or dense, is handed to lm-eval's wrapper of transformers
models as it is, so answers come from the same layers and kernels as any other use. Data sets come from the hub or its
cache by way of `datasets`, which HF_DATASETS_OFFLINE=1 keeps off the network; a task of one's own (a YAML file with
``dataset_path: json`` and a local ``data_files``) needs neither. The YAML files of a task folder can name Python code
(``!function``): such a folder is code that its user trusts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import logging
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FluteError


@dataclass(frozen=True)
class TaskScores:
    """One task or group of tasks.

    Attributes:
        task: its name. shots, examples: as it was run; None for a group.
        metrics: name -> (value, standard error or None); names are lm-eval's, a filter's after a comma.
    """

    task: str
    shots: int | None
    examples: int | None
    metrics: dict[str, tuple[float, float | None]]


def accuracy(scores: TaskScores) -> float:
    """The accuracy that papers give: normalized by length where the task has that.

    Raises:
        FluteError: the task is not measured by accuracy.
    """
    for name in ("acc_norm", "acc"):
        if name in scores.metrics:
            return scores.metrics[name][0]
    raise FluteError(f"task {scores.task!r} has no accuracy but {', '.join(scores.metrics)}; leave it out of the mean")


def require() -> str:
    """The version of lm-eval.

    Raises:
        FluteError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise FluteError("--tasks: lm-eval is not installed; run: pip install 'flute-engine[eval]'")
    return importlib.metadata.version("lm_eval")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    quiet: bool = False,
) -> list[TaskScores]:
    """Scores of a loaded model, with lm-eval's own seeds and each task's own number of shots.

    Args:
        model, tokenizer: of transformers.
        tasks: names that lm-eval knows or that ``task_dir`` describes.
        task_dir: folder of task YAML files of one's own, which come before lm-eval's.
        limit: only the first so many examples of each task.
        batch_size: sequences at once.
        quiet: no progress bars.

    Raises:
        FluteError: lm-eval is missing, does not know a task, or cannot get its data.
    """
    require()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(tasks, task_dir)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        place = "" if task_dir is None else f" and {task_dir} has none of that name"
        raise FluteError(
            f"--tasks: lm-eval knows no task {', '.join(unknown)}{place}; list its tasks: lm-eval ls tasks"
        )
    try:
        with redirect_stderr(io.StringIO()) if quiet else nullcontext():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
            )  # fmt: skip
    except Exception as error:  # lm-eval, datasets and the hub's client each have their own errors
        text = " ".join(str(error).split()) or type(error).__name__
        raise FluteError(f"--tasks {','.join(tasks)}: lm-eval stopped: {text[:300]}") from error
    return [_scores(name, values, found) for name, values in found["results"].items()]


def _manager(tasks: Sequence[str], task_dir: Path | None) -> Any:
    """lm-eval's index of ``task_dir`` alone if that has all tasks, for to read all of its own takes it 15 seconds."""
    from lm_eval.tasks import TaskManager

    if task_dir is not None:
        if not task_dir.is_dir():
            raise FluteError(f"--task-dir {task_dir} is not a folder; give one that holds task YAML files")
        own = TaskManager(include_path=str(task_dir), include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    return TaskManager(include_path=None if task_dir is None else str(task_dir))


def _scores(name: str, values: dict[str, Any], found: dict[str, Any]) -> TaskScores:
    """One entry of lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        metrics[metric if filtered == "none" else key] = (value, error if isinstance(error, float) else None)
    examples = found["n-samples"].get(name, {}).get("effective")
    return TaskScores(name, found["n-shot"].get(name), examples, metrics)
