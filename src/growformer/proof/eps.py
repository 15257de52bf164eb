"""What the eps of norms alone does to a model whose layers end in norms on the stream, when new layers come between.

Measured on the source, before the grown model is run. A norm gives n = (u - mean) / sqrt(v + eps), v the variance of u.
In the grown model n passes m more norms, of gain K and no shift, before the old gain and shift are applied to it. Each
of them divides what it reads by the root of its variance and eps, so that after them n has become s n, with

    s^2 = (v + eps) / (v (1 + d + ... + d^(m-1)) + d^m (v + eps)),   d = eps / K^2

which is 1 + eps (1/v - 1/K^2) to first order in eps, and exact as it stands. The same s comes of scaling the input: of
u a, with a^2 = K^2 / (v (1 + d + ... + d^(m-1)) + d^(m-1) eps), the norm gives s n. The source with its inputs so
scaled is the function that the grown model must compute exactly; how far that is from the source itself is what eps
explains, and no more is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from growformer.algebra.family import Family
from growformer.algebra.sizes import lookup
from growformer.errors import UncheckedError
from growformer.proof.handing import LayerMap, Stack, handed, kept_gains

if TYPE_CHECKING:
    import torch

__all__ = ["MULTIPLE", "EpsEffect", "Passing", "passings", "worst_move"]

MULTIPLE = 2.0
"""The bound is what eps does to the source, this many times: the two agree to rounding, so it is close and safe."""


@dataclass(frozen=True)
class Passing:
    """A norm of the source whose output passes more norms in the grown model.

    Attributes:
        gain: the name of its gain, as patterns have it.
        kind: what it divides by: "layer", the variance; "rms", the mean square.
        eps: of it, and of those that follow.
        kept: the gain K of those before the last.
        after: how many follow.
    """

    gain: str
    kind: Literal["rms", "layer"]
    eps: float
    kept: float
    after: int

    def scaling(self, v: torch.Tensor) -> torch.Tensor:
        """a, by which the input of this norm is multiplied (its mean apart) to have the effect of those that follow."""
        d = self.eps / self.kept**2
        return self.kept / (v * self._sum(d) + d ** (self.after - 1) * self.eps).sqrt()

    def move(self, v: torch.Tensor) -> torch.Tensor:
        """|s - 1|: how far the output of this norm moves, as a part of itself; none where nothing varies."""
        import torch

        d = self.eps / self.kept**2
        square = (v + self.eps) / (v * self._sum(d) + d**self.after * (v + self.eps))
        return torch.where(v > 0, (square.sqrt() - 1).abs(), 0.0)

    def _sum(self, d: float) -> float:
        return math.fsum(d**i for i in range(self.after))


def passings(family: Family, layers: LayerMap, axes: Mapping[str, Any], full: Mapping[str, Any]) -> list[Passing]:
    """Every norm whose output passes more norms than it did.

    Args:
        family: of both models, as the source's config has it.
        layers: by layer axis, for each target layer the source layer or None.
        axes: of the receipt, for the gains that norms keep.
        full: the source's config, defaults filled in.
    """
    gains, problems = kept_gains(family, axes)
    out = []
    for axis in family.layers:
        stack, told = Stack(family, axis), list(layers.get(axis, ()))
        if stack.empty or stack.problems or problems or axis not in gains or stack.norm is None:
            continue
        if stack.norm.kind == "batch":
            continue  # it would read single channels, and no layer takes it over
        eps = lookup(full, stack.norm.eps) if isinstance(stack.norm.eps, str) else stack.norm.eps
        for one in handed(told):
            at = stack.name("gain", one.source, axis)
            if at is not None and one.stands > one.stood:
                after = stack.norms * (one.stands - one.stood)
                name = at[0].format(at[1])
                kind: Literal["rms", "layer"] = "layer" if stack.norm.kind == "layer" else "rms"
                out.append(Passing(name, kind, float(eps), float(gains[axis]), after))
    return out


@dataclass
class EpsEffect:
    """Scales the inputs of a source model's norms, so that it computes what the grown one must.

    Attributes:
        norms: whose.
        prefix: what patterns have before names that a bare backbone leaves out.
        variance: by norm, the least and the largest variance of a token that was seen.
        moved: by norm, how far it moved a token at most, as a part of itself.
    """

    norms: Sequence[Passing]
    prefix: str
    variance: dict[str, tuple[float, float]] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    def attach(self, model: Any) -> None:
        """Have a model's norms do so from now on.

        Raises:
            UncheckedError: one of them is no module of the model.
        """
        modules = dict(model.named_modules())
        for norm in self.norms:
            name = norm.gain.rpartition(".")[0]
            found = next((modules[n] for n in (name, name.removeprefix(self.prefix)) if n in modules), None)
            if found is None:
                raise UncheckedError(f"{type(model).__name__} has no module {name}, whose eps is to be measured")
            found.register_forward_pre_hook(self._hook(norm))

    def _hook(self, norm: Passing) -> Any:
        import torch

        def scale(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            stored, x = args[0].dtype, args[0].double()
            x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
            v = x.square().mean(-1)
            low, high = self.variance.get(norm.gain, (math.inf, 0.0))
            self.variance[norm.gain] = min(low, float(v.min())), max(high, float(v.max()))
            # Not Python's max, which may lose a NaN.
            before = v.new_tensor(self.moved.get(norm.gain, 0.0))
            self.moved[norm.gain] = float(torch.stack([norm.move(v).max(), before]).max())
            return ((x * norm.scaling(v).unsqueeze(-1)).to(stored), *args[1:])

        return scale


def worst_move(effect: EpsEffect) -> float:
    """How far eps moves any token at any of the norms, as a part of itself."""
    import torch

    return float(torch.tensor(list(effect.moved.values()), dtype=torch.float64).max()) if effect.moved else 0.0
