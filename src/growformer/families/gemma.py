"""Gemma: gains are 1 + w, the embedding is multiplied by the square root of the hidden size, and it is tied."""

from fractions import Fraction

from growformer.algebra import Norm, Power, replace
from growformer.families.mistral import MISTRAL

GEMMA = replace(
    MISTRAL,
    name="gemma",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM", "GemmaModel", "GemmaForSequenceClassification", "GemmaForTokenClassification"),
    tensors={
        "model.embed_tokens.weight": "vocab -> (embed: hidden)",
        "model.layers.{layer}.self_attn.q_proj.weight": "(q: heads key) <- hidden",
        "model.layers.{layer}.self_attn.q_proj.bias": "-> (q: heads key)",
        "model.layers.{layer}.self_attn.k_proj.weight": "(k: kv_heads key) <- hidden",
        "model.layers.{layer}.self_attn.k_proj.bias": "-> (k: kv_heads key)",
        "model.layers.{layer}.self_attn.v_proj.weight": "(v: kv_heads value) <- hidden",
        "model.layers.{layer}.self_attn.v_proj.bias": "-> (v: kv_heads value)",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden <- (heads value)",
        "model.layers.{layer}.self_attn.o_proj.bias": "-> hidden",
        "model.layers.{layer}.mlp.gate_proj.weight": "mlp <- hidden",
        "model.layers.{layer}.mlp.up_proj.weight": "mlp <- hidden",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden <- mlp",
        "model.layers.{layer}.input_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.post_attention_layernorm.weight": "pre: * hidden",
        "model.norm.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={"score.weight": "_ <- hidden", "score.bias": "-> _"},
    gates=("model.layers.{layer}.mlp.gate_proj.weight",),
    norms={
        "pre": Norm("hidden", "rms", eps="rms_norm_eps", gain="1+w"),
        "final": Norm("hidden", "rms", eps="rms_norm_eps", gain="1+w"),
    },
    powers={"embed": Power("hidden", Fraction(1, 2))},
    optional={
        "model.layers.{layer}.self_attn.q_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.k_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.v_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.o_proj.bias": "attention_bias",
    },
    per_layer={},
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    neutral=(
        "hidden_act",
        "hidden_activation",
        "max_position_embeddings",
        "initializer_range",
        "attention_dropout",
        "use_bidirectional_attention",
    ),
)
