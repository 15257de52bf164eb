"""Where a run starts: its model, its tokenizer, its text, its optimizers."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from growformer.checkpoint import read_config
from growformer.checkpoint.stock import known_type, last_line, stock_class
from growformer.errors import RequestError, SourceError
from growformer.training.data import Tokens, Windows, byte_tokens, cut_tokens, tokenizer_print
from growformer.training.recipe import Optimizer, RecipeFile

if TYPE_CHECKING:
    import transformers

BYTES = 256
"""Tokens of a byte-level vocabulary."""


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a folder with a tokenizer has one."""


def tokenizer_folder(file: RecipeFile) -> Path | None:
    """The folder of the recipe's tokenizer: the one it names, or the first model's, if there is one in it."""
    recipe = file.recipe
    if recipe.data.tokenizer is not None:
        return file.file(recipe.data.tokenizer)
    if recipe.model.source is None:
        return None
    folder = file.file(recipe.model.source)
    return folder if any((folder / name).is_file() for name in TOKENIZERS) else None


def load_tokenizer(file: RecipeFile) -> Any | None:
    """The recipe's tokenizer; None: a token is a byte.

    Raises:
        SourceError: the folder has none that transformers loads.
    """
    folder = tokenizer_folder(file)
    if folder is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder}: transformers cannot load its tokenizer: {error}") from error


def load_text(file: RecipeFile, tokenizer: Any | None, cache: Path) -> tuple[Windows, Windows]:
    """The training text and the held-out text.

    Raises:
        RequestError: a file is in both.
        SourceError: a file cannot be read.
    """
    recipe, folder = file.recipe, tokenizer_folder(file)

    def tokens(names: list[str]) -> Tokens:
        paths = [file.file(name) for name in names]
        if tokenizer is None or folder is None:
            return byte_tokens(paths)
        return cut_tokens(paths, tokenizer, tokenizer_print(folder), cache)

    both = {file.file(name).resolve() for name in recipe.data.train} & {
        file.file(n).resolve() for n in recipe.data.valid
    }
    if both:
        raise RequestError(
            f"{file.where('data', 'valid')}: {min(both)} is trained on as well; what is held out must be other text"
        )
    train, valid = tokens(recipe.data.train), tokens(recipe.data.valid)
    return (
        Windows(train, recipe.sequence_length, recipe.seed, recipe.data.repeat),
        Windows(valid, recipe.sequence_length, recipe.seed),
    )


