"""A merge as a recipe: a YAML file before it, the card of the merged expert after it.

    method: ties
    experts: [sql, poems]       names or digests, or {name, digest}
    weights: {sql: 0.7}
    options: {density: 0.2}
    rank: 16

The command line takes `cluster:NAME/LABEL` too. A recipe whose experts are all {name, digest} is
pinned: it makes the same expert whatever the names have come to mean. The card of a merged expert
holds its recipe pinned.
"""

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.experts.codec import Manifest
from adaptlib.experts.library import Library

MAX_RECIPE = 256 * 1024  # bytes; reading YAML takes seconds for a megabyte
DEFAULT = "linear"
_MERGE = "tag:yaml.org,2002:merge"  # what YAML makes of the key <<
Value = bool | int | float | str | None


class Parent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An expert by the name it went by and the digest it had."""

    name: str
    digest: str


class Rows(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The rows that a merge with data was learnt from: `tasks` is the digest of their files."""

    tasks: str
    rows: int


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What decides a merged expert. What is left out is what the method does by itself; see
    `Merge` for each. `name` is only where it is kept, `description` goes into its card."""

    experts: Annotated[tuple[str | Parent, ...], msgspec.Meta(min_length=1)]
    method: str = DEFAULT
    weights: dict[str, float] | None = None
    options: dict[str, Value] = {}
    kind: Literal["lora", "sparse"] | None = None
    rank: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    keep_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    on: Literal["updates", "factors"] = "updates"
    name: str | None = None
    description: str | None = None
    data: Rows | None = None

    @property
    def parents(self) -> dict[str, str]:
        """Digest by name, of a pinned recipe."""
        return {one.name: one.digest for one in self.experts if isinstance(one, Parent)}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. UsageError, with the line and the field, where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE + 1)
    except FileNotFoundError:
        raise NotFoundError(f"no recipe {path}", hint="--save-recipe FILE writes one") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_RECIPE:
        raise UsageError(f"{path} is above {MAX_RECIPE:,} bytes, which is no recipe")
    try:
        return parse_recipe(str(path), data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text file: {error}") from None


def parse_recipe(source: str, text: str) -> Recipe:
    """A recipe from YAML; `source` is what errors call it."""
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        # Ten lines of << can stand for a billion fields.
        merges = any(key.tag == _MERGE for pairs in _mappings(node) for key, _ in pairs)
        document = None if node is None or merges else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{source}{where}: this is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{source}: this is not YAML: {str(error) or 'too deep'}") from None
    if merges:
        raise UsageError(f"{source}: a recipe has no <<", hint="write the fields out")
    for key, line in _twice(node):
        raise UsageError(f"{source}, line {line}: {key} is there twice", hint="keep one of them")
    if not isinstance(document, dict):
        raise UsageError(
            f"{source}: a recipe is `field: value` lines; got {type(document).__name__}",
            hint="method: linear, and experts: [a, b]",
        )
    try:
        recipe = msgspec.convert(document, Recipe)
    except msgspec.ValidationError as error:
        raise _wrong(source, str(error), node) from None
    except OverflowError:  # YAML has numbers to the base of 60, of any length
        raise UsageError(f"{source}: a number in it is larger than can be") from None
    for name, weight in (recipe.weights or {}).items():
        if not math.isfinite(weight):
            line = _line(node, ("weights", name))
            raise UsageError(f"{source}{line}: the weight of {name} is {weight}; want a number")
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The recipe as a YAML file, which `read_recipe` gives back."""
    path.write_bytes(msgspec.yaml.encode(recipe))


def _wrong(source: str, message: str, node: Any) -> UsageError:
    """What msgspec found wrong, with the line and the value that is there."""
    what, _, where = message.partition(" - at `$")
    fields = tuple(re.findall(r"[^.\[\]`]+", where))
    field = fields[0] if fields else ""
    if unknown := re.search(r"unknown field `(.*)`", what):
        known = Recipe.__struct_fields__ if not fields else Parent.__struct_fields__
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return UsageError(
            f"{source}{_line(node, (*fields, unknown[1]))}: a recipe has no field {unknown[1]!r}"
            + (f"; did you mean {close[0]}?" if close else ""),
            hint=f"its fields: {', '.join(known)}",
        )
    if missing := re.search(r"missing required field `(.*)`", what):
        return UsageError(
            f"{source}{_line(node, fields)}: {missing[1]} is missing",
            hint="experts: [a, b]" if missing[1] == "experts" else None,
        )
    got = _at(node, fields)
    value = getattr(got, "value", None)
    shown = f" {value[:80]!r}" if isinstance(value, str) else ""
    what = what.replace("Expected", "want").replace(", got", "; got").replace("`", "")
    if "; got" not in what and shown:
        what += "; got"
    hint = "put it in quotes" if "want str" in what and shown else None
    return UsageError(f"{source}{_line(node, fields)}: {field}: {what}{shown}", hint=hint)


