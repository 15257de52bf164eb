"""Ways of growing, one literal each."""

from growformer.algebra import Method
from growformer.methods import copied, deeper, drawn, faded, learned
from growformer.methods.paper import PAPER

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        PAPER,
        drawn.ZERO_IN,
        drawn.TWINS,
        faded.MSG,
        faded.GATED,
        learned.GRADMAX,
        learned.LIGO,
        copied.NET2NET,
        copied.BERT2BERT,
        copied.AKI,
        copied.LEMON,
        copied.HYPERCLONE,
        copied.HYPERCLONE_NOISE,
        copied.MATRIX_SPLIT,
        copied.HALVES_SPLIT,
        copied.DYADIC,
        copied.STAGED,
        copied.DEEPFUSION,
        copied.SPARKLING,
        deeper.LLAMA_PRO,
        deeper.STACK,
        deeper.INTERPOLATE,
        deeper.MIDAS,
        deeper.SOLAR,
    )
}
"""Every method by name."""

__all__ = ["METHODS"]
