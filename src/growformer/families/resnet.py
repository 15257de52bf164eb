"""ResNet of transformers: a stem, residual stages of basic or bottleneck layers, a head over the pooled channels.

Sizes of stages are entries of lists in config.json (hidden_sizes, depths), which no axis of `FAMILIES` can have; so
this family is not among them, and grows by `growformer.api.convnets`. An axis that a layer reads is the one that the
layer before it writes: `into` that of the layer before, `before` that of the stage before, `pooled` that of the last
stage.
"""

from growformer.algebra import Family, Field, Norm

BASIC = {
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.0.convolution.weight": "(a: inner) <- into 3 3",
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.convolution.weight": "(last: hidden) <- inner 3 3",
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.weight": "last: * hidden",
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.bias": "last: + hidden",
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.running_mean": "mean: + hidden",
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.running_var": "variance: * hidden",
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.num_batches_tracked": ".",
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.convolution.weight": None,
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.weight": None,
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.bias": None,
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.running_mean": None,
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.running_var": None,
    "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.num_batches_tracked": None,
}
"""What differs in a basic layer, which has two convolutions."""

RESNET = Family(
    name="resnet",
    model_types=("resnet",),
    architectures=("ResNetForImageClassification", "ResNetModel"),
    axes={
        "stem": Field("embedding_size"),
        "hidden": Field("hidden_sizes"),
        "inner": Field("hidden_sizes"),
        "second": Field("hidden_sizes"),
        "layer": Field("depths"),
    },
    tensors={
        "resnet.embedder.embedder.convolution.weight": "(stem: stem) <- _ 7 7",
        "resnet.embedder.embedder.normalization.weight": "stem: * stem",
        "resnet.embedder.embedder.normalization.bias": "stem: + stem",
        "resnet.embedder.embedder.normalization.running_mean": "mean: + stem",
        "resnet.embedder.embedder.normalization.running_var": "variance: * stem",
        "resnet.embedder.embedder.normalization.num_batches_tracked": ".",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.0.convolution.weight": "(a: inner) <- into 1 1",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.0.normalization.weight": "a: * inner",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.0.normalization.bias": "a: + inner",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.0.normalization.running_mean": "mean: + inner",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.0.normalization.running_var": "variance: * inner",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.0.normalization.num_batches_tracked": ".",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.convolution.weight": "(b: second) <- inner 3 3",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.weight": "b: * second",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.bias": "b: + second",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.running_mean": "mean: + second",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.running_var": "variance: * second",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.1.normalization.num_batches_tracked": ".",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.convolution.weight": "(last: hidden) <- second 1 1",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.weight": "last: * hidden",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.bias": "last: + hidden",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.running_mean": "mean: + hidden",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.running_var": "variance: * hidden",
        "resnet.encoder.stages.{stage}.layers.{layer}.layer.2.normalization.num_batches_tracked": ".",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.convolution.weight": "(shortcut: hidden) <- before 1 1",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.weight": "shortcut: * hidden",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.bias": "shortcut: + hidden",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.running_mean": "mean: + hidden",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.running_var": "variance: * hidden",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.num_batches_tracked": ".",
    },
    tasks={
        "classifier.1.weight": "_ <- pooled",
        "classifier.1.bias": "-> _",
    },
    norms={
        "stem": Norm("stem", "batch", eps=1e-5),
        "a": Norm("inner", "batch", eps=1e-5),
        "b": Norm("second", "batch", eps=1e-5),
        "last": Norm("hidden", "batch", eps=1e-5, output="added"),
        "shortcut": Norm("hidden", "batch", eps=1e-5),
    },
    attention=(),
    streams=(),
    uneven=(
        "resnet.encoder.stages.{stage}.layers.0.shortcut.convolution.weight",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.weight",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.bias",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.running_mean",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.running_var",
        "resnet.encoder.stages.{stage}.layers.0.shortcut.normalization.num_batches_tracked",
    ),
    prefix="resnet.",
    when=(({"layer_type": "basic"}, {"tensors": BASIC}),),
)
