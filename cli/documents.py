"""The JSON Schemas of what `--json` prints.

`python -m adaptlib.cli.documents` writes schemas/ anew, from the classes of the documents. Keys may
be added to a document, as what is optional; where one goes, or comes to mean something else, the
document gets another number.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from . import document, documents_config, documents_groups, documents_library, documents_models

FOLDER = Path(__file__).with_name("schemas")
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def kinds() -> dict[str, list[type]]:
    """The classes of each kind of document, such as `list`, by name; `show` has several."""
    found: dict[str, list[type]] = {}
    for one in _documents():
        found.setdefault(_name(one), []).append(one)
    return dict(sorted(found.items()))


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of one kind of document."""
    forms = kinds()[name]
    wanted, parts = msgspec.json.schema_components(forms, ref_template="#/$defs/{name}")
    body = parts.pop(forms[0].__name__) if len(forms) == 1 else {"anyOf": list(wanted)}
    head = {
        "$schema": DRAFT,
        "$id": f"urn:adaptlib:{name}:1",
        "title": f"adaptlib.{name}/1",
        "description": " ".join(" ".join(str(one.__doc__) for one in forms).split()),
    }
    return (
        head
        | {k: v for k, v in body.items() if k not in head}
        | ({"$defs": parts} if parts else {})
    )


def text_of(name: str) -> str:
    """The schema as its file holds it."""
    return json.dumps(schema_of(name), indent=2, ensure_ascii=False) + "\n"


def _documents() -> Iterator[type]:
    for module in (
        document,
        documents_config,
        documents_groups,
        documents_library,
        documents_models,
    ):
        for one in vars(module).values():
            if (
                isinstance(one, type)
                and issubclass(one, document.Document)
                and one.__module__ == module.__name__
                and one is not document.Document
            ):
                yield one


def _name(one: type) -> str:
    return str(one.__struct_config__.tag).removeprefix("adaptlib.").removesuffix("/1")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name in kinds():
        (FOLDER / f"{name}.json").write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
