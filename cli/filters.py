"""The words of `--filter` and `--sort`: what they mean, and which rows they choose.

    rank>=16   task=qa   base=meta-llama/*   description~poem   bytes<10MB   added>30d   task=

A row has a value, or None, for each field of `FIELDS`. Pure functions: they read nothing.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

from adaptlib.errors import UsageError

from .suggest import near

Row: TypeAlias = Mapping[str, Any]

TEXT, NUMBER, SIZE, AGE, DIGEST, CLUSTER = "text", "number", "size", "age", "digest", "cluster"
FIELDS: Final = {
    "name": TEXT,
    "tag": TEXT,
    "kind": TEXT,
    "base": TEXT,
    "task": TEXT,
    "description": TEXT,
    "rank": NUMBER,
    "modules": NUMBER,
    "params": NUMBER,
    "bytes": SIZE,
    "digest": DIGEST,
    "added": AGE,
    "cluster": CLUSTER,
}
ALIASES: Final = {"size": "bytes"}

EQUALITY, ORDER = ("=", "!="), (">", ">=", "<", "<=")
OPERATORS: Final = {  # which operators go with which fields, and what the value is
    TEXT: ((*EQUALITY, "~"), "text, in which * stands for anything"),
    NUMBER: ((*EQUALITY, *ORDER), "a number, such as 16 or 1.5M"),
    SIZE: ((*EQUALITY, *ORDER), "a size, such as 500kB, 10MB or 1.5GB"),
    AGE: (ORDER, "an age, such as 90m, 2h, 30d or 6w: added>30d is older than 30 days"),
    DIGEST: ((*EQUALITY, "~"), "the first digits of a digest"),
    CLUSTER: (EQUALITY, "LABEL or NAME:LABEL of a saved clustering"),
}
GRAMMAR: Final = (
    f"FIELD OPERATOR VALUE; fields: {', '.join(FIELDS)}; operators: = != > >= < <= ~ (contains)"
)

# Compiled where they are used: most lists are not filtered, and should not wait for that.
_FILTER: Final = r"(?s)\s*([A-Za-z][\w-]*)\s*(==|!=|>=|<=|=|>|<|~)\s*(.*?)\s*"
_AMOUNT: Final = r"(?ai)(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)"
_COUNTS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_SIZES: Final = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}ib", 1024))
}
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition. `value` is a pattern, a number, bytes, seconds or text, by the field."""

    field: str
    operator: str
    value: Any


@dataclass(frozen=True, slots=True)
class Key:
    """One field to sort by."""

    field: str
    falling: bool


def parse_filter(text: str) -> Filter:
    """Read one `--filter`. UsageError says what is wrong with it and what there is."""
    match = re.fullmatch(_FILTER, text)
    if match is None:
        raise UsageError(f"--filter {text!r} is not FIELD OPERATOR VALUE", hint=GRAMMAR)
    field = parse_field(match[1], f"--filter {text!r}")
    operator, value = match[2].replace("==", "="), match[3]
    operators, wanted = OPERATORS[FIELDS[field]]
    if operator not in operators:
        raise UsageError(
            f"--filter {text!r}: {field} is not compared with {operator}",
            hint=f"operators of {field}: {' '.join(operators)}; the value is {wanted}",
        )
    if not value and operator not in EQUALITY:
        raise UsageError(f"--filter {text!r} has no value", hint=f"the value is {wanted}")
    try:
        return Filter(field, operator, _value(FIELDS[field], value) if value else None)
    except ValueError:
        raise UsageError(
            f"--filter {text!r}: {value!r} is not {wanted.split(',')[0]}",
            hint=f"the value is {wanted}",
        ) from None


def parse_field(text: str, where: str) -> str:
    """The field of this name. UsageError suggests the nearest."""
    name = text.lower().replace("_", "-")
    name = ALIASES.get(name, name)
    if name in FIELDS:
        return name
    raise UsageError(
        f"{where}: there is no field {text!r}{near(name, [*FIELDS, *ALIASES])}",
        hint=f"fields: {', '.join(FIELDS)}",
    )


