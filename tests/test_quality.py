"""`flute bench quality`: who takes part, what is measured and written, how a run goes on, other libraries' rounding."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import flute

from flute.bench import candidates, plot, quality_peers, results
from flute.bench.candidates import CANDIDATES, DENSE, Candidate, chosen
from flute.bench.quality import Bench, Conditions, QualityRow, quantize_apart
from flute.bench.quality_peers import Peer, Rounded
from flute.errors import FluteError
from flute.evaluate.divergence import divergence
from flute.evaluate.perplexity import encode, perplexity
from flute.integrations import folders

HELD_OUT = folders.embedded() / "heldout.txt"
TEXT = HELD_OUT.read_text(encoding="utf-8")[:3000]
NF2 = next(one for one in CANDIDATES if one.name == "rtn nf2 2-bit")
GPTQ = next(one for one in CANDIDATES if one.name == "gptq nf2 2-bit")


def to_grid(weight: torch.Tensor, bits: int) -> Rounded:
    return Rounded((weight * 16).round() / 16, weight.numel())


def refusing(weight: torch.Tensor, bits: int) -> Rounded:
    raise RuntimeError("not\nthis shape")


PEER = Candidate("peer 4-bit", "peer", 4, peer=Peer("peer", "torch", "torch", (4,), to_grid))
SHY = Candidate("shy 4-bit", "shy", 4, peer=Peer("shy", "torch", "torch", (4,), refusing))
GHOST = Candidate("ghost 4-bit", "ghost", 4, peer=Peer("ghost", "ghost-lib", "no_such_module", (4,), to_grid))


@pytest.fixture
def bank() -> Bench:
    texts = {"one": TEXT, "two": TEXT[1000:]}
    return Bench(Conditions(folders.embedded(), "tiny", texts, seq_len=96, windows=2, threads=1))


# ---- who takes part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [one for one in CANDIDATES if one.options], ids=lambda one: one.name)
def test_options_are_those_of_quantize(one: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option is looked at before the model is."""
    more = ["--calibration", HELD_OUT, "--samples", 4, "--window", 32] if one.calibrated else []
    code, _, err = flute("quantize", "no-such-model", "-o", tmp_path / "o", *one.options, *more, capsys=capsys)
    assert code == 1 and "'no-such-model' does not exist" in err


def test_chosen() -> None:
    names = [one.name for one in CANDIDATES]
    assert len(set(names)) == len(names) and names[0] == "dense"
    assert [one.name for one in chosen(["rtn nf?*2-bit", "dense"], names)] == ["dense", NF2.name, "rtn nf2 mse 2-bit"]
    assert [one.name for one in chosen([], names[1:])] == ["dense"]
    with pytest.raises(FluteError, match="--only 'nf9' matches no row; there are dense, rtn int4"):
        chosen(["dense", "nf9"], [])


# ---- one row ---------------------------------------------------------------------------------------------------------


def test_a_peer_is_the_dense_model_with_its_weights(bank: Bench) -> None:
    row, plain = bank.row(PEER), bank.row(DENSE)
    (model, tokenizer), (dense, _) = (folders.load(folders.find("tiny"), dtype=torch.float32) for _ in range(2))
    held = 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            made = to_grid(layer.weight.detach().half(), 4)
            layer.weight.data.copy_(made.weight)
            held += made.nbytes
    tokens = encode(tokenizer, TEXT)
    found = divergence(model, dense, tokens, seq_len=96, max_windows=2)
    assert (row.perplexity, row.kl, row.agreement) == (found.model.perplexity, found.kl, found.agreement)
    assert row.bits_per_weight == 8 and row.nbytes == plain.nbytes - held  # one byte a weight instead of two
    assert row.version == f"torch {torch.__version__}"
    other = encode(tokenizer, TEXT[1000:])
    assert plain.perplexity == perplexity(dense, tokens, seq_len=96, max_windows=2).perplexity
    assert plain.second_perplexity == perplexity(dense, other, seq_len=96, max_windows=2).perplexity
    assert (plain.bits_per_weight, plain.kl, plain.seconds, plain.tokens, plain.second_tokens) == (
        16,
        None,
        None,
        190,
        190,
    )


@pytest.mark.parametrize(
    ("one", "message"), [(SHY, "RuntimeError: not"), (GHOST, "pip install ghost-lib"), (GPTQ, "needs --calibration")]
)
def test_what_cannot_be_made(one: Candidate, message: str, bank: Bench) -> None:
    with pytest.raises(FluteError, match=message):
        bank.row(one)


