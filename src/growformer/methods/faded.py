"""Methods that fade in: what reads new channels is zero at growth, and becomes something as the model trains."""

from growformer.algebra import Method, Way

_DRAWN = Way(behind="normal")
_COPIED = Way(fill="copy", behind="copy")

MSG = Method(
    name="msg",
    source="arXiv 2305.02869",
    about="masks that go from 0 to 1: what reads new channels, and what new layers add, fades in to a normal draw",
    ways={"mlp": _DRAWN, "heads": _DRAWN, "value": _DRAWN, "key": _DRAWN, "layer": _DRAWN},
    cannot={"hidden": "masks new hidden channels inside every norm as well, which a stock model's norms cannot"},
)

GATED = Method(
    name="gated",
    source="growformer",
    about="copied layers, heads and units behind one scalar, ramped from 0 or found by a line search, then folded in",
    ways={"layer": _COPIED, "heads": _COPIED, "mlp": _COPIED},
)