def parse_sort(words: Iterable[str]) -> tuple[Key, ...]:
    """Read `--sort`, split into FIELD or FIELD:desc. UsageError for anything else."""
    keys = []
    for word in words:
        name, _, direction = word.partition(":")
        if direction.lower() not in ("", "asc", "desc"):
            raise UsageError(
                f"--sort {word!r}: {direction!r} is not a direction", hint="asc or desc"
            )
        field = parse_field(name, f"--sort {word!r}")
        keys.append(Key(field, direction.lower() == "desc"))
    return tuple(keys)


def matches(row: Row, condition: Filter, *, now: datetime) -> bool:
    """Whether a row fulfils a condition. One without the value is neither more nor less than
    anything and differs from everything; `FIELD=` with nothing after it is what it equals."""
    value = row[condition.field]
    if condition.operator == "=":
        return _equal(row, condition)
    if condition.operator == "!=":
        return not _equal(row, condition)
    if value is None:
        return False
    if condition.operator == "~":
        return condition.value in value.lower()
    if isinstance(value, datetime):
        value = (now - value).total_seconds()
    return _COMPARE[condition.operator](value, condition.value)


def choose(
    rows: Iterable[Row],
    filters: Sequence[Filter] = (),
    keys: Sequence[Key] = (),
    limit: int | None = None,
    *,
    now: datetime,
) -> list[Row]:
    """The rows for which all filters hold, sorted; where the keys are equal, in their order.
    Rows without a value come last, rising or falling. Of times, the earliest is the least."""
    chosen = [row for row in rows if all(matches(row, one, now=now) for one in filters)]
    for key in reversed(keys):  # sorting is stable, so the first key is the last to be sorted by
        have = [row for row in chosen if row[key.field] not in (None, ())]
        have.sort(key=lambda row: _rank(row[key.field]), reverse=key.falling)
        chosen = have + [row for row in chosen if row[key.field] in (None, ())]
    return chosen if limit is None else chosen[:limit]


_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


def _value(kind: str, text: str) -> Any:
    """What a condition compares with. ValueError where the text is not of the kind."""
    if kind == NUMBER:
        return _amount(text, _COUNTS)
    if kind == SIZE:
        return _amount(text, _SIZES)
    if kind == AGE:
        return _amount(text, _SECONDS)
    if kind == DIGEST:
        digits = text.lower().removeprefix("sha256:")
        if not re.fullmatch(r"[0-9a-f]{1,64}", digits):
            raise ValueError
        return digits
    return text.lower()


def _amount(text: str, units: Mapping[str, int]) -> float:
    match = re.fullmatch(_AMOUNT, text)
    if match is None or match[2].lower() not in units:
        raise ValueError
    unit = units[match[2].lower()]
    return int(match[1]) * unit if match[1].isdecimal() else float(match[1]) * unit


def _equal(row: Row, condition: Filter) -> bool:
    field, wanted = condition.field, condition.value
    value = row[field]
    if wanted is None:
        return value in (None, "", ())
    if value is None:
        return False
    kind = FIELDS[field]
    if kind == DIGEST:
        return value.removeprefix("sha256:").startswith(wanted)
    if kind == CLUSTER:  # all that it is in: `NAME:LABEL`
        return any(wanted in (one.lower(), one.rpartition(":")[2].lower()) for one in value)
    if kind != TEXT:
        return value == wanted
    if field == "name":  # each tag of a name, unless one of them is said
        value = f"{value.split(':')[0]}:{row['tag']}" if ":" in wanted else value.split(":")[0]
    return _glob(wanted).fullmatch(value.lower()) is not None


def _glob(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split("*"))), re.DOTALL)


def _rank(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
