"""adaptlib: keep, group, merge and route the adapters of a language model.

Importing this package costs nothing: each public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptlib.clustering import mbc as mbc
    from adaptlib.experts import Delta as Delta
    from adaptlib.experts import Expert as Expert
    from adaptlib.experts import Library as Library
    from adaptlib.experts import LoRADelta as LoRADelta
    from adaptlib.experts import SparseDelta as SparseDelta
    from adaptlib.experts import read_peft as read_peft
    from adaptlib.experts import write_peft as write_peft
    from adaptlib.routing import ROUTERS as ROUTERS
    from adaptlib.routing import Arrow as Arrow
    from adaptlib.routing import Named as Named
    from adaptlib.routing import Uniform as Uniform
    from adaptlib.routing import attach as attach
    from adaptlib.training import train as train

__version__ = "0.1.0"

_HOME = {
    "Arrow": "adaptlib.routing",
    "Delta": "adaptlib.experts",
    "Expert": "adaptlib.experts",
    "Library": "adaptlib.experts",
    "LoRADelta": "adaptlib.experts",
    "Named": "adaptlib.routing",
    "ROUTERS": "adaptlib.routing",
    "SparseDelta": "adaptlib.experts",
    "Uniform": "adaptlib.routing",
    "attach": "adaptlib.routing",
    "mbc": "adaptlib.clustering",
    "read_peft": "adaptlib.experts",
    "train": "adaptlib.training",
    "write_peft": "adaptlib.experts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptlib' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *sorted(_HOME)]
