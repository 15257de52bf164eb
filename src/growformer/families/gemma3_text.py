"""Gemma 3, the text model: Gemma 2 with a norm on each query and key head, and rotary bases by layer type."""

from growformer.algebra import Norm, replace
from growformer.families.gemma2 import GEMMA2

GEMMA3_TEXT = replace(
    GEMMA2,
    name="gemma3_text",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextForSequenceClassification"),
    tensors={
        "model.embed_tokens.weight": "vocab -> (embed: hidden)",
        "model.layers.{layer}.self_attn.q_norm.weight": "q: * key",
        "model.layers.{layer}.self_attn.k_norm.weight": "k: * key",
        **GEMMA2.tensors,
    },
    tasks={"score.weight": "_ <- hidden"},
    norms={
        **GEMMA2.norms,
        "q": Norm("key", "rms", eps="rms_norm_eps", gain="1+w"),
        "k": Norm("key", "rms", eps="rms_norm_eps", gain="1+w"),
    },
    neutral=(*GEMMA2.neutral, "sliding_window_pattern", "_sliding_window_pattern"),
)
