"""The pieces in order: plan, expand, grow, verify."""

from growformer.api.folders import Grown, Progress, expand_checkpoint
from growformer.api.fusing import fuse, fuse_checkpoint
from growformer.api.live import grow, new_parameters
from growformer.api.models import expand
from growformer.api.planned import family_of, method_named, plan
from growformer.api.training import train
from growformer.api.verified import verify

__all__ = [
    "Grown",
    "Progress",
    "expand",
    "expand_checkpoint",
    "family_of",
    "fuse",
    "fuse_checkpoint",
    "grow",
    "method_named",
    "new_parameters",
    "plan",
    "train",
    "verify",
]
