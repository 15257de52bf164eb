"""Phi-3: fused q|k|v and gate|up; under longrope the config class ties the head size to hidden_size / heads."""

from growformer.algebra import Attention, Divides, Ratio, Rotary, replace
from growformer.families.mistral import MISTRAL

PHI3 = replace(
    MISTRAL,
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM", "Phi3Model", "Phi3ForSequenceClassification", "Phi3ForTokenClassification"),
    tensors={
        "model.embed_tokens.weight": "vocab -> hidden",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden <- (heads value)",
        "model.layers.{layer}.self_attn.qkv_proj.weight": (
            "(q: heads key | k: kv_heads key | v: kv_heads value) <- hidden"
        ),
        "model.layers.{layer}.mlp.gate_up_proj.weight": "(gate: mlp | up: mlp) <- hidden",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden <- mlp",
        "model.layers.{layer}.input_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.post_attention_layernorm.weight": "pre: * hidden",
        "model.norm.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={"score.weight": "_ <- hidden", "score.bias": "-> _"},
    attention=Attention(
        kv_heads="kv_heads", rotary=Rotary(partial="partial_rotary_factor", steady=("default", "longrope"), inside=())
    ),
    per_layer={},
    when=(
        # The class counts longrope's factors by hidden_size / num_attention_heads, whatever head_dim says.
        (
            {"rope_parameters.rope_type": "longrope"},
            {
                "axes": {
                    "key": Ratio("hidden_size", "num_attention_heads"),
                    "value": Ratio("hidden_size", "num_attention_heads"),
                },
                "rules": (Divides(by="num_attention_heads", over="hidden_size"),),
            },
        ),
    ),
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 32,
        "original_max_position_embeddings": 32,
        "sliding_window": 7,
        "rms_norm_eps": 1e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    neutral=(*MISTRAL.neutral, "original_max_position_embeddings", "resid_pdrop", "embd_pdrop"),
)
