"""Experts: the values (Expert, LoRADelta, SparseDelta), and how they are kept and exchanged."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptlib.experts.base import BaseModel as BaseModel
    from adaptlib.experts.delta import Delta as Delta
    from adaptlib.experts.expert import Expert as Expert
    from adaptlib.experts.library import Library as Library
    from adaptlib.experts.lora import LoRADelta as LoRADelta
    from adaptlib.experts.peft import read_peft as read_peft
    from adaptlib.experts.peft import write_peft as write_peft
    from adaptlib.experts.sparse import SparseDelta as SparseDelta

_HOME = {
    "BaseModel": "base",
    "Delta": "delta",
    "Expert": "expert",
    "Library": "library",
    "LoRADelta": "lora",
    "SparseDelta": "sparse",
    "read_peft": "peft",
    "write_peft": "peft",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptlib.experts' has no attribute {name!r}")
    return getattr(import_module(f"adaptlib.experts.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
