"""SigLIP: CLIP's two towers, and the cosine of the text tower's head and the vision tower's, as wide as its stream."""

from growformer.algebra import Field, Frozen, Norm, replace
from growformer.families.clip import CLIP, IMAGES_ALONE, TEXT, VISION_LAYERS

HEAD = {
    "vision_model.head.probe": "-> 1 1 vision_hidden",
    "vision_model.head.attention.in_proj_weight": (
        "(q: vision_heads vision_key | k: vision_heads vision_key | v: vision_heads vision_value) <- vision_hidden"
    ),
    "vision_model.head.attention.in_proj_bias": (
        "-> (q: vision_heads vision_key | k: vision_heads vision_key | v: vision_heads vision_value)"
    ),
    "vision_model.head.attention.out_proj.weight": "joint <- (vision_heads vision_value)",
    "vision_model.head.attention.out_proj.bias": "-> joint",
    "vision_model.head.layernorm.weight": "head: * joint",
    "vision_model.head.layernorm.bias": "head: + joint",
    "vision_model.head.mlp.fc1.weight": "head_mlp <- joint",
    "vision_model.head.mlp.fc1.bias": "-> head_mlp",
    "vision_model.head.mlp.fc2.weight": "joint <- head_mlp",
    "vision_model.head.mlp.fc2.bias": "-> joint",
}
"""The vision tower's head: one learned probe attends to all the patches."""

SIGLIP = replace(
    CLIP,
    name="siglip",
    model_types=("siglip",),
    architectures=("SiglipModel", "SiglipForImageClassification"),
    axes={
        **CLIP.axes,
        "joint": Field("vision_config.hidden_size"),
        "head_mlp": Field("vision_config.intermediate_size"),
    },
    tensors={
        "logit_scale": "-> 1",
        "logit_bias": "-> 1",
        **TEXT,
        "text_model.head.weight": "joint <- text_hidden",
        "text_model.head.bias": "-> joint",
        "vision_model.embeddings.patch_embedding.weight": "vision_hidden <- _ _ _",
        "vision_model.embeddings.patch_embedding.bias": "-> vision_hidden",
        "vision_model.embeddings.position_embedding.weight": "_ -> vision_hidden",
        **VISION_LAYERS,
        **HEAD,
    },
    tasks={
        "classifier.weight": "_ <- vision_hidden",
        "classifier.bias": "-> _",
    },
    norms={
        "text_pre": Norm("text_hidden", "layer", eps="text_config.layer_norm_eps"),
        "text_final": Norm("text_hidden", "layer", eps="text_config.layer_norm_eps"),
        "vision_pre": Norm("vision_hidden", "layer", eps="vision_config.layer_norm_eps"),
        "vision_final": Norm("vision_hidden", "layer", eps="vision_config.layer_norm_eps"),
        "head": Norm("joint", "layer", eps="vision_config.layer_norm_eps"),
    },
    copied={
        "vision_hidden": "one projection reads the probe, which has no norm, together with the normed patches",
        "joint": "its cosine is the model's answer, and the vision tower's head normalises it on the way",
    },
    aliases={},
    frozen=(
        Frozen(
            ("vision_hidden",),
            "both towers' embeddings are as wide and normalised to length one, so their old channels would shrink",
        ),
    ),
    follows={"text_config.projection_size": "vision_config.hidden_size"},
    requires={"vision_config.vision_use_head": True},
    activations={**CLIP.activations, "head_mlp": "vision_config.hidden_act"},
    neutral=(
        "initializer_factor",
        "text_config.hidden_act",
        "text_config.layer_norm_eps",
        "text_config.attention_dropout",
        "text_config.projection_size",
        "vision_config.hidden_act",
        "vision_config.attention_dropout",
        "vision_config.image_size",
        "vision_config.patch_size",
        "vision_config.num_channels",
    ),
    when=(
        ({"architectures": ["SiglipForImageClassification"]}, IMAGES_ALONE),
        (
            {"architectures": ["SiglipForImageClassification"]},
            {
                "tensors": {"logit_bias": None, "text_model.head.weight": None, "text_model.head.bias": None},
                "follows": {"text_config.projection_size": None},
                "requires": {"vision_config.vision_use_head": None},
                "frozen": (),
            },
        ),
        (
            {"architectures": ["SiglipForImageClassification"], "vision_config.vision_use_head": False},
            {
                "frozen": (),
                "axes": {"joint": None, "head_mlp": None},
                "tensors": {
                    "vision_model.head.probe": None,
                    "vision_model.head.attention.in_proj_weight": None,
                    "vision_model.head.attention.in_proj_bias": None,
                    "vision_model.head.attention.out_proj.weight": None,
                    "vision_model.head.attention.out_proj.bias": None,
                    "vision_model.head.layernorm.weight": None,
                    "vision_model.head.layernorm.bias": None,
                    "vision_model.head.mlp.fc1.weight": None,
                    "vision_model.head.mlp.fc1.bias": None,
                    "vision_model.head.mlp.fc2.weight": None,
                    "vision_model.head.mlp.fc2.bias": None,
                },
                "norms": {"head": None},
                "copied": {"vision_hidden": None, "joint": None},
            },
        ),
    ),
    sample={
        "text_config": {
            "vocab_size": 61,
            "hidden_size": 24,
            "intermediate_size": 28,
            "projection_size": 20,
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
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 12,
            "patch_size": 4,
            "layer_norm_eps": 2e-3,
        },
    },
)
