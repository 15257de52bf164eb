"""One check in a process of its own: `python -m growformer.proof.worker`, JSON in, JSON out.

The request is the first argument or, without one, standard input: {"command": ..., arguments}. Commands:

    functional   {src, out, tokens}            -> the fields of Difference
    runtime      {src, out, tokens, floor}     -> {difference, floor, ratio, passed}
    greedy       {folder, prompt, n}           -> {ids}
    load_report  {folder}                      -> see growformer.proof.functional.load_report

tokens: ids, or other inputs by keyword, or batches (see growformer.proof.inputs), as nested lists.
A GrowformerError comes back as {"error": class name, "message": text} and its exit code.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from growformer.errors import GrowformerError, UncheckedError

COMMANDS = ("functional", "runtime", "greedy", "load_report")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request.

    Raises:
        UncheckedError: the command is unknown, or an argument is missing.
    """
    if request.get("command") not in COMMANDS:
        raise UncheckedError(f"The worker knows {', '.join(COMMANDS)}; it was asked: {request}.")
    # Seconds of imports, so not before the request is known to make sense.
    from growformer.proof import functional
    from growformer.proof.inputs import from_json

    match request:
        case {"command": "functional", "src": src, "out": out, "tokens": tokens}:
            return dataclasses.asdict(functional.functional(Path(src), Path(out), from_json(tokens)))
        case {"command": "runtime", "src": src, "out": out, "tokens": tokens, "floor": floor}:
            floors = functional.NoiseFloor(**floor)
            result = functional.judged(functional.runtime(Path(src), Path(out), from_json(tokens), floors))
            return {**dataclasses.asdict(result), "ratio": result.ratio, "passed": result.passed}
        case {"command": "greedy", "folder": folder, "prompt": prompt, "n": n}:
            return {"ids": functional.greedy(Path(folder), prompt, n)}
        case {"command": "load_report", "folder": folder}:
            return functional.load_report(Path(folder))
    raise UncheckedError(f"The worker's command {request['command']} lacks arguments: {sorted(request)} were given.")


def main() -> int:
    """Read the request, print the answer as the only line on standard output, return the exit code."""
    request = json.loads(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read())
    code = 0
    # Libraries may print; standard output is for the answer alone.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = answer(request)
        except GrowformerError as error:
            result, code = {"error": type(error).__name__, "message": str(error)}, error.exit_code
    print(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main())
