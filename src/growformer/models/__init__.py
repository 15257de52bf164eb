"""Models written here so that every axis stands apart: the paper's reference Transformer, a small convolutional net."""

from growformer.models.convnet import ConvConfig, ConvNet, StageSize, randomise_convnet
from growformer.models.reference import HeadSize, LayerSize, ReferenceConfig, ReferenceTransformer, randomise

__all__ = [
    "ConvConfig",
    "ConvNet",
    "HeadSize",
    "LayerSize",
    "ReferenceConfig",
    "ReferenceTransformer",
    "StageSize",
    "randomise",
    "randomise_convnet",
]
