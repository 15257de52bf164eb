"""The reference Transformer against a second, slower reading of the paper's equations 1 to 5."""

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from growformer.models import HeadSize, LayerSize, ReferenceConfig, ReferenceTransformer, randomise
from growformer.proof.bar import BAR

Array = np.ndarray[Any, np.dtype[np.float64]]

# Every size differs from every other, so that no swapped axis can pass unseen.
RAGGED = ReferenceConfig(
    vocab=23,
    positions=5,
    hidden=12,
    layers=(
        LayerSize(17, (HeadSize(3, 7), HeadSize(6, 2), HeadSize(4, 9))),
        LayerSize(10, (HeadSize(8, 1),)),
        LayerSize(13, (HeadSize(1, 11), HeadSize(14, 15))),
    ),
)
SWITCHES: dict[str, Any] = {"eps": 0.03, "final_norm": True, "causal": True, "activation": "swiglu", "tied": True}
VARIANTS: list[dict[str, Any]] = [
    {},
    *({name: value} for name, value in SWITCHES.items()),
    {"activation": "gelu"},
    {"eps": Fraction(1, 30), "final_norm": True, "causal": True},
    SWITCHES,
]


def config_with(**switches: Any) -> ReferenceConfig:
    return dataclasses.replace(RAGGED, **switches)


def model_with(dtype: torch.dtype = torch.float64, seed: int = 1, **switches: Any) -> ReferenceTransformer:
    return randomise(ReferenceTransformer(config_with(**switches), dtype), seed)


def some_tokens(batch: int = 6) -> Tensor:
    """Tokens [batch, positions] among which every token of the vocabulary appears."""
    count = batch * RAGGED.positions
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    return (order % RAGGED.vocab).view(batch, RAGGED.positions)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max())


# --- a second reading of the equations: numpy, one token at a time, parameters by name -------------------------------

SLIPS = """
P left out | residual left out | norm left out | gain left out | mean over channels taken as sum | post-norm
b1 left out | b2 left out | score scale left out | score scale of the first head | score scale of the value size
queries and keys swapped | MLP beside the heads
"""


def by_the_equations(model: ReferenceTransformer, tokens: list[int], slip: str = "") -> Array:
    """Logits [positions, vocab] of one sequence; `slip` makes one deliberate mistake."""
    config = model.config
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    erf = np.vectorize(math.erf)

    def rms(x: Array, gain: Array) -> Array:  # equation 5
        if slip == "norm left out":
            return x * gain
        total = sum(float(c) ** 2 for c in x)
        mean = total if slip == "mean over channels taken as sum" else total / len(x)
        return x / math.sqrt(mean + config.eps) * (1.0 if slip == "gain left out" else gain)

    def mlp(n: str, x: Array) -> Array:  # equation 3
        up = x @ w[n + "w1"] + (0 if slip == "b1 left out" else w[n + "b1"])
        if config.activation == "relu":
            inner = np.where(up > 0, up, 0.0)
        elif config.activation == "gelu":
            inner = up * (1 + erf(up / math.sqrt(2))) / 2
        else:
            gate = x @ w[n + "w_gate"] + w[n + "b_gate"]
            inner = gate / (1 + np.exp(-gate)) * up
        out: Array = inner @ w[n + "w2"] + (0 if slip == "b2 left out" else w[n + "b2"])
        return out

    def mha(n: str, xs: list[Array], heads: tuple[HeadSize, ...]) -> list[Array]:  # equation 4
        outs = []
        stacked_w_o = np.concatenate([w[f"{n}heads.{e}.w_o"] for e in range(len(heads))])  # equation 15
        for i in range(len(xs)):
            concatenated = []
            for e, head in enumerate(heads):
                w_q, w_k, w_v = (w[f"{n}heads.{e}.{leaf}"] for leaf in ("w_q", "w_k", "w_v"))
                if slip == "queries and keys swapped":
                    w_q, w_k = w_k, w_q
                seen = xs[: i + 1] if config.causal else xs
                scale = math.sqrt(head.key)
                if slip.startswith("score scale"):
                    scale = math.sqrt({"out": 1, "head": heads[0].key, "size": head.value}[slip.split()[-1]])
                scores = [float((xs[i] @ w_q) @ (x @ w_k)) / scale for x in seen]
                weights = [math.exp(score - max(scores)) for score in scores]
                concatenated.append(sum(a / sum(weights) * (x @ w_v) for a, x in zip(weights, seen, strict=True)))
            outs.append(np.concatenate(concatenated) @ stacked_w_o)
        return outs

    xs = [w["embedding"][t] + (0 if slip == "P left out" else w["positions"][i]) for i, t in enumerate(tokens)]
    for layer, size in enumerate(config.layers):  # equation 2
        n = f"layers.{layer}."
        before = xs
        if slip == "post-norm":
            attended = [x + y for x, y in zip(xs, mha(n, xs, size.heads), strict=True)]
            middle = [rms(x, w[n + "norm_mha"]) for x in attended]
            xs = [rms(x + mlp(n, x), w[n + "norm_mlp"]) for x in middle]
            continue
        attended = mha(n, [rms(x, w[n + "norm_mha"]) for x in xs], size.heads)
        xs = [(0 if slip == "residual left out" else x) + y for x, y in zip(xs, attended, strict=True)]
        read = before if slip == "MLP beside the heads" else xs
        xs = [x + mlp(n, rms(r, w[n + "norm_mlp"])) for x, r in zip(xs, read, strict=True)]
    if config.final_norm:
        xs = [rms(x, w["norm_final"]) for x in xs]
    logits: Array = np.stack(xs) @ (w["embedding"].T if config.tied else w["w_out"])  # equation 1
    return logits


