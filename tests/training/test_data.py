"""Data: a drawn order in which no byte comes twice, from files that are never read whole."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growformer.errors import RequestError, SourceError
from growformer.training import data
from growformer.training.data import Tokens, Windows, byte_tokens, cut_tokens, fingerprint, permuted, tokenizer_print


def numbered(*lengths: int) -> Tokens:
    """Text whose every token is another one."""
    ends = np.cumsum((0, *lengths))
    parts = tuple(np.arange(a, b, dtype=np.uint32) for a, b in pairwise(ends))
    return Tokens(parts, int(ends[-1]), "")


def all_of(windows: Windows, batch: int) -> torch.Tensor:
    whole = windows.count // batch * batch
    parts = [windows.batch(at, batch) for at in range(0, whole, batch)]
    if windows.count > whole:
        parts.append(windows.batch(whole, windows.count - whole))
    return torch.cat(parts)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 7))
def test_no_token_comes_twice(one: int, two: int, length: int, seed: int, batch: int) -> None:
    windows = Windows(numbered(one, two), length, seed)
    assert windows.count == one // length + two // length
    if not windows.count:
        return
    rows = all_of(windows, batch)
    seen = Counter(rows.flatten().tolist())
    assert set(seen.values()) == {1} and len(seen) == windows.count * length
    # Each window is a piece of one file.
    assert bool((rows.diff(dim=1) == 1).all()) and not any(row[0] < one <= row[-1] for row in rows.tolist())


@given(st.integers(1, 5000), st.lists(st.integers(0, 2**40), min_size=1, max_size=2))
def test_the_order_is_a_permutation(count: int, seed: list[int]) -> None:
    found = permuted(np.arange(count), count, seed)
    assert sorted(found.tolist()) == list(range(count))
    # Where it is asked for makes no difference.
    places = np.arange(0, count, 3)
    assert permuted(places, count, seed).tolist() == found[places].tolist()


def test_the_order_looks_drawn() -> None:
    count = 10_000
    orders = [permuted(np.arange(count), count, (seed,)) for seed in (0, 1)]
    assert (orders[0] == orders[1]).mean() < 0.01
    for order in orders:
        assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        # Every tenth of the run sees every tenth of the text about equally: 100 of 1,000, give or take 6 deviations.
        table = np.histogram2d(np.arange(count), order, bins=10)[0]
        assert table.min() > 40 and table.max() < 160


def test_where_a_batch_is_cut_makes_no_difference() -> None:
    windows = Windows(numbered(1000), 8, 3)
    assert torch.equal(torch.cat([windows.batch(5, 4), windows.batch(9, 7)]), windows.batch(5, 11))
    assert not torch.equal(windows.batch(0, 8), Windows(numbered(1000), 8, 4).batch(0, 8))


def test_text_ends_or_starts_over() -> None:
    windows = Windows(numbered(80), 8, 0)
    with pytest.raises(RequestError, match=r"80 tokens .* 10 sequences of 8; 11 are asked for.*80 tokens fits"):
        windows.batch(7, 4)
    windows = Windows(numbered(80), 8, 0, repeat=True)
    rows = windows.batch(0, 30)
    passes = [rows[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(part.flatten().tolist()) == list(range(80)) for part in passes)
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])
    assert torch.equal(windows.batch(7, 6), rows[7:13])


def test_held_out_text_is_spread_evenly() -> None:
    windows = Windows(numbered(800), 8, 0)
    assert windows.spread(5)[:, 0].tolist() == [0, 200, 400, 592, 792]
    assert len(windows.spread(1000)) == 100
    with pytest.raises(SourceError, match="shorter than one sequence of 8 tokens"):
        Windows(numbered(7), 8, 0).spread(1)


def test_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_bytes(b"xyz")
    tokens = byte_tokens([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert isinstance(tokens.parts[0], np.memmap)
    assert tokens.count == tokens.bytes == 259
    assert Windows(tokens, 3, 0).spread(1000)[-1].tolist() == list(b"xyz")
    with pytest.raises(SourceError, match=r"none\.txt: cannot be read: No such file"):
        byte_tokens([tmp_path / "none.txt"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SourceError, match=r"empty\.txt: holds no text"):
        byte_tokens([tmp_path / "empty.txt"])


def test_a_fingerprint_sees_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    seen = set()
    for content in (b"a" * 1000, b"a" * 999 + b"b", b"a" * 1001, bytes(3_000_000), bytes(2_999_999) + b"b"):
        path.write_bytes(content)
        seen.add(fingerprint([path]))
    assert len(seen) == 5


def test_tokens_are_cut_once(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    tokenizer, name = AutoTokenizer.from_pretrained(stories), tokenizer_print(stories)
    text = "Once upon a time there was a café.\nThe end — of it.\n" * 40
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(data, "_PIECE", 500)
    found = cut_tokens([path], tokenizer, name, tmp_path / "cache")
    assert found.parts[0].dtype == np.uint16 and found.bytes == len(text.encode())
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Cut at ends of lines: the text is all there, and only tokens at the cuts may differ.
    assert tokenizer.decode(found.parts[0].tolist()).split() == tokenizer.decode(whole).split()
    assert len(found.parts[0]) <= len(whole) + 10
    monkeypatch.setattr(data, "_pieces", lambda path: pytest.fail("cut again"))
    again = cut_tokens([path], tokenizer, name, tmp_path / "cache")
    assert np.array_equal(again.parts[0], found.parts[0])


def test_text_without_lines_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_PIECE", 7)
    path = tmp_path / "a.txt"
    path.write_text("é€𝄞" * 50, encoding="utf-8")
    assert "".join(data._pieces(path)) == "é€𝄞" * 50
    path.write_bytes(b"ab\xff\xfe" * 10)
    with pytest.raises(SourceError, match=r"is no UTF-8.*a tokenizer reads text"):
        list(data._pieces(path))
