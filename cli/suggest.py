"""Did you mean: the nearest of the words that are known."""

import difflib
from collections.abc import Iterable


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


def _form(word: str) -> str:
    return word.lower().replace("-", "_")
