"""The six expansions as published: one side zero, the other free (arXiv 2308.06103, definitions 3.1 to 3.6)."""

from growformer.algebra import Method

PAPER = Method(
    name="paper",
    source="arXiv 2308.06103",
    preserving=True,
    closed={
        "mlp": "readers",
        "heads": "readers",
        "kv_heads": "readers",
        "value": "readers",
        "key": "readers",
        "hidden": "writers",
        "layer": "readers",
    },
)
