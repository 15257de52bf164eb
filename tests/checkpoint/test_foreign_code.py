"""No code that comes with a model is run, or offered to be run."""

import ast
import builtins
import json
import sys
from pathlib import Path

import pytest

from growformer.errors import SourceError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
WORDS = [p for part in ("src", "docs", "benchmarks") for p in sorted((ROOT / part).rglob("*")) if p.is_file()]


def faults(source: str) -> list[str]:
    """Calls that switch foreign code on, or that leave it to transformers, which asks the user."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: word.value for word in node.keywords}
        trust = given.get("trust_remote_code")
        off = isinstance(trust, ast.Constant) and trust.value is False
        called = ast.unparse(node.func).split(".")
        auto = called[-1] in ("from_pretrained", "from_config") and called[-2:][0].startswith("Auto")
        if (trust is not None or auto) and not off:
            found.append(ast.unparse(node))
    return found


def test_trust_is_off_in_every_call() -> None:
    found = {path.name: faults(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert not any(found.values()), found
    assert sum("trust_remote_code=False" in path.read_text(encoding="utf-8") for path in SOURCES) >= 3


def test_no_file_says_that_it_is_on() -> None:
    on = "trust_remote_code" + "=True"
    assert [p for p in [*WORDS, ROOT / "README.md"] if on.encode() in p.read_bytes().replace(b" ", b"")] == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(x)",
        "transformers.AutoConfig.from_pretrained(x, local_files_only=True)",
        "LlamaConfig.from_pretrained(x, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=None)",
        "load(x, trust_remote_code=asked)",
    ],
)
def test_such_calls_would_be_seen(source: str) -> None:
    assert faults(source) == [source.replace('"', "'")]
    assert not faults("AutoModel.from_pretrained(x, trust_remote_code=False)")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose tokenizer is a class of its own, which leaves a mark when imported; and a user who agrees."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (model / "tokenizer.json").write_text("{}")
    about = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    mark = f"open({str(tmp_path / 'mark')!r}, 'w').close()"
    (model / "odd.py").write_text(
        f"{mark}\nfrom transformers import PreTrainedTokenizer\n\n\nclass Odd(PreTrainedTokenizer): ...\n"
    )

    def agree(_: object = "") -> str:
        (tmp_path / "asked").touch()
        return "y"

    monkeypatch.setattr(builtins, "input", agree)
    return model


def test_a_tokenizer_with_code_is_neither_run_nor_asked_about(trap: Path) -> None:
    from growformer.cli.commands import _continuations
    from growformer.proof.probe import probe_tokens

    probe = probe_tokens(trap, 1, 8, 0)
    assert probe.kind == "random" and "its tokenizer cannot be used" in probe.reason
    with pytest.raises(SourceError, match=r"transformers cannot load its tokenizer: .*custom code"):
        _continuations(trap, trap, "Once", 1)
    assert not (trap.parent / "asked").exists() and not (trap.parent / "mark").exists()


def test_that_tokenizer_would_leave_its_mark(trap: Path) -> None:
    """The control: asked, the user agrees."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(trap, local_files_only=True)
    except Exception as error:  # the class is of no use, once it is imported
        print(error)
    assert (trap.parent / "asked").exists() and (trap.parent / "mark").exists()
