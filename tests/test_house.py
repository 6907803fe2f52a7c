"""The habits of the house, as far as a machine can check them.

CONTRIBUTING.md says why; who may import whom is in pyproject.toml.
"""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flute

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flute"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70  # without the docstring: explaining is free
IMPORT_SECONDS = 0.15

# Files of a model directory are untrusted: whatever can run code from data is not used at all.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.expr) -> str:
    """os.path.join -> "os.path.join"; anything that is not a plain chain of names -> ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported(node: ast.AST) -> set[str]:
    """The top-level packages that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").partition(".")[0]}
    return set()


def loads_weights_only(node: ast.Call) -> bool:
    """torch.load(..., weights_only=True), which builds tensors and containers and calls nothing else."""
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return dotted(node.func) == "torch.load" and said.get("weights_only") == "True"


def functions(module: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


each_source = pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])


@each_source
def test_no_code_from_data(path: Path) -> None:
    found = []
    for node in ast.walk(tree(path)):
        found += [(node.lineno, f"import {name}") for name in imported(node) & FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS and not loads_weights_only(node):
                found.append((node.lineno, dotted(node.func)))
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in FORBIDDEN_ARGUMENTS and not off:
                    found.append((node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"))
    assert not found, f"{path}: runs code from data: {found}"


@each_source
def test_environment_is_read_in_one_place(path: Path) -> None:
    if path == PACKAGE / "settings.py":
        return
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and dotted(node) in {"os.environ", "os.getenv", "os.putenv"}:
            found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [node.lineno for alias in node.names if alias.name in {"environ", "getenv", "putenv"}]
    assert not found, f"{path}: lines {found} use the environment; ask flute.settings"


@each_source
def test_a_page_or_three(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{path}: {lines} lines, at most {MAX_FILE_LINES}; a file is one idea"
    for function in functions(tree(path)):
        docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
        spared = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
        length = (function.end_lineno or 0) - function.lineno + 1 - spared
        assert length <= MAX_FUNCTION_LINES, (
            f"{path}:{function.lineno}: {function.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        )


@each_source
def test_errors_say_something(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            silent_call = isinstance(node.exc, ast.Call) and not node.exc.args and not node.exc.keywords
            silent_class = bool(re.search(r"(^|\.)[A-Z]\w*$", dotted(node.exc)))
            assert not (silent_call or silent_class), f"{path}:{node.lineno}: raise without a message"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: a bare except also catches Ctrl-C"


@each_source
def test_public_things_are_explained(path: Path) -> None:
    module = tree(path)
    if module.body:
        assert ast.get_docstring(module), f"{path}: the file does not say what it is for"
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_the_package_root_imports_only_the_hook() -> None:
    """Everything public is looked up lazily."""
    rooms = {
        alias.name
        for node in ast.walk(tree(PACKAGE / "__init__.py"))
        if isinstance(node, ast.ImportFrom) and node.module == "flute"
        for alias in node.names
    }
    assert rooms <= {"_autoload"}


def fresh(code: str) -> str:
    """What a new Python prints when it runs `code`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


HEAVY = "{'torch', 'transformers', 'accelerate', 'peft', 'cuda', 'triton', 'matplotlib', 'numpy', 'typer', 'rich'}"


def test_import_is_silent_and_loads_nothing_heavy() -> None:
    assert fresh("import flute") == ""
    assert fresh(f"import flute, sys; print(sorted({HEAVY} & set(sys.modules)))") == "[]\n"


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import flute; print(time.perf_counter() - t)"
    best = min(float(fresh(code)) for _ in range(5))
    assert best <= IMPORT_SECONDS, f"import flute takes {best:.3f} s"


def test_the_core_needs_no_third_party_library_beyond_torch() -> None:
    rooms = "flute.spec, flute.tables, flute.quantize, flute.packing, flute.kernels.ops, flute.linear, flute.checkpoint"
    code = f"""
import sys, torch
before = set(sys.modules)
import {rooms}
print(sorted({HEAVY} & (set(sys.modules) - before)), torch.cuda.is_initialized())
"""
    assert fresh(code) == "[] False\n"


def test_a_public_name_is_not_hidden_by_its_module() -> None:
    code = "import flute.quantize, flute; from flute.quantize import quantize; print(flute.quantize is quantize)"
    assert fresh(code) == "True\n"


def test_every_public_name_resolves() -> None:
    for name in flute.__all__:
        assert getattr(flute, name) is not None
    assert set(flute.__all__) <= set(dir(flute))
    with pytest.raises(AttributeError, match="public names are"):
        flute.no_such_name  # noqa: B018


def test_what_is_installed_is_this_version() -> None:
    if Path(flute.__file__).parent != PACKAGE:
        pytest.skip("flute is not imported from this checkout")
    assert importlib.metadata.version("flute-engine") == flute.__version__
    groups = {"console_scripts": "flute.cli:main", "torch.backends": "flute._autoload:register"}
    for group, target in groups.items():
        assert target in {entry.value for entry in importlib.metadata.entry_points(group=group, name="flute")}


def test_tools_and_main_dependencies_are_pinned_once() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert {"torch", "transformers", "ruff", "mypy", "import-linter", "pytest", "setuptools"} <= set(pins)
    for name in (".pre-commit-config.yaml", "pyproject.toml", ".ci/run", "dev.py"):
        assert not re.search(r"(ruff|mypy|torch)==", (ROOT / name).read_text()), (
            f"{name}: pins belong in constraints.txt"
        )


@pytest.mark.parametrize(
    ("environment", "tag"),
    [({"FLUTE_PURE": "1"}, "py3-none-any"), ({"CC": "no-such-compiler"}, "py3-none-")],
    ids=["pure", "no-compiler"],
)
def test_wheel_holds_what_it_must(tmp_path: Path, environment: dict[str, str], tag: str) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, source / "flute", ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(build, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert tag in wheel.name
    description = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert description and description.loader
    dev = importlib.util.module_from_spec(description)
    description.loader.exec_module(dev)
    dev.verify(wheel)
