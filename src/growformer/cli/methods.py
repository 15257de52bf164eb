"""`growformer methods`: the ways of growing, and what was measured of them."""

from __future__ import annotations

from growformer.cli import show
from growformer.methods import METHODS
from growformer.report.methods import COLUMNS, load_results, summary


def run_methods(json: bool) -> None:
    """`growformer methods`."""
    results = load_results()
    if json:
        about = [
            {"name": m.name, "source": m.source, "about": m.about, "preserving": m.preserving, "grows": list(m.ways)}
            for m in METHODS.values()
        ]
        show.as_json({"methods": about, "measured": results})
        return
    show.table(COLUMNS, summary(results))
    show.say("")
    for method in METHODS.values():
        show.say(f"{method.name}: {method.about}")