def compare(model: ReferenceTransformer, slip: str = "") -> float:
    tokens = some_tokens()
    logits = model(tokens)
    other = torch.from_numpy(np.stack([by_the_equations(model, row.tolist(), slip) for row in tokens]))
    assert logits.shape == other.shape == (*tokens.shape, RAGGED.vocab)
    return relative(logits, other)


@pytest.mark.parametrize("switches", VARIANTS, ids=str)
def test_computes_the_equations(switches: dict[str, Any]) -> None:
    assert compare(model_with(**switches)) <= BAR


@pytest.mark.parametrize("slip", [slip.strip() for slip in SLIPS.strip().replace("|", "\n").splitlines()])
def test_a_slip_in_the_equations_is_seen(slip: str) -> None:
    assert compare(model_with(), slip) > BAR


def test_uniform_is_the_same_architecture_with_equal_sizes() -> None:
    config = ReferenceConfig.uniform(23, 5, 12, layers=2, heads=3, key=4, value=7, mlp=17, eps=0.01, causal=True)
    assert config.layers == (LayerSize(17, (HeadSize(4, 7),) * 3),) * 2
    assert (config.eps, config.causal, config.tied) == (0.01, True, False)
    assert compare(randomise(ReferenceTransformer(config), 1)) <= BAR


def test_no_layers_is_embedding_times_head() -> None:
    model = model_with(layers=())
    tokens = some_tokens()
    w_out = model.get_parameter("w_out")
    expected = (model.embedding[tokens] + model.positions) @ w_out
    assert relative(model(tokens), expected) <= BAR
    assert relative(model(tokens), model.embedding[tokens] @ w_out) > BAR


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_alone_changes_the_output(name: str) -> None:
    plain, tokens = model_with(), some_tokens()
    switched = model_with(seed=3, **{name: SWITCHES[name]})
    same = ReferenceTransformer(config_with())
    for model in (switched, same):  # everything that both have is equal, so only the switch can make a difference
        model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(tokens), same(tokens))
    assert relative(plain(tokens), switched(tokens)) > BAR


def test_causal_hides_the_future_and_only_then() -> None:
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % RAGGED.vocab
    for causal in (True, False):
        model = model_with(causal=causal)
        a, b = model(tokens), model(changed)
        assert (relative(a[:, :-1], b[:, :-1]) <= BAR) is causal
        assert relative(a[:, -1], b[:, -1]) > BAR


