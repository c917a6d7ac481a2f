"""adaptlib: keep, group, merge and route the adapters of a language model.

Importing this package costs nothing: each public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptlib.clustering import mbc as mbc
    from adaptlib.evaluation import compare as compare
    from adaptlib.evaluation import evaluate as evaluate
    from adaptlib.experts import Delta as Delta
    from adaptlib.experts import Expert as Expert
    from adaptlib.experts import Library as Library
    from adaptlib.experts import LoRADelta as LoRADelta
    from adaptlib.experts import SparseDelta as SparseDelta
    from adaptlib.experts import read_peft as read_peft
    from adaptlib.experts import write_peft as write_peft
    from adaptlib.experts.arithmetic import interpolate as interpolate
    from adaptlib.experts.arithmetic import negate as negate
    from adaptlib.experts.prototypes import catalogue as catalogue
    from adaptlib.experts.shelf import Shelf as Shelf
    from adaptlib.learned.gates import train_gate as train_gate
    from adaptlib.learned.train import adapt as adapt
    from adaptlib.learned.train import train_router as train_router
    from adaptlib.merging import MERGES as MERGES
    from adaptlib.routing import LAG as LAG
    from adaptlib.routing import LORAUTER as LORAUTER
    from adaptlib.routing import MHR as MHR
    from adaptlib.routing import PHATGOOSE as PHATGOOSE
    from adaptlib.routing import ROUTERS as ROUTERS
    from adaptlib.routing import Arrow as Arrow
    from adaptlib.routing import CentroidMatching as CentroidMatching
    from adaptlib.routing import LoGo as LoGo
    from adaptlib.routing import LoraRetriever as LoraRetriever
    from adaptlib.routing import MoPE as MoPE
    from adaptlib.routing import Named as Named
    from adaptlib.routing import Polytropon as Polytropon
    from adaptlib.routing import Random as Random
    from adaptlib.routing import SpectR as SpectR
    from adaptlib.routing import TaskPredictor as TaskPredictor
    from adaptlib.routing import TunedArrow as TunedArrow
    from adaptlib.routing import Uniform as Uniform
    from adaptlib.routing import attach as attach
    from adaptlib.routing import calibrate as calibrate
    from adaptlib.routing import load_router as load_router
    from adaptlib.routing import save_router as save_router
    from adaptlib.routing import subtract as subtract
    from adaptlib.routing.shortlist import shortlist as shortlist
    from adaptlib.training import train as train

__version__ = "0.1.0"

_HOME = {
    "Arrow": "adaptlib.routing",
    "CentroidMatching": "adaptlib.routing",
    "Delta": "adaptlib.experts",
    "Expert": "adaptlib.experts",
    "LAG": "adaptlib.routing",
    "LORAUTER": "adaptlib.routing",
    "Library": "adaptlib.experts",
    "LoGo": "adaptlib.routing",
    "LoRADelta": "adaptlib.experts",
    "LoraRetriever": "adaptlib.routing",
    "MERGES": "adaptlib.merging",
    "MHR": "adaptlib.routing",
    "MoPE": "adaptlib.routing",
    "Named": "adaptlib.routing",
    "PHATGOOSE": "adaptlib.routing",
    "Polytropon": "adaptlib.routing",
    "ROUTERS": "adaptlib.routing",
    "Random": "adaptlib.routing",
    "Shelf": "adaptlib.experts.shelf",
    "SparseDelta": "adaptlib.experts",
    "SpectR": "adaptlib.routing",
    "TaskPredictor": "adaptlib.routing",
    "TunedArrow": "adaptlib.routing",
    "Uniform": "adaptlib.routing",
    "adapt": "adaptlib.learned.train",
    "attach": "adaptlib.routing",
    "calibrate": "adaptlib.routing",
    "catalogue": "adaptlib.experts.prototypes",
    "compare": "adaptlib.evaluation",
    "evaluate": "adaptlib.evaluation",
    "interpolate": "adaptlib.experts.arithmetic",
    "load_router": "adaptlib.routing",
    "mbc": "adaptlib.clustering",
    "negate": "adaptlib.experts.arithmetic",
    "read_peft": "adaptlib.experts",
    "save_router": "adaptlib.routing",
    "shortlist": "adaptlib.routing.shortlist",
    "subtract": "adaptlib.routing",
    "train": "adaptlib.training",
    "train_gate": "adaptlib.learned.gates",
    "train_router": "adaptlib.learned.train",
    "write_peft": "adaptlib.experts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptlib' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *sorted(_HOME)]
