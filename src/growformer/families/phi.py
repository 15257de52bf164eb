"""Phi: attention and MLP side by side after one LayerNorm, partial rotary, biases throughout, one on the head too."""

from growformer.algebra import Attention, Family, Field, Norm, Ratio, Rotary, Tied

PHI = Family(
    name="phi",
    model_types=("phi",),
    architectures=("PhiForCausalLM", "PhiModel", "PhiForSequenceClassification", "PhiForTokenClassification"),
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
        "model.layers.{layer}.self_attn.dense.weight": "hidden <- (heads value)",
        "model.layers.{layer}.self_attn.dense.bias": "-> hidden",
        "model.layers.{layer}.mlp.fc1.weight": "mlp <- hidden",
        "model.layers.{layer}.mlp.fc1.bias": "-> mlp",
        "model.layers.{layer}.mlp.fc2.weight": "hidden <- mlp",
        "model.layers.{layer}.mlp.fc2.bias": "-> hidden",
        "model.layers.{layer}.input_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.input_layernorm.bias": "pre: + hidden",
        "model.final_layernorm.weight": "final: * hidden",
        "model.final_layernorm.bias": "final: + hidden",
        "lm_head.weight": "vocab <- hidden",
        "lm_head.bias": "-> (odds: vocab)",
    },
    tasks={"score.weight": "_ <- hidden", "score.bias": "-> _"},
    norms={
        "pre": Norm("hidden", "layer", eps="layer_norm_eps"),
        "final": Norm("hidden", "layer", eps="layer_norm_eps"),
    },
    attention=Attention(kv_heads="kv_heads", rotary=Rotary(partial="partial_rotary_factor")),
    tied=Tied("lm_head.weight", "model.embed_tokens.weight", norm="final"),
    uneven=("lm_head.bias",),
    prefix="model.",
    drop=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    when=(
        (
            # The class sizes these norms by hidden_size / num_attention_heads, whatever head_dim says.
            {"qk_layernorm": True},
            {
                "axes": {
                    "key": Ratio("hidden_size", "num_attention_heads"),
                    "value": Ratio("hidden_size", "num_attention_heads"),
                },
                "tensors": {
                    "model.layers.{layer}.self_attn.q_layernorm.weight": "q: * key",
                    "model.layers.{layer}.self_attn.q_layernorm.bias": "q: + key",
                    "model.layers.{layer}.self_attn.k_layernorm.weight": "k: * key",
                    "model.layers.{layer}.self_attn.k_layernorm.bias": "k: + key",
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
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-3,
    },
    activations={"mlp": "hidden_act"},
    neutral=(
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "resid_pdrop",
        "embd_pdrop",
        "attention_dropout",
        "qk_layernorm",
    ),
)
