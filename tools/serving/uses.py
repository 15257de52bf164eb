"""What people do with a checkpoint: train an adapter on it (PEFT), and evaluate it (lm-eval)."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import programs
import torch

STEPS = 3
ITEMS = 8


def lora(folder: Path, given: programs.Prompts, work: Path) -> dict[str, float]:
    """A LoRA on every linear layer: at its start, after some steps, loaded again, and merged.

    Returns:
        start: the largest difference of logits between the model and the model with a fresh adapter; before, after: the
        loss; reload, merged: the largest difference to the trained one.
    """
    import peft

    out = work / "adapter"
    shutil.rmtree(out, ignore_errors=True)
    torch.manual_seed(0)
    ids = torch.tensor([list(given[-1])])
    model = programs.stock(folder)

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = of.eval()(ids).logits
        return found

    plain = logits(model)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    start = logits(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    adapted.train()
    for _ in range(STEPS + 1):
        loss = adapted(ids, labels=ids).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = logits(adapted)
    adapted.save_pretrained(out)
    again = logits(peft.PeftModel.from_pretrained(programs.stock(folder), out))
    merged = logits(adapted.merge_and_unload())
    return {
        "start": float((plain - start).abs().max()),
        "before": losses[0],
        "after": losses[-1],
        "trained": float((plain - trained).abs().max()),
        "reload": float((trained - again).abs().max()),
        "merged": float((trained - merged).abs().max()),
    }


def _task(folder: Path) -> str:
    """A task of two choices, made from text that growformer ships: which half sentence goes on?"""
    folder.mkdir(parents=True, exist_ok=True)
    text = resources.files("growformer.proof").joinpath("probe.txt").read_text(encoding="utf-8")
    sentences = [s.strip() for s in text.replace("\n", " ").split(". ") if len(s.split()) >= 8][: ITEMS + 1]
    halves = [(" ".join(words[:4]), " " + " ".join(words[4:8])) for words in (s.split() for s in sentences)]
    rows = []
    for i, (start, end) in enumerate(halves[:ITEMS]):
        choices = [end, halves[i + 1][1]]
        rows.append({"start": start, "choices": choices[:: 1 if i % 2 else -1], "label": 0 if i % 2 else 1})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "items.jsonl").write_text(lines, encoding="utf-8")
    task = {
        "task": "goes_on",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    # YAML reads JSON.
    (folder / "goes_on.yaml").write_text(json.dumps(task), encoding="utf-8")
    return "goes_on"


class Evaluator:
    """lm-eval on that task.

    Args:
        work: where the task is put.

    Attributes:
        accuracy: of every folder that was evaluated.
    """

    def __init__(self, work: Path) -> None:
        from lm_eval.tasks import TaskManager

        self._name = _task(work / "task")
        self._manager = TaskManager(include_path=str(work / "task"), include_defaults=False)
        self.accuracy: dict[Path, float] = {}

    def __call__(self, folder: Path) -> torch.Tensor:
        """The log-likelihood of every choice, as one row."""
        import lm_eval

        told = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32", "device": "cpu"},
            tasks=[self._name],
            task_manager=self._manager,
            batch_size=1,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
        self.accuracy[folder] = told["results"][self._name]["acc,none"]
        samples = sorted(told["samples"][self._name], key=lambda one: one["doc_id"])
        return torch.tensor([[float(found[0]) for one in samples for found in one["filtered_resps"]]])
