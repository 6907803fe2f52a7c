"""What each method costs a model: perplexity on one or two texts, KL divergence and agreement, against real bits.

Every candidate is made from the same dense folder and measured with the same tokens in the same windows (see
`flute.evaluate.perplexity` and `flute.evaluate.divergence`; the dense model runs beside each). Ours are made by ``flute
quantize`` in a process of its own, so time is a fresh process's and the row is a command that anybody can repeat, and
run through their own layers and kernels, float32 on a CPU and the checkpoint's dtype on a GPU. Peers round the weights
of the dense model (`flute.bench.quality_peers`).

    bits_per_weight   8 x bytes of codes, scales, zero points and tables / number of quantized weights
    seconds           to quantize, calibration included; of a peer only its rounding
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.plan import Plan, make_plan
from ..config import ModelSpec
from ..errors import FluteError
from ..evaluate.divergence import divergence
from ..evaluate.perplexity import context_length, cut, encode, perplexity
from ..integrations import folders
from .candidates import DENSE, Candidate
from .machine import describe
from .peers import first_line
from .quality_peers import Peer


@dataclass(frozen=True)
class QualityRow:
    """One candidate. ``options`` made it; ``kl`` in nats per token and ``agreement`` are of the first text."""

    name: str
    family: str
    bits: float | None
    bits_per_weight: float | None
    nbytes: int
    perplexity: float | None
    second_perplexity: float | None
    kl: float | None
    agreement: float | None
    seconds: float | None
    options: str
    version: str
    model: str
    text: str
    tokens: int
    second_text: str
    second_tokens: int
    seq_len: int
    device: str
    machine: str


@dataclass(frozen=True)
class Conditions:
    """The same for every row.

    Attributes:
        source: folder of the dense model. model: what to call it.
        texts: one or two, name -> text.
        calibration: files for the methods that need one; never what is evaluated.
        samples, window: of calibration. seq_len, windows: of evaluation, see `flute.evaluate.perplexity.perplexity`.
        threads: of the CPU; 0: as many as torch likes.
    """

    source: Path
    model: str
    texts: dict[str, str]
    calibration: Sequence[Path] = ()
    samples: int = 64
    window: int = 512
    seq_len: int = 2048
    windows: int | None = None
    device: str = "cpu"
    threads: int = 0


class Bench:
    """The dense model, the tokens, and what is measured with them, row by row."""

    def __init__(self, conditions: Conditions, progress: Callable[[str], None] = lambda line: None) -> None:
        """Loads the dense model. ``progress`` is told what is being done."""
        self._of, self._progress = conditions, progress
        record = ModelSpec()
        architecture = folders.architecture(conditions.source, record)
        self._plan: Plan = make_plan(conditions.source, architecture, record)
        self._dense, tokenizer = self._load(conditions.source)
        length = context_length(self._dense, conditions.seq_len)
        self._options: dict[str, Any] = {"seq_len": length, "max_windows": conditions.windows}
        self._tokens = [encode(tokenizer, text) for text in conditions.texts.values()]
        parts = [cut(tokens, length, conditions.windows) for tokens in self._tokens]
        self._predicted = [sum(len(part) - 1 for part in text) for text in parts]
        self._seq_len = len(parts[0][0])

    def check(self, rows: Sequence[QualityRow], path: Path) -> None:
        """Refuse ``rows`` of the file ``path`` that were measured on something else.

        Raises:
            FluteError: saying what differs.
        """
        mine = self._blank(DENSE)
        for row in rows:
            for name in ("model", "text", "tokens", "second_text", "second_tokens", "seq_len", "device"):
                found, wanted = getattr(row, name), getattr(mine, name)
                if found != wanted:
                    raise FluteError(
                        f"{path} holds rows with {name} {found!r}, not {wanted!r}; choose another --output"
                    )

    def row(self, candidate: Candidate) -> QualityRow:
        """Make and measure one candidate.

        Raises:
            FluteError: it cannot be made or measured here; the line says why.
        """
        if candidate.peer is not None:
            row = self._by_peer(candidate, candidate.peer)
        elif candidate is DENSE:
            row = self._measured(self._blank(candidate), self._dense)
        else:
            row = self._by_us(candidate)
        if self._of.device == "cuda":
            torch.cuda.empty_cache()
        return row

    def _load(self, folder: Path) -> tuple[Any, Any]:
        dtype = torch.float32 if self._of.device == "cpu" else None
        return folders.load(folders.Found(folder), device=self._of.device, dtype=dtype)

    def _blank(self, candidate: Candidate) -> QualityRow:
        nbytes = sum(entry.nbytes for entry in self._plan.headers.values())
        (first, second), (tokens, more) = (
            [*values, empty][:2] for values, empty in ((self._of.texts, ""), (self._predicted, 0))
        )
        return QualityRow(
            candidate.name, candidate.family, float(candidate.bits), 16.0, nbytes, None, None, None, None, None, "",
            f"flute {__version__}", self._of.model, first, tokens, second, more, self._seq_len, self._of.device,
            describe(),
        )  # fmt: skip

    def _measured(self, row: QualityRow, model: Any) -> QualityRow:
        """``row`` with the figures of both texts."""
        self._progress(f"{row.name}: measuring")
        if model is self._dense:
            result = perplexity(model, self._tokens[0], **self._options)
        else:
            found = divergence(model, self._dense, self._tokens[0], **self._options)
            result = found.model
            row = replace(row, kl=found.kl, agreement=found.agreement)
        others = [perplexity(model, tokens, **self._options).perplexity for tokens in self._tokens[1:]]
        return replace(row, perplexity=result.perplexity, second_perplexity=next(iter(others), None))

    def _by_us(self, candidate: Candidate) -> QualityRow:
        options, files = [*candidate.options], self._of.calibration if candidate.calibrated else ()
        if candidate.calibrated:
            if not files:
                raise FluteError("needs --calibration FILE")
            options += ["--samples", str(self._of.samples), "--window", str(self._of.window)]
        told = " ".join([*options, *(f"--calibration {path.name}" for path in files)])  # where they lie says nothing
        here = [f"--calibration={path}" for path in files]
        here += ["--device", self._of.device, "--threads", str(self._of.threads)]
        with tempfile.TemporaryDirectory(prefix="flute-quality-") as work:
            self._progress(f"{candidate.name}: flute quantize {told}")
            made = quantize_apart(self._of.source, Path(work) / "made", [*options, *here])
            model, _ = self._load(Path(work) / "made")
            row = replace(
                self._blank(candidate), bits_per_weight=made["bits_per_weight"], nbytes=made["bytes"],
                seconds=made["seconds"], options=told,
            )  # fmt: skip
            return self._measured(row, model)

    def _by_peer(self, candidate: Candidate, peer: Peer) -> QualityRow:
        missing = peer.missing()
        if missing:
            raise FluteError(missing)
        self._progress(f"{candidate.name}: rounding")
        model = copy.deepcopy(self._dense)
        layers = [layer.name for file in self._plan.layers.values() for layer in file]
        held, dense, started = 0, 0, time.perf_counter()
        for name in layers:
            weight = model.get_submodule(name).weight.data
            try:
                made = peer.rounded(weight.to(self._plan.scale_dtype), int(candidate.bits))
            except Exception as error:  # somebody else's code, which may fail in any way
                raise FluteError(f"{name}: {first_line(error)}") from error
            weight.copy_(made.weight)
            held, dense = held + made.nbytes, dense + 2 * weight.numel()
        seconds = time.perf_counter() - started
        blank = self._blank(candidate)
        row = replace(
            blank, bits_per_weight=16 * held / dense, nbytes=blank.nbytes - dense + held, seconds=seconds,
            version=f"{peer.package} {peer.version()}",
        )  # fmt: skip
        return self._measured(row, model)


def quantize_apart(source: Path, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run ``flute quantize`` in a process of its own; returns its figures.

    Raises:
        FluteError: it refuses, in its own words.
    """
    command = [sys.executable, "-m", "flute", "quantize", str(source), "-o", str(out), "--json", "--quiet", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FluteError(last.removeprefix("flute: error: "))
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def table(rows: Sequence[QualityRow]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people."""
    first, second = rows[0].text, rows[0].second_text
    header = ["weights", "bits/weight", "MB", first, *([second] if second else []), "KL", "same top-1", "s"]
    made = []
    for row in rows:
        perplexities = [row.perplexity, row.second_perplexity] if second else [row.perplexity]
        made.append([
            row.name, _figure(row.bits_per_weight, ".3f"), f"{row.nbytes / 1e6:.1f}",
            *[_figure(one, ".3f") for one in perplexities],
            _figure(row.kl, ".4f"), _figure(row.agreement, ".2%"), _figure(row.seconds, ".1f"),
        ])  # fmt: skip
    return header, made


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form if value < 1e6 else ".1e")
