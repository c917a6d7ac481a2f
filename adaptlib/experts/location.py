"""Where the library is, when nobody says."""

import os
from pathlib import Path

DIRECTORY = ".adaptlib"
VARIABLE = "ADAPTLIB_LIBRARY"


def _expand(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 -- Path.expanduser raises on `~nobody`


def library_path(explicit: str | Path | None = None) -> tuple[Path, str]:
    """The library's directory and why it is that one: the option, `ADAPTLIB_LIBRARY`, the nearest
    `.adaptlib/` from here upwards, or the user's data directory."""
    if explicit is not None:
        return _expand(explicit), "--library"
    if chosen := os.environ.get(VARIABLE):
        return _expand(chosen), VARIABLE
    here = Path.cwd()
    for directory in (here, *here.parents):
        if (directory / DIRECTORY / "FORMAT").is_file():
            return directory / DIRECTORY, f"{DIRECTORY} in {directory}"
    from platformdirs import user_data_path

    return user_data_path("adaptlib") / "library", "the user data directory"
