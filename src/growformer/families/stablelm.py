"""StableLM: LayerNorm, a gated MLP, partial rotary; optionally a norm for each head, under a name of its own."""

from growformer.algebra import Attention, Divides, Family, Field, Norm, Ratio, Rotary, Tied

STABLELM = Family(
    name="stablelm",
    model_types=("stablelm",),
    architectures=(
        "StableLmForCausalLM",
        "StableLmModel",
        "StableLmForSequenceClassification",
        "StableLmForTokenClassification",
    ),
    axes={
        "vocab": Field("vocab_size"),
        "hidden": Field("hidden_size"),
        "mlp": Field("intermediate_size"),
        "heads": Field("num_attention_heads"),
        "kv_heads": Field("num_key_value_heads"),
        "key": Ratio("hidden_size", "num_attention_heads"),
        "value": Ratio("hidden_size", "num_attention_heads"),
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
        "model.layers.{layer}.mlp.gate_proj.weight": "mlp <- hidden",
        "model.layers.{layer}.mlp.up_proj.weight": "mlp <- hidden",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden <- mlp",
        "model.layers.{layer}.input_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.input_layernorm.bias": "pre: + hidden",
        "model.layers.{layer}.post_attention_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.post_attention_layernorm.bias": "pre: + hidden",
        "model.norm.weight": "final: * hidden",
        "model.norm.bias": "final: + hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={"score.weight": "_ <- hidden", "score.bias": "-> _"},
    gates=("model.layers.{layer}.mlp.gate_proj.weight",),
    norms={
        "pre": Norm("hidden", "layer", eps="layer_norm_eps"),
        "final": Norm("hidden", "layer", eps="layer_norm_eps"),
    },
    attention=Attention(kv_heads="kv_heads", rotary=Rotary(partial="partial_rotary_factor")),
    tied=Tied("lm_head.weight", "model.embed_tokens.weight", norm="final"),
    optional={
        "model.layers.{layer}.self_attn.q_proj.bias": "use_qkv_bias",
        "model.layers.{layer}.self_attn.k_proj.bias": "use_qkv_bias",
        "model.layers.{layer}.self_attn.v_proj.bias": "use_qkv_bias",
    },
    prefix="model.",
    drop=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    rules=(Divides(by="num_attention_heads", over="hidden_size"),),
    when=(
        (
            {"use_parallel_residual": True},
            {
                "tensors": {
                    "model.layers.{layer}.post_attention_layernorm.weight": None,
                    "model.layers.{layer}.post_attention_layernorm.bias": None,
                }
            },
        ),
        (
            {"qk_layernorm": True},
            {
                "tensors": {
                    "model.layers.{layer}.self_attn.q_layernorm.norms.{heads}.weight": "q: * key",
                    "model.layers.{layer}.self_attn.k_layernorm.norms.{kv_heads}.weight": "k: * key",
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
        "hidden_size": 32,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-3,
    },
    neutral=(
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "hidden_dropout",
        "attention_dropout",
        "use_parallel_residual",
        "qk_layernorm",
    ),
)
