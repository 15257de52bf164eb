"""Hugging Face model folders: what is read from one, what travels to the next, and how one comes into being whole."""

import contextlib
import fcntl
import hashlib
import json
import os
import reprlib
import shutil
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import Any

from growformer.errors import SourceError, TargetError

COMPANIONS = (
    # tokenizers, by the names that transformers' tokenizers read
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "vocab-src.json",
    "vocab-tgt.json",
    "target_vocab.json",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "*.tiktoken",
    "tekken.json",
    "normalizer.json",
    "emoji.json",
    "dict.txt",
    "byte_maps.json",
    "entity_vocab.json",
    # how it is prompted and how its other inputs are prepared
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "processor_config.json",
)
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
LEGAL = ("license*", "licence*", "notice*", "use_policy*", "copying*")
_MAX_JSON = 100_000_000

# A stranger's value may be megabytes long, or nested so deeply that repr itself fails.
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 200


def shown(value: object) -> str:
    """Return the `repr` of a value that a stranger wrote, cut to what a message has room for."""
    return _brief.repr(value)


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, once it is certain that the name leads nowhere else.

    A Hub cache snapshot is made of links into the `blobs` folder beside it, so those links, and no others, may leave.

    Raises:
        SourceError: the name is empty, absolute, climbs with "..", or is a link that leaves the folder.
    """
    asked = PureWindowsPath(name)  # splits at both kinds of slash and sees drives: strict on every system
    if not asked.parts or asked.anchor or ".." in asked.parts or "\0" in name:
        raise SourceError(f"{folder}: {name!r} does not name a file inside this folder")
    path = folder / name
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that the system cannot spell
        raise SourceError(f"{path}: cannot be followed: {error}") from error
    homes = [root, *(p.parent / "blobs" for p in (root, *root.parents) if p.name == "snapshots")]
    if not any(real.is_relative_to(home) for home in homes):
        raise SourceError(
            f"{path}: is a link to {real}, outside its folder, and is not followed; copy the file into the folder"
        )
    return path


def parse_json(text: bytes | str, where: object) -> Any:
    """Parse JSON that a stranger wrote; a key given twice is refused, for readers differ on which one counts.

    As in other readers -0 is no integer, and half of a surrogate pair is no text.

    Raises:
        SourceError: not UTF-8, not JSON, nested too deeply, or a duplicate key; the message begins with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise SourceError(f"{where}: the key {shown(key)} is there twice")
            out[key] = value
        return out

    def whole(digits: str) -> float:
        return -0.0 if digits == "-0" else int(digits)

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        found = json.loads(text, object_pairs_hook=unique, parse_int=whole)
        if "\\ud" in text.lower():  # only an escape can bring half a pair in
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not readable as JSON: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        SourceError: not there, no regular file, too large, unreadable, not JSON, or another kind of value.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise SourceError(f"{path}: is no regular file")
        if about.st_size > _MAX_JSON:
            raise SourceError(f"{path}: {size_text(about.st_size)}, and at most {size_text(_MAX_JSON)} of JSON is read")
        text = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    found = parse_json(text, path)
    if not isinstance(found, dict):
        raise SourceError(f"{path}: holds a JSON {type(found).__name__}, expected an object")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a model folder that stock transformers loads in floating point.

    Raises:
        SourceError: no such folder, no or a damaged config, a quantised model, or one that runs code of its own.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, does not raise where the path cannot be looked at
        found = "is a file" if os.path.exists(folder) else "does not exist"
        raise SourceError(f"{folder}: {found}; expected the folder of a model, with config.json and its weights")
    path = inside(folder, "config.json")
    if not os.path.lexists(path):
        raise SourceError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    config = read_json(path)
    quantised = _quantisation(config)
    if quantised is not None:
        raise SourceError(
            f"{path}: the model is quantised ({quantised}); growth needs floating-point weights: "
            "dequantise it first, or grow the model it was quantised from"
        )
    if config.get("auto_map"):
        raise SourceError(
            f"{path}: auto_map asks for code that comes with the model, and such code is not run; if transformers "
            f"itself has the model type {shown(config.get('model_type'))}: remove auto_map and try again"
        )
    kernels = _kernels(config)
    if kernels is not None:
        raise SourceError(
            f"{path}: {kernels} asks for code from elsewhere, and such code is not run; "
            "remove that entry from config.json and try again"
        )
    return config


def _kernels(config: dict[str, Any]) -> str | None:
    # transformers takes a name with a slash for a repository of kernels: compiled code, fetched and run while it loads.
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("attn_implementation", "_attn_implementation"):
            entry = section.get(key)
            for name in entry.values() if isinstance(entry, dict) else (entry,):
                if isinstance(name, str) and "/" in name:
                    return f"{key} = {shown(entry)}"
    return None


def _quantisation(config: dict[str, Any]) -> str | None:
    # Multimodal configs keep a quantised text model's entry one level down.
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            entry = section.get(key)
            if isinstance(entry, dict):
                return shown(entry.get("quant_method", "method not named")).strip("'")
            if entry is not None:
                return f"{key} = {shown(entry)}"
    return None


