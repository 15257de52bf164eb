"""UMT5: T5 with a table of relative positions in every layer, and always scaled logits."""

from fractions import Fraction

from growformer.algebra import Power, Tied, replace
from growformer.families.t5 import ENCODER_ONLY, T5

UMT5 = replace(
    T5,
    name="umt5",
    model_types=("umt5",),
    architectures=(
        "UMT5ForConditionalGeneration",
        "UMT5Model",
        "UMT5EncoderModel",
        "UMT5ForSequenceClassification",
        "UMT5ForTokenClassification",
        "UMT5ForQuestionAnswering",
    ),
    tensors={
        **T5.tensors,
        "transformer.encoder.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight": "_ -> (q: heads)",
        "transformer.decoder.block.{decoder_layer}.layer.0.SelfAttention.relative_attention_bias.weight": (
            "_ -> (q: heads)"
        ),
    },
    tied=Tied("lm_head.weight", "transformer.shared.weight", norm="final", field=""),
    drop=(),
    when=(
        (
            {},
            {
                "tensors": {
                    "transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": None,
                    "transformer.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": None,
                }
            },
        ),
        *T5.when,
        (
            {"architectures": ["UMT5ForConditionalGeneration"]},
            {"powers": {"logits": Power("hidden", Fraction(-1, 2))}},
        ),
        ({"architectures": None}, {"powers": {"logits": Power("hidden", Fraction(-1, 2))}}),
        ({"architectures": ["UMT5EncoderModel"]}, ENCODER_ONLY),
        ({"architectures": ["UMT5ForTokenClassification"]}, ENCODER_ONLY),
    ),
    sample={**T5.sample, "vocab_size": 67, "num_layers": 4, "num_decoder_layers": 3},
)
