"""Facts of attention: its axes, rotary positions, linear biases, scaled scores; and what switches add."""

from __future__ import annotations

import re
from typing import Any

from growformer.algebra import Attention, Rotary
from growformer.drafts.modules import biased, same_tokens, turning
from growformer.drafts.names import Named
from growformer.drafts.reading import size_of
from growformer.drafts.texts import Texts


class Attending(Texts):
    """Adds facts of attention and optional tensors."""

    def _attention(self) -> list[Attention]:
        out: list[Attention] = []
        same = same_tokens(self.base.raw)
        numbers = [i for i, s in enumerate(self.base.trace.scores) if s.used] if self.base.trace else []
        for i, score in zip(numbers, self.patterns.scores, strict=True):
            axes = self.patterns.axes
            heads = [n.root for n in score.heads if n.root in self.patterns.heads]
            whole = next(iter(heads), None) or next(
                (w for k, w in self.patterns.kv.items() if any(n.root is k for n in score.heads)), None
            )
            if whole is None:
                continue
            query, _ = self.patterns._one(whole, "")
            kv = next((k for k, w in self.patterns.kv.items() if w is whole), None)
            kv_heads = self.patterns._one(kv, "")[0] if kv is not None else None
            if query not in axes.sizes:
                self.guesses.append(f"heads of attention: {query}, which no field counts alone; they stay as they are")
                continue
            keys = self._atoms(score.query.writers, "q") or ("key",)
            value = next(iter(self._atoms(score.value.writers, "v") if score.value else ()), "value")
            twin = same.scores[i] if same is not None and i < len(same.scores) else None
            facts: dict[str, Any] = {}
            if any(a.heads == query and a.key == keys and a.rotary is not None for a in out):
                continue
            turned = turning(twin, same) if twin is not None and same is not None else None
            if turned is not None:
                facts["rotary"] = self._rotary(turned, keys)
            elif twin is not None and biased(twin):
                facts["alibi"] = "mpt" if "attn_config" in self.base.full else "bloom"
                self.guesses.append(f"linear biases: slopes as in {facts['alibi']} are a guess")
            if keys != ("key",):
                facts["key"] = keys
            if value not in ("value", *axes.sizes):
                value = "value"
            attention = Attention(
                heads=query,
                kv_heads=kv_heads if kv_heads in axes.sizes else None,
                value=value,
                scaled=self._scaled(i),
                **facts,
            )
            if attention not in out:
                out.append(attention)
        if len(out) > 1:  # layers without rotary positions (NoPE) among others with them
            turned_ones = [a for a in out if a.rotary is not None]
            out = [a for a in out if a.rotary is not None or not any(
                b.heads == a.heads and b.key == a.key for b in turned_ones)]  # fmt: skip
        return out

    def _rotary(self, turned: Any, keys: tuple[str, ...]) -> Rotary:
        facts: dict[str, Any] = {}
        if turned.layout == "interleaved":
            facts["layout"] = "interleaved"
        if len(keys) > 1:
            at, sizes = 0, []
            for axis in keys:
                n = self.base.full.get(getattr(self.patterns.axes.sizes.get(axis), "name", ""), 0)
                sizes.append((at, n, axis))
                at += n
            facts["axis"] = next((axis for start, n, axis in sizes if start == turned.start), keys[-1])
        else:
            if keys[0] != "key":
                facts["axis"] = keys[0]
            if turned.count < turned.size:
                own = [k for k, v in self.base.full.items() if v == turned.count and "rot" in k]
                if own:
                    facts["turned"] = own[0]
                else:
                    known = ("rotary_pct", "partial_rotary_factor", "rotary_percent")
                    facts["partial"] = next(
                        (k for k in known if k in self.base.raw or k in self.base.full), "partial_rotary_factor"
                    )
            else:
                rope = self.base.full.get("rope_parameters") or {}
                if "partial_rotary_factor" in rope or "partial_rotary_factor" in self.base.full:
                    facts["partial"] = "partial_rotary_factor"
        return Rotary(**facts)

    def _scaled(self, i: int) -> bool:
        ok = True
        moved = False
        for p in self.every.values():
            if p.trace is None or i >= len(p.trace.scores):
                continue
            score = p.trace.scores[i]
            size = (score.axis and size_of(score.axis)) or 1
            base = self.base.trace.scores[i] if self.base.trace else score
            was = size_of(base.axis)
            if size != was:
                moved = True
                ok &= abs(score.scale / base.scale - (was / size) ** 0.5) < 1e-4
        if not moved:
            self.guesses.append("whether scores are divided by the root of the head size: no probe could change it")
        return ok

    def _optional(self, names: Named, tensors: dict[str, str]) -> dict[str, str]:
        out: dict[str, str] = {}
        generic = {n: t for t, disks in names.patterns.items() for n in disks}
        for switch, other in self.switches.items():
            gone = set(self.base.shapes) - set(other.shapes)
            come = set(other.shapes) - set(self.base.shapes)
            same = all(other.shapes[n] == s for n, s in self.base.shapes.items() if n in other.shapes)
            if not same or (gone and come):
                self.guesses.append(f"{switch}={not self.base.full[switch]} has other tensors: write it under `when`")
                continue
            on = bool(self.base.full[switch])
            if gone and on:
                out |= {generic[n]: switch for n in gone if n in generic}
            elif come and not on:
                out |= self._come(come, switch, tensors, generic)
            else:
                self.guesses.append(f"{switch}={on} takes tensors away: write it under `when`")
        return out

    def _come(self, come: set[str], switch: str, tensors: dict[str, str], generic: dict[str, str]) -> dict[str, str]:
        """Tensors that a switch adds: biases, which stand beside their weights."""
        out = {}
        plain = {re.sub(r"\d+", "#", n): n for n in come}
        for name in plain.values():
            weight = re.sub(r"bias$", "weight", name)
            pattern = generic.get(weight)
            if weight == name or pattern is None or pattern not in tensors:
                self.guesses.append(f"{switch} adds {name}: write it under `when`")
                continue
            text = tensors[pattern]
            written = text.split(" <- ")[0] if " <- " in text else text.split(" -> ")[-1]
            bias = re.sub(r"weight$", "bias", pattern)
            role, _, rest = text.partition(": ")
            tensors[bias] = f"{role}: + {rest[2:]}" if rest.startswith("* ") else f"-> {written}"
            out[bias] = switch
        return out
