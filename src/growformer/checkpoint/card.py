"""The model card: says to people what `growformer.json` says to programs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from growformer.checkpoint.hub import hub_id

_TAGS = ("growformer", "model-growth")
# What the source's card says of the source alone: results, emissions, or keys that are written anew.
_LEFT_BEHIND = {"base_model", "base_model_relation", "library_name", "tags", "model-index", "model_name"}
_LEFT_BEHIND |= {"new_version", "co2_eq_emissions", "quantized_by"}


def write_card(folder: Path, source_card: str | None, base_model: str, data: Mapping[str, Any]) -> Path:
    """Write README.md: front matter for the Hub, and a section "Grown with growformer".

    The front matter keeps what the source's card says beyond the source itself (license, language, pipeline_tag,
    datasets, ...). `base_model` goes there only in the form "org/name", for the Hub refuses a path, and a
    path says more about a machine than about a model.

    Args:
        folder: The grown folder.
        source_card: Text of the source's README.md, or None. Front matter that is no YAML counts as none.
        base_model: The source: its Hub id ("org/name"), or else a path; that of a snapshot in the Hub's cache stands
            for its id.
        data: `request` (config field -> value) and `proof` (the proof table as Markdown); where there, also `title`,
            `method`, `seed`, `dtype`, `growformer` (the version), `dead` (blocks that never get a gradient),
            `within_eps` (what is exact only up to the eps of norms), `beside` (the second of two models that were
            fused), and `imports` (the module with the model's class, where transformers has none).

    Returns:
        The path of the card.
    """
    kept = _front_matter(source_card)
    base_model = hub_id(base_model) or base_model
    tags = kept.get("tags", [])
    tags = tags if isinstance(tags, list) else [tags]
    front: dict[str, Any] = {key: value for key, value in kept.items() if key not in _LEFT_BEHIND}
    if _is_id(base_model):
        front |= {"base_model": base_model, "base_model_relation": "finetune"}
    front["library_name"] = "transformers"
    front["tags"] = list(dict.fromkeys([*(tag for tag in tags if isinstance(tag, str)), *_TAGS]))
    name = _name(base_model)
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    path = folder / "README.md"
    path.write_text(f"---\n{text}---\n\n{_body(name, data)}", encoding="utf-8")
    return path


def _is_id(model: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model, re.ASCII) is not None


def _name(model: str) -> str:
    """A Hub id, or the last part of a path."""
    return model if _is_id(model) else re.split(r"[/\\]", model.rstrip("/\\"))[-1] or "a local model"


def _body(name: str, data: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in data["request"].items())
    facts = [f"{key} {_cell(data[key])}" for key in ("method", "seed", "dtype") if data.get(key) is not None]
    version = f" {data['growformer']}" if data.get("growformer") else ""
    dead = "\n".join(f"- {line}" for line in data.get("dead") or [])
    changes = "\n".join(f"- {line}" for line in data.get("changes") or [])
    within = "\n".join(f"- {line}" for line in data.get("within_eps") or [])
    own = data.get("imports")
    beside = _name(hub_id(data["beside"]) or data["beside"]) if data.get("beside") else ""
    made = f"`{name}` and `{beside}` side by side, fused" if beside else f"`{name}`, grown"
    parts = [
        f"# {data.get('title') or (f'{name} and {beside}, fused' if beside else f'{name}, grown')}",
        f"## {'Fused' if beside else 'Grown'} with growformer",
        f"This model is {made} by growformer{version} to the sizes below. `growformer.json` beside this card "
        "holds the whole receipt: hashes, plan, versions and every measured error.",
        f"| asked for | value |\n|---|---|\n{rows}",
        *([f"Made with {', '.join(facts)}."] if facts else []),
        *(["It computes the same function within eps, not exactly:", within] if within else []),
        *([f"It computes another function than {'both' if beside else 'its source'}:", changes] if changes else []),
        *([f"Its class comes with growformer: `import {data['imports']}` before `from_pretrained`."] if own else []),
        "### Proof",
        str(data["proof"]).strip(),
        *(["These blocks never get a gradient:", dead] if dead else []),
        "### Check it yourself",
        f"```sh\ngrowformer verify {'ONE OTHER' if beside else 'SRC'} OUT\n```",
        (
            f"`ONE` and `OTHER` are folders with `{name}` and `{beside}`"
            if beside
            else f"`SRC` is a folder with `{name}`"
        )
        + ", `OUT` is this folder. Nothing in the receipt is taken on trust: every "
        "tensor of both folders is read.",
    ]
    return "\n\n".join(parts) + "\n"


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def _front_matter(card: str | None) -> dict[str, Any]:
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card or "", re.DOTALL)
    if match is None:
        return {}
    try:
        found = yaml.load(match[1], _CardLoader)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2024-13-01
        return {}
    return found if isinstance(found, dict) else {}


class _CardLoader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML 1.2's booleans only: to YAML 1.1 the language code "no" (Norwegian) is False."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_CardLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"
)
