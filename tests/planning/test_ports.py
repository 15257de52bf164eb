"""Ports: what a lift becomes for what writes an axis, reads it, or norms it, against the equations that define it."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from growformer.algebra import Experts, Factor, Family, Lift, Norm, Power, Run, Tied
from growformer.planning.growth import AxisGrowth
from growformer.planning.ports import _dual
from tests.planning.tiny_families import EPS, Grown, at, close, dense, family, grow, norm

COPIED = {"hidden": "a test says so"}


@dataclass(frozen=True)
class Stream:
    """A stream with its writers, norms and readers, one fact changed at a time."""

    kind: str = "rms"
    gain: str | None = "w"
    eps: str | float = "eps"
    copied: bool = False
    tied: bool = True
    headed: bool = True
    embed: Fraction | None = None
    logits: Fraction | None = None
    old: int = 6
    new: int = 11

    @property
    def family(self) -> Family:
        over = {"gain": self.gain, "eps": self.eps}
        norms = {role: Norm("hidden", self.kind, **over) for role in ("pre", "final")}  # type: ignore[arg-type]
        norms["added"] = Norm("hidden", self.kind, **over, output="added")  # type: ignore[arg-type]
        tensors = {"embed": "vocab -> (embed: hidden)"}
        if self.copied:
            norms["stream"] = Norm("hidden", self.kind, **over, output="stream")  # type: ignore[arg-type]
        for role in norms:
            tensors |= {f"{role}.gain": f"{role}: * hidden"} if self.gain else {}
            tensors |= {f"{role}.shift": f"{role}: + hidden"} if self.gain and self.kind == "layer" else {}
        tensors |= {
            "out": "hidden <- mlp",
            "out.bias": "-> hidden",
            "conv": "mlp -> hidden",
            "read": "mlp <- hidden",
            "raw": "mlp <- (raw: hidden)",
            "head": "vocab <- hidden",
        }
        powers = {"embed": self.embed, "logits": self.logits}
        return family(
            ("vocab", "hidden", "mlp"),
            tensors,
            norms,
            tied=Tied("head", "embed", norm="final") if self.headed else None,
            copied=COPIED if self.copied else {},
            powers={role: Power("hidden", p) for role, p in powers.items() if p is not None},
        )

    def grow(self, **options: Any) -> Grown:
        config = {"vocab_size": 7, "hidden_size": self.old, "mlp_size": 5}
        without = ["head"] if self.tied and self.headed else []
        return grow(self.family, config, {"hidden_size": self.new}, without=without, **options)


STREAMS = {
    "rms": Stream(),
    "rms, untied": Stream(tied=False),
    "rms, no head": Stream(headed=False),
    "rms, fixed eps": Stream(eps=EPS),
    "rms, fixed eps, untied": Stream(eps=EPS, tied=False),
    "rms, 1+w": Stream(gain="1+w"),
    "rms, 1+w, fixed eps": Stream(gain="1+w", eps=EPS),
    "rms, no gain": Stream(gain=None, tied=False),
    "rms, no gain, fixed eps": Stream(gain=None, eps=EPS, tied=False),
    "rms, copies": Stream(copied=True, new=18),
    "rms, copies, 1+w": Stream(copied=True, gain="1+w", new=12),
    "rms, copies, no gain, untied": Stream(copied=True, gain=None, tied=False, new=18),
    "rms, powers": Stream(embed=Fraction(1, 2), logits=Fraction(-1, 2)),
    "rms, powers, fixed eps": Stream(embed=Fraction(1, 2), logits=Fraction(-1), eps=EPS),
    "rms, powers, untied": Stream(embed=Fraction(1, 2), logits=Fraction(-1, 2), tied=False),
    "rms, powers, copies": Stream(embed=Fraction(1, 2), logits=Fraction(-1, 2), copied=True, new=12),
    "layer": Stream("layer"),
    "layer, untied": Stream("layer", tied=False),
    "layer, fixed eps": Stream("layer", eps=EPS),
    "layer, 1+w": Stream("layer", gain="1+w"),
    "layer, no gain": Stream("layer", gain=None, tied=False),
    "layer, powers": Stream("layer", embed=Fraction(1, 2), logits=Fraction(-1, 2), eps=EPS),
    "layer, copies": Stream("layer", copied=True, new=18),
    "layer, copies, fixed eps": Stream("layer", eps=EPS, copied=True, new=12),
    "layer, copies, fixed eps, untied": Stream("layer", eps=EPS, copied=True, tied=False, new=12),
}


class Run64:
    """What a stream's tensors compute under a config, by definition."""

    def __init__(self, stream: Stream, config: Any, tensors: dict[str, Tensor]) -> None:
        self.stream, self.tensors = stream, tensors
        self.hidden = at(config, "hidden")
        self.eps = stream.eps if isinstance(stream.eps, float) else config[stream.eps]

    def power(self, exponent: Fraction | None) -> float:
        return math.pow(self.hidden, exponent or 0)

    def written(self, token: int, units: Tensor) -> Tensor:
        t = self.tensors
        embedded = t["embed"][token] * self.power(self.stream.embed)
        return embedded + t["out"] @ units + t["out.bias"] + units @ t["conv"]

    def norm(self, role: str, x: Tensor) -> Tensor:
        gain: Any = self.tensors.get(f"{role}.gain", 1.0)
        gain = gain + (self.stream.gain == "1+w")
        return norm(x, self.stream.kind, self.eps, gain, self.tensors.get(f"{role}.shift", 0.0))

    def logits(self, x: Tensor) -> Tensor:
        t = self.tensors
        head = t["embed"] if self.stream.tied else t["head"]
        return head @ self.norm("final", x) * self.power(self.stream.logits)


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_by_the_equations(name: str) -> None:
    stream = STREAMS[name]
    grown = stream.grow(seed=3)
    small, large = Run64(stream, grown.old, grown.source), Run64(stream, grown.new, grown.target)
    lift = grown.lift("hidden") * grown.scale("hidden")
    units = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x, y = small.written(2, units), large.written(2, units)
    assert close(y, lift @ x)  # writers: W' = c E W
    assert close(large.tensors["read"] @ large.norm("pre", y), small.tensors["read"] @ small.norm("pre", x))
    # Without a gain, what it would take has nowhere to go; and no gain keeps a carried mean.
    if stream.gain is not None and (stream.kind == "rms" or stream.copied):
        branch = small.tensors["out"] @ units, large.tensors["out"] @ units
        assert close(large.norm("added", branch[1]), lift @ small.norm("added", branch[0]))
    if stream.copied and stream.gain is not None:
        assert close(large.norm("stream", y), lift @ small.norm("stream", x))
    if stream.headed:
        assert close(large.logits(y), small.logits(x))
    if stream.kind == "rms" or stream.copied:
        assert close(large.tensors["raw"] @ y, small.tensors["raw"] @ x)


