"""Ports of attention's axes: heads, groups, keys and values, by a whole attention computed from the tensors."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from growformer.algebra import Attention, Family, Field, Norm, Ratio, Rotary
from tests.planning.tiny_families import Grown, at, close, family, grow, norm

HEADS = {"hidden_size": 6, "heads_size": 4, "kv_heads_size": 2, "key_size": 6, "value_size": 5}
THETA = 50.0
TOKENS = 5
ROPE = {"rope_type": "default", "rope_theta": THETA}


@dataclass(frozen=True)
class Case:
    """An attention, and what to grow.

    `qk`: the kind of norm over each head's queries and keys; `across`: one norm over those of all heads.
    """

    request: dict[str, int]
    kv: str = "kv_heads"
    qk: str = ""
    gain: str = "w"
    across: bool = False
    per_head: bool = False
    shifts: bool = False
    scaled: bool = True
    layout: Any = ""
    turned: int = 0
    alibi: Any = None

    @property
    def family(self) -> Family:
        partial = "older" if self.turned else ""
        rotary = Rotary(layout=self.layout, partial=partial) if self.layout else None
        attention = Attention(kv_heads=self.kv_axis, scaled=self.scaled, rotary=rotary, alibi=self.alibi)
        kv = self.kv or "1"
        tensors = {
            "q": "(q: heads key) <- hidden",
            "q.bias": "-> (q: heads key)",
            "k": f"(k: {kv} key) <- hidden",
            "k.bias": f"-> (k: {kv} key)",
            "v": f"(v: {kv} value) <- hidden",
            "v.bias": f"-> (v: {kv} value)",
            "o": "hidden <- (heads value)",
            "sinks": "-> (q: heads)",
            "table": "_ -> (q: heads)",
        }
        norms = {}
        for role, axis in (("q", "heads"), ("k", self.kv)) if self.qk else ():
            over: Any = (axis, "key") if self.across else "key"
            norms[role] = Norm(over, self.qk, eps="eps", gain=self.gain)  # type: ignore[arg-type]
            wide = f"({axis} key)" if self.across or self.per_head else "key"
            tensors[f"{role}.gain"] = f"{role}: * {wide}"
            tensors |= {f"{role}.shift": f"{role}: + {wide}"} if self.shifts else {}
        axes = ("hidden", "heads", *(("kv_heads",) if self.kv == "kv_heads" else ()), "key", "value")
        return family(axes, tensors, norms, attention, neutral=("rope_parameters", "older"))

    @property
    def kv_axis(self) -> str | None:
        return "kv_heads" if self.kv == "kv_heads" else None

    def grow(self) -> Grown:
        config: dict[str, Any] = {**HEADS, "rope_parameters": ROPE}
        if self.turned:
            share = self.turned / config["key_size"]
            config |= {"older": share, "rope_parameters": {**ROPE, "partial_rotary_factor": share}}
        return grow(self.family, config, self.request, seed=2)

    def attend(self, config: Any, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """The sum that attention adds to the stream, for tokens x [token, hidden]."""
        heads, key, value = at(config, "heads"), at(config, "key"), at(config, "value")
        kv = {"kv_heads": at(config, "kv_heads"), "heads": heads, "": 1}[self.kv]
        q = self.normed(config, tensors, "q", (x @ tensors["q"].T + tensors["q.bias"]).reshape(-1, heads, key))
        k = self.normed(config, tensors, "k", (x @ tensors["k"].T + tensors["k.bias"]).reshape(-1, kv, key))
        v = (x @ tensors["v"].T + tensors["v.bias"]).reshape(-1, kv, value)
        q, k = self.turn(config, q), self.turn(config, k)
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / (math.sqrt(key) if self.scaled else 1)
        apart = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None]
        if self.alibi:
            scores = scores - slopes(heads)[:, None, None] * apart
        scores = scores + tensors["table"].T[:, apart.abs().clamp(max=len(tensors["table"]) - 1)]
        sinks = tensors["sinks"][:, None, None].expand(-1, TOKENS, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return torch.einsum("hij,jhd->ihd", weights, v).reshape(TOKENS, -1) @ tensors["o"].T

    def normed(self, config: Any, tensors: dict[str, Tensor], role: str, x: Tensor) -> Tensor:
        if not self.qk:
            return x
        flat = x.reshape(TOKENS, -1) if self.across else x
        gain, shift = tensors[f"{role}.gain"] + (self.gain == "1+w"), tensors.get(f"{role}.shift", torch.zeros(()))
        if self.per_head:
            gain = gain.reshape(x.shape[1:])
        return norm(flat, self.qk, config["eps"], gain, shift).reshape(x.shape)

    def turn(self, config: Any, x: Tensor) -> Tensor:
        """Rotary positions, written out pair by pair."""
        if not self.layout:
            return x
        rope, size = config["rope_parameters"], x.shape[-1]
        count = int(size * rope["partial_rotary_factor"]) if self.turned else size
        out = x.clone()
        for pair in range(count // 2):
            a, b = (pair, pair + count // 2) if self.layout == "half" else (2 * pair, 2 * pair + 1)
            angle = torch.arange(TOKENS, dtype=torch.float64)[:, None] * rope["rope_theta"] ** (-2 * pair / count)
            out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
            out[..., b] = x[..., a] * angle.sin() + x[..., b] * angle.cos()
        return out


def slopes(heads: int) -> Tensor:
    """By hand for the counts that are used here; test_resolve has transformers' own."""
    tables = {4: [2, 4, 6, 8], 5: [2, 4, 6, 8, 1], 6: [2, 4, 6, 8, 1, 3], 8: [1, 2, 3, 4, 5, 6, 7, 8]}
    return torch.tensor([2.0**-e for e in tables[heads]], dtype=torch.float64)


