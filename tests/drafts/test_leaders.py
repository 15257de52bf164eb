"""Fields that repeat others: only what the config class gives a value can lead."""

from growformer.drafts.draft import infer
from growformer.families import FAMILIES


def test_a_size_that_no_field_holds_leads_none() -> None:
    raw = {**FAMILIES["phi"].sample, "model_type": "phi", "architectures": ["PhiForCausalLM"]}
    drafted = infer(raw)
    assert "head_dim" not in raw and "head_dim" not in drafted.family.follows.values()
