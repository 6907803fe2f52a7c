"""``flute eval``: perplexity of a model on a text, how far it is from the dense model there, and tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FluteError
from .common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    ThreadsOption,
    check_device,
    note,
    parse_dtype,
    print_json,
    print_table,
    progress_bar,
    quiet_libraries,
    read_text,
)

if TYPE_CHECKING:
    from ..evaluate.perplexity import Perplexity
    from ..evaluate.tasks import TaskScores


def evaluate(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option("--text", help="A UTF-8 text file.", show_default=False)] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model: KL divergence and agreement on the text.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window; at most the model's own context.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval (pip install 'flute-engine[eval]'), such as piqa,arc_easy.")
    ] = "",
    task_dir: Annotated[
        Path | None, typer.Option(help="Folder of task YAML files of your own; they can name Python code, which runs.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once in tasks.")] = 8,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="auto: float32 on the CPU, the checkpoint's own on a GPU.")] = "auto",
    threads: ThreadsOption = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity: exp of the mean negative log-likelihood per predicted token. Also KL divergence, and tasks.

    The text is tokenized once, with the BOS token that the tokenizer adds by itself (one at the beginning, if any), and
    cut into windows that do not overlap; a last partial window is dropped. --against: KL(dense || model) in nats per
    token, and the share of tokens at which both have the same likeliest next token.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if text is None and (not names or against is not None):
        raise FluteError("nothing to evaluate on: give --text FILE, or --tasks NAMES" if not names else
                         "--against compares on a text: give --text FILE")  # fmt: skip
    if output is not None and not output.expanduser().parent.is_dir():
        raise FluteError(f"--output {output}: {output.parent} is no folder; make it, or choose another")
    words = None if text is None else read_text(text)
    chosen = parse_dtype(dtype)
    check_device(device)
    quiet_libraries(threads)
    import torch

    from ..checkpoint.atomic import write_json
    from ..evaluate import tasks as runs
    from ..integrations import folders

    if names:
        runs.require()
    if chosen is None and device == "cpu":
        chosen = torch.float32
    loaded, tokenizer = folders.load(folders.find(model), device=device, dtype=chosen)
    figures: dict[str, Any] = {"device": device, "dtype": str(loaded.dtype).removeprefix("torch.")}
    if words is not None:
        dense = None if against is None else folders.load(folders.find(against), device=device, dtype=chosen)[0]
        figures |= _on_text(loaded, tokenizer, words, dense, seq_len, windows, quiet=quiet, as_json=as_json)
    if names:
        scores = runs.run_tasks(loaded, tokenizer, names, task_dir=task_dir, limit=limit, batch_size=batch_size,
                                quiet=quiet)  # fmt: skip
        figures |= {"tasks": _task_figures(scores), "lm_eval": runs.require(), "limit": limit}
        if not as_json:
            print_table(*_task_table(scores))
    if as_json:
        print_json(figures)
    if output is not None:  # last: a full disk costs nobody the figures
        write_json(output.expanduser(), figures)


def _on_text(
    model: Any, tokenizer: Any, words: str, dense: Any, seq_len: int, windows: int | None, *, quiet: bool, as_json: bool
) -> dict[str, Any]:
    """Figures of a text, printed unless they will be as JSON."""
    from ..evaluate.divergence import divergence
    from ..evaluate.perplexity import PROTOCOL, context_length, encode, perplexity

    tokens = encode(tokenizer, words)
    if len(tokens) < 2:
        raise FluteError(f"--text has {len(tokens)} tokens; nothing to predict, give a longer text")
    length = context_length(model, seq_len)
    if length < seq_len:
        note(f"windows of {length} tokens: the model was made for no more", quiet=quiet)
    bos = tokenizer.bos_token_id is not None and tokens[0] == tokenizer.bos_token_id
    with progress_bar(0, "window", quiet=quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(1)

        options: dict[str, Any] = {"seq_len": length, "max_windows": windows, "progress": progress}
        compared = None if dense is None else divergence(model, dense, tokens, **options)
        result = perplexity(model, tokens, **options) if compared is None else compared.model
    if not as_json:
        print(_line(result, bos=bos))
    figures = {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "windows": result.windows,
        "seq_len": result.seq_len,
        "text_tokens": len(tokens),
        "bos": "one at the beginning of the text" if bos else "none",
        "protocol": PROTOCOL,
    }
    if compared is not None:
        figures |= {"dense_perplexity": compared.dense.perplexity, "kl": compared.kl, "agreement": compared.agreement}
        if not as_json:
            print(
                f"dense perplexity {compared.dense.perplexity:.4f}; KL divergence {compared.kl:.5f} nats per token, "
                f"same likeliest token at {compared.agreement:.2%}"
            )
    return figures


def _line(result: Perplexity, *, bos: bool) -> str:
    return (
        f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.seconds:.1f} s "
        f"({result.windows} windows of {result.seq_len}, {'one BOS at the beginning' if bos else 'no BOS'})"
    )


def _task_figures(scores: list[TaskScores]) -> dict[str, Any]:
    return {
        one.task: {
            "shots": one.shots,
            "examples": one.examples,
            "metrics": {name: {"value": value, "stderr": error} for name, (value, error) in one.metrics.items()},
        }
        for one in scores
    }


def _task_table(scores: list[TaskScores]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [one.task, "-" if one.shots is None else str(one.shots), "-" if one.examples is None else str(one.examples),
         name, f"{value:.4f}", "-" if error is None else f"{error:.4f}"]
        for one in scores for name, (value, error) in one.metrics.items()
    ]  # fmt: skip
    return ["task", "shots", "examples", "metric", "value", "standard error"], rows
