"""OLMo 3: OLMo 2 with sliding windows in most layers, and rotary parameters by layer type."""

from growformer.algebra import replace
from growformer.families.olmo2 import OLMO2

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    model_types=("olmo3",),
    architectures=("Olmo3ForCausalLM", "Olmo3Model", "Olmo3ForSequenceClassification"),
    per_layer={"layer_types": "each"},
    sample={**OLMO2.sample, "num_hidden_layers": 5, "sliding_window": 7},
    neutral=(*OLMO2.neutral, "sliding_window"),
)
