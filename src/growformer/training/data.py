"""Text for training: memory-mapped, in windows that do not overlap, in an order that a seed draws."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from growformer.checkpoint.folder import size_text, target_errors
from growformer.errors import RequestError, SourceError

if TYPE_CHECKING:
    import numpy.typing as npt

_ROUNDS = 6
_SAMPLES, _SAMPLE = 256, 4096
_PIECE = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """Text as tokens, on disk.

    Attributes:
        parts: one array a file, memory-mapped: uint8 [byte], or uint16 or uint32 [token].
        bytes: of the text.
        print: a fingerprint of the text and of the tokenizer.
    """

    parts: tuple[npt.NDArray[Any], ...]
    bytes: int
    print: str

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return sum(len(part) for part in self.parts)


def byte_tokens(paths: Sequence[Path]) -> Tokens:
    """Files as they are: a token is a byte.

    Raises:
        SourceError: a file is missing or empty.
    """
    parts = tuple(_mapped(path, np.uint8) for path in paths)
    return Tokens(parts, sum(len(part) for part in parts), fingerprint(paths))


def cut_tokens(paths: Sequence[Path], tokenizer: Any, tokenizer_print: str, cache: Path) -> Tokens:
    """Files tokenised once, into a cache beside the run's output.

    The text is cut into pieces of about 1 MB, at the ends of lines where it has any; each is tokenised without special
    tokens, so a token never goes over a cut.

    Args:
        paths: text files, in UTF-8.
        tokenizer: of transformers.
        tokenizer_print: a fingerprint of it.
        cache: a folder to keep the tokens in.

    Raises:
        SourceError: a file is missing or empty, or is no UTF-8.
        TargetError: the cache cannot be written.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts, total = [], 0
    for path in paths:
        total += len(_mapped(path, np.uint8))
        name = hashlib.sha256(f"{fingerprint([path])} {tokenizer_print} {_PIECE}".encode()).hexdigest()[:24]
        made = cache / f"{name}.{np.dtype(dtype).name}"
        if not made.exists():
            with target_errors(made):
                cache.mkdir(parents=True, exist_ok=True)
                partial = made.with_suffix(f".{os.getpid()}.partial")
                with partial.open("wb") as file:
                    for text in _pieces(path):
                        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                        file.write(np.asarray(found, dtype=dtype).tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, made)
        parts.append(_mapped(made, dtype))
    return Tokens(tuple(parts), total, fingerprint(paths) + tokenizer_print)


def fingerprint(paths: Sequence[Path]) -> str:
    """A hash of the files' sizes and of 256 pieces of 4 kB spread evenly over each (the whole, where it is small)."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{size} ".encode())
                whole = size <= _SAMPLES * _SAMPLE
                for at in [0] if whole else [i * (size - _SAMPLE) // (_SAMPLES - 1) for i in range(_SAMPLES)]:
                    file.seek(at)
                    digest.update(file.read(_SAMPLES * _SAMPLE if whole else _SAMPLE))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


class Windows:
    """Windows of the text in a drawn order; what a position holds depends on nothing but the seed.

    Args:
        tokens: the text. Each file is cut into windows of `length` tokens; what is left at its end is not used.
        length: tokens of a window.
        seed: draws the order, another one each time the text starts over.
        repeat: whether it starts over.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int, repeat: bool = False) -> None:
        self.tokens, self.length, self.seed, self.repeat = tokens, length, seed, repeat
        self._ends = np.cumsum([len(part) // length for part in tokens.parts])
        self.count = int(self._ends[-1])

    def require(self, sequences: int) -> None:
        """Refuse to use more windows than there are.

        Raises:
            RequestError: `sequences` are more, and the text does not start over; the message says how much there is.
        """
        if sequences > self.count and not self.repeat:
            unit = "bytes" if self.tokens.parts[0].dtype == np.uint8 else "tokens"
            raise RequestError(
                f"the text has {self.tokens.count:,} {unit} ({size_text(self.tokens.bytes)}), which are "
                f"{self.count:,} sequences of {self.length}; {sequences:,} are asked for, and no byte is used twice: "
                f"a budget of {self.count * self.length:,} tokens fits, more text does, or repeat: true in data"
            )

    def batch(self, position: int, count: int) -> torch.Tensor:
        """The windows at positions `position` to `position + count` of the order: int64 [sequence, token].

        Raises:
            RequestError: the text ends before, and does not start over.
        """
        self.require(position + count)
        places = np.arange(position, position + count)
        rows = np.empty((count, self.length), dtype=np.int64)
        for epoch in np.unique(places // self.count):
            here = places // self.count == epoch
            rows[here] = self._read(permuted(places[here] % self.count, self.count, (self.seed, int(epoch))))
        return torch.from_numpy(rows)

    def spread(self, count: int) -> torch.Tensor:
        """At most `count` windows spread evenly over the text, in its own order: int64 [sequence, token].

        Raises:
            SourceError: the text has not one window.
        """
        if not self.count:
            raise SourceError(f"the held-out text is shorter than one sequence of {self.length} tokens")
        picks = np.unique(np.linspace(0, self.count - 1, min(count, self.count)).round().astype(np.int64))
        return torch.from_numpy(self._read(picks))

    def _read(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        part = np.searchsorted(self._ends, windows, side="right")
        first = np.concatenate(([0], self._ends))[part]
        starts = (windows - first) * self.length
        return np.stack(
            [
                self.tokens.parts[p][s : s + self.length].astype(np.int64)
                for p, s in zip(part.tolist(), starts.tolist(), strict=True)
            ]
        )


def permuted(places: npt.NDArray[np.int64], count: int, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """A permutation of 0..count-1, drawn by a seed and computed where it is asked for.

    A Feistel network of six rounds permutes the smallest 4^k >= count numbers; what falls outside goes through it again
    until it is inside (cycle walking: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        places: where to look, each in 0..count-1.
        count: how many numbers there are.
        seed: any numbers.

    Returns:
        The numbers at those places.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(list(seed)).generate_state(_ROUNDS, np.uint64)
    out = places.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> np.uint64(half), out[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        out[outside] = (left << np.uint64(half)) | right
        outside = out >= count
    return out.astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise SourceError(f"{path}: holds no text: {error}") from error


def _pieces(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        left = b""
        while True:
            read = file.read(_PIECE)
            data = left + read
            cut = len(data) if not read else data.rfind(b"\n") + 1 or _last_character(data)
            left = data[cut:]
            try:
                yield data[:cut].decode("utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(f"{path}: is no UTF-8: {error}; a tokenizer reads text") from error
            if not read:
                return


def _last_character(data: bytes) -> int:
    """Where the last character, perhaps cut, begins."""
    return next((i for i in range(len(data) - 1, max(-1, len(data) - 5), -1) if data[i] & 0xC0 != 0x80), len(data))


def tokenizer_print(folder: Path) -> str:
    """A fingerprint of a tokenizer's files."""
    names = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in {".json", ".model", ".txt", ".tiktoken"})
    return hashlib.sha256(json.dumps([p.name for p in names]).encode()).hexdigest()[:16] + fingerprint(names)
