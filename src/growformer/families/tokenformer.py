"""TokenFormer: every linear map in a layer attends to parameter tokens, which grow by keys of zero and free values.

A token is written by its key (what the input scores) and read by its value. Between the two stands a norm over a sum
of squares, whose length the config states, and a GeLU.
"""

from growformer.algebra import Attention, Family, Field, Norm, Ratio, Rotary, Tied

TOKENFORMER = Family(
    name="tokenformer",
    model_types=("tokenformer",),
    architectures=("TokenFormerForCausalLM", "TokenFormerModel"),
    axes={
        "vocab": Field("vocab_size"),
        "hidden": Field("hidden_size"),
        "qkv_tokens": Field("qkv_tokens"),
        "proj_tokens": Field("proj_tokens"),
        "ffn_tokens": Field("ffn_tokens"),
        "heads": Field("num_attention_heads"),
        "kv_heads": Field("num_key_value_heads", default=Field("num_attention_heads")),
        "key": Field("head_dim", default=Ratio("hidden_size", "num_attention_heads")),
        "value": Field("head_dim", default=Ratio("hidden_size", "num_attention_heads")),
        "layer": Field("num_hidden_layers"),
    },
    tensors={
        "model.embed_tokens.weight": "vocab -> hidden",
        "model.layers.{layer}.input_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.self_attn.q_proj.keys": "qkv_tokens <- hidden",
        "model.layers.{layer}.self_attn.q_proj.values": "qkv_tokens -> (q: heads key)",
        "model.layers.{layer}.self_attn.k_proj.keys": "qkv_tokens <- hidden",
        "model.layers.{layer}.self_attn.k_proj.values": "qkv_tokens -> (k: kv_heads key)",
        "model.layers.{layer}.self_attn.v_proj.keys": "qkv_tokens <- hidden",
        "model.layers.{layer}.self_attn.v_proj.values": "qkv_tokens -> (v: kv_heads value)",
        "model.layers.{layer}.self_attn.o_proj.keys": "proj_tokens <- (heads value)",
        "model.layers.{layer}.self_attn.o_proj.values": "proj_tokens -> hidden",
        "model.layers.{layer}.post_attention_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.mlp.keys": "ffn_tokens <- hidden",
        "model.layers.{layer}.mlp.values": "ffn_tokens -> hidden",
        "model.norm.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    norms={
        "pre": Norm("hidden", "rms", eps="rms_norm_eps"),
        "final": Norm("hidden", "rms", eps="rms_norm_eps"),
        "qkv": Norm("qkv_tokens", "sum", eps="pattention_eps", gain=None, length="qkv_tau"),
        "proj": Norm("proj_tokens", "sum", eps="pattention_eps", gain=None, length="proj_tau"),
        "ffn": Norm("ffn_tokens", "sum", eps="pattention_eps", gain=None, length="ffn_tau"),
    },
    attention=Attention(kv_heads="kv_heads", rotary=Rotary()),
    tied=Tied("lm_head.weight", "model.embed_tokens.weight", norm="final"),
    prefix="model.",
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "qkv_tokens": 20,
        "proj_tokens": 18,
        "ffn_tokens": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-3,
        "pattention_eps": 1e-2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    neutral=("max_position_embeddings", "initializer_range", "attention_dropout"),
)
