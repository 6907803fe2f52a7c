"""``python -m flute.flatquant``: the flags of the published FlatQuant program, verbatim, on this engine.

Results go to OUTPUT_DIR/<model>/w4a4/<exp_name>/ as there: ``flat_matrices.safetensors`` with --save_matrix, the
quantized checkpoint ``quantized/`` with --quantized_save, and ``results.json``. Texts come from files
(--cali_dataset FILE, --eval_text FILE) or, by the published names, from the package ``datasets``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FluteError
from .common import check_device, note, progress_bar, quiet_libraries, read_text

if TYPE_CHECKING:
    from ..methods.flat_folder import FlatJob

TASKS = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "lambada_openai")


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(prog="python -m flute.flatquant", description="FlatQuant with its published flags.")
    add = made.add_argument
    add("--model", required=True, help="a folder, a hub id, or the word tiny")
    add("--seed", type=int, default=0)
    add("--hf_token", help="of the hub, for models that ask for one")
    for name in "waqkv":
        add(f"--{name}_bits", type=int, default=16)
        add(f"--{name}_asym", action="store_true")
        add(f"--{name}_groupsize", type=int, default=-1, help="of weights; elsewhere tokens or heads are the groups")
    add("--gptq", action="store_true", help="round weights with error feedback")
    add("--percdamp", type=float, default=0.01, help="share of the Hessian's mean diagonal that GPTQ adds to it")
    add("--act_order", action="store_true", help="GPTQ rounds the most important columns first")
    add("--gptq_mse", action="store_true", help="refused: --lwc begins with such clips")
    add("--epochs", type=int, default=15)
    add("--cali_dataset", default="wikitext2", help="wikitext2, c4, pile, or a text file")
    add("--nsamples", type=int, default=128)
    add("--seqlen", type=int, default=2048)
    add("--cali_bsz", type=int, default=4)
    add("--flat_lr", type=float, default=1e-5)
    for name, text in {
        "cali_trans": "learn transforms", "add_diag": "learn diagonals", "lwc": "learn clips of weights",
        "lac": "learn clips of activations", "resume": "accepted: blocks that are done are always kept",
        "save_matrix": "keep the matrices", "reload_matrix": "take matrices from --matrix_path",
        "warmup": "come up to the rate in 16 steps", "direct_inv": "learn the entries of transforms",
        "deactive_amp": "float32 also on a GPU", "quantized_save": "write the quantized checkpoint",
        "lm_eval": "run tasks with the package lm-eval", "distribute_model": "accepted: one device does all",
        "separate_vtrans": "transform values when the model runs",
    }.items():  # fmt: skip
        add(f"--{name}", action="store_true", help=text)
    add("--matrix_path", type=Path, help="flat_matrices.safetensors, or upstream's flat_matrices.pth (or their folder)")
    add("--diag_init", default="sq_style")
    add("--diag_alpha", type=float, default=0.3)
    add("--output_dir", type=Path, default=Path("outputs"))
    add("--exp_name", default="exp")
    add("--tasks", nargs="+", default=list(TASKS))
    add("--lm_eval_batch_size", type=int, default=128)
    for name, text in {
        "tie_clips": "one clip for q, k, v and one for gate, up: faster", "key_offset": "subtract mean keys",
        "force": "replace what an earlier run left",
    }.items():  # fmt: skip
        add(f"--{name}", action="store_true", help=f"(not upstream's) {text}")
    add("--start", default="moments", help="(not upstream's) transforms begin as moments, hadamard or identity")
    add("--eval_text", type=Path, help="(not upstream's) a text file for perplexity; left out: wikitext2's test part")
    add("--eval_windows", type=int, help="(not upstream's) only so many windows of it")
    add("--device", default=None, help="(not upstream's) cpu or cuda")
    return made


def job_of(options: argparse.Namespace) -> FlatJob:
    """What the flags ask for.

    Raises:
        FluteError: values that do not go together.
    """
    from ..flatquant.spec import FlatSpec
    from ..methods.flat_folder import Feedback, FlatJob, Schedule, Start

    if options.a_groupsize != -1:
        raise FluteError("--a_groupsize: a token has one scale, as in the published program; leave it at -1")
    if options.gptq_mse:
        raise FluteError("--gptq_mse: clips of least squared error are where --lwc begins; give --lwc instead")
    if options.reload_matrix and options.matrix_path is None:
        raise FluteError("--reload_matrix needs --matrix_path FILE")
    names = [f"{letter}_{what}" for letter in "waqkv" for what in ("bits", "asym")]
    names += ["w_groupsize", "separate_vtrans", "key_offset"]
    spec = FlatSpec(separate_clips=not options.tie_clips, **{name: getattr(options, name) for name in names})
    feedback = Feedback(options.percdamp, options.act_order) if options.gptq else None
    start = Start(
        options.cali_trans, options.add_diag, options.lwc, options.lac,
        options.start, options.diag_init, options.diag_alpha, options.direct_inv,
    )  # fmt: skip
    amp = options.device == "cuda" and not options.deactive_amp
    path = options.matrix_path if options.reload_matrix else None
    if path is not None and path.is_dir():
        files = ("flat_matrices.safetensors", "flat_matrices.pth")
        path = next((path / name for name in files if (path / name).exists()), path / files[0])
    return FlatJob(
        spec, start, Schedule(options.epochs, options.flat_lr, options.warmup, amp),
        options.nsamples, options.seqlen, options.cali_bsz, options.seed, feedback, path,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 done, 1 refused, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        _run(options)
    except FluteError as error:
        print(f"flute: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flute: error: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    import torch

    from ..evaluate.tasks import require
    from ..integrations import folders

    quiet_libraries()
    options.device = check_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    job = job_of(options)
    if options.lm_eval:
        require()
    options.source = folders.find(options.model, token=options.hf_token)
    out = options.output_dir / Path(options.model).name / f"w{options.w_bits}a{options.a_bits}" / options.exp_name
    matrices = out / "flat_matrices.safetensors" if options.save_matrix else None
    if any(size not in (-1, 128) for size in (options.q_groupsize, options.k_groupsize, options.v_groupsize)):
        note("--q_groupsize, --k_groupsize, --v_groupsize: a head is the group (as in the published program)")
    if options.distribute_model:
        note("--distribute_model: the model is evaluated on one device")
    texts = {} if job.matrices is not None and not job.gptq else _calibration(options.cali_dataset)
    model, tokenizer = (_saved if options.quantized_save else _simulated)(options, job, texts, out, matrices)
    _evaluate(options, model, tokenizer, out)


def _calibration(name: str) -> dict[str, str]:
    from ..integrations.texts import NAMES, text

    return {name: text(name, "train")} if name in NAMES else {name: read_text(Path(name))}


def _saved(
    options: argparse.Namespace, job: FlatJob, texts: dict[str, str], out: Path, matrices: Path | None
) -> tuple[Any, Any]:
    """The quantized model, from the folder it was written to."""
    from ..integrations import folders
    from .flatquant import run

    folder = out / "quantized"
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = str(options.source.folder)
    run(source, folder, job, texts, device=options.device, force=options.force, save_to=matrices, quiet=False)
    dtype = None if options.device == "cuda" else _float32()
    return folders.load(folders.Found(folder), device=options.device, dtype=dtype)


def _simulated(
    options: argparse.Namespace, job: FlatJob, texts: dict[str, str], out: Path, matrices: Path | None
) -> tuple[Any, Any]:
    """The model with rounded numbers in floating point."""
    from ..integrations import folders
    from ..methods.calibration import token_windows
    from ..methods.flat_folder import learn, quantize, save_matrices
    from .flatquant import stepper

    dtype = None if options.device == "cuda" else _float32()
    model, tokenizer = folders.load(options.source, device=options.device, dtype=dtype)
    windows = token_windows(tokenizer, texts, samples=job.samples, length=job.window, seed=job.seed) if texts else None
    with progress_bar(0, "step", quiet=False) as bar:
        made, report = learn(model, windows, job, device=options.device, state=out / "blocks", on_step=stepper(bar))
    for line in report.notes:
        note(line)
    if matrices is not None:
        save_matrices(matrices, made, job.spec)
    quantize(model, job, made, windows, device=options.device, real=False)
    return model, tokenizer


def _float32() -> Any:
    import torch

    return torch.float32


def _evaluate(options: argparse.Namespace, model: Any, tokenizer: Any, out: Path) -> None:
    from ..checkpoint.atomic import write_json
    from ..evaluate.flat import perplexities
    from ..evaluate.perplexity import encode
    from ..integrations.texts import text

    words = text("wikitext2", "test") if options.eval_text is None else read_text(options.eval_text)
    found: dict[str, Any] = perplexities(
        model, encode(tokenizer, words), seq_len=options.seqlen, max_windows=options.eval_windows
    )
    if options.lm_eval:
        from ..evaluate.tasks import accuracy, run_tasks

        scores = run_tasks(model, tokenizer, options.tasks, batch_size=options.lm_eval_batch_size)
        found |= {one.task: 100 * accuracy(one) for one in scores}
        found["mean of tasks"] = sum(100 * accuracy(one) for one in scores) / len(scores)
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", found)
