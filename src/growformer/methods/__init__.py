"""Ways of growing, one literal each."""

from growformer.algebra import Method
from growformer.methods.paper import PAPER

METHODS: dict[str, Method] = {method.name: method for method in (PAPER,)}
"""Every method by name."""

__all__ = ["METHODS"]
