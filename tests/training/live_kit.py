"""Tiny models in the middle of their training, for the tests of growth in a live run."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from growformer.api.planned import on_disk
from growformer.proof.float64 import build64_from, true_float64
from tests.tiny import LLAMA, build

VOCAB = 37
LR = 1e-2
MIXTRAL: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"},
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}

Model = transformers.PreTrainedModel
Optimizer = torch.optim.Optimizer

# Sizes along each axis alone, and all together, for each of the models.
GROWTHS: dict[str, dict[str, dict[str, int]]] = {
    "llama-tied-bias": {
        "mlp": {"intermediate_size": 40},
        "heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
        "head_dim": {"head_dim": 14},
        "hidden": {"hidden_size": 36},
        "layers": {"num_hidden_layers": 5},
    },
    "qwen3": {
        "mlp": {"intermediate_size": 40},
        "heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
        "head_dim": {"head_dim": 20},
        "hidden": {"hidden_size": 36},
        "layers": {"num_hidden_layers": 5},
    },
    "gpt2": {
        "mlp": {"n_inner": 120},
        "heads": {"n_head": 6, "n_embd": 36},
        "layers": {"n_layer": 5},
    },
    "mixtral": {
        "mlp": {"intermediate_size": 40},
        "heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
        "head_dim": {"head_dim": 14},
        "hidden": {"hidden_size": 36},
        "layers": {"num_hidden_layers": 5},
        "experts": {"num_local_experts": 6},
    },
}
for _growths in GROWTHS.values():
    _growths["all"] = {name: size for request in _growths.values() for name, size in request.items()}
# Experts with half of their width cannot have a larger one in the same request.
GROWTHS["mixtral"]["split"] = {"num_local_experts": 6, "num_experts_per_tok": 4, "intermediate_size": 14}
GROWTHS["mixtral"]["split, hidden"] = {**GROWTHS["mixtral"]["split"], "hidden_size": 36}


def model(kind: str, seed: int = 0) -> Model:
    """A tiny model with every parameter random, in float64, without dropout, in training mode."""
    if kind == "mixtral":
        config = transformers.MixtralConfig(**MIXTRAL)
        config._experts_implementation = "eager"  # grouped products know no float64
        made = transformers.MixtralForCausalLM(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + drawn if "norm" in name else drawn)
    else:
        drops = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}
        made = build(kind, seed, **drops)
    return made.double().train()


def batch(seed: int, size: int = 3, length: int = 12) -> torch.Tensor:
    """Token ids [sequence, position]."""
    return torch.randint(0, VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))


def train(of: Model, optimizer: Optimizer, steps: range, then: Callable[[int], None] | None = None) -> list[float]:
    """A step on the batch of each number; the losses before each."""
    losses = []
    for number in steps:
        tokens = batch(number)
        loss = of(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        of.zero_grad()
        losses.append(float(loss.detach()))
        if then is not None:
            then(number)
    return losses


def adamw(of: Model, **options: Any) -> torch.optim.AdamW:
    """AdamW whose gains and biases are in a group without weight decay."""
    wide = [x for x in of.parameters() if x.dim() > 1]
    flat = [x for x in of.parameters() if x.dim() <= 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **{"lr": LR, **options})


def logits64(of: Model) -> torch.Tensor:
    """The logits of a model's weights in true float64, with rotary tables computed in it."""
    config = of.config.to_dict()
    config["architectures"] = [type(of).__name__]
    rebuilt = build64_from(config, {name: x.detach() for name, x in on_disk(of).items()})
    with true_float64():
        return rebuilt(input_ids=batch(99)).logits.detach()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """max|a-b| / max|a|."""
    return float((one - other).abs().max() / one.abs().max())


def named_state(of: Model, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Copies of an optimizer's state, by parameter name."""
    return {name: copy.deepcopy(dict(optimizer.state.get(x, {}))) for name, x in of.named_parameters()}


@contextmanager
def wide() -> Iterator[None]:
    """Everything that is made within is float64, for rotary tables and norms would round to float32."""
    with true_float64(strict=False):
        yield
