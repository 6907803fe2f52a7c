"""``flute generate``: continue a text."""

from __future__ import annotations

from typing import Annotated

import typer

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
    quiet_libraries,
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float16, bfloat16 or float32.")] = "auto",
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text greedily: the likeliest token each time. The new text goes to stdout, the speed to stderr."""
    chosen = parse_dtype(dtype)
    check_device(device)
    quiet_libraries(threads)
    from ..evaluate import speed
    from ..integrations import folders

    loaded, tokenizer = folders.load(folders.find(model), device=device, dtype=chosen)
    made = speed.generate(loaded, tokenizer, prompt, max_new_tokens)
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "text": made.text,
                "tokens": made.tokens,
                "seconds": made.seconds,
                "tokens_per_second": made.tokens_per_second,
            }
        )
        return
    print(prompt + made.text)
    note(f"{made.tokens} tokens in {made.seconds:.2f} s, {made.tokens_per_second:.1f} tokens/s", quiet=quiet)
