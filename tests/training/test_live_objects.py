"""The objects of a run stay the same through a growth, and what a user has set on them stays set."""

import copy
import weakref
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.checkpoint.layout import layout_of
from growformer.errors import RequestError
from growformer.optim import rates_of
from growformer.proof.bar import BAR
from growformer.training.changes import Changes
from tests.training.live_kit import GROWTHS, adamw, batch, model, named_state, relative, train

KIND = "llama-tied-bias"
ALL = GROWTHS[KIND]["all"]


def logits(of: Any) -> torch.Tensor:
    with torch.no_grad():
        return of(input_ids=batch(7)).logits


def test_references_stay_valid() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(of, optimizer, range(2), lambda _: schedule.step())
    modules, parameters = set(map(id, of.modules())), list(of.parameters())
    layer, weight, config = of.model.layers[1], of.model.layers[1].mlp.up_proj.weight, of.config
    children, groups, held = of.model.layers._modules, optimizer.param_groups, optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["mine"] = "kept"
    weight.mine = "kept"
    ids = set(map(id, parameters))
    gf.grow(of, optimizer, layers_at=[1, 3], **ALL)

    assert modules < set(map(id, of.modules())) and ids < set(map(id, of.parameters()))
    assert of.model.layers[2] is layer and layer.mlp.up_proj.weight is weight and of.model.layers._modules is children
    assert list(children) == ["0", "1", "2", "3", "4"]
    assert weight.shape == (40, 36) and weight.mine == "kept" and layer.mlp.up_proj.out_features == 40
    assert of.config is config and all(x.config is config for x in of.modules() if hasattr(x, "config"))
    assert config.num_hidden_layers == 5 and config.hidden_size == 36 and config.head_dim == 14
    assert [x.self_attn.layer_idx for x in of.model.layers] == [0, 1, 2, 3, 4]
    assert optimizer.param_groups is groups and groups[0]["params"] is held and groups[0]["mine"] == "kept"
    before = optimizer.param_groups[0]["lr"]
    train(of, optimizer, range(2, 3), lambda _: schedule.step())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before * 3 / 4)


def test_tied_embeddings_stay_tied() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    embedding = of.model.embed_tokens.weight
    gf.grow(of, optimizer, **ALL)
    assert of.lm_head.weight is of.model.embed_tokens.weight is embedding
    train(of, optimizer, range(2))
    assert of.lm_head.weight is embedding and embedding.shape == (37, 36)
    # An untied head is a parameter of its own, and stays one.
    loose = model("qwen3")
    gf.grow(loose, hidden_size=36)
    assert loose.lm_head.weight is not loose.model.embed_tokens.weight


def test_what_a_user_has_set_stays_set() -> None:
    of = model(KIND)
    calls: list[str] = []
    of.model.layers[1].register_forward_hook(lambda *_: calls.append("layer"))
    of.register_forward_pre_hook(lambda *_: calls.append("model"))
    of.gradient_checkpointing_enable({"use_reentrant": False})
    of.note, of.model.norm.variance_epsilon = "mine", 0.5
    of.model.layers[2].eval()
    of.model.layers[2].self_attn.scaling = 7.0
    of.probe = torch.nn.Linear(3, 3)
    with pytest.raises(RequestError, match=r"probe\.weight is \[3, 3\], and no tensor of its own in a stock Llama"):
        gf.grow(of, **ALL)
    of.probe = probe = torch.nn.Dropout()
    gf.grow(of, num_hidden_layers=5, intermediate_size=40, layers_at=[2, 4])
    assert of.probe is probe and of.note == "mine" and of.model.norm.variance_epsilon == 0.5
    assert [x.gradient_checkpointing for x in of.model.layers] == [True] * 5
    assert [x.training for x in of.model.layers] == [True, True, True, False, False]
    assert [x.self_attn.scaling for x in of.model.layers][3:] == [7.0, 7.0]
    out = of(input_ids=batch(1), labels=batch(1), use_cache=False)
    out.loss.backward()
    assert calls.count("model") == 1 and calls.count("layer") >= 1


