"""The receipt: `growformer.json` beside a grown model says what was asked, what was done and what was measured."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from growformer.checkpoint.folder import inside, read_json, sha256
from growformer.errors import SourceError

RECEIPT = "growformer.json"
FORMAT = 1
_STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(_STRICT)
class SourceFiles(TypedDict):
    """Where the source was (as the user gave it; None where that is nobody's business) and its SHA-256 by name."""

    path: str | None
    files: dict[str, str]


@with_config(_STRICT)
class TargetFiles(TypedDict):
    """The SHA-256 of the grown folder's files, by name."""

    files: dict[str, str]


@with_config(_STRICT)
@dataclass(kw_only=True)
class Receipt:
    """All that a grown folder says about its making; `verify` takes its claims from here and believes none of them.

    Everything is plain JSON. `axes`, `layers` and `plan` are opaque here: the planner writes them, the certificate
    reads them.
    """

    format: int = FORMAT
    """Version of this file's layout."""
    growformer: str
    """Version of growformer that made the folder."""
    versions: dict[str, str]
    """Versions of what took part: python, torch, transformers, safetensors."""
    family: str
    source_family: str
    """The source's family, where `family` is another that it became; else empty."""
    method: str
    seed: int
    dtype: str | None
    """The storage dtype that was asked for; None where the source's was kept."""
    request: dict[str, Any]
    """Config fields and the values asked for."""
    moved: list[str]
    """Config fields that changed without being asked for (eps, theta, per-layer lists)."""
    source: SourceFiles
    target: TargetFiles
    axes: dict[str, Any]
    layers: dict[str, Any]
    plan: dict[str, Any]
    fidelity: dict[str, int]
    """How many tensors are identical, scaled, rounded."""
    dead: list[str]
    """Blocks that never get a gradient, each with its reason."""
    stds: dict[str, float]
    """Standard deviations that the fill measured on the source, by tensor."""
    within_eps: list[str]
    """What is exact only up to the eps of norms, with the formula of the bound; empty where the growth is exact."""
    measured: dict[str, Any]
    """Errors and floors that the checks measured."""

    def write(self, folder: Path) -> Path:
        """Write `growformer.json` into the folder and return its path.

        Raises:
            ValueError: a number is NaN or infinite, which JSON cannot say.
            SourceError: a field holds what `read` would refuse.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        _check(text, "receipt")
        path = folder / RECEIPT
        path.write_text(text, encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: Path) -> "Receipt":
        """Read the receipt of a grown folder.

        Raises:
            SourceError: no receipt, damaged, of another format version, or with a missing, unknown or ill-typed key.
        """
        path = inside(folder, RECEIPT)
        if not path.exists():
            raise SourceError(f"{folder}: has no {RECEIPT}; expected a folder that growformer wrote")
        fields = read_json(path)
        # The version comes first: another version's keys are not wrong, they are another version's.
        found = fields.get("format")
        if type(found) is not int or found != FORMAT:
            raise SourceError(f"{path}: its format is {found!r}, this growformer reads {FORMAT}")
        return _check(json.dumps(fields), path)

    def check_files(self, folder: Path, which: Literal["source", "target"]) -> list[str]:
        """Return the names of recorded files that are missing from the folder, or whose SHA-256 differs.

        Raises:
            SourceError: a recorded name leads out of the folder.
        """
        recorded = self.source["files"] if which == "source" else self.target["files"]
        paths = {name: inside(folder, name) for name in recorded}
        return [name for name, path in paths.items() if not path.is_file() or sha256(path) != recorded[name]]


def _check(text: str, where: object) -> Receipt:
    try:
        # As JSON: to strict pydantic, a dict in Python is no dataclass.
        return TypeAdapter(Receipt).validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SourceError(f"{where}: {problems}") from error
