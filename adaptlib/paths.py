"""Where figures may be written; apart from `figures`, since asking must not import matplotlib."""

from pathlib import Path

from adaptlib.errors import NotFoundError, UsageError


def check_path(path: str | Path) -> Path:
    """The path of a figure. UsageError unless it ends in .svg or .png, NotFoundError where its
    directory is not there."""
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise UsageError(
            f"a figure is an .svg or a .png file; got {str(path)!r}",
            hint=f"write to {(path.stem or 'figure') + '.svg'}",
        )
    if not path.parent.is_dir():
        raise NotFoundError(
            f"the directory {str(path.parent)!r} of the figure is not there",
            hint=f"mkdir -p {path.parent}",
        )
    return path
