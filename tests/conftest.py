"""What every test may rely on: no GPU test without a GPU, no flaky deadlines, no files of the user touched."""

import os
from pathlib import Path

# Threads that wait sleep: those that spin take the time of others. OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

# Shared and loaded machines: a slow example is not a wrong one. CI tries the same examples each time.
hypothesis.settings.register_profile("house", deadline=None, derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("house")

# Models of tests are small: a second thread waits more than it works. Threaded code has tests that ask for threads.
THREADS = 1
torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _threads() -> None:
    """As many threads as everybody's, whatever a test before did or a command was told."""
    torch.set_num_threads(THREADS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="also the complete sweeps: minutes more, before a release")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {} if torch.cuda.is_available() else {"gpu": "needs an NVIDIA GPU, and torch sees none"}
    if not config.getoption("--sweep"):
        skipped["sweep"] = "one of the complete sweeps; run with --sweep before a release"
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled kernels of a test run are kept apart from the user's; all workers of the run share them."""
    if "FLUTE_CACHE_DIR" not in os.environ:
        base: Path = tmp_path_factory.getbasetemp()
        shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
        os.environ["FLUTE_CACHE_DIR"] = str(shared / "flute-cache")


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the embedded model's eight blocks, with its tokenizer: real weights in a quarter of the time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flute.integrations.folders import embedded

    folder: Path = tmp_path_factory.mktemp("shallow") / "tiny"
    AutoModelForCausalLM.from_pretrained(embedded(), num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float16, to be copied before anything is done to it."""
    from tiny_models import saved

    return Path(saved(tmp_path_factory.mktemp("dense") / "dense", dtype=torch.float16))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files."""
    from tiny_models import build

    folder: Path = tmp_path_factory.mktemp("sharded") / "sharded"
    build("Llama", torch.float16).save_pretrained(folder, max_shard_size="60KB")
    return folder
