"""Cohere2: Cohere with sliding windows in some layers; only those turn queries and keys by position."""

from growformer.algebra import replace
from growformer.families.cohere import COHERE

COHERE2 = replace(
    COHERE,
    name="cohere2",
    model_types=("cohere2",),
    architectures=("Cohere2ForCausalLM", "Cohere2Model"),
    per_layer={"layer_types": "each"},
    when=(),
    sample={
        **COHERE.sample,
        "num_hidden_layers": 5,
        "sliding_window": 6,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
    },
    neutral=(
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "attention_dropout",
        "logit_scale",
        "sliding_window",
    ),
)
