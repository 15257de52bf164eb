"""Request x family x method -> plan; and the plan applied to named tensors."""

from growformer.planning.apply import Applier, apply, pull_back
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.make import make_plan
from growformer.planning.plan import Block, Plan, TensorPlan

__all__ = ["Applier", "AxisGrowth", "Block", "Growth", "Plan", "TensorPlan", "apply", "make_plan", "pull_back"]
