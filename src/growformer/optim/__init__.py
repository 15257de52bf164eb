"""What an optimizer knows of a model, through a growth: state rules, moments, and the rates of new blocks."""

from growformer.optim.dual import approximate
from growformer.optim.rates import BlockRate, BlockRates, rates_of
from growformer.optim.rules import RULES, StateRule, declare, rule_of

__all__ = ["RULES", "BlockRate", "BlockRates", "StateRule", "approximate", "declare", "rates_of", "rule_of"]
