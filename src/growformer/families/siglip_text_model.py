"""SigLIP's text tower: CLIP's without the causal mask, pooled at the last token and projected with a bias."""

from growformer.algebra import Field, Frozen, replace
from growformer.families.clip_text_model import CLIP_TEXT_MODEL

SIGLIP_TEXT_MODEL = replace(
    CLIP_TEXT_MODEL,
    name="siglip_text_model",
    model_types=("siglip_text_model",),
    architectures=("SiglipTextModel",),
    axes={**CLIP_TEXT_MODEL.axes, "projection": Field("projection_size", default=Field("hidden_size"))},
    tensors={
        **CLIP_TEXT_MODEL.tensors,
        "text_model.head.weight": "projection <- hidden",
        "text_model.head.bias": "-> projection",
    },
    tasks={},
    neutral=("hidden_act", "attention_dropout"),
    frozen=(Frozen(("projection",), "it is the size of an output of the model"),),
    sample={
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 28,
        "projection_size": 14,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "layer_norm_eps": 1e-3,
        "bos_token_id": 3,
        "eos_token_id": 4,
    },
)
