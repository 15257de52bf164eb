"""The six expansions as published: one side zero, the other free (arXiv 2308.06103, definitions 3.1 to 3.6)."""

from growformer.algebra import Method, Way

PAPER = Method(
    name="paper",
    source="arXiv 2308.06103",
    about="new channels read with zeros and written at random (hidden: the other way round); new layers add nothing",
    ways={
        "mlp": Way(closed="readers"),
        "heads": Way(closed="readers"),
        "value": Way(closed="readers"),
        "key": Way(closed="readers"),
        "hidden": Way(closed="writers"),
        "layer": Way(closed="readers"),
    },
)