def test_a_refusal_of_quantize_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        assert command[1:6] == ["-m", "flute", "quantize", "model", "-o"] and command[-2:] == ["--bits", "5"]
        return subprocess.CompletedProcess(command, 1, "", "a warning\nflute: error: bits=5 is not supported\n")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(FluteError, match=r"^bits=5 is not supported$"):
        quantize_apart(Path("model"), Path("out"), ["--bits", "5"])


@pytest.mark.parametrize("peer", quality_peers.PEERS, ids=lambda peer: peer.name)
def test_other_libraries_where_they_are(peer: Peer) -> None:
    """They round as well as so many bits allow, and what they hold is near the bits they promise."""
    if peer.missing():
        pytest.skip(peer.missing())
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).half()
    for bits in peer.bits:
        made = peer.rounded(weight.clone(), bits)
        error = float((made.weight.float() - weight.float()).norm() / weight.float().norm())
        assert made.weight.shape == weight.shape and 0 < error < {4: 0.12, 3: 0.25, 2: 0.55}[bits]
        assert bits + 16 / 64 <= 8 * made.nbytes / weight.numel() <= bits + 1
        assert len({float(value) for value in made.weight[0, :64]}) <= 1 << bits or peer.name == "hqq axis=0"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(candidates, "CANDIDATES", (DENSE, PEER, NF2, GPTQ, GHOST))
    (tmp_path / "part.txt").write_text(TEXT, encoding="utf-8")
    given: tuple[Any, ...] = (
        "bench",
        "quality",
        "tiny",
        "--text",
        tmp_path / "part.txt",
        "--seq-len",
        96,
        "--threads",
        1,
    )
    given += ("-o", tmp_path / "q.csv", "--quiet")
    code, out, err = flute(*given, "--windows", 2, "--only", "dense,rtn*", "--plot", capsys=capsys)
    assert code == 0, err
    assert out.splitlines()[-1] == f"written: {tmp_path / 'q.csv'}, {tmp_path / 'q.png'}"
    origin, (dense, nf2) = results.read_rows(tmp_path / "q.csv", QualityRow)
    assert origin.startswith("tiny, cpu; perplexity on part.txt (190 tokens), windows of 96; text tokenized once")
    assert (dense.name, nf2.name, nf2.bits_per_weight) == ("dense", NF2.name, 2.25)
    assert nf2.options == "--group-size 64 --bits 2" and nf2.seconds > 0
    assert nf2.perplexity > dense.perplexity and nf2.kl > 0.1 and 0 < nf2.agreement < 1
    assert nf2.nbytes < dense.nbytes / 2
    # it goes on: what is there is kept, what cannot be made is named
    code, out, err = flute(*given, "--windows", 2, capsys=capsys)
    assert code == 0 and [line.split(" is left out: ")[0] for line in err.splitlines()] == [GPTQ.name, GHOST.name]
    rows = results.read_rows(tmp_path / "q.csv", QualityRow)[1]
    assert [row.name for row in rows] == ["dense", PEER.name, NF2.name] and (rows[0], rows[2]) == (dense, nf2)
    code, _, err = flute(*given, "--windows", 1, capsys=capsys)
    assert code == 1 and "holds rows with tokens 190, not 95; choose another --output" in err
    for option, message in (("--calibration", "is what the table evaluates"), ("--second-text", "has the name of")):
        code, _, err = flute(*given, option, tmp_path / "part.txt", capsys=capsys)
        assert code == 1 and message in err


def test_the_plot(tmp_path: Path, bank: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    dense = bank.row(DENSE)
    rows = [dense, *[replace(dense, name=f"a {bits}", family="a", bits_per_weight=bits + 0.25) for bits in (4, 3)],
            replace(dense, name="b", family="b", perplexity=3e9, second_perplexity=None)]  # fmt: skip
    figure: Any = None

    def keep(made: Any, path: Path) -> Path:
        nonlocal figure
        figure = made
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_save", keep)
        plot.quality(rows, tmp_path / "q.png", "made up")
    first, second = figure.axes
    assert first.get_title() == f"one; beyond {8 * dense.perplexity:.3g}: b" and second.get_title() == "two"
    points = {line.get_label(): list(line.get_xdata()) for line in first.get_lines()}
    assert points["a"] == [4.25, 3.25] and points["b"] == [] and first.get_yscale() == "log"
    results.write_rows(tmp_path / "q.csv", "made up", rows, digits=6)
    code, _, _ = flute("bench", "plot", tmp_path / "q.csv", capsys=capsys)
    assert code == 0 and (tmp_path / "q.png").read_bytes()[:4] == b"\x89PNG"
