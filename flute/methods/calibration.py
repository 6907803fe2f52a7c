"""Text to calibrate with: windows of tokens, drawn by a seed.

Each text is tokenized as a whole and cut into windows that do not overlap; a seeded shuffle of all windows of all texts
says which are taken. Windows have one length, so nothing is ever padded and the tokenizer needs no pad token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CalibrationError


def token_windows(
    tokenizer: Any, texts: Mapping[str, str], *, samples: int = 128, length: int = 2048, seed: int = 0
) -> torch.Tensor:
    """Token ids int64 (S, length), S at most ``samples``.

    Args:
        tokenizer: of transformers.
        texts: name (for messages) -> text.
        samples: windows to take; all there are, if they are fewer.
        length: tokens in a window.
        seed: of the shuffle.

    Raises:
        CalibrationError: no text, or none that fills a window.
    """
    if samples < 1 or length < 2:
        raise CalibrationError(f"{samples} windows of {length} tokens: give at least 1 window of at least 2 tokens")
    if not any(text.strip() for text in texts.values()):
        raise CalibrationError(f"calibration text is empty ({', '.join(texts) or 'no file'}); give a text in UTF-8")
    windows, longest = [], 0
    for text in texts.values():
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        longest = max(longest, len(ids))
        windows += list(ids[: len(ids) // length * length].view(-1, length))
    if not windows:
        raise CalibrationError(
            f"the longest calibration text ({', '.join(texts)}) has {longest} tokens, a window {length}; give a longer "
            f"text, or windows of at most {max(longest, 2)}"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return torch.stack([windows[index] for index in order[:samples].tolist()])


def check_windows(windows: torch.Tensor, vocabulary: int, context: int | None) -> None:
    """Refuse windows that a model cannot read.

    Raises:
        CalibrationError: not int64 (S, L), a token outside the vocabulary, or a window longer than the model's context.
    """
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.numel() == 0 or windows.shape[1] < 2:
        raise CalibrationError(
            f"calibration windows are {tuple(windows.shape)} {windows.dtype}; give int64 token ids (samples, length)"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"calibration holds token {high if high >= vocabulary else low}, the model knows 0 to {vocabulary - 1}; "
            "use the model's own tokenizer"
        )
    if context and windows.shape[1] > context:
        raise CalibrationError(f"calibration windows have {windows.shape[1]} tokens, the model was made for {context}")
