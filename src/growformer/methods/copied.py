"""Methods that copy: a new channel is an old one again, and what read the old one is shared among the copies."""

from growformer.algebra import Method, Split, Way

NET2NET = Method(
    name="net2net",
    source="arXiv 1511.05641",
    about="new channels copy old ones picked at random, whose readers divide their weights by the number of copies",
    ways={
        "mlp": Way("copies", order="random"),
        "heads": Way("copies", order="random"),
        "value": Way("copies", order="random"),
        "key": Way("copies", order="random"),
        "hidden": Way("copies"),
        "layer": Way(),
    },
)

BERT2BERT = Method(
    name="bert2bert",
    source="arXiv 2110.07143",
    about="FPI: one mapping for the whole residual stream, random copies inside, readers divided by the copies' number",
    ways={
        "mlp": Way("copies", order="random"),
        "heads": Way("copies", order="random"),
        "hidden": Way("copies"),
        "layer": Way("copies", order="stack"),
    },
)

AKI = Method(
    name="bert2bert-aki",
    source="arXiv 2110.07143",
    about="AKI: as FPI, but what writes new channels is taken from the next layer, so that the function changes",
    ways={
        "mlp": Way("copies", order="random", ahead=True),
        "heads": Way("copies", order="random", ahead=True),
        "hidden": Way("copies", ahead=True),
        "layer": Way("copies", order="stack"),
    },
)

SPARKLING = Method(
    name="sparkling",
    source="arXiv 2602.02472",
    about="equal copies, which keep every norm's mean square; the optimizer forgets the copies, and they part",
    ways={
        "mlp": Way("copies", split=Split(fresh=True)),
        "heads": Way("copies", split=Split(fresh=True)),
        "hidden": Way("copies", split=Split(fresh=True)),
    },
)

LEMON = Method(
    name="lemon",
    source="arXiv 2310.07999",
    about="copies whose readers share unequally, so that they part; hidden carries means under a LayerNorm, zeros else",
    ways={
        "mlp": Way("copies", split=Split("uneven")),
        "heads": Way("copies", split=Split("uneven")),
        "hidden": Way(closed="writers"),
        "layer": Way(fill="copy"),
    },
)

HYPERCLONE = Method(
    name="hyperclone",
    source="arXiv 2409.12903",
    about="the whole width once more: every copy has an equal part of the weights; copies that never part",
    ways={
        "mlp": Way("copies"),
        "heads": Way("copies"),
        "hidden": Way("copies"),
    },
)

HYPERCLONE_NOISE = Method(
    name="hyperclone-noise",
    source="arXiv 2409.12903",
    about="hyperclone with noise that is added in one copy's readers and taken off in the other's",
    ways={
        "mlp": Way("copies", split=Split("noise", 0.1)),
        "heads": Way("copies", split=Split("noise", 0.1)),
        "hidden": Way("copies", split=Split("noise", 0.1)),
    },
)

MATRIX_SPLIT = Method(
    name="matrix-split",
    source="growformer",
    about="copies whose readers are W/2 + D and W/2 - D, with D of the size of W",
    ways={
        "mlp": Way("copies", split=Split("noise", 1.0)),
        "heads": Way("copies", split=Split("noise", 1.0)),
        "hidden": Way("copies", split=Split("noise", 1.0)),
    },
)

HALVES_SPLIT = Method(
    name="halves",
    source="growformer",
    about="copies of which each weight goes whole to one, or half to each of two: nothing rounds in any dtype",
    ways={
        "mlp": Way("copies", split=Split("halves")),
        "heads": Way("copies", split=Split("halves")),
        "hidden": Way("copies", split=Split("halves")),
    },
)

DYADIC = Method(
    name="dyadic",
    source="growformer",
    about="copies whose readers have 1/2, 1/4, ..., of the weights: powers of two, exact in bfloat16",
    ways={
        "mlp": Way("copies", split=Split("dyadic")),
        "heads": Way("copies", split=Split("dyadic")),
        "hidden": Way("copies", split=Split("dyadic")),
    },
)

STAGED = Method(
    name="staged",
    source="arXiv 2203.06211",
    about="the model beside itself, each copy reading its own; new layers copy their neighbour and add nothing",
    ways={
        "mlp": Way("copies", split=Split("own")),
        "heads": Way("copies", split=Split("own")),
        "hidden": Way("copies", split=Split("own")),
        "layer": Way(fill="copy"),
    },
)

DEEPFUSION = Method(
    name="deepfusion",
    source="arXiv 2306.11903",
    about="self-fusion: the model beside itself, each copy reading its own; what leaves the stream reads equal parts",
    ways={
        "mlp": Way("copies", split=Split("own")),
        "heads": Way("copies", split=Split("own")),
        "hidden": Way("copies", split=Split("own")),
    },
)
