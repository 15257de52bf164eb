"""The certificate against methods: right growths pass, and each rule of copies and pairs, broken alone, is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from growformer.methods import METHODS
from tests.proof.certified import Growth, failing, grow_planned

UP, GATE, DOWN = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "gate", "down"))
Q, K, V, OUT = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkvo")
UNITS = {"intermediate_size": 33}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
QUERIES = {"num_attention_heads": 8}
HIDDEN = {"hidden_size": 48}
Break = Callable[[Growth], object]


@cache
def _grown(kind: str, method: str, request: tuple[tuple[str, int], ...]) -> Growth:
    return grow_planned(kind, dict(request), method=method)[1]


def grown(kind: str, method: str, request: dict[str, int]) -> Growth:
    """A right growth, to be broken; the same is made once."""
    return copy.deepcopy(_grown(kind, method, tuple(request.items())))


def put(name: str, place: tuple[int, ...], value: float | None = None) -> Break:
    """Another value; None: the opposite."""

    def broken(growth: Growth) -> None:
        x = growth.target[name]
        x[place] = -x[place] if value is None else value

    return broken


def told(axis: str, **other: Any) -> Break:
    return lambda growth: growth.axes[axis].update(other)


def both(*breaks: Break) -> Break:
    def broken(growth: Growth) -> None:
        for one in breaks:
            one(growth)

    return broken


def pair(count: int, distance: int) -> list[object]:
    """A run of new channels whose partners stand so far before them."""
    return [count, None, "1", None, 0, False, None, "", {"mirror": distance}]


WIDER = [m for m in METHODS if {"mlp", "heads"} <= set(METHODS[m].ways) and METHODS[m].ways["mlp"].preserving]
RIGHT = [
    *(("llama", m, {"intermediate_size": 41, **HEADS}) for m in WIDER),
    *(("llama", m, HIDDEN) for m in WIDER if "hidden" in METHODS[m].ways),
    *(("gpt2", m, {"n_embd": 48, "n_head": 8}) for m in WIDER if "hidden" in METHODS[m].ways),
    *(("llama", m, {"num_hidden_layers": 5}) for m in ("lemon", "zero-in", "staged", "llama-pro")),
    ("llama", "twins", QUERIES),
    ("llama", "lemon,key=paper,value=paper", {"head_dim": 10, "intermediate_size": 41}),
]


@pytest.mark.parametrize(("kind", "method", "request_"), RIGHT)
def test_right_growths_pass(kind: str, method: str, request_: dict[str, int]) -> None:
    assert grown(kind, method, request_).certify().failures == []


def test_another_function_does_not_pass() -> None:
    assert not grown("llama", "bert2bert-aki", {"intermediate_size": 41}).certify().ok


WRONG: dict[str, tuple[str, dict[str, int], Break, tuple[str, ...]]] = {
    "a writer's twin": ("twins", UNITS, put(UP, (31, 3)), (UP, "partner")),
    "a gate's twin": ("twins", UNITS, put(GATE, (30, 0), 0.25), (GATE, "partner")),
    "a bias's twin": ("twins", UNITS, put("model.layers.0.mlp.up_proj.bias", (30,), 0.25), ("up_proj.bias", "partner")),
    "a reader's twin of one sign": ("twins", UNITS, put(DOWN, (4, 31)), (DOWN, "partner")),
    "one without a partner": ("twins", UNITS, put(DOWN, (4, 32), 0.25), (DOWN, "[4, 32]", "zero")),
    "another partner told": (
        "twins",
        UNITS,
        told("mlp", lift=[[28, 0], [1, None], pair(1, 1), [1, None], pair(1, 1), [1, None]]),
        ("partner",),
    ),
    "partners told that are old": (
        "twins",
        UNITS,
        told("mlp", lift=[[28, 0], pair(4, 2), [1, None]]),
        ("mlp", "partner"),
    ),
    "no partners told": ("twins", UNITS, told("mlp", lift=[[28, 0], [5, None]]), (DOWN, "zero")),
    "pairs told of what is closed": ("twins", UNITS, told("mlp", closed="readers"), (DOWN, "zero")),
    "a head's twin": ("twins", HEADS, put(V, (12, 0), 0.25), (V, "partner")),
    "an output of one sign": ("twins", HEADS, put(OUT, (0, 24)), (OUT, "partner")),
    "queries of a pair differ": ("twins", QUERIES, put(Q, (12, 0), 0.25), (Q, "partner")),
    "heads that read other values": (
        "twins",
        QUERIES,
        told("heads", lift=[[2, 0], [2, None], [2, 2], pair(2, 4)]),
        ("are a pair, and", "read key/value heads that are not"),
    ),
    "pairs that a norm reads": (
        "paper",
        HIDDEN,
        told("hidden", closed="pairs", lift=[[24, 0], [12, None], pair(12, 12)]),
        ("hidden",),
    ),
    "one copy's part": ("hyperclone", UNITS, put(DOWN, (4, 30), 0.25), (DOWN,)),
    "one copy's part, uneven": ("lemon", UNITS, put(DOWN, (4, 2), 0.25), (DOWN,)),
    "one copy's part with noise": ("matrix-split", UNITS, put(DOWN, (4, 30), 0.25), (DOWN,)),
    "one copy's half": ("halves", HEADS, put(OUT, (4, 30), 0.25), (OUT,)),
    "a reader of the stream": ("dyadic", HIDDEN, put(Q, (4, 30), 0.25), (Q,)),
    "what reads its own": ("staged", HIDDEN, put(Q, (4, 30), 0.25), (Q,)),
    "a copy that is none": ("lemon", UNITS, put(UP, (30, 3), 0.25), (UP, "[30, 3]")),
    "a copied key": ("hyperclone", HEADS, put(K, (15, 3), 0.25), (K, "[15, 3]")),
    "parts that are too large": (
        "lemon",
        UNITS,
        told("mlp", lift=[[5, 0, "1", "4/9"], [23, 5], [5, 0, "1", "4/9"]]),
        ("axis mlp", "R E", "4/3"),
    ),
    "a copy told that is another": (
        "hyperclone",
        UNITS,
        told("mlp", lift=[[5, 0], [5, 5, "1", "1/4"], [18, 10], [5, 5, "1", "1/4"]]),
        ("mlp",),
    ),
    "up is open": ("zero-in", UNITS, put(UP, (30, 3), 0.25), (UP, "[30, 3]", "zero")),
    "up's bias is open": (
        "zero-in",
        UNITS,
        put("model.layers.0.mlp.up_proj.bias", (30,), 0.25),
        ("up_proj.bias", "zero"),
    ),
    "values are open": ("zero-in", HEADS, put(V, (14, 3), 0.25), (V, "[14, 3]", "zero")),
    "new heads on old values": ("paper", QUERIES, told("heads", closed="writers"), ("heads", "old values")),
    "new heads on old values, o open": (
        "paper",
        QUERIES,
        both(told("heads", closed="writers"), put(OUT, (4, 14), 0.25)),
        ("heads", "old values"),
    ),
    "a new layer's output": (
        "lemon",
        {"num_hidden_layers": 5},
        put("model.layers.2.mlp.down_proj.weight", (0, 0), 0.25),
        ("model.layers.2.mlp.down_proj.weight",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_broken_rule_is_named(name: str) -> None:
    method, request, broken, said = WRONG[name]
    growth = grown("llama", method, request)
    assert growth.certify().failures == []
    broken(growth)
    failing(growth, *said)


FREE: dict[str, tuple[str, dict[str, int], Break]] = {
    "the gate of what is zero": ("zero-in", UNITS, put(GATE, (30, 3), 0.25)),
    "what reads zeros": ("zero-in", UNITS, put(DOWN, (4, 30), 0.25)),
    "scores of new heads": ("zero-in", HEADS, both(put(Q, (26, 3), 0.25), put(K, (14, 3), 0.25))),
    "both of a pair": ("twins", UNITS, both(put(UP, (28, 3), 0.25), put(UP, (30, 3), 0.25))),
    "both readers of a pair": ("twins", UNITS, both(put(DOWN, (4, 28), 0.25), put(DOWN, (4, 30), -0.25))),
    "a new layer's inside": (
        "lemon",
        {"num_hidden_layers": 5},
        put("model.layers.2.mlp.up_proj.weight", (0, 0), 0.25),
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_what_is_free_is_free(name: str) -> None:
    method, request, broken = FREE[name]
    growth = grown("llama", method, request)
    broken(growth)
    assert growth.certify().failures == []
