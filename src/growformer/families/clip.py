"""CLIP: a text tower beside a vision tower, each with its own stream, and the cosine of what both project."""

from growformer.algebra import Attention, Divides, Family, Field, Norm, Ratio

TEXT = {
    "text_model.embeddings.token_embedding.weight": "vocab -> text_hidden",
    "text_model.embeddings.position_embedding.weight": "positions -> text_hidden",
    "text_model.encoder.layers.{text_layer}.self_attn.k_proj.weight": "(k: text_heads text_key) <- text_hidden",
    "text_model.encoder.layers.{text_layer}.self_attn.k_proj.bias": "-> (k: text_heads text_key)",
    "text_model.encoder.layers.{text_layer}.self_attn.v_proj.weight": "(v: text_heads text_value) <- text_hidden",
    "text_model.encoder.layers.{text_layer}.self_attn.v_proj.bias": "-> (v: text_heads text_value)",
    "text_model.encoder.layers.{text_layer}.self_attn.q_proj.weight": "(q: text_heads text_key) <- text_hidden",
    "text_model.encoder.layers.{text_layer}.self_attn.q_proj.bias": "-> (q: text_heads text_key)",
    "text_model.encoder.layers.{text_layer}.self_attn.out_proj.weight": "text_hidden <- (text_heads text_value)",
    "text_model.encoder.layers.{text_layer}.self_attn.out_proj.bias": "-> text_hidden",
    "text_model.encoder.layers.{text_layer}.layer_norm1.weight": "text_pre: * text_hidden",
    "text_model.encoder.layers.{text_layer}.layer_norm1.bias": "text_pre: + text_hidden",
    "text_model.encoder.layers.{text_layer}.mlp.fc1.weight": "text_mlp <- text_hidden",
    "text_model.encoder.layers.{text_layer}.mlp.fc1.bias": "-> text_mlp",
    "text_model.encoder.layers.{text_layer}.mlp.fc2.weight": "text_hidden <- text_mlp",
    "text_model.encoder.layers.{text_layer}.mlp.fc2.bias": "-> text_hidden",
    "text_model.encoder.layers.{text_layer}.layer_norm2.weight": "text_pre: * text_hidden",
    "text_model.encoder.layers.{text_layer}.layer_norm2.bias": "text_pre: + text_hidden",
    "text_model.final_layer_norm.weight": "text_final: * text_hidden",
    "text_model.final_layer_norm.bias": "text_final: + text_hidden",
}
"""The text tower's tensors."""

VISION_LAYERS = {
    "vision_model.encoder.layers.{vision_layer}.self_attn.k_proj.weight": (
        "(k: vision_heads vision_key) <- vision_hidden"
    ),
    "vision_model.encoder.layers.{vision_layer}.self_attn.k_proj.bias": "-> (k: vision_heads vision_key)",
    "vision_model.encoder.layers.{vision_layer}.self_attn.v_proj.weight": (
        "(v: vision_heads vision_value) <- vision_hidden"
    ),
    "vision_model.encoder.layers.{vision_layer}.self_attn.v_proj.bias": "-> (v: vision_heads vision_value)",
    "vision_model.encoder.layers.{vision_layer}.self_attn.q_proj.weight": (
        "(q: vision_heads vision_key) <- vision_hidden"
    ),
    "vision_model.encoder.layers.{vision_layer}.self_attn.q_proj.bias": "-> (q: vision_heads vision_key)",
    "vision_model.encoder.layers.{vision_layer}.self_attn.out_proj.weight": (
        "vision_hidden <- (vision_heads vision_value)"
    ),
    "vision_model.encoder.layers.{vision_layer}.self_attn.out_proj.bias": "-> vision_hidden",
    "vision_model.encoder.layers.{vision_layer}.layer_norm1.weight": "vision_pre: * vision_hidden",
    "vision_model.encoder.layers.{vision_layer}.layer_norm1.bias": "vision_pre: + vision_hidden",
    "vision_model.encoder.layers.{vision_layer}.mlp.fc1.weight": "vision_mlp <- vision_hidden",
    "vision_model.encoder.layers.{vision_layer}.mlp.fc1.bias": "-> vision_mlp",
    "vision_model.encoder.layers.{vision_layer}.mlp.fc2.weight": "vision_hidden <- vision_mlp",
    "vision_model.encoder.layers.{vision_layer}.mlp.fc2.bias": "-> vision_hidden",
    "vision_model.encoder.layers.{vision_layer}.layer_norm2.weight": "vision_pre: * vision_hidden",
    "vision_model.encoder.layers.{vision_layer}.layer_norm2.bias": "vision_pre: + vision_hidden",
    "vision_model.post_layernorm.weight": "vision_final: * vision_hidden",
    "vision_model.post_layernorm.bias": "vision_final: + vision_hidden",
}
"""The vision tower's layers, and the norm behind them."""