ALL = {"heads_size": 12, "kv_heads_size": 3, "key_size": 10, "value_size": 9}
CASES = {
    "more heads to a group": Case({"heads_size": 8}),
    "more groups": Case({"heads_size": 6, "kv_heads_size": 3}),
    "smaller groups": Case({"kv_heads_size": 4}),
    "everything": Case(ALL),
    "value": Case({"value_size": 11}),
    "key": Case({"key_size": 9}),
    "key, unscaled": Case({"key_size": 9}, scaled=False),
    "one head for all keys": Case({"heads_size": 7, "key_size": 9, "value_size": 6}, kv=""),
    "no groups": Case({"heads_size": 7, "key_size": 9, "value_size": 6}, kv="heads"),
    "rotary halves": Case(ALL, layout="half"),
    "rotary halves, twice": Case({"key_size": 12}, layout="half"),
    "rotary interleaved": Case(ALL, layout="interleaved"),
    "partial rotary": Case({**ALL, "key_size": 11}, layout="half", turned=4),
    "partial rotary, interleaved": Case({"key_size": 13}, layout="interleaved", turned=2),
    "bloom": Case({"heads_size": 6}, alibi="bloom", kv="heads"),
    "bloom, a power": Case({"heads_size": 8, "key_size": 7}, alibi="bloom", kv="heads"),
    "mpt": Case({"heads_size": 5}, alibi="mpt", kv="heads"),
    "mpt, a power": Case({"heads_size": 8, "value_size": 7}, alibi="mpt", kv="heads"),
    "normed keys, dead": Case({"key_size": 8}, qk="rms", layout="half"),
    "normed keys, twice": Case({**ALL, "key_size": 12}, qk="rms", layout="half"),
    "normed keys, uneven": Case({"key_size": 16}, qk="rms", layout="half"),
    "normed keys, uneven, plain": Case({"key_size": 15}, qk="rms"),
    "normed keys, interleaved": Case({"key_size": 20}, qk="rms", layout="interleaved"),
    "normed keys, partial": Case({"key_size": 14}, qk="rms", layout="half", turned=4),
    "normed keys, 1+w": Case({"key_size": 14}, qk="rms", gain="1+w"),
    "normed keys, unscaled": Case({"key_size": 14}, qk="rms", scaled=False),
    "LayerNorm over keys": Case({"key_size": 12}, qk="layer", shifts=True),
    "LayerNorm over keys, thrice": Case({**ALL, "key_size": 18}, qk="layer", layout="half"),
    "LayerNorm over keys, halves and shifts": Case({"key_size": 12}, qk="layer", layout="half", shifts=True),
    "a gain for each head": Case({**ALL, "key_size": 12}, qk="rms", per_head=True),
    "LayerNorm, a gain for each head": Case({**ALL, "key_size": 12}, qk="layer", per_head=True),
    "one norm for all heads": Case({"heads_size": 8}, qk="rms", across=True),
    "one norm for all heads, groups": Case({"heads_size": 8, "kv_heads_size": 4}, qk="rms", across=True),
    "one norm for all heads, dead groups": Case({"heads_size": 6, "kv_heads_size": 3}, qk="rms", across=True),
    "one norm for all heads, key": Case({"key_size": 12}, qk="rms", across=True, layout="half"),
    "one norm for all heads, dead key": Case({"key_size": 8}, qk="rms", across=True, layout="half"),
    "one norm for all heads, all": Case(
        {"heads_size": 8, "kv_heads_size": 4, "key_size": 16, "value_size": 6}, qk="rms", across=True, layout="half"
    ),
    "one norm for all heads, no groups": Case({"heads_size": 8}, qk="rms", across=True, kv="heads"),
    "the stream as well": Case({**ALL, "hidden_size": 9, "key_size": 12}, qk="rms", layout="half"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_by_its_definition(name: str) -> None:
    case = CASES[name]
    grown = case.grow()
    hidden, wide = at(grown.old, "hidden"), at(grown.new, "hidden")
    x = torch.randn(TOKENS, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    before = case.attend(grown.old, grown.source, x)
    after = case.attend(grown.new, grown.target, torch.nn.functional.pad(x, (0, wide - hidden)))
    assert close(after[:, :hidden], before)
    # The control: it is not the same because nothing is seen of what was grown.
    moved = {**grown.target, "q": grown.target["q"] * 1.001}
    assert case.qk or not close(case.attend(grown.new, moved, torch.nn.functional.pad(x, (0, wide - hidden))), before)
    rough = {**grown.target, "v": grown.target["v"] * 1.001}
    assert not close(case.attend(grown.new, rough, torch.nn.functional.pad(x, (0, wide - hidden)))[:, :hidden], before)


@pytest.mark.parametrize("name", [name for name in CASES if "dead" in name])
def test_what_cannot_learn_is_named(name: str) -> None:
    (said,) = CASES[name].grow().plan.dead
    assert "zero times zero has no gradient" in said
    works = {
        "normed keys, dead": "key_size=12 is alive",
        "one norm for all heads, dead key": "key_size=12 is alive",
        "one norm for all heads, dead groups": "2 -> 3 key/value heads",
    }
    assert works[name] in said


@pytest.mark.parametrize("name", [name for name in CASES if "dead" not in name])
def test_all_else_learns(name: str) -> None:
    assert CASES[name].grow().plan.dead == ()


def test_copies_are_told_from_new_heads() -> None:
    """A new head is free at q, k and v, and closed once, at o; a copied one arrives there by the source's bits."""
    grown = Case({"heads_size": 8, "kv_heads_size": 4}).grow()
    q, o = grown.target["q"].reshape(8, 6, 6), grown.target["o"].reshape(6, 8, 5)
    k = grown.target["k"].reshape(4, 6, 6)
    assert torch.equal(q[:4], grown.source["q"].reshape(4, 6, 6)) and (q[4:] != 0).all()
    assert (o[:, 4:] == 0).all() and torch.equal(o[:, :4], grown.source["o"].reshape(6, 4, 5))
    assert torch.equal(k[:2], grown.source["k"].reshape(2, 6, 6)) and (k[2:] != 0).all()
    split = Case({"kv_heads_size": 4}).grow().target["k"].reshape(4, 6, 6)
    assert torch.equal(split, grown.source["k"].reshape(2, 6, 6).repeat_interleave(2, 0))


# --- other layouts ---------------------------------------------------------------------------------------------------


def test_a_group_of_queries_beside_its_keys() -> None:
    """Falcon: (q of the group | k | v) for each key/value head in one tensor."""
    attention = Attention(kv_heads="kv_heads", group="group")
    axes: dict[str, Any] = {a: Field(f"{a}_size") for a in ("hidden", "heads", "kv_heads", "key", "value")}
    axes["group"] = Ratio("heads_size", "kv_heads_size")
    fused = {"qkv": "(kv_heads (q: group key | k: key | v: value)) <- hidden", "o": "hidden <- (kv_heads group value)"}
    grown = grow(family(axes, fused, {}, attention), HEADS, {"heads_size": 9, "kv_heads_size": 3, "key_size": 8})

    def attend(config: Any, tensors: dict[str, Tensor]) -> Tensor:
        kv, group, key = at(config, "kv_heads"), at(config, "heads") // at(config, "kv_heads"), at(config, "key")
        x = torch.randn(TOKENS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        rows = (x @ tensors["qkv"].T).reshape(TOKENS, kv, (group + 1) * key + 5)
        q, k, v = torch.split(rows, [group * key, key, 5], -1)
        scores = torch.einsum("ijgd,sjd->jgis", q.reshape(TOKENS, kv, group, key), k) / math.sqrt(key)
        return torch.einsum("jgis,sjv->ijgv", scores.softmax(-1), v).reshape(TOKENS, -1) @ tensors["o"].T

    assert close(attend(grown.new, grown.target), attend(grown.old, grown.source))


@pytest.mark.parametrize("request_", [{"nope_size": 9}, {"rope_size": 6}, {"nope_size": 8, "rope_size": 10}])
def test_a_dot_product_over_two_axes(request_: dict[str, int]) -> None:
    """DeepSeek's MLA: keys from a latent and from the stream, scores over the root of both sizes' sum."""
    attention = Attention(key=("nope", "rope"), rotary=Rotary(axis="rope", layout="interleaved"))
    tensors = {
        "q": "(q: heads (nope | rope)) <- hidden",
        "kv_a": "(kv_rank | k: rope) <- hidden",
        "kv_norm": "kv_rank: * kv_rank",
        "kv_b": "(heads (k: nope | v: value)) <- kv_rank",
        "o": "hidden <- (heads value)",
    }
    norms = {"kv_rank": Norm("kv_rank", "rms", eps=1e-2)}
    axes = ("hidden", "heads", "nope", "rope", "value", "kv_rank")
    model = family(axes, tensors, norms, attention, neutral=("rope_parameters",))
    config = {"hidden_size": 6, "heads_size": 2, "nope_size": 5, "rope_size": 4, "value_size": 3, "kv_rank_size": 7}
    grown = grow(model, {**config, "rope_parameters": ROPE}, {**request_, "kv_rank_size": 11})
    turn = Case({}, layout="interleaved").turn

    def attend(config: Any, t: dict[str, Tensor]) -> Tensor:
        nope, rope, rank = at(config, "nope"), at(config, "rope"), at(config, "kv_rank")
        x = torch.randn(TOKENS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        q = (x @ t["q"].T).reshape(TOKENS, 2, nope + rope)
        latent, k_rope = torch.split(x @ t["kv_a"].T, [rank, rope], -1)
        k, v = torch.split(
            (norm(latent, "rms", 1e-2, t["kv_norm"]) @ t["kv_b"].T).reshape(TOKENS, 2, -1), [nope, 3], -1
        )
        scores = torch.einsum("ihd,jhd->hij", q[..., :nope], k)
        q_rope, k_rope = turn(config, q[..., nope:]), turn(config, k_rope[:, None]).expand(-1, 2, -1)
        turned = torch.einsum("ihd,jhd->hij", q_rope, k_rope)
        weights = ((scores + turned) / math.sqrt(nope + rope)).softmax(-1)
        return torch.einsum("hij,jhv->ihv", weights, v).reshape(TOKENS, -1) @ t["o"].T

    assert close(attend(grown.new, grown.target), attend(grown.old, grown.source))
    assert grown.scale("kv_rank") == pytest.approx(math.sqrt(11 / 7), rel=1e-15)  # its eps stands in the code
