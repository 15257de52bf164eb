"""Every method does what its paper says: its equation, on tensors of tiny models and on cases worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_kit import Grown, grow, source, sources, stock
from torch import Tensor

import growformer as gf
from growformer.algebra import Split
from growformer.methods import METHODS
from growformer.optim.dual import grow_moments
from growformer.planning import apply

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MLP = "model.layers.{}.mlp.{}_proj.weight"
ATTN = "model.layers.{}.self_attn.{}_proj.weight"
WIDE = {"intermediate_size": 56, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48}
CLOSING = ("self_attn.o_proj", "mlp.down_proj")


def rounded(a: Tensor, b: Tensor) -> bool:
    """Equal but for a rounding or two of float64."""
    return bool((a - b).abs().max() <= 4 * torch.finfo(torch.float64).eps * b.abs().max())


def tiled(case: Grown, name: str, *parts: float) -> None:
    """A tensor [new, old] that writes copies, or a gain: whole copies."""
    old, new = case.pair(name)
    assert torch.equal(new, torch.cat([old] * len(parts)))


def blocks(new: Tensor, rows: int = 2, columns: int = 2) -> list[list[Tensor]]:
    return [list(row.chunk(columns, 1)) for row in new.chunk(rows, 0)]


def in_all_blocks(method: str, part: float, off: float | None = None) -> Grown:
    """A model of twice the width: writers are [W; W], and what reads and writes copies is made of four blocks."""
    case = grow("llama", method, **WIDE)
    for name in (EMBED, HEAD):
        old, new = case.pair(name)
        halves = new.chunk(2, 1)
        factor = 1.0 if name == EMBED else 0.5
        assert all(torch.equal(half, factor * old) for half in halves)
    for layer in range(3):
        for name in (MLP.format(layer, n) for n in ("up", "gate", "down")):
            old, new = case.pair(name)
            for i, row in enumerate(blocks(new)):
                for j, block in enumerate(row):
                    assert torch.equal(block, old * (part if off is None or i == j else off))
        old, new = case.pair(f"model.layers.{layer}.input_layernorm.weight")
        assert torch.equal(new, old.repeat(2))
    return case


def paper() -> None:
    # arXiv 2308.06103: Theorem 3.1 (new rows of W2 are zero, columns of W1 free), Theorem 3.5 (the other way round).
    case = grow("llama", "paper", intermediate_size=41, hidden_size=48)
    old, new = case.pair(MLP.format(1, "down"))
    assert torch.equal(new[:24, :28], old) and not new[:24, 28:].any() and not new[24:].any()
    assert (
        case.after.tensors[MLP.format(1, "up")][28:].all() and case.after.tensors[MLP.format(1, "up")][:28, 24:].all()
    )
    assert not case.after.tensors[EMBED][:, 24:].any()


def zero_in() -> None:
    # arXiv 2602.02472: what enters new units is zero; what leaves them is a copy. SwiGLU's gate is open: up is zero.
    case = grow("llama", "zero-in", intermediate_size=41, num_attention_heads=8, num_key_value_heads=4)
    up, gate, down = (case.pair(MLP.format(0, n)) for n in ("up", "gate", "down"))
    assert not up[1][28:].any()
    assert torch.equal(gate[1][28:], gate[0][:13]) and torch.equal(down[1][:, 28:], down[0][:, :13])
    q, k, v, o = (case.pair(ATTN.format(0, n)) for n in "qkvo")
    assert not v[1][20:].any() and torch.equal(k[1][20:], k[0]) and torch.equal(q[1][40:], q[0])
    assert torch.equal(o[1][:, 40:], o[0])
    deep = grow("llama", "zero-in", num_hidden_layers=6)
    again(deep)


def twins() -> None:
    # Units in pairs, (u, +w) and (u, -w); of an odd number the last is read with zeros. None is written with zeros.
    case = grow("llama", "twins", intermediate_size=33, num_attention_heads=8, num_key_value_heads=4)
    up, gate, down = (case.after.tensors[MLP.format(2, n)] for n in ("up", "gate", "down"))
    for wrote in (up, gate):
        assert torch.equal(wrote[28:30], wrote[30:32]) and wrote[28:].all()
        assert not torch.equal(wrote[28], wrote[29])
    assert torch.equal(down[:, 28:30], -down[:, 30:32]) and down[:, 28:32].all() and not down[:, 32].any()
    q, k, v, o = (case.after.tensors[ATTN.format(2, n)] for n in "qkvo")
    for wrote, first in ((q, 40), (k, 20), (v, 20)):
        one, other = wrote[first:].chunk(2)
        assert torch.equal(one, other) and one.all()
    one, other = o[:, 40:].chunk(2, 1)
    assert torch.equal(one, -other) and one.all()
    deep = grow("llama", "twins", num_hidden_layers=4)
    (new,) = (layer for layer, old in enumerate(deep.plan.layers["layer"]) if old is None)
    down, up = (deep.after.tensors[MLP.format(new, n)] for n in ("down", "up"))
    assert torch.equal(down[:, :14], -down[:, 14:]) and torch.equal(up[:14], up[14:]) and down.all() and up.all()


def net2net() -> None:
    # arXiv 1511.05641, U1[:, j] = W1[:, g(j)], U2[j] = W2[g(j)] / |{x: g(x) = g(j)}|; by hand, 2 to 3 units.
    seen = set()
    for seed in range(12):
        made = gf.plan(two_units(), method="net2net", intermediate_size=3, seed=seed)
        tensors = {name: x.double() for name, x in two_units().state_dict().items()}
        larger = apply(made, tensors)
        g = sources(made, "mlp")
        assert g[:2] == [0, 1] and g[2] in (0, 1)
        seen.add(g[2])
        up, down = larger[MLP.format(0, "up")], larger[MLP.format(0, "down")]
        u, w = tensors[MLP.format(0, "up")], tensors[MLP.format(0, "down")]
        assert torch.equal(up, torch.stack([u[0], u[1], u[g[2]]]))
        hand = [w[:, 0] / 2, w[:, 1], w[:, 0] / 2] if g[2] == 0 else [w[:, 0], w[:, 1] / 2, w[:, 1] / 2]
        assert torch.equal(down, torch.stack(hand, 1))
    assert seen == {0, 1}


def two_units() -> Any:
    from tests.tiny import build

    return build("llama", intermediate_size=2, num_hidden_layers=1)


def replicated(case: Grown) -> None:
    """Units of every layer by one mapping: rows copied, columns divided by how often theirs stands there."""
    g = sources(case.plan, "mlp")
    count = torch.tensor([g.count(i) for i in g], dtype=torch.float64)
    for layer in range(3):
        old, new = case.pair(MLP.format(layer, "down"))
        assert rounded(new * count, old[:, g])
        for name in ("up", "gate"):
            old, new = case.pair(MLP.format(layer, name))
            assert torch.equal(new, old[g])
    assert len(set(g[28:])) < len(g[28:]) or g[28:] != [*range(13)]


def bert2bert() -> None:
    # arXiv 2110.07143, FPI: in a unit's readers W / count; the stream has one mapping for all that write and read it.
    replicated(grow("llama", "bert2bert", intermediate_size=41))
    case = grow("llama", "bert2bert", hidden_size=48)
    g = sources(case.plan, "hidden")
    assert g == [*range(24)] * 2
    for name in (n for n in case.after.tensors if "o_proj" in n or "down_proj" in n):
        old, new = case.pair(name)
        assert torch.equal(new, old[g])
    for name in (n for n in case.after.tensors if any(x in n for x in ("q_proj", "up_proj", "lm_head"))):
        old, new = case.pair(name)
        assert torch.equal(new, old[:, g] / 2)
    deep = grow("llama", "bert2bert", num_hidden_layers=6)
    stands(deep, [0, 1, 2, 0, 1, 2])


def aki() -> None:
    # arXiv 2110.07143, AKI: new rows are the next layer's; the last layer has none, and takes its own.
    case = grow("llama", "bert2bert-aki", intermediate_size=41)
    g = sources(case.plan, "mlp")
    for layer, after in ((0, 1), (1, 2), (2, 2)):
        old, new = case.pair(MLP.format(layer, "up"))
        later = case.before.tensors[MLP.format(after, "up")]
        assert torch.equal(new[:28], old) and torch.equal(new[28:], later[g[28:]])
        down_old, down = case.pair(MLP.format(layer, "down"))
        count = torch.tensor([g.count(i) for i in g], dtype=torch.float64)
        assert rounded(down * count, down_old[:, g])


def lemon() -> None:
    # arXiv 2310.07999: parts that add up to one and differ; means under a LayerNorm, zeros under an RMSNorm.
    case = grow("llama", "lemon", intermediate_size=84)
    old, new = case.pair(MLP.format(0, "down"))
    parts = new.chunk(3, 1)
    for part, alpha in zip(parts, (4 / 7, 2 / 7, 1 / 7), strict=True):
        assert rounded(part, alpha * old)
    assert rounded(sum(parts[1:], parts[0]), old)
    wide = grow("gpt2", "lemon", n_embd=36, n_head=6)
    old, new = wide.pair("transformer.wte.weight")
    assert torch.equal(new[:, :24], old) and rounded(new[:, 24:], old.mean(1, keepdim=True).expand(-1, 12))
    assert not grow("llama", "lemon", hidden_size=48).after.tensors[EMBED][:, 24:].any()
    again(grow("llama", "lemon", num_hidden_layers=6))


def hyperclone() -> None:
    # arXiv 2409.12903: x' = [x, x], and W' = [[W/2, W/2], [W/2, W/2]].
    in_all_blocks("hyperclone", 0.5)


def noisy(method: str, level: float) -> None:
    case = grow("llama", method, **WIDE)
    for name in (MLP.format(1, "down"), ATTN.format(1, "q"), MLP.format(1, "up")):
        old, new = case.pair(name)
        for row in blocks(new):
            total = row[0] + row[1]
            assert rounded(total, old)
            noise = row[0] - old / 2
            assert float(noise.std() / old.std()) == pytest.approx(level, rel=0.15)
            assert rounded(row[1] - old / 2, -noise)
            # Drawn, and not W again.
            assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), old.flatten()]))[0, 1])) < 0.2


def noise() -> None:
    # arXiv 2409.12903, section 3: W/2 + noise in one half and W/2 - noise in the other.
    noisy("hyperclone-noise", 0.1)


def matrix_split() -> None:
    noisy("matrix-split", 1.0)


def halves() -> None:
    case = grow("llama", "halves", intermediate_size=56)
    old, new = case.pair(MLP.format(1, "down"))
    one, other = new.chunk(2, 1)
    assert torch.equal(one + other, old)
    shares = {round(float(x), 6) for x in (one / old).flatten()}
    assert shares == {0.0, 0.5, 1.0}


def dyadic() -> None:
    case = grow("llama", "dyadic", intermediate_size=84)
    old, new = case.pair(MLP.format(1, "down"))
    assert torch.equal(new, torch.cat([old / 2, old / 4, old / 4], 1))
    model = stock("llama")
    rough = {name: x.bfloat16() for name, x in source("llama").tensors.items()}
    made = apply(gf.plan(model, method="dyadic", intermediate_size=84), rough)[MLP.format(1, "down")]
    one, two, three = made.double().chunk(3, 1)
    assert made.dtype == torch.bfloat16 and torch.equal(one + two + three, rough[MLP.format(1, "down")].double())


def staged() -> None:
    # arXiv 2203.06211: W' = [[W, 0], [0, W]], embeddings twice, the head halved; new layers are the identity.
    case = in_all_blocks("staged", 1.0, 0.0)
    moments = grow_moments(case.plan, dict(case.before.tensors), 1)
    assert all(moments[MLP.format(0, "down")].chunk(2, 1)[0].flatten())
    again(grow("llama", "staged", num_hidden_layers=6))


def deepfusion() -> None:
    # arXiv 2306.11903, self-fusion: block-diagonal, and only what leaves the stream reads both halves.
    in_all_blocks("deepfusion", 1.0, 0.0)


def sparkling() -> None:
    # arXiv 2602.02472: copies at the same root mean square, and moments that the new halves do not inherit.
    case = in_all_blocks("sparkling", 0.5)
    assert case.plan.target_config["rms_norm_eps"] == case.plan.source_config["rms_norm_eps"]
    ones = {name: torch.ones_like(x) for name, x in case.before.tensors.items()}
    moments = grow_moments(case.plan, ones, 1)
    first, second = moments[EMBED].chunk(2, 1)
    assert first.all() and not second.any()
    up = blocks(moments[MLP.format(0, "up")])
    assert up[0][0].all() and not up[0][1].any() and not up[1][0].any() and not up[1][1].any()


def again(case: Grown) -> None:
    """New layers are the layer before them, with zeros where they add to the stream."""
    before = 0
    for layer, old in enumerate(case.plan.layers["layer"]):
        before = before if old is None else old
        names = [n for n in case.after.tensors if n.startswith(f"model.layers.{layer}.")]
        for name in names:
            was = case.before.tensors[name.replace(f"layers.{layer}.", f"layers.{before}.")]
            found = case.after.tensors[name]
            closes = old is None and any(part in name for part in CLOSING)
            assert torch.equal(found, torch.zeros_like(was) if closes else was)
    assert list(case.plan.layers["layer"]).count(None) == 3


def stands(case: Grown, layers: list[int]) -> None:
    """Layer j of the grown model is layer `layers[j]` of the source, entry by entry."""
    assert list(case.plan.layers["layer"]) == layers
    for layer, old in enumerate(layers):
        names = [n for n in case.after.tensors if n.startswith(f"model.layers.{layer}.")]
        assert len(names) == 9
        for name in names:
            was = case.before.tensors[name.replace(f"layers.{layer}.", f"layers.{old}.")]
            assert torch.equal(case.after.tensors[name], was)


def llama_pro() -> None:
    again(grow("llama", "llama-pro", num_hidden_layers=6))


def stack() -> None:
    stands(grow("llama", "stack", num_hidden_layers=6), [j % 3 for j in range(6)])
    stands(grow("llama", "stack", num_hidden_layers=12), [j % 3 for j in range(12)])


def interpolate() -> None:
    stands(grow("llama", "interpolate", num_hidden_layers=6), [j // 2 for j in range(6)])
    stands(grow("llama", "interpolate", num_hidden_layers=9), [j // 3 for j in range(9)])


def midas() -> None:
    stands(grow("llama", "midas", num_hidden_layers=4), [0, 1, 1, 2])
    stands(grow("llama", "midas", num_hidden_layers=6), [0, 1, 2, 0, 1, 2])


def solar() -> None:
    # arXiv 2312.15166: n layers, less m at the seam of each copy: 32 layers, m = 8, make 48.
    stands(grow("llama", "solar", num_hidden_layers=4), [0, 1, 1, 2])
    deep = gf.plan(two_units_deep(), method="solar", num_hidden_layers=12)
    assert list(deep.layers["layer"]) == [*range(6), *range(2, 8)]


def two_units_deep() -> Any:
    from tests.tiny import build

    return build("llama", intermediate_size=2, num_hidden_layers=8)


def msg() -> None:
    # arXiv 2305.02869: with the masks at 0 it is the paper's growth; with all at 1 nothing new is zero any more.
    wide = {"intermediate_size": 41, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6}
    case, base = grow("llama", "msg", **wide), grow("llama", "paper", **wide)
    opened = apply(case.plan.opened, case.before.tensors)
    for name, x in base.after.tensors.items():
        assert torch.equal(case.after.tensors[name], x)
        assert torch.equal(opened[name][x != 0], x[x != 0]) and opened[name].all()
    assert {name.rpartition(".layers.")[2][2:] for name in opened if not base.after.tensors[name].all()} == {
        f"{name}.weight" for name in CLOSING
    }


def gated() -> None:
    # A copied layer behind a scalar: at 0 it is LLaMA Pro's, at 1 the layer before it stands again.
    case = grow("llama", "gated", num_hidden_layers=6)
    again(case)
    opened, before = apply(case.plan.opened, case.before.tensors), 0
    for layer, old in enumerate(case.plan.layers["layer"]):
        before = before if old is None else old
        for name, x in opened.items():
            if name.startswith(f"model.layers.{layer}."):
                assert torch.equal(x, case.before.tensors[name.replace(f"layers.{layer}.", f"layers.{before}.")])


def gradmax() -> None:
    # arXiv 2201.05125: what writes new units is zero, and what reads them waits for a loss (see test_gradmax).
    case = grow("llama", "gradmax", intermediate_size=41)
    for layer in range(3):
        up, gate = (case.after.tensors[MLP.format(layer, name)] for name in ("up", "gate"))
        assert not up[28:].any() and gate[28:].all()
    assert case.plan.learned == {"mlp": "readers"}


def ligo() -> None:
    # arXiv 2303.00980: the lift waits for a loss (see test_ligo); it starts as copies, read in parts of 2/3 and 1/3.
    case = grow("llama", "ligo", **WIDE)
    old, new = case.pair(MLP.format(0, "up"))
    parts = new[:28].chunk(2, 1)
    assert rounded(parts[0], old * 2 / 3) and rounded(parts[1], old / 3) and torch.equal(new[28:], new[:28])
    old, new = case.pair(EMBED)
    assert torch.equal(new, torch.cat([old] * 2, 1))
    assert set(case.plan.learned.values()) == {"lift"} and case.plan.function == "changed"


CHECKS: dict[str, Callable[[], None]] = {
    "paper": paper,
    "zero-in": zero_in,
    "twins": twins,
    "net2net": net2net,
    "bert2bert": bert2bert,
    "bert2bert-aki": aki,
    "lemon": lemon,
    "hyperclone": hyperclone,
    "hyperclone-noise": noise,
    "matrix-split": matrix_split,
    "halves": halves,
    "dyadic": dyadic,
    "staged": staged,
    "deepfusion": deepfusion,
    "sparkling": sparkling,
    "llama-pro": llama_pro,
    "stack": stack,
    "interpolate": interpolate,
    "midas": midas,
    "solar": solar,
    "msg": msg,
    "gated": gated,
    "gradmax": gradmax,
    "ligo": ligo,
}


def test_no_method_is_left_out() -> None:
    assert set(CHECKS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_paper_says(method: str) -> None:
    CHECKS[method]()


@pytest.mark.parametrize("parts", ["even", "uneven", "dyadic", "halves", "noise", "own"])
@pytest.mark.parametrize("copies", [1, 2, 3, 5, 8])
def test_parts_add_up_to_one(parts: Any, copies: int) -> None:
    total = sum((a.square for a in Split(parts).alphas(copies)), start=0)
    alphas = [float(a) for a in Split(parts).alphas(copies)]
    assert len(alphas) == copies and sum(alphas) == pytest.approx(1, abs=1e-15) and total <= 1
    if parts == "uneven":
        assert len(set(alphas)) == copies
    if parts == "dyadic":
        assert all(a.exponent is not None for a in Split(parts).alphas(copies))


def test_gpt2_splits_what_a_fused_projection_reads() -> None:
    case = grow("gpt2", "hyperclone", n_embd=48, n_head=8)
    old, new = case.pair("transformer.h.1.attn.c_attn.weight")  # [hidden, (q: heads key | k | v)]
    for half in new.chunk(2, 0):
        for made, was in zip(half.chunk(3, 1), old.chunk(3, 1), strict=True):
            assert torch.equal(made, torch.cat([was, was], 1) / 2)