def test_without_eps_a_norm_sees_no_scale_and_with_eps_it_does() -> None:
    tokens = some_tokens()
    for eps in (0.0, 0.03):
        model = model_with(layers=(), final_norm=True, eps=eps)
        before = model(tokens)
        with torch.no_grad():
            model.embedding.mul_(3)
            model.positions.mul_(3)
        assert (relative(before, model(tokens)) <= BAR) is (eps == 0.0)


def test_a_short_sequence_uses_the_first_positions_and_a_long_one_is_refused() -> None:
    model, tokens = model_with(causal=True), some_tokens()
    assert relative(model(tokens)[:, :3], model(tokens[:, :3])) <= BAR
    assert relative(model(tokens)[:, 1:4], model(tokens[:, 1:4])) > BAR
    with pytest.raises(ValueError, match=r"6 tokens.*at most 5"):
        model(torch.zeros(1, 6, dtype=torch.long))


# --- names and shapes ------------------------------------------------------------------------------------------------

NAMES = """
embedding 23 12 | positions 5 12 | w_out 12 23
layers.0.norm_mha 12 | layers.0.norm_mlp 12
layers.0.heads.0.w_q 12 3 | layers.0.heads.0.w_k 12 3 | layers.0.heads.0.w_v 12 7 | layers.0.heads.0.w_o 7 12
layers.0.heads.1.w_q 12 6 | layers.0.heads.1.w_k 12 6 | layers.0.heads.1.w_v 12 2 | layers.0.heads.1.w_o 2 12
layers.0.w1 12 17 | layers.0.b1 17 | layers.0.w2 17 12 | layers.0.b2 12
layers.1.norm_mha 12 | layers.1.norm_mlp 12
layers.1.heads.0.w_q 12 8 | layers.1.heads.0.w_k 12 8 | layers.1.heads.0.w_v 12 1 | layers.1.heads.0.w_o 1 12
layers.1.w1 12 10 | layers.1.b1 10 | layers.1.w2 10 12 | layers.1.b2 12
"""
GATES = "layers.0.w_gate 12 17 | layers.0.b_gate 17 | layers.1.w_gate 12 10 | layers.1.b_gate 10"


def table(text: str) -> dict[str, tuple[int, ...]]:
    rows = [row.split() for row in text.replace("|", "\n").splitlines() if row.strip()]
    return {name: tuple(map(int, shape)) for name, *shape in rows}


def test_state_dict_holds_exactly_the_agreed_names_and_shapes() -> None:
    layers = (LayerSize(17, (HeadSize(3, 7), HeadSize(6, 2))), RAGGED.layers[1])

    def shapes(**switches: Any) -> dict[str, tuple[int, ...]]:
        state = ReferenceTransformer(config_with(layers=layers, **switches)).state_dict()
        return {name: tuple(value.shape) for name, value in state.items()}

    names = table(NAMES)
    assert shapes() == names
    assert shapes(eps=0.1, causal=True, activation="gelu") == names
    assert shapes(activation="swiglu") == names | table(GATES)
    assert shapes(final_norm=True) == names | {"norm_final": (12,)}
    assert shapes(tied=True) == {name: shape for name, shape in names.items() if name != "w_out"}


# --- dtypes ----------------------------------------------------------------------------------------------------------


class OtherFloats(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point results, forward and backward, that are not of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.results, self.others = dtype, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.results += 1
                self.others += value.dtype != self.dtype
        return out


def count_other_floats(model: ReferenceTransformer, dtype: torch.dtype) -> OtherFloats:
    mode = OtherFloats(dtype)
    with mode:
        logits = model(some_tokens())
        (logits * logits).sum().backward()
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    return mode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("switches", VARIANTS, ids=str)
def test_every_step_stays_in_its_dtype(dtype: torch.dtype, switches: dict[str, Any]) -> None:
    mode = count_other_floats(model_with(dtype, **switches), dtype)
    assert mode.results > 0
    assert mode.others == 0


def test_a_hidden_cast_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim: softmax(x.float(), dim=dim).to(x.dtype))
    assert count_other_floats(model_with(), torch.float64).others > 0