@pytest.mark.parametrize("name", STREAMS)
def test_new_channels_learn(name: str) -> None:
    """What is not closed is filled: no reader has a column of zeros, no gain a new entry of none."""
    stream, grown = STREAMS[name], STREAMS[name].grow()
    assert (grown.target["read"][:, stream.old :] != 0).any(0).all()
    if stream.gain is not None:
        assert (grown.target["pre.gain"] + (stream.gain == "1+w") != 0).all()
    written = grown.target["out"][stream.old :]
    assert bool((written != 0).any()) == (stream.kind == "layer" or stream.copied)


def test_the_stream_control() -> None:
    """The equations see one gain that is off by a hundred thousandth."""
    grown = Stream().grow(seed=3)
    grown.target["pre.gain"][0] *= 1 + 1e-5
    large = Run64(Stream(), grown.new, grown.target)
    small = Run64(Stream(), grown.old, grown.source)
    x = torch.ones(6, dtype=torch.float64).cumsum(0)
    y = grown.lift("hidden") @ x
    assert not close(large.tensors["read"] @ large.norm("pre", y), small.tensors["read"] @ small.norm("pre", x))


# --- plain axes ------------------------------------------------------------------------------------------------------

BLOCKS = family(
    ("hidden", "mlp", "inner"),
    {"up": "mlp <- inner", "up.bias": "-> mlp", "down": "inner <- mlp", "conv": "inner -> (mlp (gate: 1 | up: 1))"},
)


