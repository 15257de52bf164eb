"""Models written here so that every axis stands apart: the paper's reference Transformer."""

from growformer.models.reference import HeadSize, LayerSize, ReferenceConfig, ReferenceTransformer, randomise

__all__ = ["HeadSize", "LayerSize", "ReferenceConfig", "ReferenceTransformer", "randomise"]
