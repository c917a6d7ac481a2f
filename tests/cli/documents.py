"""Holding what `--json` prints to the schemas that are shipped."""

import functools
import json
from pathlib import Path
from typing import Any

import adaptlib.cli
from jsonschema import Draft202012Validator

FOLDER = Path(adaptlib.cli.__file__).parent / "schemas"
SEEN: set[str] = set()  # kinds of documents that were checked in this process


def schemas() -> dict[str, dict[str, Any]]:
    """Every schema that is shipped, by the name of its document."""
    return {file.stem: json.loads(file.read_bytes()) for file in sorted(FOLDER.glob("*.json"))}


@functools.cache
def validator(kind: str) -> Draft202012Validator:
    """What holds documents to the schema of this kind."""
    known = schemas()
    assert kind in known, f"no schema for {kind}: write its class into cli/documents_*.py"
    return Draft202012Validator(known[kind])


def kind_of(document: dict[str, Any]) -> str:
    return str(document["schema"]).removeprefix("adaptlib.").removesuffix("/1")


def check(document: dict[str, Any]) -> None:
    """AssertionError where a document is not what its schema says."""
    kind = kind_of(document)
    wrong = [f"{error.json_path}: {error.message[:300]}" for error in fails(kind, document)]
    assert not wrong, f"{document['schema']}: {wrong}"
    SEEN.add(kind)


def fails(kind: str, document: dict[str, Any]) -> list[Any]:
    """What is wrong with a document, by the schema of this kind."""
    return list(validator(kind).iter_errors(document))


def check_output(out: str, err: str) -> None:
    """What a command with `--json` wrote: one document on stdout and nothing else, or none there
    and an error on the last line of stderr."""
    if out:
        document = json.loads(out)  # which refuses a second one, or words around it
        if "$schema" not in document:  # a schema itself
            check(document)
    elif (last := err.splitlines()[-1:]) and last[0].startswith('{"schema"'):
        check(json.loads(last[0]))