def test_the_four_blocks_of_a_weight_whose_axes_both_grow() -> None:
    grown = grow(BLOCKS, {"hidden_size": 4, "mlp_size": 3, "inner_size": 5}, {"mlp_size": 6, "inner_size": 7})
    up, old = grown.target["up"], grown.source["up"]
    assert torch.equal(up[:3, :5], old)
    assert (up[3:, :5] != 0).all()  # both axes are closed at their readers: writers free
    assert (up[:3, 5:] == 0).all()
    assert (up[3:, 5:] != 0).all()  # the corner is free: closing it too would cost a training step
    assert (grown.target["up.bias"] != 0).all()
    assert torch.equal(grown.target["up.bias"][:3], grown.source["up.bias"])
    fused = grown.target["conv"].reshape(7, 6, 2)
    assert torch.equal(fused[:5, :3], grown.source["conv"].reshape(5, 3, 2))
    assert (fused[5:, :3] == 0).all() and (fused[:, 3:] != 0).all()


@pytest.mark.parametrize("tensor", ["up", "down", "conv"])
def test_plain_writers_and_readers_by_the_equations(tensor: str) -> None:
    grown = grow(BLOCKS, {"hidden_size": 4, "mlp_size": 3, "inner_size": 5}, {"mlp_size": 6, "inner_size": 7})
    of = {axis: grown.lift(axis) for axis in ("mlp", "inner")}
    _, pattern, _ = grown.family.find(tensor)
    new, old = grown.target[tensor], grown.source[tensor]
    if pattern.dims[0].atom is not None and pattern.dims[0].atom.stand == "read":
        new, old, dims = new.T, old.T, pattern.dims[::-1]
    else:
        dims = pattern.dims
    out, inward = dense(dims[0], of), dense(dims[1], of)
    reached = (out != 0).any(1)
    assert close((new @ inward)[reached], (out @ old)[reached])  # W' E_in = E_out W where E_out reaches
    assert (new[~reached] != 0).any(1).all()


def test_outside_axes_grow_at_their_end_and_are_free_on_both_sides() -> None:
    model = family(
        ("vocab", "positions", "hidden"),
        {"embed": "vocab -> hidden", "places": "(2 | positions) -> hidden", "head": "vocab <- hidden", "b": "-> vocab"},
    )
    grown = grow(
        model, {"vocab_size": 5, "positions_size": 3, "hidden_size": 4}, {"vocab_size": 8, "positions_size": 7}
    )
    for name, before in grown.source.items():
        assert torch.equal(grown.target[name][: len(before)], before)
        assert (grown.target[name][len(before) :] != 0).all()
    assert len(grown.target["places"]) == 9


# --- experts ---------------------------------------------------------------------------------------------------------

EXPERTS: dict[str, str] = {
    "router": "experts <- hidden",
    "router.bias": "-> experts",
    "up": "[experts] hidden -> mlp",
    "up.bias": "-> [experts] mlp",
    "down": "[experts] mlp -> hidden",
    "down.bias": "-> [experts] hidden",
}
NAMED = {**EXPERTS, "up": "", "down": ""} | {
    "up.{experts}": "hidden -> [experts] mlp",
    "down.{experts}": "[experts] mlp -> hidden",
}


def mixture(tensors: dict[str, Tensor], x: Tensor, chosen: int, named: bool) -> Tensor:
    """Softmax over the chosen experts' scores, normalised, and the sum of what they give, so weighed."""
    scores = tensors["router"] @ x + tensors["router.bias"]
    best = scores.topk(chosen)
    weights = best.values.softmax(0)
    total = torch.zeros_like(tensors["down.bias"][0])
    for weight, e in zip(weights, best.indices.tolist(), strict=True):
        up = tensors[f"up.{e}"] if named else tensors["up"][e]
        down = tensors[f"down.{e}"] if named else tensors["down"][e]
        total = total + weight * ((x @ up + tensors["up.bias"][e]).relu() @ down + tensors["down.bias"][e])
    return total


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("times", [2, 3, 5])
def test_experts_by_the_equations(named: bool, layer_norm: bool, times: int) -> None:
    tensors = {name: text for name, text in (NAMED if named else EXPERTS).items() if text}
    # A LayerNorm over the stream makes its new channels means, of shares here.
    norms = {"pre": Norm("hidden", "layer", eps="eps", gain=None)} if layer_norm else {}
    model = family(("hidden", "mlp", "experts"), tensors, norms, experts=Experts(chosen="chosen"))
    config = {"hidden_size": 4, "mlp_size": 6, "experts_size": 3, "chosen": 2}
    grown = grow(model, config, {"experts_size": 3 * times, "mlp_size": 8})
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = mixture(grown.source, x, 2, named)
    assert grown.new["chosen"] == 2 * times
    assert close(mixture(grown.target, x, 2 * times, named), wanted)
    # Their inner units are copies, and what reads them is shared out: copies add up to `times` the old, and differ.
    downs = [grown.target[f"down.{e}"] if named else grown.target["down"][e] for e in range(3 * times)]
    for e in range(3):
        old = grown.source[f"down.{e}"] if named else grown.source["down"][e]
        mine = [downs[e + 3 * k][:6] for k in range(times)]
        assert close(torch.stack(mine).sum(0), times * old)
        assert all(not torch.equal(a, b) for i, a in enumerate(mine) for b in mine[:i])
    assert torch.equal(grown.target["router"], grown.source["router"].repeat(times, 1))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("named", [False, True])
