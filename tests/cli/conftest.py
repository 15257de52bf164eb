"""Tiny checkpoints, saved once, and the command line in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import CONFIGS, save

from .harness import Cli


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every kind."""
    root = tmp_path_factory.mktemp("bases")
    grouped = save(root / "llama-gqa", "llama", num_attention_heads=6)
    return {"llama-gqa": grouped} | {kind: save(root / kind, kind) for kind in CONFIGS}


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    """What the entry point sets for a process of its own, before transformers is imported."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def cli(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """The command line, in a folder of its own."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return Cli(tmp_path, bases, monkeypatch, capsys)
