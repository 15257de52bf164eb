"""Logits of a folder's model in three programs: transformers, llama.cpp and ONNX Runtime, all in float32."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

Prompts = Sequence[Sequence[int]]

LENGTHS = (6, 20, 60, 120, 240, 440)
"""Tokens of the prompts, behind the start token."""

CONTEXT = 512
GREEDY = 64
"""New tokens of each greedy continuation."""


def prompts(folder: Path) -> list[list[int]]:
    """Real text as ids of Hugging Face's tokenizer; every program gets these, for each cuts text in its own way."""
    text = resources.files("growformer.proof").joinpath("probe.txt").read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found, at = [], 0
    for length in LENGTHS:
        if at + length > len(ids):
            at = 0
        found.append(start + ids[at : at + length])
        at += length
    return found


def stock(folder: Path) -> Any:
    """The stock model, in eval mode."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def in_transformers(folder: Path, given: Prompts) -> torch.Tensor:
    """Logits [position of any prompt, token] in PyTorch."""
    model = stock(folder)
    return torch.cat([model(torch.tensor([list(ids)])).logits[0] for ids in given])


def gguf(folder: Path, converter: Path) -> Path:
    """The folder as one GGUF file with float32 weights, by llama.cpp's own converter.

    It is run as a program, but in this process: what it imports takes longer than what it does.

    Raises:
        RuntimeError: it fails; with the end of what it said.
    """
    out = folder / "model.gguf"
    if out.is_file():
        return out
    if str(converter.parent) not in sys.path:
        sys.path.append(str(converter.parent))
    words, said = sys.argv, io.StringIO()
    sys.argv = [str(word) for word in (converter, folder, "--outtype", "f32", "--outfile", out)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_path(str(converter), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{converter.name} {folder.name}: {said.getvalue()[-800:]}") from end
    finally:
        sys.argv = words
    return out


@contextlib.contextmanager
def llama(folder: Path, converter: Path, cache: str = "F32") -> Iterator[Any]:
    """llama.cpp's model of a folder: float32 weights, a cache of that type, no flash attention."""
    import llama_cpp

    kind = getattr(llama_cpp, f"GGML_TYPE_{cache}")
    options: dict[str, Any] = {"type_k": kind, "type_v": kind, "flash_attn": False}
    model = llama_cpp.Llama(
        str(gguf(folder, converter)), n_ctx=CONTEXT, logits_all=True, n_threads=1, verbose=False, **options
    )
    try:
        yield model
    finally:
        model.close()


def loads(folder: Path, converter: Path) -> bool:
    """Whether llama.cpp loads a folder's file at all."""
    try:
        with llama(folder, converter):
            return True
    except ValueError:
        return False


def _evaluated(model: Any, ids: Sequence[int]) -> torch.Tensor:
    model.reset()
    model.eval(list(ids))
    return torch.tensor(model.scores[: model.n_tokens]).clone()


def in_llama(folder: Path, given: Prompts, converter: Path, cache: str = "F32") -> torch.Tensor:
    """Logits [position of any prompt, token] in llama.cpp."""
    with llama(folder, converter, cache) as model:
        return torch.cat([_evaluated(model, ids) for ids in given])


def greedy_in_llama(folder: Path, given: Prompts, converter: Path, vocab: int) -> list[list[int]]:
    """Each prompt continued greedily, among the first `vocab` tokens, with the key-value cache."""
    found = []
    with llama(folder, converter) as model:
        for ids in given:
            new = [int(_evaluated(model, ids)[-1, :vocab].argmax())]
            while len(new) < min(GREEDY, CONTEXT - len(ids)):
                model.eval([new[-1]])
                new.append(int(model.scores[model.n_tokens - 1, :vocab].argmax()))
            found.append(new)
    return found


class _Logits(torch.nn.Module):
    """A model whose only output is its logits, for a graph has no caches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return out


def onnx(folder: Path) -> Path:
    """The folder's model as an ONNX graph for prompts of any length."""
    out = folder / "model.onnx"
    if not out.is_file():
        length = torch.export.Dim("length", min=2, max=CONTEXT)
        example = (torch.arange(3, 11)[None],)
        torch.onnx.export(
            _Logits(stock(folder)), example, out, dynamo=True, dynamic_shapes=({1: length},), verbose=False
        )
    return out


def in_onnx(folder: Path, given: Prompts) -> torch.Tensor:
    """Logits [position of any prompt, token] in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx(folder), providers=["CPUExecutionProvider"])
    (name,) = (told.name for told in session.get_inputs())
    return torch.cat(
        [torch.tensor(session.run(None, {name: torch.tensor([list(ids)]).numpy()})[0][0]) for ids in given]
    )
