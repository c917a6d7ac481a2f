"""The JSON documents of `adaptlib config`."""

from typing import Any, Literal

from .document import Document, Part


class Setting(Part):
    """A setting, and who says so: a line of a file, an environment variable, an option, `default`
    or, of the library, why it is that one."""

    key: str
    value: Any
    origin: str


class Config(Document, tag="adaptlib.config/1"):
    """The settings that hold here, or the one that was asked for."""

    settings: list[Setting]


class ConfigSet(Document, tag="adaptlib.config-set/1"):
    """What was set in which file; the value is null where it was unset."""

    path: str
    key: str
    value: Any


class ConfigFile(Part):
    """A file of settings."""

    scope: Literal["project", "user"]
    path: str
    exists: bool


class ConfigPath(Document, tag="adaptlib.config-path/1"):
    """The files that hold here, the strongest first."""

    files: list[ConfigFile]


class Variable(Part):
    """An environment variable, what it is now, and what it says."""

    name: str
    value: str | None
    meaning: str


class ConfigEnv(Document, tag="adaptlib.config-env/1"):
    """The environment variables that are read."""

    variables: list[Variable]
