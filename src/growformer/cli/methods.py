"""`growformer methods`: the ways of growing."""

from __future__ import annotations

from growformer.cli import show
from growformer.methods import METHODS


def run_methods(json: bool) -> None:
    """`growformer methods`."""
    rows = [(m.name, m.source, "yes" if m.preserving else "no") for m in METHODS.values()]
    if json:
        show.as_json([{"name": n, "source": s, "preserving": p == "yes"} for n, s, p in rows])
    else:
        show.table(("method", "source", "same function"), rows)