def test_experts_and_a_stream_that_carries_its_mean(named: bool, rows: bool) -> None:
    """The new channels are means of what a shared-out reader writes: means of shares, entry by entry."""
    name = "down.{experts}" if named else "down"
    text = "hidden <- [experts] mlp" if named and rows else "[experts] hidden <- mlp" if rows else EXPERTS["down"]
    tensors = {name: text, "bias": "-> [experts] hidden", "g": "pre: * hidden"}
    norms = {"pre": Norm("hidden", "layer", eps="eps")}
    model = family(("hidden", "mlp", "experts"), tensors, norms, experts=Experts(chosen="c"))
    config = {"hidden_size": 4, "mlp_size": 6, "experts_size": 3, "c": 2}
    grown = grow(model, config, {"experts_size": 6, "hidden_size": 7})
    lift = grown.lift("hidden")
    for e in range(3):
        old = grown.source[f"down.{e}"] if named else grown.source["down"][e]
        news = [grown.target[f"down.{e + k}"] if named else grown.target["down"][e + k] for k in (0, 3)]
        total = sum(news, torch.zeros(()))
        assert close(total, 2 * lift @ old) if rows else close(total, 2 * old @ lift.T)
        assert close(grown.target["bias"][[e, e + 3]].sum(0), 2 * lift @ grown.source["bias"][e])


# --- a gain that is no norm's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_scale_by_the_equations(kind: str, copied: bool) -> None:
    """What a branch adds is multiplied, channel by channel: a carried mean is that of the products."""
    tensors = {
        "{layer}.out": "(scale_a: hidden) <- mlp",
        "{layer}.a": "scale_a: * hidden",
        "{layer}.b": "scale_b: * hidden",
        "{layer}.bias": "-> (scale_b: hidden)",
    }
    norms = {"pre": Norm("hidden", kind, eps="eps")}  # type: ignore[arg-type]
    model = family(("hidden", "mlp", "layer"), tensors, norms, copied=COPIED if copied else {})
    config = {"hidden_size": 4, "mlp_size": 3, "layer_size": 2}
    grown = grow(model, config, {"hidden_size": 8 if copied else 7, "layer_size": 3}, layers_at=[0])
    x, lift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), grown.lift("hidden")

    def branch(t: dict[str, Tensor], layer: int) -> Tensor:
        return t[f"{layer}.a"] * (t[f"{layer}.out"] @ x) + t[f"{layer}.b"] * t[f"{layer}.bias"]

    for layer in range(2):
        assert close(branch(grown.target, layer + 1), lift @ branch(grown.source, layer))
    assert (grown.target["1.a"] != 0).all()  # new gains learn, and let what writes them learn
    assert (branch(grown.target, 0) == 0).all()


# --- the dual --------------------------------------------------------------------------------------------------------


def test_a_reader_takes_the_left_inverse() -> None:
    lift = Lift(3, (Run(2, 0, Factor.of(2), Factor.of(1, 2)), Run(1, None, back=None), Run(1, 2), Run(1, 2, back=None)))
    dual = _dual(lift)
    assert [run.factor for run in dual.runs if not run.new] == [Factor.of(1, 2), Factor.of(1)]
    assert [run.new for run in dual.runs] == [False, True, False, True]  # a copy nobody reads is no old column
    assert _dual(_dual(Lift.identity(3).times(Factor.of(3)))) == Lift.identity(3).times(Factor.of(3))


def test_uneven_copies_have_no_energy() -> None:
    axis = AxisGrowth("hidden", Lift.rows(2, [0, 1, 0]))
    with pytest.raises(ValueError, match="copied unevenly"):
        _ = axis.energy
    assert AxisGrowth("hidden", Lift.rows(2, [0, 1, 0, 1])).energy == 1
    assert AxisGrowth("hidden", Lift.place(2, range(2), 3)).energy == Fraction(2, 3)
