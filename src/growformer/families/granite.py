"""Granite: Llama whose embedding, branches, scores and logits are multiplied by numbers of the config."""

from growformer.algebra import Attention, Rotary, replace
from growformer.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    name="granite",
    model_types=("granite",),
    architectures=("GraniteForCausalLM", "GraniteModel"),
    attention=Attention(kv_heads="kv_heads", scaled=False, rotary=Rotary()),
    rules=(),
    sample={
        **LLAMA.sample,
        "embedding_multiplier": 12.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
    },
    neutral=(
        *LLAMA.neutral,
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
    ),
)
