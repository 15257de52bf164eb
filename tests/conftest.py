"""What every test shares: threads, the real checkpoint, hypothesis profiles, and which tests need a GPU."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A test process next to another gets one thread; its child processes too.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# Threads that wait by spinning make two test processes on two cores many times slower.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# A test that reaches for the hub is a bug: nothing is downloaded at run time. (Read when transformers is imported.)
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
ON_CI = os.environ.get("CI", "").lower() == "true"

# Shared machines stall for seconds, so no profile has a deadline. `ci` draws the same examples every time.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if ON_CI else "dev")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def find_stories(root: Path, data: str | None, on_ci: bool) -> Path:
    """Finds the real pretrained Llama (260,000 weights) that some tests grow.

    Args:
        root: The repository's root; its sibling `shared/data` is the default place.
        data: A folder to look in instead, or None.
        on_ci: Whether a missing folder is a failure: a skip nobody sees would hide the tests that matter most.

    Returns:
        The checkpoint's folder.

    Raises:
        pytest.fail.Exception: It is missing and `on_ci`.
        pytest.skip.Exception: It is missing elsewhere.
    """
    folder = (Path(data) if data else root.parent / "shared" / "data") / "stories260K"
    if (folder / "model.safetensors").is_file():
        return folder
    reason = f"no checkpoint at {folder}: set GROWFORMER_DATA to the folder that holds stories260K"
    if on_ci:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of stories260K, a real pretrained Llama; see `find_stories` for what happens without it."""
    return find_stories(ROOT, os.environ.get("GROWFORMER_DATA"), ON_CI)
