"""The TokenFormer model against a slow reading of its equation, and as a model of transformers."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import growformer
from growformer.models.tokenformer import Pattention, TokenFormerConfig, TokenFormerForCausalLM
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64_from, true_float64
from tests.tokenformer.kit import FAMILY, loaded, randomised, relative, tokens

TAU, EPS = 1.7, 0.03


def slow(x: Tensor, keys: Tensor, values: Tensor) -> np.ndarray:
    """Pattention by loops: GeLU(τ A_ij / sqrt(sum_k A_ik² + eps)) V."""
    out = np.zeros((len(x), values.shape[1]))
    for i, row in enumerate(x.tolist()):
        scores = [sum(a * b for a, b in zip(row, key, strict=True)) for key in keys.tolist()]
        root = math.sqrt(math.fsum(a * a for a in scores) + EPS)
        for score, value in zip(scores, values.tolist(), strict=True):
            s = TAU * score / root
            weight = s * (1 + math.erf(s / math.sqrt(2))) / 2
            out[i] += weight * np.array(value)
    return out


def pattention(n: int = 7) -> Pattention:
    with true_float64(strict=False):
        made = randomised(Pattention(n, 5, 6, TAU, EPS))
    return made.double()


def test_it_is_its_equation() -> None:
    of, x = pattention(), torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with true_float64():
        found = of(x)
    wanted = torch.from_numpy(slow(x, of.keys, of.values))
    assert relative(wanted, found) <= BAR
    of.eps = 0.0
    with true_float64():
        assert relative(wanted, of(x)) > BAR, "eps is seen"


def test_zeros_of_any_kind_give_numbers() -> None:
    """An input, or keys, of zeros: eps keeps the scores finite, and their gradients."""
    of = Pattention(7, 5, 6, TAU, 1e-6)
    with torch.no_grad():
        of.keys.zero_()
        of.values.normal_(generator=torch.Generator().manual_seed(0))
    out = of(torch.ones(2, 5))
    out.square().sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert of.keys.grad is not None and bool(of.keys.grad.isfinite().all())


def test_tau_is_the_root_of_the_tokens_once() -> None:
    made = TokenFormerConfig(qkv_tokens=20, proj_tokens=18, ffn_tokens=28, proj_tau=3.0)
    assert (made.qkv_tau, made.proj_tau, made.ffn_tau) == (math.sqrt(20), 3.0, math.sqrt(28))
    later = TokenFormerConfig.from_dict({**made.to_dict(), "qkv_tokens": 40})
    assert later.qkv_tau == math.sqrt(20)


def test_a_model_says_the_same_with_its_cache(folder: Path) -> None:
    model, x = loaded(folder), tokens()
    with torch.no_grad():
        whole = model(input_ids=x).logits
        first = model(input_ids=x[:, :7], use_cache=True)
        rest = model(input_ids=x[:, 7:], past_key_values=first.past_key_values).logits
    assert torch.allclose(whole[:, 7:], rest, atol=1e-5)
    assert model.generate(x, max_new_tokens=3, do_sample=False).shape == (len(x), x.shape[1] + 3)


def test_later_tokens_are_not_seen(folder: Path) -> None:
    model, x = loaded(folder), tokens()
    with torch.no_grad():
        before, after = model(input_ids=x).logits, model(input_ids=torch.cat([x[:, :-1], x[:, -1:] ^ 1], 1)).logits
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before, after)


def test_it_is_clean_in_float64(folder: Path) -> None:
    """The stock pieces cast to float32 inside; the strict mode counts what it did not turn into float64."""
    source = loaded(folder)
    config = {**source.config.to_dict(), "architectures": ["TokenFormerForCausalLM"]}
    model = build64_from(config, {name: x.double() for name, x in source.state_dict().items()})
    with true_float64():
        found = model(input_ids=tokens()).logits
    assert found.dtype == torch.float64
    assert 0 < relative(found, source(input_ids=tokens()).logits.double()) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_new_weights_are_drawn(implementation: str) -> None:
    config = TokenFormerConfig(**FAMILY.sample)
    torch.manual_seed(0)
    model = TokenFormerForCausalLM._from_config(config, attn_implementation=implementation)
    stds = {name: float(x.detach().std()) for name, x in model.named_parameters() if x.dim() > 1}
    assert stds and all(0.015 < std < 0.025 for std in stds.values())
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(x.grad is not None and bool(x.grad.any()) for x in model.parameters())


def test_a_fresh_process_loads_it(folder: Path, tmp_path: Path) -> None:
    """Saved again, every bit of the weights is what it was, and no code comes from the folder.

    Where nobody imported the model, growformer does so itself when it meets its model type.
    """
    model = loaded(folder)
    model.save_pretrained(tmp_path / "again")
    torch.save(model(input_ids=tokens()).logits.detach(), tmp_path / "logits.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import growformer as gf\n"
        "from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM\n"
        "folder, logits = sys.argv[1:]\n"
        "assert 'tokenformer' not in CONFIG_MAPPING\n"
        "assert gf.plan(folder, ffn_tokens=40).target_config['ffn_tokens'] == 40\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "assert type(AutoConfig.from_pretrained(folder)).__name__ == 'TokenFormerConfig'\n"
        "x = torch.randint(37, (3, 12), generator=torch.Generator().manual_seed(5))\n"
        "wanted = torch.load(logits, weights_only=True)\n"
        "assert torch.allclose(model(input_ids=x).logits, wanted, atol=1e-6)\n"
    )
    paths = os.pathsep.join([str(Path(growformer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again"), str(tmp_path / "logits.pt")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
