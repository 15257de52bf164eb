"""What the package promises as a package: its names, what starting it loads, and what its files may hold.

Each rule is a function of its input, tested on the repository and on an input made to break it.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import growformer
import growformer.training

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
MAX_NAMES = 16
HEAVY = ("torch", "transformers")

# A change here is a change of the public interface: it goes into CHANGELOG.md as well.
PUBLIC_NAMES = [
    "AttentionExpansion",
    "GrowformerError",
    "HeadAddition",
    "HeadsExpansion",
    "HiddenExpansion",
    "LayerAddition",
    "MLPExpansion",
    "__version__",
    "compose",
    "expand",
    "expand_checkpoint",
    "fuse",
    "grow",
    "new_parameters",
    "plan",
    "verify",
]
TRAINING_NAMES = ["GrowthCallback", "Searched", "line_search"]


def project_table() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


def names_of(requirements: Iterable[str]) -> set[str]:
    """The normalized project names that `requirements` begin with, as in Typing_Extensions>=4 -> typing-extensions."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower() for line in requirements}


def loaded(statement: str, *path: Path) -> set[str]:
    """Runs `statement` in a fresh interpreter and returns which of the heavy packages it loaded.

    `path` comes first on the import path. A `SystemExit` other than 0 or None fails the statement.
    """
    script = f"""
import json, sys
try:
    {statement}
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    search = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": search}
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("import growformer", id="import growformer"),
        pytest.param("import growformer.api", id="import growformer.api"),
        pytest.param("import growformer.training", id="import growformer.training"),
        pytest.param(
            "from growformer.cli.main import run; sys.argv = ['growformer', '--help']; run()", id="growformer --help"
        ),
    ],
)
def test_start_loads_nothing_heavy(statement: str) -> None:
    assert loaded(statement) == set()


@pytest.mark.parametrize("heavy", HEAVY)
def test_start_control(heavy: str, tmp_path: Path) -> None:
    # Stand-ins with the heavy packages' names: the check goes by name, and the real ones take seconds.
    (tmp_path / f"{heavy}.py").touch()
    (tmp_path / "command.py").write_text(f"def run():\n    import {heavy}\n    raise SystemExit(0)\n")
    assert loaded("from command import run; run()", tmp_path) == {heavy}


def test_start_control_exit_code() -> None:
    with pytest.raises(AssertionError):
        loaded("raise SystemExit(2)")


def test_public_names_are_frozen() -> None:
    assert sorted(growformer.__all__) == PUBLIC_NAMES
    assert len(PUBLIC_NAMES) <= MAX_NAMES


def test_public_names_of_training_are_frozen() -> None:
    assert sorted(growformer.training.__all__) == TRAINING_NAMES
    assert [name for name in TRAINING_NAMES if getattr(growformer.training, name, None) is None] == []
    assert dir(growformer.training) == TRAINING_NAMES
    with pytest.raises(AttributeError, match="no_such_name"):
        growformer.training.no_such_name  # noqa: B018


def test_public_names_resolve() -> None:
    assert [name for name in growformer.__all__ if getattr(growformer, name, None) is None] == []


def test_public_names_are_listed_by_dir() -> None:
    assert set(PUBLIC_NAMES) <= set(dir(growformer))


def test_an_unknown_name_is_an_attribute_error() -> None:
    # A lazy package that answers every name would make the tests above pass on anything.
    with pytest.raises(AttributeError, match="no_such_name"):
        growformer.no_such_name  # noqa: B018


def test_version_is_the_project_file_s() -> None:
    version = project_table()["version"]
    assert growformer.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


# An absolute path under a person's or a machine's folder. What precedes it must not make it a part of a longer
# path or of a URL.
MACHINE_PATH = re.compile(r"(?<![\w.~/>}$-])/(?:home|root|work|Users)/[\w.-]+|\b[A-Z]:\\+Users\\+\w+")


def project_files(root: Path, *under: str) -> list[Path]:
    """The files below `under` that git tracks or would track; all of them where `root` is no git checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *under]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode == 0:
        files: Iterable[Path] = (root / name for name in listing.stdout.split("\0") if name)
    else:
        tops = [root / name for name in under]
        files = [file for top in tops for file in ([top] if top.is_file() else top.rglob("*"))]
    return sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts)


def machine_paths(files: Sequence[Path]) -> list[str]:
    """Lines of `files` that name a path of a machine, as file:line: path."""
    return [
        f"{file}:{number}: {match.group()}"
        for file in files
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        for match in MACHINE_PATH.finditer(line)
    ]


def test_no_file_names_a_path_of_a_machine() -> None:
    places = ("src", "docs", "benchmarks", ".ci", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
    files = project_files(ROOT, *places)
    assert ROOT / "src" / "growformer" / "__init__.py" in files
    assert machine_paths(files) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("see {}home/ann/model", 1),
        ('"{}root/x"', 1),
        ("{}work/main/a.py and {}Users/ann", 2),
        (r"C:\Users\ann", 1),
        ("~{}work/model", 0),
        ("https://example.org{}home/page", 0),
        ("src{}work/a.py, ../root/x", 0),
        ("at home/work/root", 0),
    ],
)
def test_machine_paths_control(line: str, found: int, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"first\n{line.replace('{}', '/')}\n")
    assert len(machine_paths([page])) == found