IMAGES_ALONE = {
    "axes": {
        "vocab": None,
        "positions": None,
        "text_hidden": None,
        "text_mlp": None,
        "text_heads": None,
        "text_key": None,
        "text_value": None,
        "text_layer": None,
    },
    "tensors": {
        "logit_scale": None,
        "text_model.embeddings.token_embedding.weight": None,
        "text_model.embeddings.position_embedding.weight": None,
        "text_model.encoder.layers.{text_layer}.self_attn.k_proj.weight": None,
        "text_model.encoder.layers.{text_layer}.self_attn.k_proj.bias": None,
        "text_model.encoder.layers.{text_layer}.self_attn.v_proj.weight": None,
        "text_model.encoder.layers.{text_layer}.self_attn.v_proj.bias": None,
        "text_model.encoder.layers.{text_layer}.self_attn.q_proj.weight": None,
        "text_model.encoder.layers.{text_layer}.self_attn.q_proj.bias": None,
        "text_model.encoder.layers.{text_layer}.self_attn.out_proj.weight": None,
        "text_model.encoder.layers.{text_layer}.self_attn.out_proj.bias": None,
        "text_model.encoder.layers.{text_layer}.layer_norm1.weight": None,
        "text_model.encoder.layers.{text_layer}.layer_norm1.bias": None,
        "text_model.encoder.layers.{text_layer}.mlp.fc1.weight": None,
        "text_model.encoder.layers.{text_layer}.mlp.fc1.bias": None,
        "text_model.encoder.layers.{text_layer}.mlp.fc2.weight": None,
        "text_model.encoder.layers.{text_layer}.mlp.fc2.bias": None,
        "text_model.encoder.layers.{text_layer}.layer_norm2.weight": None,
        "text_model.encoder.layers.{text_layer}.layer_norm2.bias": None,
        "text_model.final_layer_norm.weight": None,
        "text_model.final_layer_norm.bias": None,
    },
    "norms": {"text_pre": None, "text_final": None},
    "attention": Attention(heads="vision_heads", key=("vision_key",), value="vision_value"),
    "streams": ("vision_hidden",),
    "layers": ("vision_layer",),
    "rules": (Divides(by="vision_config.num_attention_heads", over="vision_config.hidden_size"),),
}
"""What changes where only the vision tower is stored."""

