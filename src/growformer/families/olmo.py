"""OLMo: LayerNorm without gain or shift, whose eps stands in the code."""

from growformer.algebra import Frozen, Norm, replace
from growformer.families.mistral import MISTRAL

OLMO = replace(
    MISTRAL,
    name="olmo",
    model_types=("olmo",),
    architectures=("OlmoForCausalLM", "OlmoModel", "OlmoForSequenceClassification"),
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
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={"score.weight": "_ <- hidden"},
    gates=("model.layers.{layer}.mlp.gate_proj.weight",),
    norms={
        "pre": Norm("hidden", "layer", eps=1e-5, gain=None),
        "final": Norm("hidden", "layer", eps=1e-5, gain=None),
    },
    optional={
        "model.layers.{layer}.self_attn.q_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.k_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.v_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.o_proj.bias": "attention_bias",
    },
    per_layer={},
    # Keys that are clipped cannot be multiplied by what a larger head asks for.
    frozen=(Frozen(("key",), "queries and keys are clipped before their scores", unless={"clip_qkv": None}),),
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    neutral=("hidden_act", "max_position_embeddings", "initializer_range", "attention_dropout"),
)
