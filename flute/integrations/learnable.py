"""Upstream FLUTE's way to learned scales (NFL), under its own name: ``learn_scales``, then ``prepare_model_flute``.

The work is done by `flute.methods.learn`, in float32 and with the best state kept; ``flute quantize --method nfl`` and
``flute.methods.quantize_model(..., method="nfl")`` write checkpoints at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..config import ModelSpec
from ..errors import CalibrationError
from .base import nf_spec
from .modules import choose

_DEFAULTS = {"objective": "nll", "scale": "mse"}


def learn_scales(
    model: Any,
    tokenizer: Any,
    num_bits: int = 4,
    group_size: int = 64,
    custom_corpora: Sequence[str] | None = None,
    epochs: int = 1,
    lr: float = 1e-4,
    samples: int = 128,
    logging: bool = False,
    *,
    window: int = 2048,
    seed: int = 0,
    **learning: Any,
) -> Any:
    """Learn the scales of every layer that flute quantizes, in place; `prepare_model_flute` then takes them over.

    Args:
        model: a dense causal model of transformers in bfloat16 or float32, on the device that is to do the arithmetic.
        tokenizer: its tokenizer; windows are of one length, so no pad token is needed.
        num_bits, group_size: as `prepare_model_flute` will be given them; the table is ``nf<num_bits>``.
        custom_corpora: texts; ``samples`` windows are drawn from each, and taken in turns. Needed: no text is fetched
            from a network.
        epochs: passes over them.
        lr: first step of Adam; absolute, as it was upstream (``relative=True``: in units of a layer's mean scale).
        samples: windows of each text.
        logging: a progress bar with the loss, and what came of it, on stderr.
        window: tokens in a window, at most; the model's context if that is shorter.
        seed: of the windows and of their order.
        learning: other fields of `flute.methods.Learning`, e.g. ``objective="kl"`` or ``learn_table=True``. Scales
            begin at the searched ones; with ``scale="absmax"`` where upstream's did, too far off at 2 bits.

    Returns:
        The model, whose layers are now `flute.learned.LearnedLinear`.

    Raises:
        FluteError: a text that is empty or shorter than a window, a model that gives NaN, numbers out of range.
    """
    from ..methods.calibration import token_windows
    from ..methods.learn import Learning, learn_model

    spec = nf_spec(num_bits, group_size)
    chosen = Learning(**{"epochs": epochs, "lr": lr, "relative": False, "seed": seed, **_DEFAULTS, **learning})
    if isinstance(custom_corpora, str) or not custom_corpora:
        raise CalibrationError(
            f"custom_corpora={custom_corpora!r:.40} is no list of texts; read a text of the model's language, or of "
            "its use, and give [text]"
        )
    length = min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)
    parts = [
        token_windows(tokenizer, {f"custom_corpora[{index}]": text}, samples=samples, length=length, seed=seed)
        for index, text in enumerate(custom_corpora)
    ]
    turns = [part[turn] for turn in range(samples) for part in parts if turn < len(part)]
    bar = _bar(logging)

    def on_step(done: int, total: int, loss: float) -> None:
        bar.total = total
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        bar.update(1)

    with bar:
        made = learn_model(model, choose(model, ModelSpec(spec)).specs, torch.stack(turns), chosen, on_step=on_step)
        bar.set_postfix_str(f"calibration loss {made.before:.4f} -> {made.after:.4f} at step {made.best_step}")
    for note in made.notes:  # what did not go as asked is said in any case
        warnings.warn(note, stacklevel=2)
    return model


def _bar(logging: bool) -> Any:
    from tqdm import tqdm

    return tqdm(unit="step", disable=not logging, dynamic_ncols=True)
