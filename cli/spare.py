"""Text and paths are taken as they are typed.

typer checks each value with pydantic, and importing that takes as long as all else that a short
command does. For text and paths there is nothing to check; numbers and the like go its way.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

_AS_TYPED: dict[Any, Callable[[Any], Any]] = {
    str: str,
    str | None: str,
    Path: Path,
    Path | None: Path,
    list[str]: list,
    list[str] | None: list,
}


def spare(params: Iterable[Any]) -> None:
    """Let these parameters of one call of a command do without pydantic where they can."""
    for param in params:
        if isinstance(param.process_value, partial):
            continue  # this command was called before
        annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
        convert = _AS_TYPED.get(annotation) if annotation is not None else None
        param.process_value = partial(_process, param, param.process_value, convert)


def _process(
    param: Any,
    process: Callable[[Any, Any], Any],
    convert: Callable[[Any], Any] | None,
    context: Any,
    value: Any,
) -> Any:
    several = param.multiple or param.nargs == -1
    if value is None and not param.required:
        value = () if several else None
    elif convert and several == (convert is list) and _is_text(value, several=several):
        value = convert(value)
    else:
        return process(context, value)  # which says what is missing or wrong
    return value if param.callback is None else param.callback(context, param, value)


def _is_text(value: Any, *, several: bool) -> bool:
    """Whether it is text, or several of them, that can be written down."""
    texts = [*value] if several and isinstance(value, tuple | list) else [value]
    try:
        return all(
            isinstance(text, str | Path) and "\0" not in str(text) and str(text).encode()
            for text in texts
        ) and bool(texts)
    except UnicodeEncodeError:
        return False
