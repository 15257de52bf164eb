"""Hub ids as sources: what is asked of the Hub, what a failure says, and that a folder never asks it anything."""

import importlib
import json
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from growformer.checkpoint import Receipt, TensorFiles, companions
from growformer.checkpoint.hub import hub_id, located
from growformer.cli import main
from growformer.errors import SourceError
from tests.tiny import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = ("pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "modeling_new.py")


class Hub:
    """A Hub with one model: copies into a cache of the same layout what the patterns ask for."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache, self.asked = files, cache, list[tuple[str, dict[str, Any]]]()

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.asked.append((repo_id, options))
        org, name = repo_id.split("/")
        home = self.cache / f"models--{org}--{name}"
        snapshot = home / "snapshots" / COMMIT
        for path in sorted(p for p in self.files.rglob("*") if p.is_file()):
            relative = str(path.relative_to(self.files))
            if any(fnmatch(relative, pattern) for pattern in options["allow_patterns"]):
                blob = home / "blobs" / relative.replace("/", "-")
                link = snapshot / relative
                for folder in (blob.parent, link.parent):
                    folder.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    shutil.copyfile(path, blob)
                    link.symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    files = save(tmp_path / "remote", "llama")
    for name in ("LICENSE", "tokenizer_config.json", "chat_templates/tool.jinja", *OTHERS):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text("{}")
    (files / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    fake = Hub(files, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_an_id_becomes_a_folder_with_all_that_growing_reads(hub: Hub) -> None:
    folder = located("org/tiny-model.1")
    assert hub.asked[0][0] == "org/tiny-model.1"
    with TensorFiles.open(folder) as got, TensorFiles.open(hub.files) as there:
        assert got.names == there.names
    assert {str(p.relative_to(folder)) for p in companions(folder)} == {
        str(p.relative_to(hub.files)) for p in companions(hub.files)
    }
    assert (folder / "config.json").is_file() and (folder / "README.md").is_file()
    assert not any((folder / name).exists() for name in OTHERS)
    assert hub_id(folder) == "org/tiny-model.1"


def test_shards_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    names = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (hub.files / name).write_text("{}")
    folder = located("org/name")
    assert all((folder / name).is_file() for name in names)


@pytest.mark.parametrize(
    "name", ["gone", "./org/name", "org/name/", "/org/name", "a/b/c", "../org/name", "org/", "~/x"]
)
def test_only_ids_are_asked_for(hub: Hub, name: str) -> None:
    assert located(name) == Path(name)
    assert hub.asked == []


def test_a_folder_wins_over_an_id(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(hub.files, tmp_path / "org" / "name")
    assert located("org/name") == Path("org/name") and located(Path("org/name")) == Path("org/name")
    (tmp_path / "org" / "broken").symlink_to(tmp_path / "nowhere")
    assert located("org/broken") == Path("org/broken")
    assert hub.asked == []
    located("org/other")
    assert len(hub.asked) == 1


def test_a_local_folder_needs_no_hub_package(hub: Hub) -> None:
    """In a process that cannot import it."""
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from growformer.checkpoint.hub import located\n"
        f"print(located({str(hub.files)!r}))\n"
        "try: located('org/name')\n"
        "except ImportError: print('asked')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said == [str(hub.files), "asked"]


@pytest.mark.parametrize(
    "error", [OSError("[Errno -2] Name or service not known"), ValueError("first line\nsecond line"), RuntimeError()]
)
def test_a_failure_says_what_was_asked_and_what_failed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError) as caught:
        located("org/name")
    said = str(caught.value)
    first = (str(error).splitlines() or ["no reason given"])[0]
    assert said.startswith("org/name: there is no such folder, and no model of that name") and first in said
    assert type(error).__name__ in said and "\n" not in said


def test_an_interrupt_is_no_failure_of_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(repo_id: str, **options: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        located("org/name")


def test_the_real_thing_offline_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's own code (tests run with HF_HUB_OFFLINE set, so nothing is reached for)."""
    monkeypatch.chdir(tmp_path)
    importlib.import_module("huggingface_hub._snapshot_download")
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"no-such-org/no-such-model: there is no such folder.*offline"):
        located("no-such-org/no-such-model")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"cache/models--org--name/snapshots/{COMMIT}", "org/name"),
        (f"cache/models--org--na-me.v1_2/snapshots/{COMMIT}", "org/na-me.v1_2"),
        (f"cache/models--name/snapshots/{COMMIT}", None),
        (f"cache/models--a--b--c/snapshots/{COMMIT}", None),
        (f"cache/datasets--org--name/snapshots/{COMMIT}", None),
        ("cache/models--org--name/blobs/x", None),
        ("models--org--name", None),
        ("org/name", None),
    ],
)
def test_the_id_of_a_snapshot(path: str, found: str | None) -> None:
    assert hub_id(path) == found


def test_expand_from_an_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the card: base_model is the id, and the proof finds the snapshot again."""

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["growformer", *args])
        with pytest.raises(SystemExit) as left:
            main.run()
        return int(left.value.code or 0)

    assert run("plan", "org/name", "intermediate_size=41") == 0
    assert run("expand", "org/name", "out", "intermediate_size=41", "--prove", "structure") == 0
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "org/name" and front["license"] == "mit"
    path = Receipt.read(tmp_path / "out").source["path"]
    assert path is not None and hub_id(path) == "org/name"
    assert (tmp_path / "out" / "LICENSE").is_file() and not (tmp_path / "out" / "LICENSE").is_symlink()
    for folders in (["org/name", "out"], ["out"]):
        assert run("verify", *folders, "--prove", "structure") == 0
    # The control: the same tensors under another id, one weight changed at the Hub.
    shutil.rmtree(hub.cache)
    config = json.loads((hub.files / "config.json").read_text())
    (hub.files / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert run("verify", "org/name", "out", "--prove", "structure") == 1
