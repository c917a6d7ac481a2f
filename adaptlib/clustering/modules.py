"""Which modules are compared: all, or those of some layers or types."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from adaptlib.errors import UsageError


def chosen(modules: Iterable[str], only: Sequence[str | int] = ()) -> list[str]:
    """The modules that one of the patterns in `only` fits, sorted; all where there is no pattern.

    A pattern fits where its parts between dots are consecutive parts of the name: `q_proj`,
    `self_attn`, `mlp.down_proj`, `layers.3` (which does not fit `layers.31`); in a part `*` stands
    for anything. A number, `3` or "3", is a layer: the first number in the name.

    UsageError where a pattern fits nothing; it says which parts and layers there are.
    """
    names = sorted(modules)
    found: set[str] = set()
    for pattern in only:
        fits = {name for name in names if _fits(name, str(pattern))}
        if not fits:
            raise UsageError(
                f"no module fits {str(pattern)!r} of the {len(names)} of these experts",
                hint=f"parts of their names: {_known(names)}",
            )
        found |= fits
    return [name for name in names if name in found or not only]


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    if pattern.isdecimal():
        numbers = [part for part in parts if part.isdecimal()]
        return numbers[:1] == [str(int(pattern))]
    runs = (parts[i : i + len(wanted)] for i in range(len(parts) - len(wanted) + 1))
    return any(all(map(fnmatchcase, run, wanted)) for run in runs)


def _known(names: Sequence[str]) -> str:
    """The parts of all names, the last ones first; layers as a range."""
    depth = {part: i for name in names for i, part in enumerate(reversed(name.split(".")))}
    words = sorted((i, part) for part, i in depth.items() if not part.isdecimal())
    shown = [part for _, part in words[:20]] + ["..."] * (len(words) > 20)
    layers = sorted({int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))})
    if layers:
        shown.append(f"layers {layers[0]} to {layers[-1]}")
    return ", ".join(shown)
