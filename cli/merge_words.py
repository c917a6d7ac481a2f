"""What the words of `merge` ask for: weights, settings, and a recipe of all of it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import words

if TYPE_CHECKING:
    from adaptlib.experts.recipe import Recipe


def recipe(names: list[str], given: Mapping[str, Any], file: Path | None) -> "Recipe":
    """What was asked for: the file's recipe, where there is one, under what was said here."""
    import msgspec

    from adaptlib.errors import UsageError
    from adaptlib.experts.recipe import Recipe, read_recipe

    if names:
        given = dict(given) | {"experts": names}
    if file is not None:
        before = read_recipe(file)
        merged = {key: getattr(before, key) or {} for key in ("weights", "options") if key in given}
        given = dict(given) | {key: old | given[key] for key, old in merged.items()}
        known = {key: getattr(before, key) for key in Recipe.__struct_fields__}
        given = {key: value for key, value in known.items() if value is not None} | given
    elif not names:
        raise UsageError(
            "no experts were named", hint="adaptlib merge A B --name BOTH, or --recipe FILE.yaml"
        )
    try:
        return msgspec.convert(msgspec.to_builtins(given), Recipe)
    except msgspec.ValidationError as error:
        what, _, where = str(error).replace("`", "").partition(" - at $.")
        option = f"--{where.replace('_', '-')}" if where else "the recipe"
        got = f"; got {given[where]}" if where in given and "got" not in what else ""
        fit = {"rank": "--rank 8", "keep_ratio": "--keep-ratio 0.1"}.get(where)
        raise UsageError(f"{option}: {what.replace('Expected', 'want')}{got}", hint=fit) from None


def weights(values: list[str] | None) -> dict[str, float] | None:
    """`NAME=0.5`, each name once."""
    from adaptlib.errors import UsageError

    if not values:
        return None
    found: dict[str, float] = {}
    for value in words(values):
        name, equals, number = value.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or not math.isfinite(weight):
            raise UsageError(f"--weight is NAME=NUMBER; got {value!r}", hint="--weight sql=0.5")
        if name in found:
            raise UsageError(
                f"--weight {name} is there twice: {found[name]:g} and {weight:g}",
                hint=f"--weight {name}={weight:g}",
            )
        found[name] = weight
    return found


def settings(values: list[str] | None) -> dict[str, str] | None:
    """`KEY=VALUE`, each key once; what a value means is the method's to say."""
    from adaptlib.errors import UsageError

    if not values:
        return None
    found: dict[str, str] = {}
    for value in words(values):
        key, equals, text = value.partition("=")
        key = key.replace("-", "_")
        if not equals or not key or not text:
            raise UsageError(f"--set is KEY=VALUE; got {value!r}", hint="--set density=0.2")
        if key in found:
            raise UsageError(f"--set {key} is there twice", hint=f"--set {key}={text}")
        found[key] = text
    return found


def check_alone(replay: str, options: list[str]) -> None:
    from adaptlib.errors import UsageError

    said = ["names" if one == "names" else f"--{one.replace('_', '-')}" for one in sorted(options)]
    if said:
        raise UsageError(
            f"--replay makes {replay} again as it was, so it takes no {', '.join(said)}",
            hint=f"--replay {replay} --save-recipe FILE.yaml writes its recipe, to be changed",
        )


def check_folder(file: Path) -> None:
    """NotFoundError where the folder of a file that is to be written is not there."""
    from adaptlib.errors import NotFoundError, UsageError

    if file.is_dir():
        raise UsageError(f"{file} is a folder; a recipe is a file", hint=f"{file}/merge.yaml")
    if not file.parent.is_dir():
        raise NotFoundError(f"no folder {file.parent} for the recipe", hint=f"mkdir {file.parent}")


def check_rows(rows: int | None) -> None:
    """UsageError for no rows."""
    from adaptlib.errors import UsageError

    if rows is not None and rows < 1:
        raise UsageError(f"--rows is 1 or more; got {rows}", hint="--rows 64")
