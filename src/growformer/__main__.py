"""`python -m growformer`, as torchrun starts it."""

from growformer.cli.main import run

run()
