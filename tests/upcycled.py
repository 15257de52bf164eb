"""Dense models that became mixtures of experts, in memory: what a certificate is shown, and outputs to compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import build

from growformer import plan
from growformer.api.becoming import class_defaults
from growformer.api.planned import on_disk
from growformer.checkpoint.stock import full_config
from growformer.families import BECOMING, FAMILIES
from growformer.planning import Plan, apply
from growformer.proof.certificate import Certificate, DictTensors, certify
from growformer.proof.difference import Difference, compare_outputs, worst
from growformer.proof.float64 import build64_from
from growformer.proof.functional import outputs64
from growformer.proof.origin import Origin
from growformer.proof.pullback import PulledBack

BECOMES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "mistral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3},
    "qwen2": {
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 18,
    },
    "qwen3": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3},
}
"""What each dense family is asked to become; sizes pairwise different."""

ELSE: dict[str, Any] = {"mistral": {"sliding_window": 7}, "llama": {"tie_word_embeddings": True}}
"""Config fields of the sources beside Llama's."""


@dataclass
class Upcycled:
    """One growth: its plan, the tensors of both sides by name on disk, and what a certificate is told of it."""

    plan: Plan
    source: dict[str, torch.Tensor]
    target: dict[str, torch.Tensor]
    source_config: dict[str, Any]
    target_config: dict[str, Any]
    axes: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """The arguments of `certify`."""
        becoming = BECOMING[self.plan.source_family, self.plan.family]
        family = FAMILIES[self.plan.family]
        return {
            "family": family,
            "axes": self.axes,
            "layers": self.plan.layers,
            "source": DictTensors(self.source),
            "target": DictTensors(self.target),
            "source_config": self.source_config,
            "target_config": self.target_config,
            "source_full": full_config(self.source_config)[0],
            "origin": Origin(becoming, class_defaults(family)),
        }

    def certificate(self) -> Certificate:
        return certify(**self.told())

    def difference(self) -> Difference:
        """Of the two stock models, in true float64."""
        tokens = torch.randint(37, (3, 24), generator=torch.Generator().manual_seed(5))
        wide = [{name: x.double() for name, x in side.items()} for side in (self.source, self.target)]
        a, b = (
            outputs64(lambda config=config, tensors=tensors: build64_from(config, tensors), tokens)  # type: ignore[misc]
            for config, tensors in zip((self.source_config, self.target_config), wide, strict=True)
        )
        return worst(compare_outputs(a, b))

    def pulled(self) -> dict[str, torch.Tensor]:
        """The dense model that can be read back from the mixture."""
        back = PulledBack(**self.told())
        return {name: back.read(name) for name in back.names}


def upcycle(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **request: Any) -> Upcycled:
    """A tiny random model of a dense family, grown into its mixture of experts."""
    model = build(kind, **ELSE.get(kind, {})).to(dtype)
    made = plan(model, seed=seed, **(BECOMES[kind] | request))
    source = {name: x.detach().clone() for name, x in on_disk(model).items()}
    target = apply(made, source)
    configs = copy.deepcopy((dict(made.source_config), dict(made.target_config)))
    return Upcycled(made, source, target, *configs, copy.deepcopy(dict(made.axes)))