@pytest.mark.parametrize("when", ["first swap", "middle swap", "last change", "states"])
def test_a_failure_in_the_middle_leaves_all_as_it_was(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, twin = model(KIND), model(KIND)
    optimizer, other = adamw(of), adamw(twin)
    mean = copy.deepcopy(of)
    for one, two in ((of, optimizer), (twin, other)):
        train(one, two, range(2))
    config, tree = copy.deepcopy(of.config.to_dict()), [(n, id(m)) for n, m in of.named_modules()]
    attributes = {name: {k: repr(v) for k, v in vars(m).items()} for name, m in of.named_modules()}
    parameters, state = [(n, id(p)) for n, p in of.named_parameters()], named_state(of, optimizer)
    groups, before = [list(map(id, g["params"])) for g in optimizer.param_groups], logits(mean)

    honest: dict[str, Any] = {"swap": Changes.swap, "refill": Changes.refill}
    count = {"swap": 0, "refill": 0}

    def failing(kind: str, at: int) -> Any:
        def run(self: Changes, *args: Any) -> None:
            count[kind] += 1
            if count[kind] == at:
                raise MemoryError(when)
            honest[kind](self, *args)

        return run

    with monkeypatch.context() as patch:
        if when == "states":
            patch.setattr("growformer.training.live.grown_state", lambda *_: (_ for _ in ()).throw(MemoryError(when)))
        elif when == "last change":  # the names of the rates, after all else
            patch.setattr(Changes, "refill", failing("refill", 3))
        else:
            patch.setattr(Changes, "swap", failing("swap", 1 if when == "first swap" else 60))
        with pytest.raises(MemoryError, match=when):
            gf.grow(of, optimizer, warmup=2, averages=[mean], **ALL)

    assert of.config.to_dict() == config and [(n, id(m)) for n, m in of.named_modules()] == tree
    assert {name: {k: repr(v) for k, v in vars(m).items()} for name, m in of.named_modules()} == attributes
    assert [(n, id(p)) for n, p in of.named_parameters()] == parameters
    assert [list(map(id, g["params"])) for g in optimizer.param_groups] == groups
    assert not rates_of(optimizer).tables and torch.equal(logits(mean), before)
    for name, kept in named_state(of, optimizer).items():
        assert (
            all(torch.equal(kept[key], value) for key, value in state[name].items())
            and kept.keys() == state[name].keys()
        )
    assert train(of, optimizer, range(2, 4)) == train(twin, other, range(2, 4))
    # And it can grow afterwards.
    gf.grow(of, optimizer, **ALL)
    train(of, optimizer, range(4, 5))


def test_gradients_in_waiting_are_refused() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    of(input_ids=batch(0), labels=batch(0)).loss.backward()
    with pytest.raises(RequestError, match=r"has a gradient.*zero_grad\(set_to_none=True\)"):
        gf.grow(of, optimizer, intermediate_size=40)
    of.zero_grad()
    gf.grow(of, optimizer, intermediate_size=40)


def test_a_pending_backward_pass_is_refused() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    loss = of(input_ids=batch(0), labels=batch(0)).loss
    with pytest.raises(RequestError, match=r"a forward pass still holds .*loss\.backward\(\)"):
        gf.grow(of, optimizer, intermediate_size=40)
    loss.backward()
    of.zero_grad()
    gf.grow(of, optimizer, intermediate_size=40)  # the loss itself may stay
    assert float(loss.detach()) > 0
    train(of, optimizer, range(1))


def test_hooks_on_gradients_are_refused() -> None:
    of = model(KIND)
    handle = of.model.norm.weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(RequestError, match=r"model\.norm\.weight has hooks on its gradient"):
        gf.grow(of, hidden_size=36)
    handle.remove()
    gf.grow(of, hidden_size=36)


def test_a_model_that_is_not_as_its_class_builds_it_is_refused() -> None:
    of = model(KIND)
    of.model.layers[0].mlp.up_proj = torch.nn.utils.parametrizations.weight_norm(of.model.layers[0].mlp.up_proj)
    with pytest.raises(RequestError, match=r"up_proj is ParametrizedLinear, and Linear in a stock LlamaForCausalLM"):
        gf.grow(of, intermediate_size=40)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda of: torch.nn.DataParallel(of), "DataParallel holds the old parameters: grow model.module"),
        (lambda of: torch.nn.Linear(2, 2), "Linear is no model of transformers"),
        (lambda of: setattr(of, "peft_config", {}) or of, "adapters of PEFT"),
        (lambda of: setattr(of, "hf_quantizer", object()) or of, "is quantised"),
    ],
)
def test_wrappers_and_others_are_refused_by_name(wrap: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        gf.grow(wrap(model(KIND)), intermediate_size=40)


def test_new_parameters() -> None:
    of = model(KIND)
    with pytest.raises(RequestError, match="has not been grown"):
        gf.new_parameters(of)
    before = sum(x.numel() for x in of.parameters())
    gf.grow(of, **ALL)
    masks, named = gf.new_parameters(of), dict(of.named_parameters())
    assert all(masks[name].shape == named[name].shape for name in masks)
    assert sum(int(mask.sum()) for mask in masks.values()) == sum(x.numel() for x in of.parameters()) - before
    whole = {t.name for t in of.growformer_plan.tensors if t.source is None}
    assert len(whole) == 2 * 16 and whole == {name for name, mask in masks.items() if mask.all()}
    # Fused experts: those of the source are old, the copies are new.
    moe = model("mixtral")
    gf.grow(moe, num_local_experts=6, intermediate_size=40)
    mask = gf.new_parameters(moe)["model.layers.0.mlp.experts.gate_up_proj"]
    assert mask.shape == (6, 80, 24) and mask[3:].all()
    assert not mask[:3, :28].any() and mask[:3, 28:40].all() and not mask[:3, 40:68].any()


def test_compiled_models_are_compiled_anew() -> None:
    frames = torch._dynamo.utils.counters["frames"]
    of = model(KIND).eval()
    compiled = torch.compile(of, backend="eager")
    before = logits(compiled)
    for width in range(32, 52, 2):  # more often than a compiled function may be compiled anew by itself
        grown, _ = gf.grow(compiled, intermediate_size=width)
        count = frames["ok"]
        after = logits(compiled)
        assert grown is compiled and frames["ok"] > count, f"at {width} it ran uncompiled"
        count = frames["ok"]
        assert torch.equal(logits(compiled), after) and frames["ok"] == count, "what is compiled is used again"
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5  # float32 norms inside
    gf.grow(compiled, num_hidden_layers=5, hidden_size=36)
    assert relative(logits(of), logits(compiled)) < BAR
    torch._dynamo.reset()


def test_a_weak_reference_is_refused() -> None:
    of = model(KIND)
    weak = weakref.ref(of.model.norm.weight)
    with pytest.raises(RequestError, match=r"weak reference to model\.norm\.weight.*torch\.compiler\.reset"):
        gf.grow(of, hidden_size=36)
    gf.grow(of, intermediate_size=40)  # which leaves that parameter as it is
    assert weak() is of.model.norm.weight


def test_the_layout_of_fused_experts() -> None:
    of = model("mixtral")
    layout = layout_of(of)
    fused = of.model.layers[1].mlp.experts.gate_up_proj
    view = layout.views["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert view.name == "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(view.of(fused), fused[2, 28:])
    assert layout_of(model(KIND)).tied == {"lm_head.weight": "model.embed_tokens.weight"}
