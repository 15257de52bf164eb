"""Methods that ask a loss: a closure computes it while the model grows."""

from growformer.algebra import Method, Way

GRADMAX = Method(
    name="gradmax",
    source="arXiv 2201.05125",
    about="new units are written with zeros, and read so that the gradient of what writes them is largest",
    ways={"mlp": Way(closed="writers", fill="gradient")},
)
