"""OPT: LayerNorm with its eps in the code, learned positions after two spare rows; OPT-350m is post-norm.

Its embeddings are narrower than the stream and projected both ways.
"""

from growformer.algebra import Attention, Divides, Family, Field, Frozen, Norm, Ratio, Tied, Unlike

_LAYER = "model.decoder.layers.{layer}."
_POST_NORM = {
    "tensors": {
        f"{_LAYER}self_attn_layer_norm.weight": "attn_out: * hidden",
        f"{_LAYER}self_attn_layer_norm.bias": "attn_out: + hidden",
        f"{_LAYER}final_layer_norm.weight": "out: * hidden",
        f"{_LAYER}final_layer_norm.bias": "out: + hidden",
        "model.decoder.final_layer_norm.weight": None,
        "model.decoder.final_layer_norm.bias": None,
    },
    "norms": {
        "pre": None,
        "final": None,
        "attn_out": Norm("hidden", "layer", eps=1e-5, output="stream"),
        "out": Norm("hidden", "layer", eps=1e-5, output="stream", feeds="layer"),
    },
    "tied": Tied("lm_head.weight", "model.decoder.embed_tokens.weight", norm="out", layer="layer"),
    "copied": {"hidden": "a LayerNorm's gain and shift stand between what writes the residual stream and the stream"},
    "optional": {"model.decoder.final_layer_norm.weight": None, "model.decoder.final_layer_norm.bias": None},
    "requires": {"do_layer_norm_before": None, "layer_norm_elementwise_affine": True},
}
_PROJECTED = {
    "axes": {"embedding": Field("word_embed_proj_dim")},
    "tensors": {
        "model.decoder.embed_tokens.weight": "vocab -> embedding",
        "model.decoder.project_out.weight": "embedding <- hidden",
        "model.decoder.project_in.weight": "hidden <- embedding",
        "lm_head.weight": "vocab <- embedding",
    },
    "tasks": {"score.weight": "_ <- embedding", "qa_outputs.weight": "_ <- embedding"},
    # No norm gives to the head: it reads what is projected, whose size stays.
    "tied": Tied("lm_head.weight", "model.decoder.embed_tokens.weight", norm=""),
    "frozen": (Frozen(("embedding",), "the tied head reads it, and no norm before that could take anything back"),),
    "follows": {"word_embed_proj_dim": None},
}

OPT = Family(
    name="opt",
    model_types=("opt",),
    architectures=("OPTForCausalLM", "OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering"),
    axes={
        "vocab": Field("vocab_size"),
        "positions": Field("max_position_embeddings"),
        "hidden": Field("hidden_size"),
        "mlp": Field("ffn_dim"),
        "heads": Field("num_attention_heads"),
        "key": Ratio("hidden_size", "num_attention_heads"),
        "value": Ratio("hidden_size", "num_attention_heads"),
        "layer": Field("num_hidden_layers"),
    },
    tensors={
        "model.decoder.embed_tokens.weight": "vocab -> hidden",
        "model.decoder.embed_positions.weight": "(2 | positions) -> hidden",
        "model.decoder.layers.{layer}.self_attn.k_proj.weight": "(k: heads key) <- hidden",
        "model.decoder.layers.{layer}.self_attn.k_proj.bias": "-> (k: heads key)",
        "model.decoder.layers.{layer}.self_attn.v_proj.weight": "(v: heads value) <- hidden",
        "model.decoder.layers.{layer}.self_attn.v_proj.bias": "-> (v: heads value)",
        "model.decoder.layers.{layer}.self_attn.q_proj.weight": "(q: heads key) <- hidden",
        "model.decoder.layers.{layer}.self_attn.q_proj.bias": "-> (q: heads key)",
        "model.decoder.layers.{layer}.self_attn.out_proj.weight": "hidden <- (heads value)",
        "model.decoder.layers.{layer}.self_attn.out_proj.bias": "-> hidden",
        "model.decoder.layers.{layer}.self_attn_layer_norm.weight": "pre: * hidden",
        "model.decoder.layers.{layer}.self_attn_layer_norm.bias": "pre: + hidden",
        "model.decoder.layers.{layer}.fc1.weight": "mlp <- hidden",
        "model.decoder.layers.{layer}.fc1.bias": "-> mlp",
        "model.decoder.layers.{layer}.fc2.weight": "hidden <- mlp",
        "model.decoder.layers.{layer}.fc2.bias": "-> hidden",
        "model.decoder.layers.{layer}.final_layer_norm.weight": "pre: * hidden",
        "model.decoder.layers.{layer}.final_layer_norm.bias": "pre: + hidden",
        "model.decoder.final_layer_norm.weight": "final: * hidden",
        "model.decoder.final_layer_norm.bias": "final: + hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={"score.weight": "_ <- hidden", "qa_outputs.weight": "_ <- hidden", "qa_outputs.bias": "-> _"},
    norms={
        "pre": Norm("hidden", "layer", eps=1e-5),
        "final": Norm("hidden", "layer", eps=1e-5),
    },
    attention=Attention(),
    tied=Tied("lm_head.weight", "model.decoder.embed_tokens.weight", norm="final"),
    optional={
        "model.decoder.layers.{layer}.self_attn.k_proj.bias": "enable_bias",
        "model.decoder.layers.{layer}.self_attn.v_proj.bias": "enable_bias",
        "model.decoder.layers.{layer}.self_attn.q_proj.bias": "enable_bias",
        "model.decoder.layers.{layer}.self_attn.out_proj.bias": "enable_bias",
        "model.decoder.layers.{layer}.fc1.bias": "enable_bias",
        "model.decoder.layers.{layer}.fc2.bias": "enable_bias",
        "model.decoder.layers.{layer}.self_attn_layer_norm.weight": "layer_norm_elementwise_affine",
        "model.decoder.layers.{layer}.self_attn_layer_norm.bias": "layer_norm_elementwise_affine",
        "model.decoder.layers.{layer}.final_layer_norm.weight": "layer_norm_elementwise_affine",
        "model.decoder.layers.{layer}.final_layer_norm.bias": "layer_norm_elementwise_affine",
        "model.decoder.final_layer_norm.weight": "layer_norm_elementwise_affine",
        "model.decoder.final_layer_norm.bias": "layer_norm_elementwise_affine",
    },
    prefix="model.",
    rules=(Divides(by="num_attention_heads", over="hidden_size"),),
    follows={"word_embed_proj_dim": "hidden_size"},
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    when=(
        ({"do_layer_norm_before": False}, _POST_NORM),
        ({"word_embed_proj_dim": Unlike("hidden_size")}, _PROJECTED),
        (
            {"layer_norm_elementwise_affine": False},
            {
                "norms": {
                    "pre": Norm("hidden", "layer", eps=1e-5, gain=None),
                    "final": Norm("hidden", "layer", eps=1e-5, gain=None),
                }
            },
        ),
    ),
    sample={
        "vocab_size": 37,
        "hidden_size": 24,
        "ffn_dim": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    variants=(
        {"word_embed_proj_dim": 18},
        {"do_layer_norm_before": False, "word_embed_proj_dim": 18},
    ),
    activations={"mlp": "activation_function"},
    neutral=(
        "activation_function",
        "init_std",
        "dropout",
        "attention_dropout",
        "layerdrop",
        "word_embed_proj_dim",
    ),
)
