"""Model families, one literal each."""

from growformer.algebra import Family
from growformer.families.gpt2 import GPT2
from growformer.families.llama import LLAMA
from growformer.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, GPT2, QWEN3)}
"""Every family by name."""

__all__ = ["FAMILIES"]
