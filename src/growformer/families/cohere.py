"""Cohere: attention and MLP side by side after one LayerNorm without shifts; rotary pairs are neighbours."""

from growformer.algebra import Attention, Family, Field, Norm, Ratio, Rotary, Tied

COHERE = Family(
    name="cohere",
    model_types=("cohere",),
    architectures=("CohereForCausalLM", "CohereModel"),
    axes={
        "vocab": Field("vocab_size"),
        "hidden": Field("hidden_size"),
        "mlp": Field("intermediate_size"),
        "heads": Field("num_attention_heads"),
        "kv_heads": Field("num_key_value_heads", default=Field("num_attention_heads")),
        "key": Field("head_dim", default=Ratio("hidden_size", "num_attention_heads")),
        "value": Field("head_dim", default=Ratio("hidden_size", "num_attention_heads")),
        "layer": Field("num_hidden_layers"),
    },
    tensors={
        "model.embed_tokens.weight": "vocab -> hidden",
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
        "model.norm.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    gates=("model.layers.{layer}.mlp.gate_proj.weight",),
    norms={
        "pre": Norm("hidden", "layer", eps="layer_norm_eps"),
        "final": Norm("hidden", "layer", eps="layer_norm_eps"),
    },
    attention=Attention(kv_heads="kv_heads", rotary=Rotary(layout="interleaved")),
    tied=Tied("lm_head.weight", "model.embed_tokens.weight", norm="final"),
    optional={
        "model.layers.{layer}.self_attn.q_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.k_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.v_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.o_proj.bias": "attention_bias",
    },
    prefix="model.",
    drop=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    when=(
        (
            # A norm over each head's channels, with gains for every head.
            {"use_qk_norm": True},
            {
                "tensors": {
                    "model.layers.{layer}.self_attn.q_norm.weight": "q: * heads key",
                    "model.layers.{layer}.self_attn.k_norm.weight": "k: * kv_heads key",
                },
                "norms": {
                    "q": Norm("key", "layer", eps="layer_norm_eps"),
                    "k": Norm("key", "layer", eps="layer_norm_eps"),
                },
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
        "head_dim": 10,
        "logit_scale": 0.5,
        "max_position_embeddings": 32,
        "layer_norm_eps": 1e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    neutral=(
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "attention_dropout",
        "logit_scale",
        "use_qk_norm",
    ),
)
