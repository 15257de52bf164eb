"""GLM-4: a norm before and after each branch; half of a head's channels turn, in interleaved pairs; fused gate|up."""

from growformer.algebra import Attention, Norm, Rotary, replace
from growformer.families.mistral import MISTRAL

GLM4 = replace(
    MISTRAL,
    name="glm4",
    model_types=("glm4",),
    architectures=("Glm4ForCausalLM", "Glm4Model", "Glm4ForSequenceClassification", "Glm4ForTokenClassification"),
    tensors={
        "model.embed_tokens.weight": "vocab -> hidden",
        "model.layers.{layer}.self_attn.q_proj.weight": "(q: heads key) <- hidden",
        "model.layers.{layer}.self_attn.q_proj.bias": "-> (q: heads key)",
        "model.layers.{layer}.self_attn.k_proj.weight": "(k: kv_heads key) <- hidden",
        "model.layers.{layer}.self_attn.k_proj.bias": "-> (k: kv_heads key)",
        "model.layers.{layer}.self_attn.v_proj.weight": "(v: kv_heads value) <- hidden",
        "model.layers.{layer}.self_attn.v_proj.bias": "-> (v: kv_heads value)",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden <- (heads value)",
        "model.layers.{layer}.mlp.gate_up_proj.weight": "(gate: mlp | up: mlp) <- hidden",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden <- mlp",
        "model.layers.{layer}.input_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.post_attention_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.post_self_attn_layernorm.weight": "post: * hidden",
        "model.layers.{layer}.post_mlp_layernorm.weight": "post: * hidden",
        "model.norm.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={"score.weight": "_ <- hidden", "score.bias": "-> _"},
    norms={
        **MISTRAL.norms,
        "post": Norm("hidden", "rms", eps="rms_norm_eps", output="added"),
    },
    attention=Attention(kv_heads="kv_heads", rotary=Rotary(layout="interleaved", partial="partial_rotary_factor")),
    optional={
        "model.layers.{layer}.self_attn.q_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.k_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.v_proj.bias": "attention_bias",
    },
    per_layer={},
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    neutral=("hidden_act", "max_position_embeddings", "initializer_range", "attention_dropout"),
)
