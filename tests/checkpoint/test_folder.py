"""Model folders: what is refused, what travels, and that a new folder appears whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from growformer.checkpoint import companions, copy_companions, new_folder, read_config, sha256, size_text, write_config
from growformer.errors import SourceError, TargetError


def put_config(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


def test_reads_a_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 12, "auto_map": {}, "quantization_config": None}
    config["attn_implementation"] = "sdpa"
    put_config(tmp_path, config)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[]", "holds a JSON list, expected an object"),
        ("{", "not readable as JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\).*dequantise it first"),
        ({"quantization_config": {"bits": 4}}, r"quantised \(method not named\)"),
        ({"quantization_config": "fp8"}, "quantised .*fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"quantised \(compressed-tensors\)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"quantised \(awq\)"),
        ({"attn_implementation": "someone/kernel@main"}, "attn_implementation = 'someone/kernel@main' asks for code"),
        ({"_attn_implementation": {"": "eager", "text": "a/b"}}, "_attn_implementation = .* asks for code"),
        ({"text_config": {"attn_implementation": "a/b"}}, "attn_implementation = 'a/b' asks for code"),
        ({"model_type": "odd", "auto_map": {"AutoModel": "m.M"}}, "auto_map asks for code.*'odd'"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: Any, reason: str) -> None:
    put_config(tmp_path, config)
    with pytest.raises(SourceError, match=rf"config.json: .*{reason}"):
        read_config(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="gone: does not exist"):
        read_config(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="file: is a file"):
        read_config(tmp_path / "file")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SourceError, match="is no regular file"):
        read_config(tmp_path)


def test_writes_the_config_as_transformers_does(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=12, num_attention_heads=2).save_pretrained(tmp_path)
    theirs = (tmp_path / "config.json").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    assert write_config(out, dict(reversed(read_config(tmp_path).items()))).read_bytes() == theirs
    assert theirs.endswith(b"}\n")


# fmt: off
TRAVELS = [
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/tools.jinja", "chat_templates/rag.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE", "license.md",
    "LICENSE-MODEL.txt", "NOTICE", "USE_POLICY.md",
]
STAYS = [
    "config.json", "README.md", "growformer.json", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "consolidated.00.pth", "model.gguf", "tf_model.h5", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "trainer_state.json", "training_args.bin", "modeling_odd.py",
    "additional_chat_templates/run.py", "1_Pooling/config.json", ".gitattributes",
]
# fmt: on


def fill(folder: Path) -> None:
    for name in TRAVELS + STAYS:
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)


def test_companions_travel_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    fill(source)
    (source / "tokenizer_extra").mkdir()
    target.mkdir()
    assert [str(p.relative_to(source)) for p in companions(source)] == sorted(TRAVELS)
    copies = copy_companions(source, target)
    assert sorted(copies) == sorted(p for p in target.rglob("*") if p.is_file())
    assert {str(p.relative_to(target)): p.read_text() for p in copies} == {name: name for name in TRAVELS}


def test_every_tokenizer_file_that_transformers_names_travels(tmp_path: Path) -> None:
    from transformers import BertTokenizer, GPT2Tokenizer, LlamaTokenizer, T5Tokenizer, WhisperTokenizer

    names = {name for t in (BertTokenizer, GPT2Tokenizer, LlamaTokenizer, T5Tokenizer, WhisperTokenizer)
             for name in t.vocab_files_names.values()}  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    assert {p.name for p in companions(tmp_path)} == names and len(names) > 3


def test_a_companion_that_is_a_link_elsewhere_does_not_travel(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="outside its folder"):
        companions(folder)


def test_links_inside_travel_as_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "real").write_text("x")
    (source / "vocab.txt").symlink_to("real")
    (copy,) = copy_companions(source, target)
    assert copy.read_text() == "x" and not copy.is_symlink()


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000_000, "1.5 GB"),
        (999_960, "1.0 MB"),
        (10**18, "1000.0 PB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size_text(count) == text


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, 10) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(".out.") and partial.name.endswith(".partial")
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_relative_name_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder(Path("out"), 0):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out", 0) as partial:
        (partial / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_at_the_end_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(TargetError, match="out: cannot be written: Input/output error"):  # noqa: SIM117
        with new_folder(tmp_path / "out", 0) as partial:
            (partial / "file").write_text("x")
            monkeypatch.setattr(os, call, fails)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(ValueError, match="mine") as caught, new_folder(tmp_path / "out", 0):
        raise ValueError("mine")
    (left,) = tmp_path.iterdir()
    assert caught.value.__notes__ == [f"{left} could not be removed; delete it by hand"]


@pytest.mark.parametrize("kind", ["file", "empty folder", "dangling link"])
def test_what_exists_is_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    elif kind == "empty folder":
        out.mkdir()
    else:
        out.symlink_to("gone")
    with pytest.raises(TargetError, match=r"out: exists already.*name a new folder"), new_folder(out, 0):
        raise AssertionError("the body must not run")
    assert os.path.lexists(out) and len(list(tmp_path.iterdir())) == 1


def test_what_comes_into_being_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TargetError, match="exists already"), new_folder(out, 0) as partial:
        (partial / "file").touch()
        out.mkdir()
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())


def test_the_parent_must_exist(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="gone is not a folder that exists"), new_folder(tmp_path / "gone" / "out", 0):
        raise AssertionError("the body must not run")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match="cannot be written: File name too long"),
        new_folder(tmp_path / ("o" * 250), 0),
    ):
        raise AssertionError("the body must not run")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 2_500_000_000))
    reason = r"out: needs 4.0 GB, and its disk has 2.5 GB free; make room for 1.5 GB more"
    with pytest.raises(TargetError, match=reason), new_folder(tmp_path / "out", 4 * 10**9):
        raise AssertionError("the body must not run")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out", 2_500_000_000):
        pass
