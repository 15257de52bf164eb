"""LiGO: starts as copies, learns on the grown model's loss, and has one matrix for each axis and kind of tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.api.planned import on_disk
from growformer.checkpoint.layout import layout_of
from growformer.errors import RequestError
from growformer.proof.bar import BAR
from growformer.training.ligo import Lifts, learn
from tests.training.live_kit import batch, logits64, model, relative, train

REQUESTS: dict[str, dict[str, int]] = {
    "llama-tied-bias": {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 4,
    },
    "qwen3": {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 48, "n_head": 8, "n_inner": 120, "n_layer": 5},
}
STEPS = 6


def loss(forward: Callable[..., Any]) -> torch.Tensor:
    tokens = batch(0)
    return forward(input_ids=tokens, labels=tokens, use_cache=False).loss


def grown(kind: str, steps: int, **request: Any) -> Any:
    made = request or REQUESTS[kind]
    return gf.expand(model(kind), method="ligo", closure=loss, allow_change=True, steps=steps, **made)


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_it_starts_as_copies(kind: str) -> None:
    """Of channels, which change nothing; and of layers, which change what they change without it."""
    depth = {"num_hidden_layers", "n_layer"}
    wide = {name: size for name, size in REQUESTS[kind].items() if name not in depth}
    assert relative(logits64(model(kind)), logits64(grown(kind, 0, **wide))) < BAR
    deeper = gf.expand(model(kind), method="hyperclone,layer=interpolate", allow_change=True, **REQUESTS[kind])
    start = logits64(grown(kind, 0))
    assert relative(logits64(deeper), start) < BAR
    assert depth.isdisjoint(REQUESTS[kind]) or relative(logits64(model(kind)), start) > 1e-3


def test_copies_part() -> None:
    """Equal parts of their readers would keep them alike, whatever is learned: so HyperCloning's are."""

    def apart(grown: Any) -> float:
        loss(grown).backward()
        table = grown.get_input_embeddings().weight
        return min(relative(*x.chunk(2, dim=1)) for x in (table.detach(), table.grad))

    of = model("llama-tied-bias")
    assert apart(gf.expand(of, method="hyperclone", hidden_size=48)) < BAR
    assert apart(grown("llama-tied-bias", STEPS, hidden_size=48)) > 1e-3


def test_it_learns_on_the_loss_that_it_is_given() -> None:
    start, after = grown("llama-tied-bias", 0), grown("llama-tied-bias", STEPS)
    with torch.no_grad():
        before, now = float(loss(start)), float(loss(after))
    assert now < before
    moved = [relative(x.detach(), y.detach()) for x, y in zip(start.parameters(), after.parameters(), strict=True)]
    assert min(moved) > BAR
    assert after.lm_head.weight is after.model.embed_tokens.weight and after.training


def test_one_matrix_for_each_axis_and_kind_of_tensor() -> None:
    of = model("llama-tied-bias")
    big = gf.expand(of, method="ligo", closure=loss, allow_change=True, steps=0, **REQUESTS["llama-tied-bias"])
    plan = big.growformer_plan
    lifts = Lifts(plan, layout_of(big), {name: x.detach() for name, x in on_disk(of).items()})
    sizes = {axis: (entry["new"], entry["old"]) for axis, entry in plan.axes.items()}
    width = {name: tuple(x.shape) for name, x in lifts.matrices.items() if ": " not in name}
    assert all(shape == sizes[name.partition(".")[0]] for name, shape in width.items())
    assert {name.partition(".")[0] for name in width} == {"hidden", "mlp", "heads", "kv_heads"}
    assert {"hidden.write", "hidden.read", "hidden.gain", "mlp.write", "mlp.read"} <= set(width)
    depth = {name: tuple(x.shape) for name, x in lifts.matrices.items() if ": " in name}
    assert set(depth.values()) == {(4, 3)} and len(depth) == 16
    assert all(name.startswith("layer: model.layers.{layer}.") for name in depth)
    losses = learn(lifts, big, loss, STEPS, 1e-3)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    # By hand, of one tensor: W'_l = E (sum over k of D[l, k] W_k) R^T.
    m, name = lifts.matrices, "model.layers.{layer}.mlp.up_proj.weight"
    mixed = sum(m[f"layer: {name}"][2, k] * of.get_parameter(name.format(layer=k)) for k in range(3))
    wanted = m["mlp.write"] @ mixed @ m["hidden.read"].T
    assert relative(wanted.detach(), big.get_parameter(name.format(layer=2)).detach()) < BAR


