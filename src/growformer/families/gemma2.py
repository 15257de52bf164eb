"""Gemma 2: Gemma with a norm before and after each branch; scores are divided by a number of the config, and capped."""

from growformer.algebra import Attention, Divides, Norm, Rotary, replace
from growformer.families.gemma import GEMMA

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    model_types=("gemma2",),
    architectures=(
        "Gemma2ForCausalLM",
        "Gemma2Model",
        "Gemma2ForSequenceClassification",
        "Gemma2ForTokenClassification",
    ),
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
        "model.layers.{layer}.post_attention_layernorm.weight": "post: * hidden",
        "model.layers.{layer}.pre_feedforward_layernorm.weight": "pre: * hidden",
        "model.layers.{layer}.post_feedforward_layernorm.weight": "post: * hidden",
        "model.norm.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    gates=("model.layers.{layer}.mlp.gate_proj.weight",),
    norms={
        **GEMMA.norms,
        "post": Norm("hidden", "rms", eps="rms_norm_eps", gain="1+w", output="added"),
    },
    # query_pre_attn_scalar stands where the head size would.
    attention=Attention(kv_heads="kv_heads", scaled=False, rotary=Rotary()),
    per_layer={"layer_types": "each"},
    rules=(Divides(by="num_attention_heads", over="hidden_size"),),
    sample={
        **GEMMA.sample,
        "num_hidden_layers": 5,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "sliding_window": 7,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    neutral=(
        *GEMMA.neutral,
        "query_pre_attn_scalar",
        "sliding_window",
        "final_logit_softcapping",
        "attn_logit_softcapping",
    ),
)
