"""Factorised training: every weight between layers begins as a product of small rank, grows in rank, and ends dense.

InRank (Zhao et al., arXiv 2306.11250) trains W = U V, with U [output, rank] and V [rank, input], and lets the rank
grow: the updates of a wide network are of a rank that rises slowly, and early steps then cost r (out + in) instead of
out in. Here a growth keeps what the model computes: the rank is an axis that V writes and U reads, closed at its
readers. At r (out + in) >= out in, the full-rank equivalent, a product costs what the dense weight costs, and becomes
it. The first product is the part of the drawn weight with the largest singular values, its root on either side (Khodak
et al., arXiv 2105.01029), so that both factors have the same scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from growformer.algebra import TensorPattern
from growformer.errors import ChangedError, RequestError
from growformer.optim.rates import inner_optimizer, rates_of
from growformer.optim.rules import rule_of
from growformer.optim.state import first_state
from growformer.optim.tables import Pace
from growformer.planning import Plan
from growformer.planning.adapters import along_rank, lift
from growformer.proof.bar import BAR
from growformer.training.changes import Changes
from growformer.training.live import Trained
from growformer.training.ranks import RankGraft
from growformer.training.rest import require_at_rest

_V, _U = TensorPattern.parse("rank <- input"), TensorPattern.parse("output <- rank")


class Factorised(torch.nn.Module):
    """A linear module whose weight is a product.

    Args:
        dense: the module that it stands for; it loses its weight, and gets one again when the product becomes dense.
        u: [output, rank].
        v: [rank, input].

    Attributes:
        bias: of the dense module, or None.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, dense: torch.nn.Module, u: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__()
        self.u = torch.nn.Parameter(u)
        self.v = torch.nn.Parameter(v)
        self.register_parameter("bias", dense._parameters["bias"])
        self.training = dense.training
        dense.register_parameter("weight", None)
        self._dense = (dense,)  # in a tuple, so that its bias is no parameter twice

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., input] -> [..., output]."""
        return functional.linear(functional.linear(x, self.v), self.u, self.bias)

    @property
    def dense_module(self) -> torch.nn.Module:
        """The module that it stands for."""
        return self._dense[0]

    def product(self) -> torch.Tensor:
        """The weight [output, input], multiplied in float64 and rounded once."""
        return (self.u.detach().double() @ self.v.detach().double()).to(self.u.dtype)

    def dense(self) -> tuple[torch.nn.Module, torch.nn.Parameter]:
        """The module that it stands for, and the weight that is its own again."""
        module = self._dense[0]
        weight = self.product()
        return module, torch.nn.Parameter(weight if isinstance(module, torch.nn.Linear) else weight.T.contiguous())


def matrix(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear module, as [output, input]."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def _leading(whole: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a matrix with the largest singular values, as two factors of the same scale."""
    left, values, right = torch.linalg.svd(whole.detach().double(), full_matrices=False)
    root = values[:rank].sqrt()
    u, v = left[:, :rank] * root, root[:, None] * right[:rank]
    return u.to(whole.dtype).contiguous(), v.to(whole.dtype).contiguous()


def fewer(rank: int, outputs: int, inputs: int) -> int:
    """How many entries a product of this rank has fewer than the dense weight."""
    return outputs * inputs - rank * (outputs + inputs)


def is_full(rank: int, outputs: int, inputs: int) -> bool:
    """Whether a product of this rank has as many entries as the dense weight."""
    return fewer(rank, outputs, inputs) <= 0


def factorise(model: Any, rank: int) -> list[str]:
    """Make every weight between layers a product of a rank, before an optimizer is made.

    Linear modules are replaced, and those whose dense weight has no more entries than the product are left; so is the
    head. What the model computes changes: it begins as what the products are.

    Args:
        model: a stock model.
        rank: of the products.

    Returns:
        The names of the modules that were replaced.

    Raises:
        RequestError: no rank, no weight to which it applies, or a weight that is zero, whose factors could not learn.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RequestError(f"rank={rank!r}: a rank is a whole number of at least 1")
    linear = {name: model.get_submodule(name) for name in sparable(model, rank)}
    if not linear:
        raise RequestError(f"rank={rank}: no weight between layers is so large that a product of that rank is smaller")
    zero = next((name for name, module in linear.items() if not bool(matrix(module).any())), None)
    if zero is not None:
        raise RequestError(f"{zero} is zero: both factors of it would be, and neither could ever learn")
    put_factors(model, {name: _leading(matrix(module), rank) for name, module in linear.items()})
    return list(linear)


def sparable(model: Any, rank: int) -> dict[str, tuple[int, int]]:
    """Shapes [output, input] of the weights of a stock model that a product of a rank is smaller than, by module."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    shapes = {
        name: matrix(module).shape
        for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and module is not head
    }
    return {name: (out, into) for name, (out, into) in shapes.items() if not is_full(rank, out, into)}


