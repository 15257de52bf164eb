"""Copies that never part: what the certificate names is what stays a copy under an optimizer, and nothing else."""

import copy
from typing import Any

import pytest
import torch
from method_kit import stock, tokens

import growformer as gf
from growformer.methods import METHODS
from tests.methods.test_method_controls import grown

WIDE = {"intermediate_size": 56, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48}
STEPS = 20
ALIKE = 1e-9
"""Of the largest entry: equal but for the order in which a product adds up, 20 steps long."""
PARTED = 1e-4


def named(method: str, **request: int) -> dict[str, tuple[int, int]]:
    certificate = grown("llama", method, request).certify()
    assert certificate.ok and certificate.copied
    return certificate.inseparable


@pytest.mark.parametrize("method", ["hyperclone", "net2net", "staged"])
def test_equal_copies_are_counted(method: str) -> None:
    # A copy for each channel that another was made of, in each of three layers.
    assert named(method, intermediate_size=56) == {"mlp": (3 * 28, 3 * 56)}
    assert named(method, intermediate_size=41) == {"mlp": (3 * 13, 3 * 41)}


@pytest.mark.parametrize(
    "method", ["hyperclone", "sparkling", "staged", "deepfusion", "dyadic", "net2net", "bert2bert"]
)
def test_a_model_beside_itself_is_named_on_every_axis(method: str) -> None:
    # The stream is one set of channels for the whole model.
    assert named(method, **WIDE) == {"mlp": (3 * 28, 3 * 56), "heads": (3 * 4, 3 * 8), "hidden": (24, 48)}


@pytest.mark.parametrize("method", ["hyperclone-noise", "matrix-split", "halves"])
def test_what_is_split_entry_by_entry_is_not(method: str) -> None:
    assert named(method, **WIDE) == {}


@pytest.mark.parametrize("request_", [{"intermediate_size": 41}, {"num_attention_heads": 8, "num_key_value_heads": 4}])
def test_nor_what_is_split_unequally(request_: dict[str, int]) -> None:
    assert named("lemon", **request_) == {}
    assert named("hyperclone", **request_) != {}


def test_of_three_dyadic_parts_two_are_alike() -> None:
    # 1/2, 1/4 and 1/4: the third copy is the second's for ever, the first nobody's.
    assert named("dyadic", intermediate_size=84) == {"mlp": (3 * 28, 3 * 84)}
    up = trained("dyadic", torch.optim.AdamW, False, intermediate_size=84).model.layers[0].mlp.up_proj.weight.detach()
    one, two, three = up.chunk(3)
    assert float((two - three).abs().max()) <= ALIKE < PARTED < float((one - two).abs().max())


def test_control_one_weight_tells_a_copy() -> None:
    growth = grown("llama", "hyperclone", {"intermediate_size": 56})
    whole = growth.certify().inseparable["mlp"][0]
    down = growth.target["model.layers.1.mlp.down_proj.weight"]
    down[2, 5], down[2, 33] = 1.5 * down[2, 5], 0.5 * down[2, 33]
    certificate = growth.certify()
    assert certificate.ok and certificate.inseparable["mlp"][0] == whole - 1


def test_methods_without_copies_have_none_to_name() -> None:
    for method in ("paper", "zero-in"):
        assert not grown("llama", method, {"intermediate_size": 41}).certify().copied


def trained(method: str, optimizer: type[torch.optim.Optimizer], after: bool, **request: int) -> Any:
    """A small model grown by a method and trained on, by an optimizer that has seen the small one (`after`) or not."""
    model = copy.deepcopy(stock("llama")).train()
    made = optimizer(model.parameters(), lr=1e-2)
    if after:
        steps(model, made, 2)
        gf.grow(model, made, method=method, **request)
    else:
        gf.grow(model, None, method=method, **request)
        made = optimizer(model.parameters(), lr=1e-2)
    steps(model, made, STEPS)
    return model


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
    ids = tokens()
    for _ in range(count):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gap(model: Any, size: int = 28) -> float:
    """How far the second half of the units is from the first, in all layers, relative to the largest weight."""
    found = []
    for layer in model.model.layers:
        up = layer.mlp.up_proj.weight.detach()
        found.append(float((up[size : 2 * size] - up[:size]).abs().max() / up.abs().max()))
    return max(found)


@pytest.mark.parametrize("method", ["hyperclone", "staged", "lemon", "halves", "hyperclone-noise", "matrix-split"])
def test_steps_agree_with_the_certificate(method: str) -> None:
    alike = "mlp" in named(method, intermediate_size=56)
    found = gap(trained(method, torch.optim.AdamW, False, intermediate_size=56))
    assert found <= ALIKE if alike else found > PARTED


def test_an_optimizer_that_forgets_tells_copies_apart() -> None:
    assert gap(trained("sparkling", torch.optim.AdamW, True, intermediate_size=56)) > PARTED
    assert gap(trained("hyperclone", torch.optim.AdamW, True, intermediate_size=56)) <= ALIKE


def test_twins_part_at_once() -> None:
    model = trained("twins", torch.optim.SGD, False, intermediate_size=56)
    up = model.model.layers[0].mlp.up_proj.weight.detach()
    one, other = up[28:42], up[42:56]
    assert float((one - other).abs().max()) > PARTED * float(up.abs().max())
    assert METHODS["twins"].preserving
