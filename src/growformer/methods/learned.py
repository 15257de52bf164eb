"""Methods that ask a loss: a closure computes it while the model grows."""

from growformer.algebra import Method, Split, Way

GRADMAX = Method(
    name="gradmax",
    source="arXiv 2201.05125",
    about="new units are written with zeros, and read so that the gradient of what writes them is largest: one pass of "
    "the old model",
    ways={"mlp": Way(closed="writers", fill="gradient")},
)

# Equal parts would give both copies equal gradients at every step, of the lift and of the model that it makes.
_LEARNED = Way("copies", fill="gradient", split=Split("uneven"))

LIGO = Method(
    name="ligo",
    source="arXiv 2303.00980",
    about="a learned lift: a matrix for each axis and a mix of layers, which start as copies read in uneven parts, and "
    "follow a loss for 100 steps (steps=) of the grown model",
    ways={
        "mlp": _LEARNED,
        "heads": _LEARNED,
        "hidden": _LEARNED,
        "layer": Way("copies", order="each", fill="gradient"),
    },
)
