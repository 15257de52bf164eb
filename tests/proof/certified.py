"""Grown models as a certificate is shown them: source, target, receipt, configs. No transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from growformer.algebra import Family
from growformer.api.planned import method_named
from growformer.errors import ChangedError
from growformer.families import FAMILIES
from growformer.planning import apply, make_plan
from growformer.planning.plan import Plan
from growformer.proof.certificate import Certificate, DictTensors, certify

Q_PROJ = "model.layers.{}.self_attn.q_proj.weight"
K_PROJ = Q_PROJ.replace("q_proj", "k_proj")
O_PROJ = Q_PROJ.replace("q_proj", "o_proj")
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "mlp_bias": True,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    **ROPE,
}
QWEN3 = {k: v for k, v in LLAMA.items() if k != "mlp_bias"} | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 37,
    "n_positions": 32,
    "n_embd": 24,
    "n_inner": None,
    "n_head": 4,
    "n_layer": 3,
    "layer_norm_epsilon": 1e-3,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
EVERY = {
    "llama": {
        "hidden_size": 36,
        "intermediate_size": 41,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "num_hidden_layers": 5,
    },
    "qwen3": {"hidden_size": 35, "intermediate_size": 41, "num_attention_heads": 12, "head_dim": 14},
    "gpt2": {"n_embd": 60, "n_head": 6, "n_inner": 130, "n_layer": 5},
}


def make_source(family: Family, config: Mapping[str, Any], dtype: torch.dtype, bias: bool) -> dict[str, Tensor]:
    """Random tensors of the family's shapes; gains about 1."""
    c = config
    if family.name == "gpt2":
        head = c["n_embd"] // c["n_head"]
        sizes = {"vocab": c["vocab_size"], "positions": c["n_positions"], "hidden": c["n_embd"], "mlp": 4 * c["n_embd"]}
        sizes |= {"heads": c["n_head"], "key": head, "value": head, "layer": c["n_layer"]}
    else:
        sizes = {"vocab": c["vocab_size"], "hidden": c["hidden_size"], "mlp": c["intermediate_size"]}
        sizes |= {"heads": c["num_attention_heads"], "kv_heads": c["num_key_value_heads"]}
        sizes |= {"key": c["head_dim"], "value": c["head_dim"], "layer": c["num_hidden_layers"]}
    generator = torch.Generator().manual_seed(7)
    out = {}
    for name, pattern in family.patterns:
        tied = family.tied is not None and name.text == family.tied.head and c["tie_word_embeddings"]
        lacks_bias = not bias or (".mlp." in name.text and not c.get("mlp_bias"))
        if tied or (name.text in family.optional and lacks_bias):
            continue
        shape = [dim.size(lambda a: a.axis if isinstance(a.axis, int) else sizes[a.axis]) for dim in pattern.dims]
        for layer in range(sizes["layer"] if name.axes else 1):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            gain = any(atom.stand == "gain" for atom in pattern.atoms())
            out[name.format({"layer": layer})] = (1 + 0.3 * x if gain else 0.3 * x).to(dtype)
    return out


@dataclass
class Growth:
    """A grown model as a certificate is shown it; tests break it."""

    family: Family
    axes: dict[str, Any]
    layers: Any
    source: dict[str, Tensor]
    target: dict[str, Tensor]
    source_config: dict[str, Any]
    target_config: dict[str, Any]
    source_full: dict[str, Any] | None = None

    def arguments(self) -> tuple[Any, ...]:
        source, target = DictTensors(self.source), DictTensors(self.target)
        return self.family, self.axes, self.layers, source, target, self.source_config, self.target_config

    def certify(self) -> Certificate:
        return certify(*self.arguments(), source_full=self.source_full)

    def times(self, name: str, factor: float) -> None:
        """Multiply a target tensor, as if that had been its factor."""
        self.target[name] = (self.target[name].double() * factor).to(self.target[name].dtype)


def grow_planned(
    name: str,
    request: Mapping[str, int],
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    layers_at: list[int] | None = None,
    method: str = "paper",
) -> tuple[Plan, Growth]:
    """A right growth of random tensors, with the plan it was made by."""
    family, raw = FAMILIES[name], dict(config or {"llama": LLAMA, "qwen3": QWEN3, "gpt2": GPT2}[name])
    source = make_source(family, raw, dtype, bias)
    shapes = {key: tuple(x.shape) for key, x in source.items()}
    plan = make_plan(family, method_named(method), raw, raw, raw, shapes, request, layers_at=layers_at)
    told, target = copy.deepcopy(plan.to_json()), copy.deepcopy(dict(plan.target_config))
    return plan, Growth(family, told["axes"], told["layers"], source, apply(plan, source), raw, target)


def grow(
    name: str,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    layers_at: list[int] | None = None,
    **request: int,
) -> Growth:
    return grow_planned(name, request, config, dtype, bias, layers_at)[1]


def failing(growth: Growth, *said: str) -> str:
    """Assert that the certificate fails and that one failure says all of this; return it."""
    certificate = growth.certify()
    assert not certificate.ok
    hits = [text for text in certificate.failures if all(word in text for word in said)]
    assert hits, f"{said} not in {certificate.failures}"
    with pytest.raises(ChangedError, match="not the source's function"):
        certificate.raise_if_failed()
    return hits[0]


def move_key(growth: Growth, order: list[int]) -> None:
    """Put the new channels of every query and key head into another order."""
    for name, x in growth.target.items():
        if ".q_proj." in name or ".k_proj." in name:
            heads = x.reshape(-1, len(order), *x.shape[1:])
            growth.target[name] = heads[:, order].reshape(x.shape).contiguous()
