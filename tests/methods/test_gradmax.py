"""GradMax: growth is exact, and no other choice of what reads new units gives what writes them a larger gradient."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.errors import RequestError
from growformer.proof.bar import BAR
from growformer.training.gradmax import readers
from tests.training.live_kit import Model, adamw, batch, logits64, model, relative, train

MORE = 5
REQUESTS: dict[str, dict[str, int]] = {
    "llama-tied-bias": {"intermediate_size": 28 + MORE},
    "gpt2": {"n_inner": 96 + MORE},
}
WRITERS = {"llama-tied-bias": "up_proj.weight", "gpt2": "c_fc.weight"}
READERS = {"llama-tied-bias": "down_proj.weight", "gpt2": "mlp.c_proj.weight"}


def loss_of(of: Model, seed: int = 0) -> Callable[[], torch.Tensor]:
    tokens = batch(seed)
    return lambda: of(input_ids=tokens, labels=tokens, use_cache=False).loss


def random_columns(size: int, count: int, seed: int) -> torch.Tensor:
    """Columns of length 1 at right angles."""
    drawn = torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0]


def test_by_hand() -> None:
    """One token, x = (1, 2), delta = (3, 0, 4): G = delta x^T has one direction, delta / 5, and the value 5 sqrt(5)."""
    x, delta = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0, 4.0]])
    column = readers(x, delta, torch.ones(1, 1), 1, 0.5)
    assert float((column.abs()[:, 0] - 0.5 * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)).abs().max()) < BAR
    gradient = column.T @ delta.double().T @ x.double()
    assert abs(float(gradient.norm()) / (0.5 * 5 * 5**0.5) - 1) < BAR


def test_of_linear_units_the_gradient_is_that_of_the_largest_singular_values() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 7, dtype=torch.float64, generator=generator)
    delta = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    best = readers(x, delta, torch.ones(40, 1), 3, 2.0)
    assert float((best.T @ best - 4 * torch.eye(3)).abs().max()) < BAR
    values = torch.linalg.svdvals(delta.T @ x)
    assert abs(float((best.T @ delta.T @ x).norm() / (2 * values[:3].square().sum().sqrt())) - 1) < BAR
    for seed in range(200):
        other = 2 * random_columns(6, 3, seed)
        assert float((other.T @ delta.T @ x).norm()) <= float((best.T @ delta.T @ x).norm())
    # More units than directions: they come again.
    many = readers(x, delta, torch.ones(40, 1), 8, 2.0)
    assert torch.equal(many[:, 6:], many[:, :2]) and float((many[:, :3] - best).abs().max()) < BAR
    # As many slopes of 1 are no gate at all.
    gated = readers(x, delta, torch.ones(40, 8), 8, 2.0)
    assert float(((gated * many).sum(0).abs() - 4).abs().max()) < BAR
    slopes = torch.rand(40, 3, dtype=torch.float64, generator=generator)
    first = readers(x, delta, slopes, 3, 2.0)[:, :1]
    matrix = (delta * slopes[:, :1]).T @ x
    assert abs(float((first.T @ matrix).norm() / (2 * torch.linalg.svdvals(matrix)[0])) - 1) < BAR


def writers_gradient(
    grown: Model, kind: str, old: int, columns: Callable[[torch.Tensor], torch.Tensor] | None
) -> float:
    """The norm of the first gradient of what writes new units, where `columns` may put others in their place."""
    params = dict(grown.named_parameters())
    with torch.no_grad():
        for name, x in params.items():
            if name.endswith(READERS[kind]) and columns is not None:
                new = x[:, old:] if kind != "gpt2" else x[old:].T
                new.copy_(columns(new))
    loss = loss_of(grown)()
    names = [name for name in params if name.endswith(WRITERS[kind])]
    found = torch.autograd.grad(loss, [params[name] for name in names])
    return sum(float((g[old:] if kind != "gpt2" else g[:, old:]).square().sum()) for g in found) ** 0.5


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_growth_is_exact_and_its_first_gradient_the_largest(kind: str) -> None:
    of = model(kind)
    before = logits64(of)
    grown = gf.expand(of, method="gradmax", closure=loss_of(of), **REQUESTS[kind])
    assert relative(before, logits64(grown)) < BAR
    old = grown.growformer_plan.axes["mlp"]["old"]
    for name, x in grown.named_parameters():
        if name.endswith(READERS[kind]):
            whole = x.detach() if kind != "gpt2" else x.detach().T
            length = whole[:, :old].norm(dim=0).mean()
            assert float((whole[:, old:].norm(dim=0) / length - 1).abs().max()) < BAR
        if name.endswith(WRITERS[kind]):
            assert not bool((x[old:] if kind != "gpt2" else x[:, old:]).any())
    best = writers_gradient(grown, kind, old, None)
    for seed in range(6):
        other = writers_gradient(
            grown, kind, old, lambda new, seed=seed: random_columns(len(new), MORE, seed) * new.norm(dim=0)
        )
        assert best > 1.2 * other
    assert all(x.grad is None for x in of.parameters())


def test_in_a_live_run_it_is_the_same_and_learns() -> None:
    of = model("llama-tied-bias")
    optimizer, mean = adamw(of), copy.deepcopy(of)
    with torch.no_grad():
        mean.model.layers[0].mlp.down_proj.weight *= 2
    wanted = gf.expand(of, method="gradmax", closure=loss_of(of), **REQUESTS["llama-tied-bias"])
    gf.grow(of, optimizer, method="gradmax", closure=loss_of(of), averages=[mean], **REQUESTS["llama-tied-bias"])
    live = dict(of.named_parameters())
    assert all(torch.equal(x, live[name]) for name, x in wanted.named_parameters())
    fresh, before = gf.new_parameters(of), {name: x.detach().clone() for name, x in live.items()}
    for name, x in mean.named_parameters():
        assert name not in fresh or torch.equal(x[fresh[name]], before[name][fresh[name]])
    train(of, optimizer, range(2))
    assert all(bool((x[fresh[name]] != before[name][fresh[name]]).all()) for name, x in live.items() if name in fresh)


def test_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    of = model("llama-tied-bias")
    loss = loss_of(of)
    mlp: dict[str, Any] = {"intermediate_size": 33}
    with pytest.raises(RequestError, match=r"gradmax takes what new mlp holds from a loss: growformer.grow\(..., clos"):
        gf.grow(of, None, method="gradmax", **mlp)
    with pytest.raises(RequestError, match="gradmax takes what new mlp holds from a loss"):
        gf.expand(of, method="gradmax", **mlp)
    of.save_pretrained(tmp_path / "src")
    with pytest.raises(RequestError, match="a folder has none"):
        gf.expand_checkpoint(tmp_path / "src", tmp_path / "out", method="gradmax", **mlp)
    with pytest.raises(RequestError, match="paper asks no loss of anyone"):
        gf.grow(of, None, closure=loss, **mlp)
    with pytest.raises(RequestError, match=r"gradmax .* says nothing of that"):
        gf.grow(of, None, method="gradmax", closure=loss, hidden_size=36)
    with pytest.raises(RequestError, match=r"mlp grows alone by it, and .*layer.* grow"):
        gf.grow(of, None, method="gradmax,layer=paper", closure=loss, num_hidden_layers=4, **mlp)
    with pytest.raises(RequestError, match="a loss that has a graph"):
        gf.grow(of, None, method="gradmax", closure=lambda: loss().detach(), **mlp)
    with pytest.raises(RequestError, match=r"more than one matrix of one MLP|no one matrix that writes"):
        mixtral = model("mixtral")
        gf.grow(mixtral, None, method="gradmax", closure=loss_of(mixtral), intermediate_size=40)
    relu = model("gpt2")
    for block in relu.transformer.h:
        block.mlp.act = torch.nn.ReLU()
    with pytest.raises(RequestError, match="no slope at zero"):
        gf.expand(relu, method="gradmax", closure=loss_of(relu), n_inner=101)
    assert of.config.intermediate_size == 28 and not any(m._forward_hooks for m in of.modules())