CLIP = Family(
    name="clip",
    model_types=("clip",),
    architectures=("CLIPModel", "CLIPForImageClassification"),
    axes={
        "vocab": Field("text_config.vocab_size"),
        "positions": Field("text_config.max_position_embeddings"),
        "text_hidden": Field("text_config.hidden_size"),
        "text_mlp": Field("text_config.intermediate_size"),
        "text_heads": Field("text_config.num_attention_heads"),
        "text_key": Ratio("text_config.hidden_size", "text_config.num_attention_heads"),
        "text_value": Ratio("text_config.hidden_size", "text_config.num_attention_heads"),
        "text_layer": Field("text_config.num_hidden_layers"),
        "vision_hidden": Field("vision_config.hidden_size"),
        "vision_mlp": Field("vision_config.intermediate_size"),
        "vision_heads": Field("vision_config.num_attention_heads"),
        "vision_key": Ratio("vision_config.hidden_size", "vision_config.num_attention_heads"),
        "vision_value": Ratio("vision_config.hidden_size", "vision_config.num_attention_heads"),
        "vision_layer": Field("vision_config.num_hidden_layers"),
    },
    tensors={
        "logit_scale": ".",
        **TEXT,
        "vision_model.embeddings.class_embedding": "-> vision_hidden",
        "vision_model.embeddings.patch_embedding.weight": "vision_hidden <- _ _ _",
        "vision_model.embeddings.position_embedding.weight": "_ -> vision_hidden",
        "vision_model.pre_layrnorm.weight": "vision_embed: * vision_hidden",
        "vision_model.pre_layrnorm.bias": "vision_embed: + vision_hidden",
        **VISION_LAYERS,
        # The space of the cosine stays as wide as it is: new rows must be zero on both sides, where no gradient reaches
        # them, or copies, which get one gradient and stay copies for ever.
        "visual_projection.weight": "_ <- vision_hidden",
        "text_projection.weight": "_ <- text_hidden",
    },
    tasks={
        "classifier.weight": "_ <- (raw: vision_hidden)",
        "classifier.bias": "-> _",
    },
    norms={
        "text_pre": Norm("text_hidden", "layer", eps="text_config.layer_norm_eps"),
        "text_final": Norm("text_hidden", "layer", eps="text_config.layer_norm_eps"),
        "vision_embed": Norm("vision_hidden", "layer", eps="vision_config.layer_norm_eps", output="stream"),
        "vision_pre": Norm("vision_hidden", "layer", eps="vision_config.layer_norm_eps"),
        "vision_final": Norm("vision_hidden", "layer", eps="vision_config.layer_norm_eps"),
    },
    attention=(
        Attention(heads="text_heads", key=("text_key",), value="text_value"),
        Attention(heads="vision_heads", key=("vision_key",), value="vision_value"),
    ),
    streams=("text_hidden", "vision_hidden"),
    layers=("text_layer", "vision_layer"),
    copied={"vision_hidden": "a LayerNorm's gain and shift stand between the embeddings and the residual stream"},
    drop=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    aliases={"text_config_dict": "text_config", "vision_config_dict": "vision_config"},
    rules=(
        Divides(by="text_config.num_attention_heads", over="text_config.hidden_size"),
        Divides(by="vision_config.num_attention_heads", over="vision_config.hidden_size"),
    ),
    activations={"text_mlp": "text_config.hidden_act", "vision_mlp": "vision_config.hidden_act"},
    neutral=(
        "projection_dim",
        "logit_scale_init_value",
        "initializer_factor",
        "text_config.projection_dim",
        "text_config.hidden_act",
        "text_config.layer_norm_eps",
        "text_config.attention_dropout",
        "text_config.initializer_range",
        "text_config.initializer_factor",
        "vision_config.projection_dim",
        "vision_config.hidden_act",
        "vision_config.attention_dropout",
        "vision_config.initializer_range",
        "vision_config.initializer_factor",
        "vision_config.image_size",
        "vision_config.patch_size",
        "vision_config.num_channels",
    ),
    when=(
        ({"architectures": ["CLIPForImageClassification"]}, IMAGES_ALONE),
        (
            {"architectures": ["CLIPForImageClassification"]},
            {"tensors": {"visual_projection.weight": None, "text_projection.weight": None}},
        ),
    ),
    sample={
        "projection_dim": 14,
        "text_config": {
            "vocab_size": 61,
            "hidden_size": 24,
            "intermediate_size": 28,
            "projection_dim": 14,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "layer_norm_eps": 1e-3,
            "bos_token_id": 3,
            "eos_token_id": 4,
        },
        "vision_config": {
            "hidden_size": 20,
            "intermediate_size": 26,
            "projection_dim": 14,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 12,
            "patch_size": 4,
            "layer_norm_eps": 2e-3,
        },
    },
)
