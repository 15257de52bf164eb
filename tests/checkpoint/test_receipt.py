"""The receipt: the same after a round trip, refused when it is another's, and honest about files."""

import json
from pathlib import Path
from typing import Any

import pytest

from growformer.checkpoint import RECEIPT, Receipt, sha256
from growformer.errors import SourceError


def some_receipt(**changes: Any) -> Receipt:
    fields: dict[str, Any] = {
        "growformer": "0.1.0",
        "versions": {"python": "3.11", "torch": "2.13"},
        "family": "llama",
        "source_family": "",
        "method": "paper",
        "seed": 3,
        "dtype": None,
        "request": {"hidden_size": 24, "layers_at": [1, 3]},
        "moved": ["rms_norm_eps"],
        "source": {"path": "src", "files": {"model.safetensors": "00"}},
        "target": {"files": {"model.safetensors": "11"}},
        "axes": {"hidden": {"old": 12, "new": 24, "factor": [1, 2]}},
        "layers": {"layer": [0, None, 1]},
        "plan": {"tensors": [{"name": "w"}]},
        "fidelity": {"identical": 4, "rounded": 2},
        "dead": ["lm_head: tied"],
        "within_eps": [],
        "stds": {"w": 0.02},
        "measured": {"algebra": 3e-16, "floor": None},
    }
    return Receipt(**(fields | changes))


def test_round_trip(tmp_path: Path) -> None:
    receipt = some_receipt()
    assert receipt.write(tmp_path) == tmp_path / RECEIPT
    assert Receipt.read(tmp_path) == receipt
    assert json.loads((tmp_path / RECEIPT).read_text())["format"] == 1
    assert Receipt.read(tmp_path) != some_receipt(seed=4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "its format is 2, this growformer reads 1"),
        ({"format": 2, "new_key": 1}, "its format is 2"),
        ({"format": True}, "its format is True"),
        ({"format": "1"}, "its format is '1'"),
        ({"surprise": 1}, "surprise: .*"),
        ({"seed": "3"}, "seed: .*integer"),
        ({"seed": True}, "seed: .*integer"),
        ({"dead": "all"}, "dead: .*array"),
        ({"fidelity": {"identical": 1.5}}, "fidelity.identical: .*integer"),
        ({"source": {"files": {}}}, "source.path: .*required"),
        ({"source": {"path": "p", "files": {}, "more": 1}}, "source.more: "),
        ({"target": {"files": {"a": 1}}}, "target.files.a: .*string"),
    ],
)
def test_receipts_that_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = some_receipt().write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SourceError, match=rf"{RECEIPT}: .*{reason}"):
        Receipt.read(tmp_path)


def test_every_key_is_required(tmp_path: Path) -> None:
    path = some_receipt().write(tmp_path)
    fields = json.loads(path.read_text())
    for key in fields:
        path.write_text(json.dumps({k: v for k, v in fields.items() if k != key}))
        with pytest.raises(SourceError, match="its format is None" if key == "format" else f"{key}: .*required"):
            Receipt.read(tmp_path)


def test_no_receipt_or_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"has no {RECEIPT}"):
        Receipt.read(tmp_path)
    for text in ("{", "[]", '{"format": 1, "format": 1}'):
        (tmp_path / RECEIPT).write_text(text)
        with pytest.raises(SourceError, match=RECEIPT):
            Receipt.read(tmp_path)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="receipt: seed: "):
        some_receipt(seed=0.5).write(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        some_receipt(measured={"max": float("nan")}).write(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        some_receipt(plan={"a": object()}).write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_check_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    hashes = {name: sha256(tmp_path / name) for name in ("a", "b", "c")}
    receipt = some_receipt(source={"path": None, "files": hashes}, target={"files": hashes | {"d": "00"}})
    assert receipt.check_files(tmp_path, "source") == []
    assert receipt.check_files(tmp_path, "target") == ["d"]
    (tmp_path / "b").write_text("x")
    (tmp_path / "c").unlink()
    assert receipt.check_files(tmp_path, "source") == ["b", "c"]


def test_recorded_names_stay_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "folder"
    folder.mkdir()
    receipt = some_receipt(target={"files": {"../secret": sha256(tmp_path / "secret")}})
    with pytest.raises(SourceError, match="does not name a file inside"):
        receipt.check_files(folder, "target")
