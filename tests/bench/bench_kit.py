"""Text for tiny suites, and suites with changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.training.train_kit import text

SMOKE = Path(__file__).resolve().parents[2] / "benchmarks" / "suites" / "smoke.yaml"


class Told:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def texts(folder: Path) -> Path:
    """A folder with text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, seed in (("train.txt", 12000, 0), ("valid.txt", 1500, 1), ("test.txt", 1500, 2)):
        text(folder, name, size, seed)
    return folder


def smoke() -> dict[str, Any]:
    """The smoke suite as plain data."""
    data: dict[str, Any] = yaml.safe_load(SMOKE.read_text())
    return data


def suite_file(path: Path, data: Mapping[str, Any]) -> Path:
    """A suite in a file."""
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False))
    return path
