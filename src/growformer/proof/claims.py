"""Claims and proofs: what was checked, what was found, what was allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from growformer.errors import ChangedError, UncheckedError


@dataclass(frozen=True)
class Claim:
    """One claim about a grown model.

    Attributes:
        name: structure, algebra, stored, runtime, loads, alive, or eps (of growths that are exact up to it).
        passed: None where it could not be checked.
        found, allowed: for people.
        required: whether the request needs it.
        detail: what failed, or why it could not be checked.
        told: it is no claim but a measurement that the user should see.
    """

    name: str
    passed: bool | None
    found: str
    allowed: str = ""
    required: bool = True
    detail: str = ""
    told: bool = False


@dataclass(frozen=True)
class Proof:
    """All claims of one growth.

    Attributes:
        claims: in the order in which they were checked.
        measured: every number behind them, as plain data.
    """

    claims: tuple[Claim, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 all required claims hold; 1 one failed; 3 one could not be checked."""
        if any(claim.passed is False for claim in self.claims):
            return 1
        return 3 if any(claim.passed is None and claim.required for claim in self.claims) else 0

    def raise_if_changed(self) -> None:
        """Raise unless every required claim holds.

        Raises:
            ChangedError: a claim failed; the message names it, with what was found and what was allowed.
            UncheckedError: a required claim could not be checked.
        """
        failed = [c for c in self.claims if c.passed is False]
        if failed:
            said = "; ".join(f"{c.name}: {c.detail or f'{c.found}, allowed {c.allowed}'}" for c in failed)
            raise ChangedError(f"not the same function: {said}")
        unchecked = [c for c in self.claims if c.passed is None and c.required]
        if unchecked:
            raise UncheckedError("not checked: " + "; ".join(f"{c.name}: {c.detail}" for c in unchecked))

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(claim, found, allowed, verdict) for a table."""
        verdict = {True: "holds", False: "FAILS", None: "not checked"}
        return [(c.name, c.found, c.allowed, "told" if c.told else verdict[c.passed]) for c in self.claims]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = ["| claim | found | allowed | verdict |", "|---|---|---|---|"]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows()])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "exit_code": self.exit_code,
            "claims": [asdict(c) for c in self.claims],
            "measured": dict(self.measured),
        }
