"""Copies that a plan names as alike: those that the certificate finds in the grown numbers, never others."""

from typing import Any

import pytest

from growformer.api.planned import method_named
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.planning.alike import alike
from growformer.planning.choices import Choices
from growformer.planning.moves import field
from growformer.planning.plan import Plan
from growformer.planning.resolve import resolve_growth
from growformer.planning.sizes import resolve_sizes
from tests.proof.certified import LLAMA, grow_planned

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
WIDE = {"intermediate_size": 56, **HEADS, "hidden_size": 48}
REQUESTS: dict[str, list[dict[str, int]]] = {
    "llama": [
        {"intermediate_size": 41},
        {"intermediate_size": 84},
        HEADS,
        WIDE,
        WIDE | {"num_hidden_layers": 5},
        {"intermediate_size": 41, "hidden_size": 48},
        {"intermediate_size": 56, "hidden_size": 31},
        {"num_hidden_layers": 6},
    ],
    "gpt2": [{"n_embd": 48, "n_head": 8}, {"n_embd": 48, "n_head": 8, "n_inner": 74}, {"n_embd": 72, "n_head": 12}],
}
MIXED = [
    "hyperclone,layer=paper",
    "hyperclone,hidden=zero-in",
    "hyperclone,heads=lemon",
    "staged,mlp=hyperclone",
    "staged,mlp=halves",
    "staged,heads=lemon,layer=zero-in",
    "twins,hidden=paper,mlp=staged",
    "sparkling,hidden=hyperclone",
]
LEFT = ("dyadic", "lemon", "staged,mlp=halves", "staged,heads=lemon,layer=zero-in")
"""Methods of which a plan may say less than a certificate: some copies of an axis are alike, or in new layers only."""


def named(plan: Plan) -> set[str]:
    """Config fields whose copies a plan says are alike."""
    notes = [note.split(": nothing tells the copies")[0] for note in plan.notes if "nothing tells the copies" in note]
    return {grown.split(" ")[0] for note in notes for grown in note.split(", ")}


@pytest.mark.parametrize("method", [*METHODS, *MIXED])
def test_a_plan_names_what_the_certificate_finds(method: str) -> None:
    grown = 0
    for kind, requests in REQUESTS.items():
        for request in requests:
            try:
                plan, growth = grow_planned(kind, request, method=method)
            except RequestError:
                continue  # an axis that the method does not grow
            certificate = growth.certify()
            if not plan.changes:
                assert certificate.ok
            if not certificate.ok:
                continue
            grown += 1
            found = {field(growth.family, axis) for axis in certificate.inseparable}
            assert named(plan) <= found if method in LEFT else named(plan) == found, (kind, request)
    assert grown or not METHODS[method].preserving


def test_one_sentence_names_all_of_them() -> None:
    plan, _ = grow_planned("llama", WIDE, method="hyperclone")
    (said,) = [note for note in plan.notes if "copies" in note]
    assert all(grown in said for grown in ("num_attention_heads 4 -> 8", "hidden_size 24 -> 48", "lemon"))


def test_an_optimizer_that_forgets_is_named() -> None:
    plan, _ = grow_planned("llama", WIDE, method="sparkling")
    assert [note for note in plan.notes if "but an optimizer that forgets them" in note]


@pytest.mark.parametrize(
    ("pattern", "method"), [("down_proj", "lemon"), ("down_proj", "halves"), ("up_proj", "zero-in")]
)
def test_control_one_tensor_made_otherwise_tells_them(pattern: str, method: str) -> None:
    family: Any = FAMILIES["llama"].of(LLAMA)
    request = {"intermediate_size": 56}
    (one, _), (other, _) = (grow_planned("llama", request, method=name) for name in ("hyperclone", method))
    sizes = resolve_sizes(family, LLAMA, request, Choices(), None)
    growth = resolve_growth(family, sizes, method_named("hyperclone"), tied=False)
    assert alike(family, growth, one.tensors)
    broken = [other.by_name[t.name] if pattern in t.name else t for t in one.tensors]
    assert not alike(family, growth, broken)
