"""One tiny checkpoint for all of these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from growformer.api.checks.samples import save_tiny
from tests.tokenformer.kit import FAMILY


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """One thread, for matrices this small gain nothing from a second; and no bars."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint whose gains, keys and values are random and whose sizes all differ."""
    return save_tiny(FAMILY, "TokenFormerForCausalLM", tmp_path_factory.mktemp("tokenformer") / "src", "float32")
