"""Methods for depth."""

from growformer.algebra import Method, Way

LLAMA_PRO = Method(
    name="llama-pro",
    source="arXiv 2401.02415",
    about="a new layer is a copy of the one before it, with zeros where it adds to the stream",
    ways={"layer": Way(fill="copy")},
)

STACK = Method(
    name="stack",
    source="arXiv 2405.15319",
    about="G_stack: the whole model again, on top of itself",
    ways={"layer": Way("copies", order="stack")},
)

INTERPOLATE = Method(
    name="interpolate",
    source="arXiv 2405.15319, its baseline",
    about="every layer again, behind itself",
    ways={"layer": Way("copies", order="each")},
)

MIDAS = Method(
    name="midas",
    source="arXiv 2409.19044",
    about="the middle layers again, behind themselves",
    ways={"layer": Way("copies", order="middle")},
)

SOLAR = Method(
    name="solar",
    source="arXiv 2312.15166",
    about="depth up-scaling: two copies of the model, without the layers where they would meet",
    ways={"layer": Way("copies", order="overlap")},
)
