"""Tuned plans on disk: nothing is lost, nothing damaged or foreign is believed, and only legal plans are followed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from gpus import GPUS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flute.errors import TuneError
from flute.kernels import choice, cuda, mma, plan, tiles, tuned

HERE = tuned.Machine("NVIDIA H100 80GB HBM3, sm_90, 132 SMs", "580.65.06", "0" * 64)
PROBLEM = tuned.Problem(8, 4096, 4096, 4, 64, "float16")
VERDICT = tuned.Verdict("decode row_tiles=1 rows=2 ways=8 split=1 per_sm=1", 7.0, 7.7)
SIZES = st.integers(1, 1 << 20)
PROBLEMS = st.builds(tuned.Problem, SIZES, SIZES, SIZES, SIZES, SIZES, st.sampled_from(["float16", "bfloat16"]))
TIMES = st.floats(min_value=1e-3, max_value=1e9)
VERDICTS = st.builds(tuned.Verdict, st.none() | st.text(), TIMES, TIMES, SIZES)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "cache"))
    tuned.clear()
    return tmp_path / "cache" / "tuned"


def new_process() -> None:
    """Forget what this process measured and read, not what is on disk."""
    tuned._held.clear()
    tuned._seen.clear()


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


# ---- the file ------------------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(PROBLEMS, VERDICTS, min_size=1), min_size=1, max_size=4))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_kept_is_found_and_the_newest_wins(rounds: list[tuned.Verdicts]) -> None:
    tuned.clear()
    expected: tuned.Verdicts = {}
    for found in rounds:
        new_process()
        tuned.keep(HERE, found)
        expected |= found
    for _ in range(2):
        assert all(tuned.lookup(HERE, problem) == verdict for problem, verdict in expected.items())
        new_process()
    assert list(tuned.stored()) == [(HERE, expected)]


def test_another_gpu_driver_or_source_knows_nothing(folder: Path) -> None:
    tuned.keep(HERE, {PROBLEM: VERDICT})
    for other in (HERE._replace(device="x"), HERE._replace(driver="1"), HERE._replace(source="1" * 64)):
        assert tuned.lookup(other, PROBLEM) is None
        tuned.keep(other, {PROBLEM: VERDICT._replace(us=1.0)})
    new_process()
    assert tuned.lookup(HERE, PROBLEM) == VERDICT
    assert len(list(folder.glob("*.json"))) == 4
    assert tuned.clear() == 4 and tuned.lookup(HERE, PROBLEM) is None and tuned.clear() == 0


def test_the_hash_covers_kernels_plans_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh = tuned.source_hash.__wrapped__
    names = {fresh("13.0"), fresh("13.1")}
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr(tuned.resources, "files", lambda package: tmp_path)
    for file in ("plan.py", "cuda/decode.cu", "cuda/common.cuh"):
        for text in ("a", "b"):
            (tmp_path / file).write_text(text)
            names.add(fresh("13.0"))
    assert len(names) == 2 + 6
    (tmp_path / "README").write_text("not a source")
    assert fresh("13.0") in names


def damaged(path: Path) -> list[bytes]:
    """What a disk, an editor, another version or another GPU may leave there."""
    right = path.read_bytes()
    values = json.loads(right)
    flipped = right.replace(b'"us": 7.0', b'"us": 6.0')
    assert flipped != right

    def with_entries(**changes: object) -> bytes:
        entries = [{**values["entries"][0], **changes}]
        return json.dumps({**values, "entries": entries, "sha256": tuned._digest(entries)}).encode()

    assert tuned._digest(values["entries"]) == values["sha256"]
    bad_entries: list[dict[str, object]] = [
        {"m": "8"}, {"m": 0}, {"n": True}, {"us": 7}, {"us": -1.0}, {"us": float("nan")}, {"plan": 3}, {"dtype": None},
        {"first": 0}, {"first": None},
    ]  # fmt: skip
    bad_heads: list[dict[str, object]] = [
        {"device": "x"}, {"driver": 5}, {"source": ""}, {"format": 2}, {"entries": {}}, {"sha256": 0},
    ]  # fmt: skip
    changed = [with_entries(**bad) for bad in bad_entries]
    foreign = [json.dumps({**values, **bad}).encode() for bad in bad_heads]
    deep = b"[" * 100_000
    return [b"", right[:-1], right[: len(right) // 2], flipped, b"\0" * 100, b"\xff\xfe", b"[]", b"null", b"3", deep,
            b" " * (tuned._MOST_BYTES + 1), *changed, *foreign]  # fmt: skip


def test_damage_counts_as_absent_and_is_replaced(folder: Path) -> None:
    tuned.keep(HERE, {PROBLEM: VERDICT})
    path = the_file(folder)
    right = path.read_bytes()
    other = PROBLEM._replace(m=1)
    for content in damaged(path):
        path.write_bytes(content)
        new_process()
        assert tuned.lookup(HERE, PROBLEM) is None, content[:80]
        tuned.keep(HERE, {other: VERDICT})
        new_process()
        assert tuned.lookup(HERE, other) == VERDICT and tuned.lookup(HERE, PROBLEM) is None
        path.write_bytes(right)


def test_a_newer_file_is_read_again() -> None:
    tuned.keep(HERE, {PROBLEM: VERDICT})
    new_process()
    assert tuned.lookup(HERE, PROBLEM) == VERDICT
    script = f"from flute.kernels.tuned import *; keep({HERE!r}, {{{PROBLEM!r}: {VERDICT._replace(us=5.0)!r}}})"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert tuned.lookup(HERE, PROBLEM) == VERDICT._replace(us=5.0)


def test_sixteen_writers_lose_nothing(folder: Path) -> None:
    rounds = 12
    script = (
        "import sys\nfrom flute.kernels.tuned import *\n"
        "me = int(sys.argv[1])\nassert 'torch' not in sys.modules\nsys.stdin.read(1)\n"
        f"for i in range({rounds}):\n"
        f"    keep({HERE!r}, {{Problem(1 + me, 1 + i, 1, 4, 1, 'float16'): Verdict(None, 1.0 + me, 1.0 + i)}})\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", script, str(me)], stdin=subprocess.PIPE) for me in range(16)]
    for run in runs:  # all at once
        assert run.stdin is not None
        run.stdin.write(b"x")
        run.stdin.close()
    assert [run.wait(timeout=120) for run in runs] == [0] * 16
    (kept,) = tuned.stored()
    expected = {
        tuned.Problem(1 + me, 1 + i, 1, 4, 1, "float16"): tuned.Verdict(None, 1.0 + me, 1.0 + i)
        for me in range(16)
        for i in range(rounds)
    }
    assert kept == (HERE, expected)
    assert not list(folder.glob(".tuned-*")) and the_file(folder).stat().st_mode & 0o077 == 0


def test_a_killed_writer_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.keep(HERE, {PROBLEM: VERDICT})
    script = (
        "import os\nfrom flute.kernels import tuned\ntuned.os.replace = lambda *_: os._exit(9)\n"
        f"tuned.keep(tuned.{HERE!r}, {{tuned.{PROBLEM!r}: tuned.{VERDICT._replace(us=1.0)!r}}})"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 9
    new_process()
    assert tuned.lookup(HERE, PROBLEM) == VERDICT
    tuned.keep(HERE, {PROBLEM: VERDICT._replace(us=2.0)})  # its lock died with it


def test_without_a_usable_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(reason: str) -> None:
        new_process()
        with pytest.raises(TuneError, match=reason) as refusal:
            tuned.keep(HERE, {PROBLEM: VERDICT})
        assert "\n" not in str(refusal.value)
        assert tuned.lookup(HERE, PROBLEM) == VERDICT  # it holds here all the same

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "file"))
    check("FLUTE_CACHE_DIR")
    assert list(tuned.stored()) == [] and tuned.clear() == 0
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "cache"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tuned.os, "fsync", full)
        check("No space left")
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]
    monkeypatch.setattr(tuned, "_LOCK_SECONDS", 0.1)
    with FileLock(str(tuned._path(HERE)) + ".lock"):
        check("lock")


# ---- the choice ----------------------------------------------------------------------------------------------------


def nothing(problem: tuned.Problem) -> None:
    return None


def knows(**known: object) -> tuned.Verdict:
    return VERDICT._replace(**known)  # type: ignore[arg-type]


@given(st.integers(1, 1 << 20))
def test_buckets(m: int) -> None:
    last = choice.bucket(m)
    assert last >= m and choice.bucket(last) == last and (last < 2 * m or m == 1)
    first = choice.first_of(last)
    assert first <= m and choice.bucket(first) == last and (first == 1 or choice.bucket(first - 1) < last)


@pytest.mark.parametrize("name", sorted(GPUS))
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 14336), (333, 777), (64, 53248)])
def test_labels_are_names_and_hold_in_the_whole_bucket(name: str, n: int, k: int) -> None:
    gpu, first = GPUS[name], 1
    for last in choice.BUCKETS:
        there = choice.contestants(gpu, last, n, k, 4, 64)
        labels = {one.label for one in there}
        assert len(labels) == len(there)
        for m in {first, (first + last) // 2}:
            found = choice.contestants(gpu, m, n, k, 4, 64)
            same_passes = {getattr(one, "passes", 1) for one in found} == {getattr(one, "passes", 1) for one in there}
            if same_passes:  # else x did not fit in shared memory at the end of the bucket
                # tilings of the mma kernel are dropped where the dense path is estimated to be faster, legal or not
                missing = labels - {one.label for one in found}
                assert all(label.startswith("mma ") for label in missing), (m, last)
        first = last + 1


@pytest.mark.parametrize("name", sorted(GPUS))
@pytest.mark.parametrize("m", [1, 7, 8, 9, 48, 64, 65, 300, 4096])
def test_untuned_is_the_best_estimate_of_all_kernels(name: str, m: int) -> None:
    gpu = GPUS[name]
    for n, k, bits, group in ((4096, 4096, 4, 64), (333, 777, 3, 777), (64, 53248, 2, 32)):
        made = [plan.make(gpu, m, n, k, bits, group)] if m <= choice.DECODE_TOKENS else []
        many = tiles if gpu.has_wgmma else mma
        if m > many.FEWEST_TOKENS or made == [None]:
            made.append(many.make(gpu, m, n, k, bits, group))
        best = min((one for one in made if one is not None), key=lambda one: one.cycles, default=None)
        assert choice.choose(gpu, tuned.Problem(m, n, k, bits, group, "float16"), nothing) == best


def test_beyond_the_kernels_arithmetic_nothing_is_chosen() -> None:
    problem = PROBLEM._replace(k=plan.MAX_IN_FEATURES + 1)
    assert choice.choose(GPUS["H100"], problem, lambda last: VERDICT) is None


def test_a_winner_is_followed_only_where_it_is_legal() -> None:
    gpu = GPUS["H100"]
    found = choice.contestants(gpu, *PROBLEM[:-1])
    for one in (found[1], found[20], found[-1]):
        assert choice.choose(gpu, PROBLEM, lambda last, one=one: knows(plan=one.label)) == one
    for label in (None, "", "decode rows=99", "matmul tokens=256 rows=2 ways=1 split=1 per_sm=1", "\0"):
        assert choice.choose(gpu, PROBLEM, lambda last, label=label: knows(plan=label)) == found[0]
    small = GPUS["RTX 3090"]  # what ran best on another GPU may be more than this one has
    legal = {one.label for one in choice.contestants(small, *PROBLEM[:-1])}
    foreign = [one.label for one in found if one.label not in legal]
    assert legal and foreign
    untuned = choice.choose(small, PROBLEM, nothing)
    for label in foreign:
        assert choice.choose(small, PROBLEM, lambda last, label=label: knows(plan=label)) == untuned


def test_a_winner_is_followed_in_its_bucket_as_far_as_the_estimate_agrees() -> None:
    """Waves: 1024 tokens fill the GPU evenly with the winner's tiles, 520 may not."""
    gpu, asked = GPUS["H100"], []
    followed = dropped = 0
    for n in (1024, 4096, 14336):
        last = tuned.Problem(1024, n, 4096, 4, 64, "float16")
        there = choice.contestants(gpu, *last[:-1])
        for winner in there[1:6]:
            verdict = tuned.Verdict(winner.label, 100.0, 105.0)
            for m in (513, 600, 777, 1000):

                def measured(problem: tuned.Problem, verdict: tuned.Verdict = verdict) -> tuned.Verdict:
                    asked.append(problem)
                    return verdict

                problem = last._replace(m=m)
                chosen, untuned = choice.choose(gpu, problem, measured), choice.choose(gpu, problem, nothing)
                assert asked.pop() == last and chosen is not None and untuned is not None
                same = next(one for one in choice.contestants(gpu, *problem[:-1]) if one.label == winner.label)
                worse = (same.cycles / untuned.cycles) / (winner.cycles / there[0].cycles)
                assert chosen == (same if worse < 1.05 else untuned)
                followed, dropped = followed + (worse < 1.05), dropped + (worse >= 1.05)
    assert followed > 10 and dropped > 10


