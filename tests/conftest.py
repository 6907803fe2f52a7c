"""What every test may rely on: no GPU test without a GPU, no flaky deadlines, no files of the user touched."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# Shared and loaded machines: a slow example is not a wrong one. CI tries the same examples each time.
hypothesis.settings.register_profile("house", deadline=None, derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("house")

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads only stand in each other's way
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled kernels of a test run are kept apart from the user's; all workers of the run share them."""
    if "FLUTE_CACHE_DIR" not in os.environ:
        base: Path = tmp_path_factory.getbasetemp()
        shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
        os.environ["FLUTE_CACHE_DIR"] = str(shared / "flute-cache")