def test_project_files_without_git(tmp_path: Path) -> None:
    (tmp_path / "src" / "deep").mkdir(parents=True)
    inside, alone = tmp_path / "src" / "deep" / "a.py", tmp_path / "README.md"
    inside.touch()
    alone.touch()
    assert project_files(tmp_path, "src", "README.md", "absent") == [alone, inside]


def too_long(files: Sequence[Path]) -> dict[Path, int]:
    """The files with more than `MAX_LINES` lines, with their counts."""
    counts = {file: len(file.read_text().splitlines()) for file in files}
    return {file: count for file, count in counts.items() if count > MAX_LINES}


def test_files_stay_short() -> None:
    files = sorted((ROOT / "src").rglob("*.py"))
    assert files
    assert too_long(files) == {}


def test_files_stay_short_control(tmp_path: Path) -> None:
    fits, long = tmp_path / "fits.py", tmp_path / "long.py"
    fits.write_text("x\n" * MAX_LINES)
    long.write_text("x\n" * (MAX_LINES + 1))
    assert too_long([fits, long]) == {long: MAX_LINES + 1}


def bad_pins(text: str) -> list[str]:
    """Lines that are not `name==version`, with a public version only: nothing of a build, a path or a host."""
    return [line for line in text.splitlines() if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*|#.*|", line)]


def test_constraints_are_plain_pins() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert bad_pins(text) == []
    project = project_table()
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    assert names_of(wanted) - names_of(text.splitlines()) == set()


@pytest.mark.parametrize("line", ["torch==2.13.0+cpu", "-e .", "x @ file:///x", "torch>=2", "--index-url https://x"])
def test_constraints_control(line: str) -> None:
    assert bad_pins(f"numpy==2.4.6\n{line}\n") == [line]


def undeclared(files: Sequence[Path], declared: set[str]) -> set[str]:
    """Packages that `files` import, at the top or late, and that are neither Python's, ours, nor in `declared`."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"growformer"}
    known = packages_distributions()
    return {package for package in packages if not declared & names_of(known.get(package, []))}


def test_what_is_imported_is_declared() -> None:
    table = project_table()
    extras = [one for name, some in table["optional-dependencies"].items() if name != "dev" for one in some]
    assert undeclared(sorted((ROOT / "src").rglob("*.py")), names_of([*table["dependencies"], *extras])) == set()


def test_what_is_imported_is_declared_control(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text("import os\ndef f():\n    import numpy.linalg\n    from yaml import load\n    from . import g\n")
    assert undeclared([file], {"numpy"}) == {"yaml"}
    assert undeclared([file], {"numpy", "pyyaml"}) == set()


def root_conftest() -> Any:
    """The tests' own conftest, by its place: folders below have others of that name."""
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("on_ci", "outcome"), [(True, pytest.fail.Exception), (False, pytest.skip.Exception)])
def test_a_missing_checkpoint_fails_on_ci(on_ci: bool, outcome: type[BaseException], tmp_path: Path) -> None:
    find_stories = root_conftest().find_stories
    with pytest.raises(outcome, match="GROWFORMER_DATA"):
        find_stories(tmp_path, None, on_ci)


def test_the_checkpoint_s_place_can_be_set(tmp_path: Path) -> None:
    find_stories = root_conftest().find_stories
    folder = tmp_path / "elsewhere" / "stories260K"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert find_stories(tmp_path, str(folder.parent), on_ci=True) == folder


PACKAGES = ("cli", "report", "training", "proof", "checkpoint", "optim", "methods", "families", "planning", "algebra")
CONTRACTS = ("Imports point down", "Families and methods are data", "The algebra knows no transformers")


@pytest.mark.parametrize(
    ("importer", "imported", "broken"),
    [
        ("cli", "growformer.planning", ()),
        ("proof", "growformer.families", ()),
        ("plan", "growformer.optim", ("Imports point down",)),
        ("families", "growformer.planning", ("Families and methods are data",)),
        ("methods", "growformer.planning", ("Families and methods are data",)),
        ("methods", "growformer.families", ("Imports point down", "Families and methods are data")),
        ("algebra", "transformers", ("The algebra knows no transformers",)),
        ("stray", "growformer.algebra", ("Imports point down",)),
    ],
)
def test_import_contracts_bite(importer: str, imported: str, broken: tuple[str, ...], tmp_path: Path) -> None:
    # A package of the same name with one import in it, under the repository's own contracts.
    for package in ("", *PACKAGES, importer):
        (tmp_path / "growformer" / package).mkdir(exist_ok=True)
        (tmp_path / "growformer" / package / "__init__.py").touch()
    # Inside a function: an import made late counts as well.
    (tmp_path / "growformer" / importer / "late.py").write_text(f"def late():\n    import {imported}\n")
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--config", ROOT / "pyproject.toml", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    verdicts = {name: re.search(rf"{name}.*(KEPT|BROKEN)", done.stdout) for name in CONTRACTS}
    assert all(verdicts.values()), done.stdout + done.stderr
    assert {name for name, verdict in verdicts.items() if verdict and verdict[1] == "BROKEN"} == set(broken)
    assert bool(done.returncode) is bool(broken)
