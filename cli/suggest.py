"""Did you mean: the nearest of the words that are known."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for what is close to a word, else nothing."""
    close = closest(word, known)
    return f"; did you mean {close}?" if close else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is nearest, as long as it is near: hyphens and case do not count, and a
    word that begins as this one does is near."""
    by_form = {_form(one): one for one in known}
    form = _form(word)
    if form in by_form:
        return by_form[form]
    if found := difflib.get_close_matches(form, by_form, n=1):
        return by_form[found[0]]
    starts = [one for key, one in by_form.items() if len(form) > 2 and key.startswith(form)]
    return starts[0] if len(starts) == 1 else None


def near_file(path: str) -> str | None:
    """The file or folder beside a path that is not there whose name is nearest."""
    wanted = Path(path)
    if not wanted.parent.is_dir():
        return None
    there = [one.name for one in wanted.parent.iterdir()]
    close = difflib.get_close_matches(wanted.name, there, n=1, cutoff=0.5)
    return str(wanted.parent / close[0]) if close else None


def _form(word: str) -> str:
    return word.lower().replace("-", "_")


def unknown(noun: str, word: str, known: Iterable[str]) -> str:
    """`no router 'arow'; did you mean arrow? There are: ...`"""
    known = [*known]
    there = f"here are: {', '.join(known)}"
    close = near(word, known)
    return f"no {noun} {word!r}{close} T{there}" if close else f"no {noun} {word!r}; t{there}"


def check_choice(option: str, value: str | None, known: Sequence[str]) -> None:
    """UsageError where an option's value is none of those that it knows."""
    if value is None or value in known:
        return
    from adaptlib.errors import UsageError

    raise UsageError(
        f"{option} is one of {', '.join(known)}; got {value!r}{near(value, known)}",
        hint=f"{option} {closest(value, known) or known[0]}",
    )
