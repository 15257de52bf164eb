"""The paper's reference Transformer: every head its own tensors, W_O split into one block per head.

Layers differ in their mlp sizes and heads in their key and value sizes, so no config field holds those: their sizes,
like the counts of heads and layers, are nested in `ReferenceConfig.layers`. That is why this family is not in
`FAMILIES`, whose requests are config fields; it grows by expansions.
"""

from growformer.algebra import Attention, Family, Field, Norm, Tied

REFERENCE = Family(
    name="reference",
    model_types=(),
    architectures=("ReferenceTransformer",),
    axes={
        "vocab": Field("vocab"),
        "positions": Field("positions"),
        "hidden": Field("hidden"),
    },
    tensors={
        "embedding": "vocab -> hidden",
        "positions": "positions -> hidden",
        "layers.{layer}.norm_mha": "pre: * hidden",
        "layers.{layer}.heads.{head}.w_q": "hidden -> (q: key)",
        "layers.{layer}.heads.{head}.w_k": "hidden -> (k: key)",
        "layers.{layer}.heads.{head}.w_v": "hidden -> (v: value)",
        "layers.{layer}.heads.{head}.w_o": "[head] value -> hidden",
        "layers.{layer}.norm_mlp": "pre: * hidden",
        "layers.{layer}.w1": "hidden -> mlp",
        "layers.{layer}.b1": "-> mlp",
        "layers.{layer}.w_gate": "hidden -> mlp",
        "layers.{layer}.b_gate": "-> mlp",
        "layers.{layer}.w2": "mlp -> hidden",
        "layers.{layer}.b2": "-> hidden",
        "norm_final": "final: * hidden",
        "w_out": "hidden -> vocab",
    },
    gates=(
        "layers.{layer}.w_gate",
        "layers.{layer}.b_gate",
    ),
    norms={
        "pre": Norm("hidden", "rms", eps="eps"),
        "final": Norm("hidden", "rms", eps="eps"),
    },
    attention=Attention(heads="head"),
    tied=Tied("w_out", "embedding", norm="final", field="tied"),
    optional={"layers.{layer}.w_gate": "gated", "layers.{layer}.b_gate": "gated", "norm_final": "final_norm"},
    activations={"mlp": "activation"},
    neutral=("causal", "activation", "final_norm"),
)
