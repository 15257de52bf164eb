"""What a user says of methods: one name, others for some kinds, and what is refused, with what would work."""

import pytest
import torch
from method_kit import grow, sources, stock

import growformer as gf
from growformer.algebra import KINDS
from growformer.api.planned import method_named
from growformer.errors import RequestError
from growformer.methods import METHODS
from growformer.planning import Plan
from tests.tiny import build


def test_one_name_is_a_method() -> None:
    for name, method in METHODS.items():
        assert method_named(name) is method and method.name == name
        assert set(method.ways) <= set(KINDS) and method.source and method.about


def test_kinds_have_methods_of_their_own() -> None:
    made = method_named("lemon,key=paper, value=zero-in")
    lemon, ways = METHODS["lemon"].ways, made.ways
    assert ways["mlp"] == lemon["mlp"] and ways["hidden"] == lemon["hidden"]
    assert ways["key"] == METHODS["paper"].ways["key"] and ways["value"] == METHODS["zero-in"].ways["value"]
    assert made.name == "lemon,key=paper, value=zero-in"
    # Without a first name the rest is the paper's.
    assert method_named("hidden=hyperclone").ways == {
        **METHODS["paper"].ways,
        "hidden": METHODS["hyperclone"].ways["hidden"],
    }


def test_the_last_word_for_a_kind_counts() -> None:
    assert method_named("paper,mlp=lemon,mlp=halves").ways["mlp"] == METHODS["halves"].ways["mlp"]


def test_a_mixed_method_grows_by_each() -> None:
    case = grow(
        "llama", "hyperclone,key=paper,value=paper,mlp=lemon", head_dim=16, hidden_size=48, intermediate_size=41
    )
    assert case.plan.method == "hyperclone,key=paper,value=paper,mlp=lemon" and case.plan.function == "exact"
    assert sources(case.plan, "hidden") == [*range(24)] * 2 and None in sources(case.plan, "value")
    assert Plan.from_json(case.plan.to_json()).method == case.plan.method


def test_a_part_that_changes_the_function_makes_the_whole_change_it() -> None:
    assert not method_named("paper,layer=stack").preserving
    plan = gf.plan(stock("llama"), method="paper,layer=stack", intermediate_size=40)
    assert plan.function == "exact"  # no layer grows
    assert gf.plan(stock("llama"), method="paper,layer=stack", num_hidden_layers=6).function == "changed"


REFUSED = [
    ("lemmon", r"'lemmon' is unknown; did you mean lemon\? growformer methods lists"),
    ("net2nett", r"did you mean net2net\?"),
    ("nothing like it", r"'nothing like it' is unknown; growformer methods lists"),
    ("lemon,key=papr", r"'papr' is unknown; did you mean paper\?"),
    ("lemon,keys=paper", r"'keys=paper' should be KIND=METHOD, with KIND one of mlp, heads, value, key, hidden, layer"),
    ("lemon,paper", r"'paper' should be KIND=METHOD"),
    ("lemon,key=", r"'key=' should be KIND=METHOD"),
    ("lemon,key=hyperclone", r"hyperclone does not grow key; it grows mlp, heads, hidden"),
    ("lemon,", r"'' should be KIND=METHOD"),
    ("", r"is unknown"),
]


@pytest.mark.parametrize(("name", "said"), REFUSED)
def test_words_that_are_none(name: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        method_named(name)


@pytest.mark.parametrize(
    ("kind", "method", "request_", "said"),
    [
        ("llama", "net2net", {"head_dim": 16}, r"rotary positions turn queries and keys.*key=paper works"),
        ("qwen3", "net2net", {"head_dim": 20}, r"a norm reads queries and keys.*key=paper works"),
        (
            "llama",
            "hyperclone",
            {"hidden_size": 36},
            r"hidden_size=36: a norm reads hidden.*hidden_size=48 is the next",
        ),
        (
            "llama",
            "hyperclone",
            {"num_hidden_layers": 4},
            r"says nothing of that; it grows mlp, heads, hidden; --method",
        ),
        ("llama", "hidden=twins", {"hidden_size": 36}, r"twins does not grow hidden; it grows mlp, heads, value"),
        ("llama", "zero-in", {"num_attention_heads": 8}, r"old values.*heads=paper works"),
        ("llama", "stack", {"num_hidden_layers": 5}, r"5 layers are no multiple of 3: .*; 6 works"),
        ("llama", "midas", {"num_hidden_layers": 7}, r"middle 4 of 3 layers would be copied; at most 6"),
        ("llama", "solar", {"num_hidden_layers": 5}, r"an even number of layers up to 6; 6 works"),
        ("llama", "solar", {"num_hidden_layers": 8}, r"up to 6; 6 works"),
        ("bloom", "net2net", {"n_head": 8, "hidden_size": 48}, r"copies of heads differ by the slope.*heads=paper"),
        ("bloom", "twins,hidden=paper", {"n_head": 8, "hidden_size": 48}, r"pairs of heads differ by the slope"),
    ],
)
def test_what_has_no_answer_says_what_has(kind: str, method: str, request_: dict[str, int], said: str) -> None:
    model = build("bloom", hidden_size=24, n_head=4, n_layer=2, vocab_size=37) if kind == "bloom" else stock(kind)
    with pytest.raises(RequestError, match=said):
        gf.plan(model, method=method, **request_)


def test_what_the_refusal_names_works() -> None:
    model = stock("llama")
    for method, request in (
        ("net2net,key=paper", {"head_dim": 16}),
        ("hyperclone", {"hidden_size": 48}),
        ("zero-in,heads=paper", {"num_attention_heads": 8}),
        ("stack", {"num_hidden_layers": 6}),
        ("solar", {"num_hidden_layers": 6}),
        ("hyperclone,layer=paper", {"num_hidden_layers": 4}),
    ):
        assert gf.plan(model, method=method, **request).parameters[1] > 0


def test_stacks_say_where_layers_stand() -> None:
    with pytest.raises(RequestError, match="leave out where new layers go"):
        gf.plan(stock("llama"), method="stack", num_hidden_layers=6, layers_at=[3, 4, 5])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    request = {"num_hidden_layers": 6} if "mlp" not in METHODS[method].ways else {"intermediate_size": 41}
    one, other = grow("llama", method, seed=3, **request), grow("llama", method, seed=3, **request)
    assert one.plan.to_json() == other.plan.to_json()
    assert all(torch.equal(x, other.after.tensors[name]) for name, x in one.after.tensors.items())


def test_another_seed_picks_others() -> None:
    for method in ("net2net", "bert2bert"):
        picks = {
            tuple(sources(grow("llama", method, seed=seed, intermediate_size=41).plan, "mlp")) for seed in range(4)
        }
        assert len(picks) == 4
    cycle = {tuple(sources(grow("llama", "lemon", seed=seed, intermediate_size=41).plan, "mlp")) for seed in range(4)}
    assert cycle == {(*range(28), *range(13))}


@pytest.mark.parametrize("method", ["halves", "matrix-split", "twins"])
def test_another_seed_draws_others(method: str) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    one, other = (grow("llama", method, seed=seed, intermediate_size=56).after.tensors[name] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_random_picks_are_drawn_from_all() -> None:
    # 4 x 28 picks of 28 units: that some unit is never picked in any has a chance of 28 (27/28)^112, about a half; that
    # six are not, next to none.
    picked: set[int | None] = set()
    for seed in range(4):
        picked |= set(sources(grow("llama", "net2net", seed=seed, intermediate_size=56).plan, "mlp")[28:])
    assert len(picked) > 22
