"""Routing: choose experts for each token at each module, and run a model with the chosen ones.

A new router is one file and one line in ROUTERS.
"""

from adaptlib.routing.arrow import Arrow
from adaptlib.routing.attach import Routed, attach
from adaptlib.routing.named import Named
from adaptlib.routing.router import Choice, Router
from adaptlib.routing.trace import Trace
from adaptlib.routing.uniform import Uniform

ROUTERS: dict[str, type[Router]] = {
    "arrow": Arrow,
    "named": Named,
    "uniform": Uniform,
}

__all__ = [
    "ROUTERS",
    "Arrow",
    "Choice",
    "Named",
    "Routed",
    "Router",
    "Trace",
    "Uniform",
    "attach",
]
