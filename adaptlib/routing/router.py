"""What a router is: for each token that enters a module, which experts and how much of each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts.expert import Expert

Mix = Literal["outputs", "factors"]


class Choice(NamedTuple):
    """The experts of each token. `index` counts in `Router.experts` and names no expert twice for
    a token; `weight` is float32 and sums to 1 for each token."""

    index: Int[Tensor, "tok k"]  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: Float[Tensor, "tok k"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Router(ABC):
    """Chooses experts for tokens. Subclass this directly, give the subclass a `name` and a
    classmethod `fit(experts, *, ...)`, and add it to `ROUTERS`; the contract tests then hold it.

    `experts` are the names that indices count in. `columns` is, for each module at which it
    routes, the indices it may choose there: an expert that lacks a module is not among them.
    `mix` says how the chosen are added up: `outputs` is Σ w_i ΔW_i x, `factors` is
    (Σ w_i B_i)(Σ w_i A_i) x.
    """

    experts: tuple[str, ...]
    columns: Mapping[str, tuple[int, ...]]
    mix: Mix
    name: ClassVar[str]
    fit: ClassVar[Callable[..., Any]]  # each router has options of its own

    def __post_init__(self) -> None:
        if self.mix not in get_args(Mix):
            raise UsageError(f"mix is one of {', '.join(get_args(Mix))}; got {self.mix!r}")

    @abstractmethod
    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        """The choice for each token of `x`, as it enters `module`. NotFoundError for a module at
        which this router does not route."""

    @property
    def used(self) -> tuple[str, ...]:
        """The experts that it can choose somewhere."""
        reachable = {i for here in self.columns.values() for i in here}
        return tuple(name for i, name in enumerate(self.experts) if i in reachable)

    @property
    def most(self) -> int:
        """How many experts a token gets at most, at any module."""
        return max(len(here) for here in self.columns.values())

    def place(self, devices: Mapping[str, torch.device]) -> "Router":
        """The same router with what it needs for each module on that module's device."""
        return self

    def columns_at(self, module: str) -> tuple[int, ...]:
        """The indices it may choose at `module`; NotFoundError where there are none."""
        if module not in self.columns:
            raise NotFoundError(
                f"no expert has module {module}; router {self.name} knows "
                f"{len(self.columns)} modules, the first is {next(iter(self.columns), None)}"
            )
        return self.columns[module]


def columns_of(experts: Mapping[str, Expert]) -> dict[str, tuple[int, ...]]:
    """The indices of the experts that have each module. UsageError for no experts."""
    if not experts:
        raise UsageError("a router needs one expert at least; got none")
    found: dict[str, list[int]] = {}
    for i, expert in enumerate(experts.values()):
        for module in expert.deltas:
            found.setdefault(module, []).append(i)
    return {module: tuple(indices) for module, indices in found.items()}
