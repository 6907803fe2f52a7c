"""``flute eval``: perplexity of a model on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    progress_bar,
    quiet_libraries,
    read_text,
)


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file.", show_default=False)],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window; at most the model's own context.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="auto: float32 on the CPU, the checkpoint's own on a GPU.")] = "auto",
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity: exp of the mean negative log-likelihood per predicted token.

    The text is tokenized once, with the BOS token that the tokenizer adds by itself (one at the beginning, if any), and
    cut into windows that do not overlap; a last partial window is dropped.
    """
    words = read_text(text)
    chosen = parse_dtype(dtype)
    check_device(device)
    quiet_libraries(threads)
    import torch

    from ..evaluate import perplexity
    from ..integrations import folders

    if chosen is None and device == "cpu":
        chosen = torch.float32
    loaded, tokenizer = folders.load(folders.find(model), device=device, dtype=chosen)
    tokens = perplexity.encode(tokenizer, words)
    if len(tokens) < 2:
        raise FluteError(f"{text} has {len(tokens)} tokens; nothing to predict, give a longer text")
    length = perplexity.context_length(loaded, seq_len)
    if length < seq_len:
        note(f"windows of {length} tokens: the model was made for no more", quiet=quiet)
    bos = tokenizer.bos_token_id is not None and tokens[0] == tokenizer.bos_token_id
    with progress_bar(0, "window", quiet=quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(1)

        result = perplexity.perplexity(loaded, tokens, seq_len=length, max_windows=windows, progress=progress)
    if as_json:
        print_json(
            {
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "seconds": result.seconds,
                "windows": result.windows,
                "seq_len": result.seq_len,
                "text_tokens": len(tokens),
                "bos": "one at the beginning of the text" if bos else "none",
                "protocol": perplexity.PROTOCOL,
                "device": device,
                "dtype": str(loaded.dtype).removeprefix("torch."),
            }
        )
    else:
        print(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.seconds:.1f} s "
            f"({result.windows} windows of {result.seq_len}, {'one BOS at the beginning' if bos else 'no BOS'})"
        )