def companions(folder: Path) -> list[Path]:
    """List the files that travel unchanged with a grown model, sorted by name.

    The rule is a list of what may go, so that nothing goes by accident:

    - tokenizer files, under the names that transformers' tokenizers read (tokenizer.json, tokenizer.model*,
      vocab.json, vocab.txt, merges.txt, spiece.model, *.tiktoken, ...), and their configs;
    - chat templates: chat_template.jinja, chat_template.json, and *.jinja in `additional_chat_templates/` and
      `chat_templates/`;
    - generation_config.json and the configs of pre-processors and processors;
    - LICENSE*, NOTICE*, USE_POLICY*, COPYING*, in any case.

    Everything else stays: weights in any format, optimizer and trainer state, Python files, README.md (`write_card`
    makes a new one), growformer.json, and files whose numbers growth may change (1_Pooling/config.json).

    Raises:
        SourceError: one of these is a link that leaves the folder.
    """
    names = [p.name for p in folder.iterdir() if _travels(p.name)]
    for sub in TEMPLATE_FOLDERS:
        names += [f"{sub}/{p.name}" for p in (folder / sub).glob("*.jinja")]
    return [path for path in (inside(folder, name) for name in sorted(names)) if path.is_file()]


def _travels(name: str) -> bool:
    legal = any(fnmatchcase(name.lower(), pattern) for pattern in LEGAL)
    return legal or any(fnmatchcase(name, pattern) for pattern in COMPANIONS)


def copy_companions(source: Path, target: Path) -> list[Path]:
    """Copy `companions(source)` into `target`, links as the files they lead to; return the copies."""
    copies = []
    for path in companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copies.append(Path(shutil.copyfile(path, copy)))
    return copies


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write `config.json` in the form that transformers writes (two spaces, sorted keys, a last line break)."""
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(count: int) -> str:
    """Return a number of bytes for people: 999 B, 1.5 GB (decimal units, as disks and the Hub count)."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 if unit == "B" else value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def require_new(out: Path, source: Path) -> None:
    """Refuse, before any work is done, an OUT that `new_folder` would refuse, or one inside the source.

    Raises:
        TargetError: `out` exists, its parent does not, or `source` would change by it.
    """
    _refuse_existing(out)
    _parent(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise TargetError(f"{out}: is inside the source {source}, which is left as it is; choose an OUT elsewhere")


@contextlib.contextmanager
def new_folder(out: Path, need_bytes: int, *, resume: bool = False) -> Iterator[Path]:
    """Make a folder that appears at `out` whole or not at all.

    Yields a hidden folder beside `out` (`.<name>.partial`) to write in. When the body ends, its files are forced to
    disk and it is renamed to `out`; when the body raises, KeyboardInterrupt included, it is removed. A process killed
    outright can do neither, and leaves that hidden folder behind for a run that resumes.

    Args:
        out: The folder to make. It must not exist; its parent must.
        need_bytes: Bytes that the body will write.
        resume: Go on in the hidden folder of a killed run, if there is one.

    Raises:
        TargetError: `out` exists, its parent does not, another run is writing it or was killed and is not resumed, it
            cannot be written, or the disk has too little room.
    """
    _refuse_existing(out)
    parent = _parent(out)
    partial = parent / f".{out.name}.partial"
    left = os.path.lexists(partial)
    if left and not resume:
        raise TargetError(
            f"{out}: an unfinished run left {partial}, or is still at work there; --resume goes on with it, and "
            "deleting that folder forgets it"
        )
    there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file()) if left else 0
    free = shutil.disk_usage(parent).free + there
    if free < need_bytes:
        raise TargetError(
            f"{out}: needs {size_text(need_bytes)}, and its disk has {size_text(free)} free; make room for "
            f"{size_text(need_bytes - free)} more, or choose an OUT on another disk"
        )
    with target_errors(out):
        partial.mkdir(exist_ok=resume)
        lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise TargetError(f"{out}: another run is writing it at this moment, in {partial}") from None
    try:
        yield partial
        with target_errors(out):
            for folder, _, files in os.walk(partial, topdown=False):
                for name in files:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            _refuse_existing(out)  # a second run may have made it meanwhile, and rename replaces an empty folder
            os.rename(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if partial.exists():
            error.add_note(f"{partial} could not be removed; delete it by hand")
        raise
    finally:
        os.close(lock)
    with target_errors(out):
        _fsync(parent)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise TargetError(f"{out}: exists already and is left as it is; name a new folder")


def _parent(out: Path) -> Path:
    parent = out.absolute().parent
    if not parent.is_dir():
        raise TargetError(f"{out}: its parent {parent} is not a folder that exists; make it, or choose another OUT")
    return parent


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def target_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a TargetError that names the path."""
    try:
        yield
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror}") from error
