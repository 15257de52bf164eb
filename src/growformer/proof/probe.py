"""Inputs for a comparison: real text where the checkpoint has a tokenizer, random tokens where it has none."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from growformer.errors import UncheckedError

if TYPE_CHECKING:
    import torch

__all__ = ["Tokens", "position_limits", "probe_tokens"]

_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
"""Config fields that limit a sequence of tokens."""

# Any one of these makes a tokenizer; without one, AutoTokenizer may still build an empty one from the config alone.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids for a comparison.

    Attributes:
        tokens: [sequence, position] ids, every one below the vocabulary size.
        kind: "text" for the packaged prose under the checkpoint's own tokenizer, else "random".
        reason: why the tokens are random; empty for text.
    """

    tokens: "torch.Tensor"
    kind: Literal["text", "random"]
    reason: str = ""


def _text_ids(folder: Path, vocab: int) -> tuple[list[int], str]:
    """The packaged prose as ids below `vocab`, or no ids and the reason."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return [], "the folder has no tokenizer"
    import transformers

    text = resources.files("growformer.proof").joinpath("probe.txt").read_text(encoding="utf-8")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Tokenizers fail in as many ways as there are of them, and random tokens are a sound second choice.
    except Exception as error:
        return [], f"its tokenizer cannot be used ({type(error).__name__}: {error})"
    ids = [int(token) for token in ids if token < vocab]
    if len(set(ids)) < 2:
        return [], "its tokenizer gives one id for every text"
    return ids, ""


def position_limits(config: Any) -> list[int]:
    """How many positions the model has, by each field of its (text) config that says so."""
    found = [getattr(config, name, None) for name in _POSITIONS]
    return [limit for limit in found if isinstance(limit, int)]


def probe_tokens(folder: Path, batch: int, length: int, seed: int) -> Tokens:
    """Choose tokens to compare two models on, from the source's folder.

    Args:
        folder: a Hugging Face folder with config.json.
        batch: sequences.
        length: positions of each; clipped to what the model has.
        seed: picks where in the text each sequence starts, or the random tokens. The same seed gives the same tokens
            on every machine.

    Returns:
        The tokens, and whether they are text. The text starts over where it is shorter than what is asked.

    Raises:
        SourceError: the folder holds no stock config.
        UncheckedError: the model has no vocabulary, so tokens say nothing about it.
    """
    import torch

    from growformer.proof.float64 import stock_config

    config = stock_config(folder).get_text_config()
    vocab = getattr(config, "vocab_size", None)
    if not vocab:
        raise UncheckedError(
            f"{folder} is a {config.model_type} without a vocabulary: it cannot be compared on tokens. Give its own "
            "kind of input to growformer.proof.functional instead."
        )
    # RoBERTa counts positions from behind the padding token's id; leaving as many unused costs the others nothing.
    pad = getattr(config, "pad_token_id", None)
    unused = pad + 1 if isinstance(pad, int) and 0 <= pad <= 2 else 0
    length = min([length, *(max(1, limit - unused) for limit in position_limits(config))])
    generator = torch.Generator().manual_seed(seed)
    ids, reason = _text_ids(folder, vocab)
    if not ids:
        return Tokens(torch.randint(vocab, (batch, length), generator=generator), "random", reason)
    text = torch.tensor(ids)
    starts = torch.randint(len(ids), (batch, 1), generator=generator)
    return Tokens(text[(starts + torch.arange(length)) % len(ids)], "text")
