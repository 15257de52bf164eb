"""The small convolutional net of `growformer.models`: a plain chain, residual stages, a head over the pooled channels.

Each layer of the chain has a width of its own, and each block an inner one: their sizes are nested in `ConvConfig`, as
those of the reference Transformer are in its config. An axis that a layer reads is the one that the layer before it
writes: `came` that of the chain's layer before, `into` that of the block before, `before` that of the stage before.
"""

from growformer.algebra import Family, Field, Norm

CONVNET = Family(
    name="convnet",
    model_types=(),
    architectures=("ConvNet",),
    axes={
        "link": Field("chain"),
        "width": Field("chain"),
        "hidden": Field("stages"),
        "inner": Field("stages"),
        "layer": Field("stages"),
    },
    tensors={
        "chain.{link}.conv.weight": "(chain: width) <- came 3 3",
        "chain.{link}.norm.weight": "chain: * width",
        "chain.{link}.norm.bias": "chain: + width",
        "chain.{link}.norm.running_mean": "mean: + width",
        "chain.{link}.norm.running_var": "variance: * width",
        "chain.{link}.norm.num_batches_tracked": ".",
        "stages.{stage}.{layer}.a.conv.weight": "(a: inner) <- into 3 3",
        "stages.{stage}.{layer}.a.norm.weight": "a: * inner",
        "stages.{stage}.{layer}.a.norm.bias": "a: + inner",
        "stages.{stage}.{layer}.a.norm.running_mean": "mean: + inner",
        "stages.{stage}.{layer}.a.norm.running_var": "variance: * inner",
        "stages.{stage}.{layer}.a.norm.num_batches_tracked": ".",
        "stages.{stage}.{layer}.b.conv.weight": "(b: hidden) <- inner 3 3",
        "stages.{stage}.{layer}.b.norm.weight": "b: * hidden",
        "stages.{stage}.{layer}.b.norm.bias": "b: + hidden",
        "stages.{stage}.{layer}.b.norm.running_mean": "mean: + hidden",
        "stages.{stage}.{layer}.b.norm.running_var": "variance: * hidden",
        "stages.{stage}.{layer}.b.norm.num_batches_tracked": ".",
        "stages.{stage}.0.shortcut.conv.weight": "(shortcut: hidden) <- before 1 1",
        "stages.{stage}.0.shortcut.norm.weight": "shortcut: * hidden",
        "stages.{stage}.0.shortcut.norm.bias": "shortcut: + hidden",
        "stages.{stage}.0.shortcut.norm.running_mean": "mean: + hidden",
        "stages.{stage}.0.shortcut.norm.running_var": "variance: * hidden",
        "stages.{stage}.0.shortcut.norm.num_batches_tracked": ".",
        "head.weight": "_ <- pooled",
        "head.bias": "-> _",
    },
    norms={
        "chain": Norm("width", "batch", eps="eps"),
        "a": Norm("inner", "batch", eps="eps"),
        "b": Norm("hidden", "batch", eps="eps", output="added"),
        "shortcut": Norm("hidden", "batch", eps="eps"),
    },
    attention=(),
    streams=(),
)
