"""SmolLM3: Llama in which some layers have no rotary positions; the embedding is tied by default."""

from growformer.algebra import replace
from growformer.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    model_types=("smollm3",),
    architectures=(
        "SmolLM3ForCausalLM",
        "SmolLM3Model",
        "SmolLM3ForSequenceClassification",
        "SmolLM3ForTokenClassification",
    ),
    tasks={"score.weight": "_ <- hidden", "score.bias": "-> _"},
    per_layer={"no_rope_layers": "each", "layer_types": "each"},
    rules=(),
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 32,
        "no_rope_layers": [1, 0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 7,
        "rms_norm_eps": 1e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    neutral=(
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "pretraining_tp",
        "attention_dropout",
        "no_rope_layer_interval",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
    ),
)
