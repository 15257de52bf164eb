"""Which norms on the stream end the layers of a post-norm model: read off what reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from growformer.algebra import Family, TensorPattern
from growformer.families import FAMILIES
from growformer.planning.migrate import chained
from tests.drafts.sampled import drafted


def fed(family: Family) -> dict[str, str]:
    """By tensor of a norm on the stream, the layers that it feeds."""
    out = {}
    for name, text in {**family.tensors, **family.tasks}.items():
        for atom in TensorPattern.parse(text).atoms():
            norm = family.norms.get(atom.role or "")
            if norm is not None and norm.output == "stream":
                out[name] = norm.feeds
    return out


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_the_norms_that_end_layers_are_those_of_the_literal(name: str) -> None:
    found = fed(drafted(name))
    assert found == fed(FAMILIES[name])
    assert {"", "layer"} == set(found.values())  # a norm inside the layers ends none
    assert chained(drafted(name), "layer")
    # The control: without the fact nothing ends the layers.
    bare = {role: replace(norm, feeds="") for role, norm in drafted(name).norms.items()}
    assert not chained(replace(drafted(name), norms=bare), "layer")


def test_each_tower_has_its_own() -> None:
    family = drafted("bart")
    assert fed(family) == fed(FAMILIES["bart"])
    assert set(fed(family).values()) == {"", "layer", "decoder_layer"}
    assert chained(family, "layer") and chained(family, "decoder_layer")


def test_a_norm_that_only_embeds_feeds_no_layers() -> None:
    """ModernBERT's embedding norm is read by the first layer, and no layer ends in a norm."""
    norms = drafted("modernbert").norms.values()
    assert any(norm.output == "stream" for norm in norms)
    assert {norm.feeds for norm in norms} == {""}
