"""The command line in this process, and what every refusal has in common."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from growformer.cli import main


@dataclass(frozen=True)
class Said:
    """What a command said: its exit code, and the two streams."""

    code: int
    out: str
    err: str


def state(folder: Path) -> dict[str, str]:
    """Everything under a folder, by name: the hash of a file, where a link leads, or that it is a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {path.readlink()}"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = what
    return found


class Cli:
    """Runs commands in a folder of its own.

    Attributes:
        root: the folder; every path that a command may write is in it.
        src: the source checkpoint in it.
        out: where `expand` should make the grown one.
    """

    def __init__(
        self,
        root: Path,
        bases: Mapping[str, Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.root, self.src, self.out = root, root / "src", root / "out"
        self._bases, self._monkeypatch, self._capsys = bases, monkeypatch, capsys

    def source(self, kind: str = "llama") -> Path:
        """A fresh copy of a tiny checkpoint at `src`."""
        shutil.copytree(self._bases[kind], self.src)
        return self.src

    def config(self, **changes: Any) -> None:
        """Change the source's config.json; `...` takes a key out."""
        path = self.src / "config.json"
        kept = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))

    def __call__(self, *args: object) -> Said:
        """Run `growformer ARGS` through its entry point."""
        self._monkeypatch.setattr(sys, "argv", ["growformer", *map(str, args)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main.run()
        said = self._capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, said.err)

    def of(self, command: str, *words: object) -> list[object]:
        """The arguments of `plan SRC WORDS` or `expand SRC OUT WORDS`."""
        return [command, self.src, *([self.out] if command == "expand" else []), *words]

    def refused(self, *args: object, says: str, lines: int = 1) -> str:
        """Run a command that must be refused: exit code 2, one message, nothing written, nothing changed.

        Args:
            args: of the command.
            says: a regular expression that the message must match somewhere.
            lines: of the message.

        Returns:
            The message.
        """
        before = state(self.root)
        said = self(*args)
        assert state(self.root) == before
        assert said.code == 2, said
        assert said.out == ""
        assert said.err.startswith("growformer: ") and said.err.count("growformer: ") == 1
        assert said.err.endswith("\n") and said.err.count("\n") == lines, said.err
        assert re.search(says, said.err), said.err
        return said.err


def suggestions(message: str) -> list[dict[str, int]]:
    """The requests that a refusal names as working, each as changes to the request that was refused."""
    found = re.search(r"[;:] ([^;:]*=[^;:]*?) (?:works|is alive)", message)
    if found is None:
        return []
    pairs = [re.findall(r"(\w+)=(\d+)", choice) for choice in found[1].split(" or ")]
    return [{key: int(value) for key, value in choice} for choice in pairs]
