"""Falcon: fused q|k|v in three layouts, blocks side by side after one or two LayerNorms or in turn, rotary or ALiBi."""

from growformer.algebra import Attention, Divides, Family, Field, Frozen, Norm, Ratio, Rotary, Tied, Times

FALCON = Family(
    name="falcon",
    model_types=("falcon",),
    architectures=(
        "FalconForCausalLM",
        "FalconModel",
        "FalconForSequenceClassification",
        "FalconForTokenClassification",
        "FalconForQuestionAnswering",
    ),
    axes={
        "vocab": Field("vocab_size"),
        "hidden": Field("hidden_size"),
        "mlp": Field("ffn_hidden_size", default=Times(4, "hidden_size")),
        "heads": Field("num_attention_heads"),
        "key": Ratio("hidden_size", "num_attention_heads"),
        "value": Ratio("hidden_size", "num_attention_heads"),
        "layer": Field("num_hidden_layers"),
    },
    tensors={
        "transformer.word_embeddings.weight": "vocab -> hidden",
        "transformer.h.{layer}.self_attention.query_key_value.weight": "(q: heads key | k: key | v: value) <- hidden",
        "transformer.h.{layer}.self_attention.query_key_value.bias": "-> (q: heads key | k: key | v: value)",
        "transformer.h.{layer}.self_attention.dense.weight": "hidden <- (heads value)",
        "transformer.h.{layer}.self_attention.dense.bias": "-> hidden",
        "transformer.h.{layer}.mlp.dense_h_to_4h.weight": "mlp <- hidden",
        "transformer.h.{layer}.mlp.dense_h_to_4h.bias": "-> mlp",
        "transformer.h.{layer}.mlp.dense_4h_to_h.weight": "hidden <- mlp",
        "transformer.h.{layer}.mlp.dense_4h_to_h.bias": "-> hidden",
        "transformer.h.{layer}.input_layernorm.weight": "pre: * hidden",
        "transformer.h.{layer}.input_layernorm.bias": "pre: + hidden",
        "transformer.ln_f.weight": "final: * hidden",
        "transformer.ln_f.bias": "final: + hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={
        "score.weight": "_ <- hidden",
        "classifier.weight": "_ <- hidden",
        "classifier.bias": "-> _",
        "qa_outputs.weight": "_ <- hidden",
        "qa_outputs.bias": "-> _",
    },
    norms={
        "pre": Norm("hidden", "layer", eps="layer_norm_epsilon"),
        "final": Norm("hidden", "layer", eps="layer_norm_epsilon"),
    },
    attention=Attention(rotary=Rotary()),
    tied=Tied("lm_head.weight", "transformer.word_embeddings.weight", norm="final"),
    optional={
        "transformer.h.{layer}.self_attention.query_key_value.bias": "bias",
        "transformer.h.{layer}.self_attention.dense.bias": "bias",
        "transformer.h.{layer}.mlp.dense_h_to_4h.bias": "bias",
        "transformer.h.{layer}.mlp.dense_4h_to_h.bias": "bias",
    },
    prefix="transformer.",
    drop=("transformer.h.{layer}.self_attention.rotary_emb.inv_freq",),
    rules=(Divides(by="num_attention_heads", over="hidden_size"),),
    when=(
        (
            {"new_decoder_architecture": False, "parallel_attn": False},
            {
                "tensors": {
                    "transformer.h.{layer}.post_attention_layernorm.weight": "pre: * hidden",
                    "transformer.h.{layer}.post_attention_layernorm.bias": "pre: + hidden",
                }
            },
        ),
        (
            {"new_decoder_architecture": False, "multi_query": False},
            {
                "tensors": {
                    "transformer.h.{layer}.self_attention.query_key_value.weight": (
                        "(heads (q: key | k: key | v: value)) <- hidden"
                    ),
                    "transformer.h.{layer}.self_attention.query_key_value.bias": (
                        "-> (heads (q: key | k: key | v: value))"
                    ),
                },
                "follows": {"num_kv_heads": "num_attention_heads"},
            },
        ),
        (
            {"new_decoder_architecture": True},
            {
                "axes": {
                    "kv_heads": Field("num_kv_heads", default=Field("num_attention_heads")),
                    "group": Ratio("num_attention_heads", "num_kv_heads"),
                },
                "tensors": {
                    "transformer.h.{layer}.self_attention.query_key_value.weight": (
                        "(kv_heads (q: group key | k: key | v: value)) <- hidden"
                    ),
                    "transformer.h.{layer}.self_attention.query_key_value.bias": (
                        "-> (kv_heads (q: group key | k: key | v: value))"
                    ),
                    "transformer.h.{layer}.self_attention.dense.weight": "hidden <- (kv_heads group value)",
                },
                "attention": Attention(kv_heads="kv_heads", group="group", rotary=Rotary()),
                "requires": {"parallel_attn": True},
            },
        ),
        (
            # Where it is not said, this architecture has a norm for attention and one for the MLP.
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": None},
            {
                "tensors": {
                    "transformer.h.{layer}.input_layernorm.weight": None,
                    "transformer.h.{layer}.input_layernorm.bias": None,
                    "transformer.h.{layer}.ln_attn.weight": "pre: * hidden",
                    "transformer.h.{layer}.ln_attn.bias": "pre: + hidden",
                    "transformer.h.{layer}.ln_mlp.weight": "pre: * hidden",
                    "transformer.h.{layer}.ln_mlp.bias": "pre: + hidden",
                }
            },
        ),
        (
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
            {
                "tensors": {
                    "transformer.h.{layer}.input_layernorm.weight": None,
                    "transformer.h.{layer}.input_layernorm.bias": None,
                    "transformer.h.{layer}.ln_attn.weight": "pre: * hidden",
                    "transformer.h.{layer}.ln_attn.bias": "pre: + hidden",
                    "transformer.h.{layer}.ln_mlp.weight": "pre: * hidden",
                    "transformer.h.{layer}.ln_mlp.bias": "pre: + hidden",
                }
            },
        ),
        (
            {"alibi": True},
            {"frozen": (Frozen(("key",), "linear biases are divided by the root of the head size too"),)},
        ),
        ({"alibi": True, "new_decoder_architecture": False}, {"attention": Attention(alibi="bloom")}),
        (
            {"alibi": True, "new_decoder_architecture": True},
            {"attention": Attention(kv_heads="kv_heads", group="group", alibi="bloom")},
        ),
    ),
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "ffn_hidden_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "layer_norm_epsilon": 1e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    activations={"mlp": "activation"},
    neutral=(
        "activation",
        "max_position_embeddings",
        "initializer_range",
        "hidden_dropout",
        "attention_dropout",
        "alibi",
        "new_decoder_architecture",
        "multi_query",
        "parallel_attn",
        "num_ln_in_parallel_attn",
        "num_kv_heads",
    ),
)