def put_factors(model: torch.nn.Module, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Replace linear modules of a stock model by products with these factors (u, v), by the modules' names."""
    for name, (u, v) in factors.items():
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = Factorised(model.get_submodule(name), u, v)


def products(model: torch.nn.Module) -> dict[str, Factorised]:
    """The modules of a model whose weights are products, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factorised)}


def factors_of(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What `put_factors` takes."""
    return {name: (layer.u.detach(), layer.v.detach()) for name, layer in products(model).items()}


def spared(model: torch.nn.Module) -> int:
    """FLOPs of a token, forward and backward, that products spare: 6 (out in - r (out + in)) for each."""
    return sum(6 * fewer(layer.rank, layer.u.shape[0], layer.v.shape[1]) for layer in products(model).values())


@contextmanager
def as_dense(model: torch.nn.Module) -> Iterator[None]:
    """Within it every product is the dense module that it stands for, so that a stock model can be written."""
    layers = products(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        module, weight = layer.dense()
        module.register_parameter("weight", weight)
        module.register_parameter("bias", layer.bias)
        model.get_submodule(parent)._modules[child] = module
    try:
        yield
    finally:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = layer
            layer.dense_module.register_parameter("weight", None)


def grow_rank(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    rank: int | None,
    *,
    seed: int = 0,
    warmup: int = 0,
) -> tuple[list[str], list[str]]:
    """Grow the rank of every product in place, with the optimizer; products of full rank become dense.

    The model computes what it did. Moments of the factors stay, and new entries have none. A weight that becomes dense
    begins anew in its optimizer, in the place of its first factor: what Adam knows of the factors' gradients, U' G and
    G V', does not tell G.

    Args:
        model: after `factorise`, between two steps.
        optimizer: over its parameters, or several.
        rank: the new one; None: every product becomes dense.
        seed: of the draws.
        warmup: steps over which the learning rate of new entries rises from 0.

    Returns:
        The names of the modules that grew, and of those that became dense.

    Raises:
        RequestError: there is no product; the rank is none, or not larger; or the model is in the middle of a step.
        ChangedError: a product is not what it was; all is as before.
    """
    layers = products(model)
    if not layers:
        raise RequestError(
            "the model has no factorised weight: growformer.training.factorised.factorise(model, rank=8)"
        )
    growing: dict[str, Factorised] = {}
    full: dict[str, Factorised] = {}
    for name, layer in layers.items():
        sizes = (layer.u.shape[0], layer.v.shape[1])
        (full if rank is None or is_full(rank, *sizes) else growing)[name] = layer
        if rank is not None and rank <= layer.rank:
            raise RequestError(f"rank={rank}: {name} has rank {layer.rank} already, and ranks only grow")
    require_at_rest({f"{name}.{x}": getattr(layer, x) for name, layer in full.items() for x in ("u", "v")})
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
    inner = [inner_optimizer(each) for each in optimizers]
    graft = RankGraft(_plan(growing, rank or 0, seed), _held(growing)) if growing else None
    trained = [Trained(each, graft, Pace(warmup=warmup)) for each in inner] if graft is not None else []
    dense = {name: layer.dense() for name, layer in full.items()}
    before = {name: layer.u.detach().double() @ layer.v.detach().double() for name, layer in growing.items()}
    if graft is not None:
        graft.require_swappable()
    with Changes() as changes, torch.no_grad():
        if graft is not None:
            graft.commit(changes)
        for one in trained:
            one.commit(changes)
        for name, (module, weight) in dense.items():
            layer, (parent, _, child) = full[name], name.rpartition(".")
            weight.requires_grad_(layer.u.requires_grad)
            changes.put(module._parameters, "weight", weight)
            changes.put(module._parameters, "bias", layer.bias)
            changes.put(vars(module), "training", layer.training)
            changes.put(model.get_submodule(parent)._modules, child, module)
            for each in inner:
                _replace(changes, each, layer, weight, f"{name}.weight")
        for name, layer in growing.items():
            apart = float((layer.u.double() @ layer.v.double() - before[name]).abs().max() / before[name].abs().max())
            if not apart <= BAR:
                raise ChangedError(f"{name}: its product moved by {apart:.1e} under a growth in rank, allowed {BAR:g}")
    return list(growing), list(full)


def _held(layers: dict[str, Factorised]) -> dict[str, tuple[str, torch.nn.Parameter]]:
    return {f"{name}.{x}": (f"{name}.{x}", getattr(layer, x)) for name, layer in layers.items() for x in ("u", "v")}


def _plan(layers: dict[str, Factorised], rank: int, seed: int) -> Plan:
    tensors = []
    for name, layer in layers.items():
        grown = lift(layer.rank, rank)
        tensors.append(along_rank(f"{name}.v", _V, tuple(layer.v.shape), grown, "{module}.v"))
        tensors.append(along_rank(f"{name}.u", _U, tuple(layer.u.shape), grown, "{module}.u"))
    return Plan(
        family="factorised",
        method="rank",
        seed=seed,
        request={"rank": rank},
        moved=(),
        source_config={},
        target_config={},
        tensors=tuple(tensors),
    )


def _replace(
    changes: Changes, optimizer: torch.optim.Optimizer, layer: Factorised, weight: torch.nn.Parameter, name: str
) -> None:
    """Put a dense weight where its first factor was among an optimizer's groups, and forget both factors."""
    rates = rates_of(optimizer)
    for group in optimizer.param_groups:
        members = list(group["params"])
        kept = [i for i, p in enumerate(members) if p is not layer.v]
        if not any(p is layer.u for p in members):
            continue
        changes.relist(group["params"], [weight if members[i] is layer.u else members[i] for i in kept])
        if group.get("param_names"):
            said = list(group["param_names"])
            changes.relist(group["param_names"], [name if members[i] is layer.u else said[i] for i in kept])
        state = first_state(rule_of(optimizer), weight, group)
        if state:
            changes.put(optimizer.state, weight, state)
        changes.put(rates.names, weight, name)
    for factor in (layer.u, layer.v):
        for table in (optimizer.state, rates.tables, rates.names):
            changes.drop(table, factor)