def test_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    of = model("llama-tied-bias")
    mlp: dict[str, Any] = {"method": "ligo", "intermediate_size": 40}
    with pytest.raises(RequestError, match=r"the lift is learned.*allow_change=True"):
        gf.expand(of, closure=loss, **mlp)
    with pytest.raises(RequestError, match="ligo takes what new mlp holds from a loss"):
        gf.expand(of, allow_change=True, **mlp)
    with pytest.raises(RequestError, match=r"ligo takes what new mlp holds .*growformer.grow\(\.\.\., closure=loss\)"):
        gf.grow(of, None, allow_change=True, **mlp)
    with pytest.raises(RequestError, match="averages begin anew from it"):
        gf.grow(of, None, allow_change=True, closure=loss, averages=[model("llama-tied-bias")], **mlp)
    of.save_pretrained(tmp_path / "src")
    with pytest.raises(RequestError, match="a folder has none"):
        gf.expand_checkpoint(tmp_path / "src", tmp_path / "out", allow_change=True, **mlp)
    with pytest.raises(RequestError, match=r"head_dim.*ligo .*says nothing of that"):
        gf.expand(of, method="ligo", allow_change=True, closure=loss, head_dim=14)
    with pytest.raises(RequestError, match="key, value grow in another way"):
        gf.expand(
            of,
            method="ligo,key=paper,value=paper",
            allow_change=True,
            closure=loss,
            head_dim=14,
            **{"intermediate_size": 40},
        )
    with pytest.raises(RequestError, match="only whole copies of its channels"):
        gf.expand(of, method="ligo", allow_change=True, closure=loss, hidden_size=36)
    with pytest.raises(RequestError, match="holds 6 tensors, as experts do"):
        gf.expand(model("mixtral"), allow_change=True, closure=loss, **mlp)
    with pytest.raises(RequestError, match="the loss of what it is given to call"):
        gf.expand(of, allow_change=True, closure=lambda forward: torch.zeros(()), **mlp)


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_a_live_model_takes_the_learned_lift_and_its_optimizer_that_of_the_copies(kind: str) -> None:
    request: dict[str, Any] = {**REQUESTS[kind], "allow_change": True, "seed": 3}
    of, like = model(kind), model(kind)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (of, like)]
    for each, optimizer in zip((of, like), optimizers, strict=True):
        train(each, optimizer, range(2))
    wanted = dict(gf.expand(of, method="ligo", closure=loss, steps=STEPS, **request).named_parameters())
    objects = {id(x) for x in of.parameters()}
    same = gf.grow(of, optimizers[0], method="ligo", closure=loss, steps=STEPS, **request)
    assert same == (of, optimizers[0])
    found = dict(of.named_parameters())
    assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in found.items())
    assert objects <= {id(x) for x in found.values()}
    assert all(x.grad is None for x in found.values())
    gf.grow(like, optimizers[1], method="ligo", closure=loss, steps=0, **request)
    for (name, x), y in zip(found.items(), like.parameters(), strict=True):
        mine, copies = optimizers[0].state.get(x, {}), optimizers[1].state.get(y, {})
        assert mine.keys() == copies.keys() and all(torch.equal(mine[key], copies[key]) for key in mine), name
    train(of, optimizers[0], range(2, 3))


def test_a_loss_that_fails_leaves_the_live_model_as_it_was() -> None:
    of = model("llama-tied-bias")
    optimizer = torch.optim.AdamW(of.parameters(), lr=1e-3)
    train(of, optimizer, range(1))
    before = {name: x.detach().clone() for name, x in of.named_parameters()}
    asked = []

    def fails(forward: Callable[..., Any]) -> torch.Tensor:
        asked.append(loss(forward))
        return asked[-1] if len(asked) < 3 else asked[-1] * torch.nan

    with pytest.raises(RequestError, match="the loss is nan at step 3"):
        gf.grow(of, optimizer, method="ligo", closure=fails, allow_change=True, hidden_size=48)
    assert all(torch.equal(x, before[name]) for name, x in of.named_parameters())
    train(of, optimizer, range(1, 2))