@torch.no_grad()
def test_the_error_of_a_dtype_follows_its_precision() -> None:
    tokens = some_tokens()
    errors: list[float] = []
    slips: list[float] = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low = model_with(dtype)
        for activation, found in (("relu", errors), ("gelu", slips)):
            exact = ReferenceTransformer(config_with(activation=activation))  # the rounded weights, steps in float64
            exact.load_state_dict(low.state_dict())
            found.append(relative(exact(tokens), low(tokens).double()))
    assert 0 < errors[0] < errors[1] < errors[2] < min(slips)


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", VARIANTS, ids=str)
def test_config_survives_json(switches: dict[str, Any]) -> None:
    config = config_with(**switches)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == config.to_dict()
    back = ReferenceConfig.from_dict(written)
    assert back == config
    assert type(back.eps) is type(config.eps)
    assert hash(back) == hash(config)
    assert ReferenceConfig.from_dict(written | {"hidden": 11}) != config


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"vocab": 2.0}, "vocab=2.0"),
        ({"positions": True}, "positions=True"),
        ({"eps": -1e-6}, "eps=-1e-06"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"activation": "silu"}, "'silu'; known: relu, gelu, swiglu"),
        ({"layers": [{"mlp": 4, "heads": []}]}, "heads=0"),
        ({"layers": [{"mlp": 0, "heads": [{"key": 1, "value": 1}]}]}, "mlp=0"),
        ({"layers": [{"mlp": 4, "heads": [{"key": 1, "value": -2}]}]}, "value=-2"),
        ({"rotary": True}, "rotary"),
    ],
    ids=str,
)
def test_a_config_that_means_nothing_is_refused_by_name(bad: dict[str, Any], said: str) -> None:
    good = RAGGED.to_dict()
    assert ReferenceConfig.from_dict(good) == RAGGED
    with pytest.raises(ValueError, match=said):
        ReferenceConfig.from_dict(good | bad)


def test_a_config_without_a_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"needs.*'hidden'"):
        ReferenceConfig.from_dict({name: value for name, value in RAGGED.to_dict().items() if name != "hidden"})


# --- random values and gradients -------------------------------------------------------------------------------------


def test_randomise_leaves_nothing_at_its_default() -> None:
    model = model_with(**SWITCHES)
    for name, value in model.state_dict().items():
        assert (value != 0).all(), name
        if "norm" in name:
            assert (value != 1).all(), name
            assert 0.5 <= value.min() <= value.max() <= 1.5, name
            assert value.unique().numel() == value.numel(), name
    fresh = ReferenceTransformer(model.config).state_dict()
    assert (fresh["layers.0.norm_mha"] == 1).all()
    assert (fresh["layers.0.b2"] == 0).all()


def test_randomise_depends_on_the_seed_and_only_on_it() -> None:
    first = model_with().state_dict()
    torch.manual_seed(7)
    again, other = model_with().state_dict(), model_with(seed=9).state_dict()
    half = model_with(torch.bfloat16).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name
        assert torch.equal(value.bfloat16(), half[name]), name


def gradients(model: ReferenceTransformer, tokens: Tensor) -> dict[str, Tensor]:
    logits = model(tokens)
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(4))
    (logits * direction).sum().backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("switches", VARIANTS, ids=str)
def test_a_gradient_reaches_every_entry_of_every_parameter(switches: dict[str, Any]) -> None:
    model = model_with(**switches)
    found = gradients(model, some_tokens(batch=40))  # many, so that every ReLU channel fires
    assert found.keys() == model.state_dict().keys()
    assert [name for name, gradient in found.items() if not (gradient != 0).all()] == []


def test_a_gradient_that_cannot_arrive_is_seen_missing() -> None:
    model, tokens = model_with(), some_tokens()
    with torch.no_grad():
        model.get_parameter("layers.0.heads.1.w_o").zero_()
    closed = gradients(model, tokens)
    dead = {name for name, gradient in closed.items() if not gradient.any()}
    assert dead == {f"layers.0.heads.1.{leaf}" for leaf in ("w_q", "w_k", "w_v")}
    for tied in (False, True):  # a tied head reads the row of a token that never occurs
        unread = gradients(model_with(tied=tied), tokens.clamp(max=RAGGED.vocab - 2))["embedding"]
        assert bool(unread[-1].any()) is tied
        assert unread[:-1].any(dim=1).all()