def test_a_winner_of_the_last_m_alone() -> None:
    gpu = GPUS["H100"]
    label = choice.contestants(gpu, *PROBLEM[:-1])[1].label
    for first, followed in ((1, [5, 6, 7, 8]), (7, [7, 8]), (8, [8])):
        for m in range(5, 9):
            problem = PROBLEM._replace(m=m)
            chosen = choice.choose(gpu, problem, lambda last, first=first: tuned.Verdict(label, 1.0, 2.0, first))
            assert chosen is not None and (chosen.label == label) == (m in followed)


def test_the_launcher_consults_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda device: GPUS["H100"])
    monkeypatch.setattr(cuda, "machine", lambda device: HERE)
    cuda.choose.cache_clear()
    try:
        found = choice.contestants(GPUS["H100"], *PROBLEM[:-1])
        assert cuda.choose(0, *PROBLEM[:-1]) == found[0]
        tuned.keep(HERE, {PROBLEM: knows(plan=found[5].label)})
        new_process()
        assert cuda.choose(0, *PROBLEM[:-1]) == found[0]  # decided once
        cuda.choose.cache_clear()
        assert cuda.choose(0, *PROBLEM[:-1]) == found[5]
        assert cuda.choose(0, *PROBLEM[:-1], True) == found[0]  # bfloat16 was not measured
        for field, other in (("m", 9), ("n", 4080), ("k", 4032), ("bits", 3), ("group", 32)):
            problem = PROBLEM._replace(**{field: other})
            assert cuda.choose(0, *problem[:-1]) == choice.contestants(GPUS["H100"], *problem[:-1])[0]
        monkeypatch.setattr(cuda, "machine", lambda device: HERE._replace(driver="581.1"))
        cuda.choose.cache_clear()
        assert cuda.choose(0, *PROBLEM[:-1]) == found[0]
    finally:
        cuda.choose.cache_clear()
