"""The one tolerance that is chosen rather than measured."""

BAR = 1e-12
"""Relative difference that a float64 comparison may show: max|a-b| / max|a| over all logits (design, section 6)."""
