"""Where the library is, when nobody says."""

import os
from pathlib import Path

from adaptlib.experts.settings import SettingsFile, settings_files

DIRECTORY = ".adaptlib"
VARIABLE = "ADAPTLIB_LIBRARY"


def _expand(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 -- Path.expanduser raises on `~nobody`


def library_path(explicit: str | Path | None = None) -> tuple[Path, str]:
    """The library's directory and why it is that one: the option; `ADAPTLIB_LIBRARY`; the nearest
    from here upwards of a project's settings and an `.adaptlib/`; the user's settings; the user's
    data directory. A path in a file is meant from that file's directory."""
    if explicit is not None:
        return _expand(explicit), "--library"
    if chosen := os.environ.get(VARIABLE):
        return _expand(chosen), VARIABLE
    files = {file.scope: file for file in settings_files()}
    project = files.get("project")
    here = Path.cwd()
    for directory in (here, *here.parents):
        if project and project.path.parent == directory and (found := _said(project)):
            return found
        if (directory / DIRECTORY / "FORMAT").is_file():
            return directory / DIRECTORY, f"{DIRECTORY} in {directory}"
    if "user" in files and (found := _said(files["user"])):
        return found
    from platformdirs import user_data_path

    return user_data_path("adaptlib") / "library", "the user data directory"


def _said(file: SettingsFile) -> tuple[Path, str] | None:
    """The library of a file of settings, and the line that says so."""
    value = file.word("library")
    return ((file.path.parent / _expand(value)).resolve(), file.where("library")) if value else None
