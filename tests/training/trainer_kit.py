"""A tiny Llama under the Hugging Face Trainer, for the tests of its callback and of its checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny import build

pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate: pip install 'growformer[trainer]'")

VOCAB = 37
STEPS = 7
GROWN_AT = 3
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14}
SIZES = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 4, **HEADS}
ROWS = torch.randint(0, VOCAB, (64, 12), generator=torch.Generator().manual_seed(0))

Tensors = dict[str, torch.Tensor]


def model(dtype: torch.dtype = torch.float32) -> Any:
    """Tied, with biases; every parameter random."""
    return build("llama-tied-bias").to(dtype).train()


def loaded(folder: Path) -> Any:
    """What stock loading gives."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def trainer(of: Any, out: Path, *callbacks: Any, optimizers: Any = (None, None), **options: Any) -> Any:
    """A stock Trainer: a step takes two passes, every step is logged and saved."""
    told: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(output_dir=str(out), **told | options)
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    return transformers.Trainer(
        model=of,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def weights(of: Any) -> Tensors:
    return {name: x.detach().clone() for name, x in of.state_dict().items()}


def equal(one: Tensors, other: Tensors) -> bool:
    """To the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Seen(transformers.TrainerCallback):
    """What an integration such as TensorBoard's is told: the step and what is logged after it."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))

    def steps(self, key: str) -> list[int]:
        return [step for step, logs in self.logs if key in logs]


def growths(seen: Seen) -> Sequence[dict[str, float]]:
    return [logs for _, logs in seen.logs if "growth/step" in logs]