def _at(node: Any, path: tuple[str, ...]) -> Any:
    """The YAML node at a path of field names and numbers; the last on the way that is there."""
    for step in path:
        if hasattr(node, "value") and isinstance(node.value, list):
            pairs = [n for n in node.value if isinstance(n, tuple)]
            found = next((value for key, value in pairs if key.value == step), None)
            if found is None and step.isdecimal() and int(step) < len(node.value) and not pairs:
                found = node.value[int(step)]
            if found is None:
                return node
            node = found
    return node


def _line(node: Any, path: tuple[str, ...]) -> str:
    """`, line 3`: where the last field of the path stands."""
    if not path:
        return ""
    above = _at(node, path[:-1])
    pairs = [n for n in getattr(above, "value", ()) if isinstance(n, tuple)]
    key = next((key for key, _ in pairs if key.value == path[-1]), None)
    mark = getattr(key or _at(node, path), "start_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _mappings(node: Any) -> Iterator[list[tuple[Any, Any]]]:
    """The (key, value) nodes of each mapping. An alias is looked into once, so that a few lines
    cannot stand for a billion."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        pairs = [part for part in node.value if isinstance(part, tuple)]
        waiting += [part for part in node.value if not isinstance(part, tuple)]
        waiting += [value for _, value in pairs]
        yield pairs


def _twice(node: Any) -> Iterator[tuple[str, int]]:
    """Keys that stand twice in one place, which YAML's readers pass over; and their lines."""
    for pairs in _mappings(node):
        keys: set[str] = set()
        for key, _ in pairs:
            if str(key.value) in keys:
                yield str(key.value), key.start_mark.line + 1
            keys.add(str(key.value))


def pin(library: Library, recipe: Recipe, *, base: str | None = None) -> Recipe:
    """The recipe with all experts as (name, digest); with `base`, those of this base model only.
    NotFoundError for one that is not there, UsageError for one name twice or a weight for none of
    them."""
    parents: dict[str, str] = {}
    for one in recipe.experts:
        name, digest = _named(library, one)
        if name in parents:
            raise UsageError(
                f"{name} is merged twice", hint=f"count it double with a weight: {name}=2"
            )
        parents[name] = digest
    if base is not None:
        parents = {n: d for n, d in parents.items() if library.manifest(d).base == base}
        if not parents:
            raise NotFoundError(
                f"none of these is an expert of base model {base!r}", hint="leave out --base"
            )
    for name in recipe.weights or {}:
        if name not in parents:
            close = difflib.get_close_matches(name, parents, n=1)
            raise UsageError(
                f"a weight for {name!r}, which is not merged here"
                + (f"; did you mean {close[0]}?" if close else ""),
                hint=f"merged are: {', '.join(parents)}",
            )
    return msgspec.structs.replace(
        recipe, experts=tuple(Parent(name, digest) for name, digest in parents.items())
    )


def _named(library: Library, one: str | Parent) -> tuple[str, str]:
    """Name and digest of one of `experts`."""
    if isinstance(one, Parent):
        try:
            return one.name, library.digest(one.digest)
        except NotFoundError:
            raise NotFoundError(
                f"{one.name} as it was, {one.digest[:19]}, is gone from this library",
                hint="adaptlib gc --restore ID where gc took it, else add it again",
            ) from None
    return one, library.digest(one)


def recipe_of(name: str, manifest: Manifest) -> Recipe:
    """The pinned recipe in a merged expert's card. UsageError where it was not made by one,
    CorruptError where the card holds something else there."""
    card = manifest.card
    about = card.get("merge")
    if not isinstance(about, dict) or "parents" not in card:
        raise UsageError(
            f"{name} was not merged here: its card holds no recipe", hint=f"adaptlib show {name}"
        )
    try:
        parents = msgspec.convert(card["parents"], tuple[Parent, ...])
        weights = msgspec.convert(about["weights"], list[float])
        pairs = zip((one.name for one in parents), weights, strict=True)
        fields = {
            "experts": card["parents"],
            "method": about["method"],
            "options": about["options"],
            "data": about.get("data"),
            "description": card.get("description"),
            **about["kept"],
        }
        recipe = msgspec.convert(fields, Recipe)
        given = dict(pairs) if about.get("data") is None else about.get("given")
        return msgspec.structs.replace(recipe, weights=given)
    except (msgspec.ValidationError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{name}: the recipe in its card cannot be read: {error}") from None
