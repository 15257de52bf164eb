"""Growth of an adapter's rank in a live run: a model with LoRA adapters of PEFT, and the optimizer that trains them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from growformer.errors import RequestError
from growformer.optim.rates import inner_optimizer
from growformer.optim.tables import Pace
from growformer.planning import Plan
from growformer.planning.adapters import PREFIX, pairs_of, rank_plan
from growformer.training.changes import Changes
from growformer.training.live import Trained
from growformer.training.ranks import RankGraft

_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def adapted(model: Any) -> bool:
    """Whether PEFT has put adapters into a model."""
    return isinstance(getattr(_bare(model), "peft_config", None), dict)


def _bare(model: Any) -> Any:
    """The model within what torch.compile put around it."""
    return getattr(model, "_orig_mod", model)


def grow_adapter(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    *,
    r: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    adapter_name: str | None = None,
    seed: int = 0,
    pace: Pace | None = None,
) -> Plan:
    """Grow an adapter's rank in place, with what trains it; if anything fails, all is as it was.

    Args:
        model: a PeftModel, or a model of transformers with adapters, between two steps.
        optimizer: over its parameters, or several that share them.
        r, rank_pattern: the new ranks; see `rank_plan`.
        adapter_name: which; None: the one there is.
        seed: of the draws, which are those of the saved adapter's growth.
        pace: how new and old entries learn afterwards.

    Returns:
        The plan that was run.

    Raises:
        RequestError, SourceError: see `rank_plan`; or the model, the optimizer or the moment is none in which growth is
            possible.
    """
    graft = AdapterGraft(_bare(model), adapter_name, r, rank_pattern, seed)
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
    trained = [Trained(inner_optimizer(each), graft.ranks, pace or Pace()) for each in optimizers]
    graft.ranks.require_swappable()
    with Changes() as changes, torch.no_grad():
        graft.commit(changes)
        for one in trained:
            one.commit(changes)
    return graft.plan


class AdapterGraft:
    """All that a model needs for one of its adapters to grow, built beforehand.

    Args:
        model: that has the adapter, without wrappers of torch.compile.
        adapter_name, r, rank_pattern, seed: see `grow_adapter`.

    Attributes:
        plan: by the names that PEFT would save the adapter's tensors under.
        ranks: the adapter's parameters.
    """

    def __init__(
        self,
        model: Any,
        adapter_name: str | None,
        r: int | None,
        rank_pattern: Mapping[str, int] | None,
        seed: int,
    ) -> None:
        self.model = model
        self.adapter = _chosen(model, adapter_name)
        self.layers = _layers(model, self.adapter)
        named = {id(p): name for name, p in model.named_parameters()}
        held: dict[str, tuple[str, torch.nn.Parameter]] = {}
        for module, layer in self.layers.items():
            for saved, parameter in _parameters(layer, self.adapter):
                held[f"{PREFIX}{module}.{saved}"] = (named[id(parameter)], parameter)
        if len({name for name, _ in held.values()}) != len(held):
            raise RequestError(f"adapter {self.adapter!r} has parameters that several modules share; they cannot grow")
        shapes = {name: tuple(parameter.shape) for name, (_, parameter) in held.items()}
        config = _config(model.peft_config[self.adapter])
        self.pairs = pairs_of(config, shapes)
        self._require_as_said()
        self.plan = rank_plan(config, shapes, r, rank_pattern, seed)
        self.ranks = RankGraft(self.plan, held)

    def _require_as_said(self) -> None:
        for module, pair in self.pairs.items():
            layer = self.layers[module]
            if layer.merged:
                raise RequestError(f"{module}: the adapter is merged into its base: unmerge_adapter() first")
            said = (layer.r[self.adapter], layer.lora_alpha[self.adapter])
            if said != (pair.rank, pair.alpha):
                raise RequestError(
                    f"{module} has r and lora_alpha {said}, and {(pair.rank, pair.alpha)} by the adapter's config"
                )

    def commit(self, changes: Changes) -> None:
        """Put everything in place. A module's scale is left as it is: rank and alpha change so that it is theirs."""
        grown = pairs_of(self.plan.target_config, {t.name: t.shape for t in self.plan.tensors})
        for module, layer in self.layers.items():
            changes.put(layer.r, self.adapter, grown[module].rank)
            changes.put(layer.lora_alpha, self.adapter, grown[module].alpha)
            if self.adapter in layer.lora_A:
                changes.put(vars(layer.lora_A[self.adapter]), "out_features", grown[module].rank)
                changes.put(vars(layer.lora_B[self.adapter]), "in_features", grown[module].rank)
        config = vars(self.model.peft_config[self.adapter])
        for field in _FIELDS:
            changes.put(config, field, self.plan.target_config[field])
        self.ranks.commit(changes)


def _chosen(model: Any, adapter_name: str | None) -> str:
    names = list(model.peft_config)
    if adapter_name is None and len(names) == 1:
        return str(names[0])
    if adapter_name is None or adapter_name not in names:
        asked = "several adapters" if adapter_name is None else f"no adapter {adapter_name!r}"
        raise RequestError(f"the model has {asked}; say which grows: adapter_name={' or '.join(map(repr, names))}")
    return adapter_name


def _layers(model: Any, adapter: str) -> dict[str, Any]:
    """The modules that have the adapter, by their names in the base model."""
    # PEFT is optional, and loaded where a model has its adapters.
    lora = sys.modules.get("peft.tuners.lora")
    found = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if lora is not None and isinstance(module, lora.LoraLayer) and adapter in module.r
    }
    if not found:
        kind = str(model.peft_config[adapter].peft_type).removeprefix("PeftType.")
        raise RequestError(f"adapter {adapter!r} is of type {kind}; those of type LORA can grow")
    return found


def _parameters(layer: Any, adapter: str) -> list[tuple[str, torch.nn.Parameter]]:
    """A, B and B's bias of one module, by the ends of the names that PEFT saves them under."""
    if adapter in layer.lora_embedding_A:
        return [(end, getattr(layer, end)[adapter]) for end in ("lora_embedding_A", "lora_embedding_B")]
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    bias = [] if b.bias is None else [("lora_B.bias", b.bias)]
    return [("lora_A.weight", a.weight), ("lora_B.weight", b.weight), *bias]


def _config(config: Any) -> dict[str, Any]:
    """What adapter_config.json would hold."""
    return {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in config.to_dict().items()
        if name != "runtime_config"  # is not saved, and says nothing of the function
    }
