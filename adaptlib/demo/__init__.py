"""The bundle: a small base model and experts for it, so that everything works at once, offline."""

from pathlib import Path
from typing import TYPE_CHECKING

from adaptlib.experts.base import BUNDLE, DEMO_BASE

if TYPE_CHECKING:
    from adaptlib.experts import Expert

__all__ = ["BUNDLE", "DEMO_BASE", "expert_directories", "experts"]


def expert_directories() -> list[Path]:
    """The adaptlib directory of each bundled expert, sorted by name."""
    return sorted(path.parent for path in (BUNDLE / "experts").glob("*/expert.json"))


def experts() -> "dict[str, Expert]":
    """The bundled experts by name."""
    from adaptlib.experts.codec import read_directory, unpack

    return {path.name: unpack(read_directory(path)) for path in expert_directories()}
