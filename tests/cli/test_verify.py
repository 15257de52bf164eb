"""`growformer verify`: with both folders or the grown one alone; a changed byte in either is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from growformer import api
from growformer.errors import RequestError, SourceError

from .harness import Cli, state

WORDS = ("intermediate_size=41", "num_hidden_layers=4", "--prove", "structure")
QUICK = ("--prove", "structure")


@pytest.fixture
def grown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A source and what it grew to, by relative paths."""
    cli.source()
    (cli.src / "tokenizer_config.json").write_text('{"a": "b"}')
    monkeypatch.chdir(cli.root)
    assert cli("expand", "src", "out", *WORDS).code == 0
    return cli


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def claims(said: str) -> dict[str, dict[str, object]]:
    return {claim["name"]: claim for claim in json.loads(said)["claims"]}


def test_one_folder_finds_its_source_by_the_receipt(grown: Cli) -> None:
    before = state(grown.root)
    one, two = grown("verify", "out", *QUICK, "--json"), grown("verify", "src", "out", *QUICK, "--json")
    assert one.code == two.code == 0
    assert one.out == two.out and claims(one.out)["files"]["passed"] is True
    assert state(grown.root) == before
    table = grown("verify", "out", *QUICK)
    assert table.code == 0 and "every hash as in the receipt" in table.out


def test_everything_is_checked_by_default(grown: Cli) -> None:
    said = grown("verify", "out", "--json")
    assert said.code == 0
    assert {name: claim["passed"] for name, claim in claims(said.out).items()} == dict.fromkeys(
        ("files", "structure", "loads", "algebra", "stored", "runtime", "alive"), True
    )


def test_memory_moves_the_proof_to_the_disk(grown: Cli) -> None:
    said = grown("verify", "out", "--memory", "10kB", "--json")
    found = {name: claim["passed"] for name, claim in claims(said.out).items()}
    assert said.code == 0
    assert found["algebra"] is True and found["stored"] is True and found["alive"] is None
    grown.refused("verify", "out", "--memory", "lots", says="'lots' is no size in bytes")
    # The control: a weight that both see broken.
    flip(grown.out / "model.safetensors", -2)
    assert grown("verify", "out", "--memory", "10kB").code == 1


def test_the_python_call_takes_none_as_the_source(grown: Cli) -> None:
    assert api.verify(None, "out", level="structure").exit_code == 0
    with pytest.raises(RequestError, match="verify takes two folders"):
        api.verify(None, object())  # type: ignore[arg-type]


def test_a_relative_source_counts_from_the_current_folder(grown: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (grown.root / "elsewhere").mkdir()
    monkeypatch.chdir(grown.root / "elsewhere")
    message = grown.refused("verify", "../out", says="'src' as the source, and there is no such folder")
    assert "../out" in message and str(grown.root / "elsewhere") in message and "verify SRC" in message
    assert grown("verify", "../src", "../out", *QUICK).code == 0


def test_a_source_that_is_gone_is_named(grown: Cli) -> None:
    grown.src.rename(grown.root / "moved")
    grown.refused("verify", "out", says=r"^growformer: out: its growformer.json names 'src' as the source")
    with pytest.raises(SourceError, match="there is no such folder"):
        api.verify(None, "out")
    assert grown("verify", "moved", "out", *QUICK).code == 0


def test_a_receipt_without_a_source(grown: Cli) -> None:
    receipt = json.loads((grown.out / "growformer.json").read_text())
    receipt["source"]["path"] = None
    (grown.out / "growformer.json").write_text(json.dumps(receipt))
    grown.refused("verify", "out", says="does not name the source's folder; say where it is: growformer verify SRC out")
    assert grown("verify", "src", "out", *QUICK).code == 0


def test_what_is_no_grown_folder(grown: Cli) -> None:
    grown.refused("verify", "gone", says="gone: does not exist")
    grown.refused("verify", "src", says=r"src: has no growformer.json")
    grown.refused("verify", "a", "b", "c", says="c: does not exist")
    grown.refused("verify", "src", "src", "out", says="says method 'paper': it was not fused of two")
    grown.refused("verify", "a", "b", "c", "d", says="verify takes the source's folder and the grown one.*got 4")
    assert grown("verify").code == 2


BYTES: list[tuple[str, str, Callable[[Path], None]]] = [
    ("src", "model.safetensors", lambda path: flip(path, -2)),
    ("out", "model.safetensors", lambda path: flip(path, -2)),
    ("out", "model.safetensors", lambda path: flip(path, path.stat().st_size // 2)),
    ("out", "tokenizer_config.json", lambda path: flip(path, 2)),
    ("src", "config.json", lambda path: path.write_bytes(path.read_bytes() + b"\n")),
    ("out", "config.json", lambda path: path.write_bytes(path.read_bytes() + b"\n")),
    ("out", "generation_config.json", lambda path: path.unlink()),
]


@pytest.mark.parametrize(("folder", "name", "change"), BYTES, ids=[f"{f}-{n}-{i}" for i, (f, n, _) in enumerate(BYTES)])
def test_a_changed_byte_is_found(grown: Cli, folder: str, name: str, change: Callable[[Path], None]) -> None:
    change(grown.root / folder / name)
    where = {"src": "the source", "out": "the grown folder"}[folder]
    for folders in (("out",), ("src", "out")):
        said = grown("verify", *folders, *QUICK)
        assert said.code == 1
        found = claims(grown("verify", *folders, *QUICK, "--json").out)["files"]
        assert found["passed"] is False and found["found"] == f"other than in the receipt: {name} in {where}"
        assert name in said.out


def test_a_card_may_be_edited(grown: Cli) -> None:
    (grown.out / "README.md").write_text("ours")
    assert grown("verify", "out", *QUICK).code == 0


def test_another_growth_of_the_same_source_is_not_this_one(grown: Cli) -> None:
    """The receipt of one folder beside the tensors of another."""
    assert (
        grown("expand", "src", "other", "intermediate_size=41", "num_hidden_layers=4", "--seed", "7", *QUICK).code == 0
    )
    shutil.copyfile(grown.root / "other" / "model.safetensors", grown.out / "model.safetensors")
    said = claims(grown("verify", "out", *QUICK, "--json").out)
    assert said["files"]["passed"] is False and said["structure"]["passed"] is True
