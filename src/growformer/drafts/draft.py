"""The draft: a Family and what was guessed in it, put together from the probes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from growformer.algebra import (
    Attention,
    Divides,
    Experts,
    Family,
    Field,
    NamePattern,
    PerLayer,
    Ratio,
    TensorPattern,
    Tied,
)
from growformer.algebra.sizes import fields_of
from growformer.checkpoint.stock import full_config, last_line
from growformer.drafts.heads import Heads, When, classes_beside
from growformer.drafts.names import Named
from growformer.drafts.probe import Config, attempt, integers, probe, runs
from growformer.drafts.settled import blanked, frozen, unexplained
from growformer.errors import RequestError


@dataclass
class Draft:
    """A family as far as it could be read off.

    Attributes:
        family: the draft.
        guesses: what to look at, in words.
        raw: the tiny config that it was read off.
    """

    family: Family
    guesses: list[str]
    raw: Config


def infer(raw: Mapping[str, Any]) -> Draft:
    """A first draft of the family of a config.

    Args:
        raw: a tiny config (see `growformer.drafts.shrink`).

    Raises:
        RequestError: transformers cannot build or run its model.
    """
    try:
        base = attempt(raw)
        base = attempt(raw, classes=classes_beside(base))
    except Exception as error:  # whatever transformers raises; the text is what a user needs
        said = f"{type(error).__name__}: {last_line(error)}"
        inner = [v for v in full_config(raw)[0].values() if isinstance(v, dict)]
        parts = [str(v["model_type"]) for v in inner if "model_type" in v]
        if parts:
            said = f"it has parts with configs of their own; draft each by itself: {', '.join(parts)} ({said})"
        raise RequestError(f"{raw.get('model_type')!r}: its tiny model does not build and run: {said}") from error
    return Drafting(base).draft()


_NOT_SIZES = ("dropout", "_token_id", "sliding_window", "pad", "dtype", "torch", "pruned", "id2label", "label")


class Drafting(Heads):
    """Puts the family together."""

    def draft(self) -> Draft:
        self.texts = self._texts()
        attention = self._attention()
        tensors: dict[str, str] = {}
        for text, disk in self.names.patterns.items():
            said = self.texts.get(disk[0])
            if said is not None:
                tensors[text] = self._indexed(text, said)
        optional = self._optional(self.names, tensors)
        tasks, when = self._tasks(tensors)
        return self._family(self.names, tensors, tasks, when, optional, attention)

    def _family(
        self,
        names: Named,
        tensors: dict[str, str],
        tasks: dict[str, str],
        when: When,
        switched: dict[str, str],
        attention: list[Attention],
    ) -> Draft:
        base, axes = self.base, self.patterns.axes
        model = base.model
        raw = {k: v for k, v in base.raw.items() if k != "architectures"}
        # What a class may lack, it may lack under any switch.
        optional = {name: switch for name, switch in switched.items() if name not in tasks}
        named = {a for t in (*tensors.values(), *tasks.values()) for a in TensorPattern.parse(t).axes()}
        named |= {a for t in tensors for a in re.findall(r"{(\w+)}", t)}
        sizes = {a: s for a, s in axes.sizes.items() if a in named or a in names.layers}
        if "value" not in sizes and "key" in sizes:
            sizes["value"] = sizes["key"]
        spoken = {f for s in sizes.values() for f in fields_of(s)} | set(optional.values())
        spoken |= {n.eps for n in self.norms.values() if isinstance(n.eps, str)}
        disk_of = {p.param: d for d, p in base.places.items()}
        tied = None
        if self.head is not None and self.head[0] in base.trace.reads:  # type: ignore[union-attr]
            norm = self.norm_names.get(base.trace.reads[self.head[0]].normed, "")  # type: ignore[union-attr]
            head = disk_of.get(self.head[0], self.head[0])
            embedding = disk_of.get(self.head[1], self.head[1])
            if norm and head != embedding:
                generic = {n: t for t, disks in names.patterns.items() for n in disks}
                at = {n: t for n, t in generic.items() if n.startswith(self.trace.reads[self.head[0]].normed + ".")}
                inside = next((a for a in names.layers for t in at.values() if f"{{{a}}}" in t), "")
                tied = Tied(generic.get(head, head), generic.get(embedding, embedding), norm=norm, layer=inside)
            else:
                self.guesses.append("the head may share the embedding; which norm it reads could not be told")
        per_layer: dict[str, PerLayer] = {}
        count = next((base.full.get(s.name) for a, s in sizes.items() if a in names.layers and isinstance(s, Field)), 0)
        for key, value in base.full.items():
            if count and value and len(runs(value)) == count:
                per_layer[key] = "runs"
            elif isinstance(value, list) and count and len(value) == count and key != "architectures":
                per_layer[key] = "each"
            elif isinstance(value, list) and key.endswith("layers") and all(isinstance(x, int) for x in value):
                per_layer[key] = "numbers"
        for key, got in self.probes.items():
            if key not in spoken and got.shapes.keys() != base.shapes.keys() and key.startswith("first_"):
                per_layer[key] = "first"
        experts = None
        expert = next((a for a in sizes if axes.kinds[a] == "experts"), None) if sizes else None
        if expert is not None:
            chosen = [
                k
                for k in base.full
                if re.search(r"(experts_per_tok|top_?k$|moe_k)", k) and isinstance(base.full[k], int)
            ]
            groups = tuple(k for k in ("n_group", "topk_group") if isinstance(base.full.get(k), int))
            requires = {k: True for k in ("norm_topk_prob",) if base.full.get(k) is True}
            experts = Experts(
                axis=expert, chosen=chosen[0] if chosen else "num_experts_per_tok", groups=groups, requires=requires
            )
            spoken |= set(chosen[:1]) | set(groups)
            self.guesses.append(f"experts: `chosen`={experts.chosen} and what copies of experts need are guesses")
        copied = self._copied()
        follows = {k: v for k, v in self.follows.items() if k not in spoken}
        leaders = {s.name: axis for axis, s in sizes.items() if isinstance(s, Field)}
        for key in (k for k in integers(base.full) if k not in spoken):
            same = [n for n in leaders if n in base.full and base.full[n] == base.full[key]]
            # What the config class works out moves along; a count of heads was written down.
            led = [n for n in same if self.every.get(n, base).full.get(key) != base.full[key]]
            if key in ("num_key_value_heads", "num_kv_heads"):
                led = led or [n for n in same if leaders[n] == "heads"]
            if led:
                follows[key] = led[0]
                self.guesses.append(f"{key} repeats {led[0]}: a guess")
        spoken |= set(follows)
        attention = self._sound(attention, sizes)
        rules = self._rules(sizes)
        _, defaults = full_config(base.raw)
        from transformers import PreTrainedConfig

        common = set(PreTrainedConfig().to_dict()) | {"rope_parameters", "rope_theta", "rope_scaling"}
        requires = {s: base.full[s] for s in self.switches if s not in switched.values()}
        neutral = tuple(
            k
            for k in {**defaults, **raw}
            if k not in common
            and k not in spoken
            and k not in per_layer
            and k not in requires
            and k not in ("model_type", "layer_types")
        )
        neutral += tuple(k for k in ("decoder_start_token_id",) if base.full.get(k) is not None and k not in neutral)
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        bare = bool(prefix) and any(n.startswith(prefix) for n in base.shapes)
        family = Family(
            name=str(raw["model_type"]),
            model_types=(str(raw["model_type"]),),
            architectures=(type(model).__name__,),
            axes=sizes,
            tensors=tensors,
            tasks=tasks,
            norms=self.norms,
            attention=attention[0] if len(attention) == 1 else tuple(attention),
            experts=experts,
            layers=tuple(names.layers) or ("layer",),
            tied=tied,
            powers=self.powers,
            copied=copied,
            optional=optional,
            uneven=tuple(names.uneven),
            prefix=prefix if bare else "",
            per_layer=per_layer,
            follows=follows,
            rules=rules,
            requires=requires,
            neutral=neutral,
            when=when,
            sample={k: v for k, v in raw.items() if k != "model_type"},
        )
        family = self._serving(self._understood(family))
        family = replace(family, frozen=frozen(family, base, self.probes))
        for param, scale in base.trace.scales.items() if base.trace else ():
            moved = {
                p for p, x in self.probes.items() if x.trace and abs(x.trace.scales.get(param, scale) - scale) > 1e-9
            }
            if moved and not (self.head and param == self.head[1]):
                self.guesses.append(
                    f"{param}: its output is multiplied by a number that {', '.join(sorted(moved))} moves"
                )
        return Draft(family, [*dict.fromkeys([*axes.guesses, *self.guesses])], base.raw)

    def _understood(self, family: Family) -> Family:
        """The draft without the axes, the stream's and layers apart, that do not say what shapes tensors have."""
        lost = unexplained(family, self.base, self.probes)
        lost = {a: said for a, said in lost.items() if a not in family.streams and a not in family.layers}
        if not lost:
            return family
        named = re.compile(rf"\b({'|'.join(map(re.escape, lost))})\b")
        if set(lost) & {a for n in (*family.tensors, *family.tasks) for a in NamePattern(n).axes}:
            return family  # an axis in names cannot be left out
        tensors, tasks = ({n: blanked(t, named) for n, t in of.items()} for of in (family.tensors, family.tasks))
        for said in dict.fromkeys(lost.values()):
            self.guesses.append(f"{', '.join(a for a, x in lost.items() if x == said)}: not named, for {said}")
        return replace(
            family,
            axes={a: s for a, s in family.axes.items() if a not in lost},
            tensors=tensors,
            tasks=tasks,
            norms={r: n for r, n in family.norms.items() if not set(n.axes) & set(lost)},
            attention=tuple(self._sound(list(family.attentions), set(family.axes) - set(lost))),
            copied={a: s for a, s in family.copied.items() if a not in lost},
            neutral=(*family.neutral, *(f for a in lost for f in fields_of(family.axes[a]) if f in self.base.full)),
        )

    def _sound(self, attention: list[Attention], sizes: Collection[str]) -> list[Attention]:
        """Those whose axes the draft declares."""
        out = []
        for one in attention:
            lost = {a for a in (one.heads, one.kv_heads, *one.key, one.value) if a is not None} - set(sizes)
            if lost:
                self.guesses.append(f"attention over {one.heads}: no size explains {', '.join(sorted(lost))}")
            else:
                out.append(one)
        return out

    def _copied(self) -> dict[str, str]:
        out = {}
        for norm in self.norms.values():
            if norm.output == "stream" and isinstance(norm.axis, str) and norm.kind == "layer":
                out[norm.axis] = "a norm's gain and shift stand between what writes the residual stream and the stream"
        for call in self.base.trace.norms if self.base.trace else ():
            role = self.norm_names.get(call.name)
            axis = self.norms[role].axis if role else None
            if isinstance(axis, str) and call.before.bent and axis not in out:
                out[axis] = "an activation stands between what writes it and its norm"
        return out

    def _rules(self, sizes: Mapping[str, Any]) -> tuple[Divides, ...]:
        heads, hidden = sizes.get("heads"), sizes.get("hidden")
        if not isinstance(heads, Field) or not isinstance(hidden, Field):
            return ()
        n = self.base.full[hidden.name]
        odd = next(k for k in range(5, 50) if n % k)
        kv = sizes.get("kv_heads")
        fields = {heads.name: odd} | ({kv.name: odd} if isinstance(kv, Field) else {})
        derived = any(isinstance(s, Ratio) and s.by == heads.name for s in sizes.values())
        refused = probe({**self.base.raw, **fields}, run=False) is None
        return (Divides(by=heads.name, over=hidden.name),) if refused or derived else ()
