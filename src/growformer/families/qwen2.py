"""Qwen2: queries, keys and values have biases, the output has none; the last layers may have a sliding window."""

from growformer.algebra import replace
from growformer.families.mistral import MISTRAL

QWEN2 = replace(
    MISTRAL,
    name="qwen2",
    model_types=("qwen2",),
    architectures=(
        "Qwen2ForCausalLM",
        "Qwen2Model",
        "Qwen2ForSequenceClassification",
        "Qwen2ForTokenClassification",
    ),
    tensors={
        "model.embed_tokens.weight": "vocab -> hidden",
        "model.layers.{layer}.self_attn.q_proj.bias": "-> (q: heads key)",
        "model.layers.{layer}.self_attn.k_proj.bias": "-> (k: kv_heads key)",
        "model.layers.{layer}.self_attn.v_proj.bias": "-> (v: kv_heads value)",
        **MISTRAL.tensors,
    },
    tasks={"score.weight": "_ <- hidden", "score.bias": "-> _"},
    # Readers of the older key take the layers from max_window_layers on to be those with a window.
    per_layer={"layer_types": "each", "max_window_layers": "first"},
    sample={**MISTRAL.sample, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    neutral=(*MISTRAL.neutral, "use_sliding_window"),
)
