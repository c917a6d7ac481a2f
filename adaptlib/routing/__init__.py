"""Routing: choose experts for each token at each module, and run a model with the chosen ones.

A new router is one file and one line in ROUTERS.
"""

from adaptlib.routing.arrow import Arrow
from adaptlib.routing.arrow_tuned import TunedArrow
from adaptlib.routing.attach import Routed, attach
from adaptlib.routing.calibrate import Calibration, calibrate
from adaptlib.routing.centroid import CentroidMatching
from adaptlib.routing.gen_know_sub import subtract
from adaptlib.routing.lag import LAG
from adaptlib.routing.logo import LoGo
from adaptlib.routing.lora_retriever import LoraRetriever
from adaptlib.routing.lorauter import LORAUTER
from adaptlib.routing.mhr import MHR
from adaptlib.routing.mope import MoPE
from adaptlib.routing.named import Named
from adaptlib.routing.phatgoose import PHATGOOSE
from adaptlib.routing.poly import Polytropon
from adaptlib.routing.random import Random
from adaptlib.routing.router import Choice, PromptRouter, Router
from adaptlib.routing.saved import load_router, save_router
from adaptlib.routing.scoring import ScoringRouter
from adaptlib.routing.spectr import SpectR
from adaptlib.routing.task_predictor import TaskPredictor
from adaptlib.routing.trace import Trace
from adaptlib.routing.uniform import Uniform

ROUTERS: dict[str, type[Router]] = {
    "arrow": Arrow,
    "arrow_tuned": TunedArrow,
    "cm": CentroidMatching,
    "lag": LAG,
    "logo": LoGo,
    "loraretriever": LoraRetriever,
    "lorauter": LORAUTER,
    "mhr": MHR,
    "mope": MoPE,
    "named": Named,
    "phatgoose": PHATGOOSE,
    "poly": Polytropon,
    "random": Random,
    "spectr": SpectR,
    "tp": TaskPredictor,
    "uniform": Uniform,
}

__all__ = [
    "LAG",
    "LORAUTER",
    "MHR",
    "PHATGOOSE",
    "ROUTERS",
    "Arrow",
    "Calibration",
    "CentroidMatching",
    "Choice",
    "LoGo",
    "LoraRetriever",
    "MoPE",
    "Named",
    "Polytropon",
    "PromptRouter",
    "Random",
    "Routed",
    "Router",
    "ScoringRouter",
    "SpectR",
    "TaskPredictor",
    "Trace",
    "TunedArrow",
    "Uniform",
    "attach",
    "calibrate",
    "load_router",
    "save_router",
    "subtract",
]
