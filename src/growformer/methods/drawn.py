"""Methods whose new channels are new: which side is closed, and what the other starts from."""

from growformer.algebra import Method, Way

ZERO_IN = Method(
    name="zero-in",
    source="arXiv 2602.02472, its function-preserving baseline",
    about="zero-in/copy-out: what writes new channels is zero, and what reads them copies what reads old ones",
    ways={
        "mlp": Way(closed="writers", fill="copy"),
        "heads": Way(closed="writers", fill="copy"),
        "value": Way(closed="writers", fill="copy"),
        "key": Way(closed="writers", fill="copy"),
        "hidden": Way(closed="writers", fill="copy"),
        "layer": Way(fill="copy"),
    },
)

TWINS = Method(
    name="twins",
    source="growformer",
    about="new channels in pairs that are written alike and read with opposite signs: nothing is zero, nothing changes",
    ways={
        "mlp": Way(closed="pairs"),
        "heads": Way(closed="pairs"),
        "value": Way(closed="pairs"),
        "layer": Way(closed="pairs"),
    },
)