def first_config(file: RecipeFile, tokenizer: Any | None) -> dict[str, Any]:
    """The first model's config.json.

    Raises:
        RequestError: an unknown model type or field, a value that transformers refuses, or too small a vocabulary or
            too few positions for the data.
    """
    recipe = file.recipe
    if recipe.model.source is not None:
        config = read_config(file.file(recipe.model.source))
        made = _made(file, config)
    else:
        config = _from_scratch(file, tokenizer)
        made = _made(file, config)
    need = BYTES if tokenizer is None else len(tokenizer)
    vocab = getattr(made.get_text_config(), "vocab_size", None)
    if vocab is None or vocab < need:
        what = "bytes" if tokenizer is None else "tokens of the tokenizer"
        raise RequestError(f"{file.where('model', 'vocab_size')}: {vocab} is too small for the {need} {what}")
    positions = getattr(made.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions < recipe.sequence_length:
        raise RequestError(
            f"{file.where('sequence_length')}: {recipe.sequence_length} tokens, and the model has "
            f"max_position_embeddings={positions}; shorten the one or raise the other"
        )
    return dict(made.to_dict())


def _from_scratch(file: RecipeFile, tokenizer: Any | None) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    model, kind = file.recipe.model, file.recipe.model.model_type or ""
    if not known_type(kind):
        close = difflib.get_close_matches(kind, list(CONFIG_MAPPING), 1)
        raise RequestError(
            f"{file.where('model', 'model_type')}: {kind!r} is none that the installed transformers knows"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    cls = CONFIG_MAPPING[kind]
    known = {*cls().to_dict(), *cls.attribute_map, "tie_word_embeddings"}
    for name in model.fields:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RequestError(f"{file.where('model', name)}: is no field of {kind}'s config.json{hint}")
    # A byte is a token, so none is left for the start or end of a text.
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vocab = {"vocab_size": BYTES if tokenizer is None else len(tokenizer)}
    return {"model_type": kind, **vocab, **special, **model.fields}


def _made(file: RecipeFile, config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(config.get("model_type"))
    known_type(kind)
    try:
        made = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # each config class raises what it likes
        raise RequestError(f"{file.where('model')}: transformers refuses it: {last_line(error)}") from error
    # Encoders are in that table as well, for use as a decoder; their stock class is another one.
    if (
        type(made) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or stock_class(made) is not MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
    ):
        raise RequestError(f"{file.where('model')}: {kind} is no causal language model; `train` trains those")
    return made


def first_model(file: RecipeFile, config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """The first model, in float32: drawn by the recipe's seed, or the folder's."""
    from transformers import AutoModelForCausalLM

    if file.recipe.model.source is not None:
        folder = file.file(file.recipe.model.source)
        model: transformers.PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(file.recipe.seed)
        return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
            _made(file, config), dtype=torch.float32, trust_remote_code=False
        )


def begun(file: RecipeFile, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The first model as training begins with it: with its weights as products, where the recipe says so.

    Raises:
        RequestError: a rank under which no weight is smaller than it is.
    """
    if file.recipe.factorised is not None:
        from growformer.training.factorised import factorise

        try:
            factorise(model, file.recipe.factorised.rank)
        except RequestError as error:
            raise RequestError(f"{file.where('factorised')}: {error}") from error
    return model


def make_optimizers(file: RecipeFile, model: transformers.PreTrainedModel) -> list[torch.optim.Optimizer]:
    """The recipe's optimizer over a model's parameters, and Muon's second one.

    Each has two groups: tensors with two dims and more, and gains and biases, which are not decayed.

    Raises:
        RequestError: no class of that name, arguments that it does not take, or Muon without `others`.
    """
    asked = file.recipe.optimizer
    named = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    if asked.name != "Muon":
        if asked.others is not None:
            raise RequestError(f"{file.where('optimizer', 'others')}: belongs to Muon; {asked.name} takes every tensor")
        return [_optimizer(file, ("optimizer",), asked, named)]
    if asked.others is None:
        raise RequestError(
            f"{file.where('optimizer')}: Muon is for matrices between layers; say what trains embeddings, head and "
            "gains, such as others: {name: AdamW, lr: 3.0e-3}"
        )
    ends = {x for module in model.modules() if isinstance(module, torch.nn.Embedding) for x in module.parameters()}
    head = model.get_output_embeddings()
    ends |= set(head.parameters()) if head is not None else set()
    inner = [(name, x) for name, x in named if x.dim() == 2 and x not in ends]
    outer = [(name, x) for name, x in named if x.dim() != 2 or x in ends]
    return [
        _optimizer(file, ("optimizer",), asked, inner),
        _optimizer(file, ("optimizer", "others"), asked.others, outer),
    ]


def _optimizer(
    file: RecipeFile, key: tuple[str, ...], asked: Optimizer, named: list[tuple[str, torch.nn.Parameter]]
) -> torch.optim.Optimizer:
    cls = getattr(torch.optim, asked.name, None)
    classes = sorted(
        n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)
    )
    if asked.name not in classes or asked.name in ("Optimizer", "LBFGS", "SparseAdam"):
        raise RequestError(
            f"{file.where(*key, 'name')}: {asked.name!r} is no optimizer here; torch.optim has {', '.join(classes)}"
        )
    assert cls is not None
    takes = set(inspect.signature(cls).parameters) - {"params"}
    for name in asked.arguments:
        if name not in takes:
            raise RequestError(
                f"{file.where(*key, name)}: torch.optim.{asked.name} takes no such argument; "
                f"it takes {', '.join(sorted(takes))}"
            )
    arguments = {name: tuple(x) if isinstance(x, list) else x for name, x in asked.arguments.items()}
    wide = [x for _, x in named if x.dim() > 1]
    flat = [x for _, x in named if x.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": wide}, {"params": flat, "weight_decay": 0.0}]
    try:
        made: torch.optim.Optimizer = cls([group for group in groups if group["params"]], **arguments)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{file.where(*key)}: torch.optim.{asked.name} refuses its arguments: {error}") from error
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    return made
