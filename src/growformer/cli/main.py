"""The command line. Torch and transformers are imported inside commands, so that `--help` is quick."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from growformer.cli.bench import bench
from growformer.cli.demo import demo
from growformer.cli.report import report
from growformer.cli.train import train
from growformer.errors import GrowformerError, RequestError

app = typer.Typer(
    name="growformer",
    help="Grow a Transformer without changing what it computes; then keep training it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face model folder, or org/name on the Hub.")]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="New sizes, by the names of config.json.")
]
To = Annotated[Path | None, typer.Option("--to", help="Take the new sizes from this config.json.")]
LayersAt = Annotated[
    str | None, typer.Option("--layers-at", help="Places of the new layers in the grown model, such as 1,3,5.")
]
Ignore = Annotated[
    list[str] | None, typer.Option("--ignore-field", help="A config field that no fact covers and growth may ignore.")
]
MethodName = Annotated[str, typer.Option("--method", help="How new entries start; see `growformer methods`.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws for new entries.")]
Rope = Annotated[
    str, typer.Option("--rope", help="Where rotary pairs go in wider heads: theta, strided, longrope or proportional.")
]
NewTokens = Annotated[
    str, typer.Option("--new-tokens", help="open; or closed, to have probability zero (and no way to learn).")
]
Follow = Annotated[
    Path | None, typer.Option("--follow", metavar="GROWN_BASE", help="SRC is a PEFT adapter: make it fit this base.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command()
def plan(
    src: Source,
    request: Words = None,
    to: To = None,
    layers_at: LayersAt = None,
    method: MethodName = "paper",
    seed: Seed = 0,
    ignore_field: Ignore = None,
    rope: Rope = "theta",
    new_tokens: NewTokens = "open",
    follow: Follow = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan to this JSON file.")] = None,
    json: Json = False,
) -> None:
    """Show what a growth would do: tensors, sizes, fidelity, what else must change. Writes nothing."""
    from growformer.cli.commands import run_plan

    run_plan(
        src, request or [], to, layers_at, save, json,
        method=method, seed=seed, ignore_fields=ignore_field or [], rope=rope, new_tokens=new_tokens,
        follow=follow,
    )  # fmt: skip


@app.command()
def expand(
    src: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist.")],
    request: Words = None,
    to: To = None,
    layers_at: LayersAt = None,
    method: MethodName = "paper",
    seed: Seed = 0,
    dtype: Annotated[str | None, typer.Option(help="Storage dtype of the result; the source's if left out.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of one file, such as 5GB.")] = "50GB",
    memory: Annotated[str, typer.Option(help="What the blocks in the making may take together.")] = "1GiB",
    threads: Annotated[int | None, typer.Option(help="How many work at once; one for each core if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    prove: Annotated[
        str, typer.Option(help="structure, full, or auto: full where both models fit in memory.")
    ] = "auto",
    ignore_field: Ignore = None,
    rope: Rope = "theta",
    new_tokens: NewTokens = "open",
    allow_dead: Annotated[bool, typer.Option("--allow-dead", help="Go on where new entries can never learn.")] = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on where the method makes another function of the model.")
    ] = False,
    model_only: Annotated[
        bool, typer.Option("--model-only", help="Leave the training state of a Trainer's checkpoint behind.")
    ] = False,
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps over which new entries' learning rate rises, where an optimizer grows.")
    ] = 0,
    follow: Follow = None,
    json: Json = False,
) -> None:
    """Grow SRC, a model or a PEFT adapter, into the new folder OUT, and prove that it computes the same function."""
    from growformer.cli.commands import run_expand

    run_expand(
        src, out, request or [], to, layers_at, json,
        method=method, seed=seed, dtype=dtype, max_shard_size=max_shard_size, prove_level=prove, allow_dead=allow_dead,
        allow_change=allow_change,
        memory=memory, threads=threads, resume=resume, ignore_fields=ignore_field or [],
        rope=rope, new_tokens=new_tokens, model_only=model_only, warmup=warmup, follow=follow,
    )  # fmt: skip


@app.command()
def fuse(
    one: Annotated[Path, typer.Argument(metavar="ONE", help="A Hugging Face model folder, or org/name on the Hub.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another of the same family and tokenizer.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist.")],
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Needed: the fused model computes what neither of the two does.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Storage dtype of the result; the models' if left out.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of one file, such as 5GB.")] = "50GB",
    prove: Annotated[
        str, typer.Option(help="structure, full, or auto: models are run where all three fit in memory.")
    ] = "auto",
    ignore_field: Annotated[
        list[str] | None, typer.Option("--ignore-field", help="A config field that may differ; that of ONE counts.")
    ] = None,
    json: Json = False,
) -> None:
    """Fuse ONE and OTHER, of one family, into OUT, as wide as both together; say how far it is from their mean."""
    from growformer.cli.commands import run_fuse

    run_fuse(
        one, other, out, json,
        allow_change=allow_change, ignore_fields=ignore_field or [], dtype=dtype, max_shard_size=max_shard_size,
        prove_level=prove,
    )  # fmt: skip


@app.command()
def verify(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="[SRC] OUT", help="The grown folder, after the source's (or the two it was fused of)."),
    ],
    prove: Annotated[
        str, typer.Option(help="structure, full, or auto: full where both models fit in memory.")
    ] = "full",
    memory: Annotated[
        str | None, typer.Option(help="What models may take, such as 8GB; larger ones are run from disk.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Also compare the greedy continuations of this text.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of continuation.")] = 200,
    json: Json = False,
) -> None:
    """Prove from the two folders, believing nothing in the receipt, that OUT computes what SRC computes."""
    from growformer.cli.commands import run_verify

    run_verify(folders, prove, memory, prompt, tokens, json)


@app.command()
def families(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME | check]", help="One family, tensor by tensor; or the word check.")
    ] = None,
    target: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE.py]", help="What to check. A FILE.py is executed.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/families.md, from shipped results.")] = False,
    json: Json = False,
) -> None:
    """List the model families, show one, or check one: grow every axis of tiny models and prove it."""
    from growformer.cli.families import run_families

    run_families(name, target, markdown, json)


@app.command()
def methods(json: Json = False) -> None:
    """List the ways of growing."""
    from growformer.cli.methods import run_methods

    run_methods(json)


app.command()(demo)
app.command()(train)
app.command()(bench)
app.command()(report)


def run() -> None:
    """Entry point: errors are one message and an exit code (0 holds, 1 changed, 2 bad request, 3 not checked)."""
    from growformer.cli import show

    # Taking torch and transformers down object by object at the end costs half a second, and frees nothing of use.
    atexit.register(gc.freeze)
    # What transformers warns of while it loads is checked here, and said in one message. Read when it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(prog_name="growformer")
    except GrowformerError as error:
        show.error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        show.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(GrowformerError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["RequestError", "app", "run"]
