"""What a router is: for each token that enters a module, which experts and how much of each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert

Mix = Literal["outputs", "factors"]
Scope = Literal["token", "sequence", "prompt"]


class Choice(NamedTuple):
    """The experts of each token, or of each sequence where a whole sequence has one choice;
    (tok, module, k) for several modules. `index` counts in `Router.experts` and names no expert
    twice in a row; `weight` is float32. A row sums to 1 where all of its experts have the module,
    and to 0 where the base answers alone.
    """

    index: Int[Tensor, "tok *module k"]  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: Float[Tensor, "tok *module k"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Router(ABC):
    """Chooses experts. Subclass `ScoringRouter` or `PromptRouter`, or this directly; give the
    subclass a `name` and a classmethod `fit(experts, *, ...)`, and add it to `ROUTERS`; the
    contract tests then hold it. Its fields are numbers, strings, tensors and mappings of tensors,
    so that `save_router` can keep any router.

    `experts` are the names that indices count in. `columns` is, for each module at which it
    routes, the indices it may choose there: an expert that lacks a module is not among them.
    `mix` says how the chosen are added up: `outputs` is Σ w_i ΔW_i x, `factors` is
    (Σ w_i B_i)(Σ w_i A_i) x.

    `scope` is what gets a choice of its own: each `token` at each module; each `sequence` at each
    module, which then keeps the choice of its prompt while it answers; or each `prompt`, the same
    experts at all modules, from one pass of the base over the prompt. With a `threshold` the base
    answers alone where `confidence` in a prompt is below it. `fitted` has the fingerprint of each
    expert, or "" for one that it did not look at, so that no router is attached to experts that
    have changed since; it may be empty where the experts are known by their digests.
    """

    experts: tuple[str, ...]
    columns: Mapping[str, tuple[int, ...]]
    mix: Mix
    scope: Scope = "token"
    threshold: float | None = None
    fitted: tuple[str, ...] = ()
    name: ClassVar[str]
    reads_text: ClassVar[bool] = False  # whether `weigh` needs the texts of the prompts
    fit: ClassVar[Callable[..., Any]]  # each router has options of its own

    def __post_init__(self) -> None:
        if self.mix not in get_args(Mix):
            raise UsageError(f"mix is one of {', '.join(get_args(Mix))}; got {self.mix!r}")
        if self.scope not in get_args(Scope):
            raise UsageError(f"scope is one of {', '.join(get_args(Scope))}; got {self.scope!r}")
        if self.fitted and len(self.fitted) != len(self.experts):
            raise UsageError(
                f"fitted has a fingerprint for each expert, or none; got {len(self.fitted)} for "
                f"{len(self.experts)}"
            )

    @abstractmethod
    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        """The choice for each token of `x`, as it enters `module`. NotFoundError for a module at
        which this router does not route."""

    def route_all(self, modules: Sequence[str], x: Float[Tensor, "tok d_in"]) -> Choice:
        """`route` at several modules that see the same input and have the same experts, such as
        q, k and v: a choice of (tok, module, k)."""
        choices = [self.route(module, x) for module in modules]
        return Choice(*(torch.stack(parts, 1) for parts in zip(*choices, strict=True)))

    @property
    def probes(self) -> tuple[str, ...]:
        """The modules whose input `look` wants to see in a pass of the base over the prompt."""
        return ()

    def look(
        self,
        module: str,
        x: Float[Tensor, "sequence tok d_in"],
        mask: Bool[Tensor, "sequence tok"],
    ) -> Float[Tensor, "sequence n"]:
        """What to remember of the prompts' tokens at one of `probes`; padding has `mask` False."""
        raise UsageError(f"router {self.name} looks at no prompt")

    def weigh(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, "sequence expert"]:
        """The weight of each expert for each prompt, with scope "prompt": from what `look` gave at
        each module, and from the texts where `reads_text`."""
        raise UsageError(f"router {self.name} makes no choice for a whole prompt")

    def confidence(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, " sequence"]:
        """How well the best expert fits each prompt; larger is better. What it is compared with,
        `threshold`, is found by `calibrate`."""
        raise UsageError(
            f"router {self.name} has no measure of how well an expert fits, so no threshold"
        )

    def blended(self, module: str, deltas: Sequence[Delta]) -> Delta | None:
        """The one update that every token gets at `module`, where the choice depends on nothing
        that comes in and says more than a weight for each expert; `deltas` are those of
        `columns[module]`. None, as for most routers: the choice says all."""
        return None

    @property
    def used(self) -> tuple[str, ...]:
        """The experts that it can choose somewhere."""
        reachable = {i for here in self.columns.values() for i in here}
        return tuple(name for i, name in enumerate(self.experts) if i in reachable)

    @property
    def most(self) -> int:
        """How many experts a token gets at most, at any module."""
        return max(len(here) for here in self.columns.values())

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "Router":
        """The same router with what it needs for each module on that module's device, ready for
        `route_all` with each of `groups`, modules that see the same input."""
        return self

    def columns_at(self, module: str) -> tuple[int, ...]:
        """The indices it may choose at `module`; NotFoundError where there are none."""
        if module not in self.columns:
            raise NotFoundError(
                f"no expert has module {module}; router {self.name} knows "
                f"{len(self.columns)} modules, the first is {next(iter(self.columns), None)}"
            )
        return self.columns[module]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRouter(Router):
    """A router that chooses once for a whole prompt. Subclasses give `weigh`, and `look` with
    `probes` where they look at the base's hidden states."""

    scope: Scope = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "prompt":
            raise UsageError(
                f"router {self.name} chooses once for a prompt; got scope {self.scope!r}"
            )

    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        self.columns_at(module)
        raise UsageError(
            f"router {self.name} chooses for a prompt, not for a token at a module",
            hint="attach(model, experts, router) asks it for each prompt",
        )

    @abstractmethod
    def weigh(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, "sequence expert"]: ...


def fingerprints(experts: Mapping[str, Expert]) -> tuple[str, ...]:
    """What `Router.fitted` keeps of the experts that a router can choose."""
    return tuple(expert.fingerprint for expert in experts.values())


def columns_of(experts: Mapping[str, Expert]) -> dict[str, tuple[int, ...]]:
    """The indices of the experts that have each module. UsageError for no experts."""
    if not experts:
        raise UsageError("a router needs one expert at least; got none")
    found: dict[str, list[int]] = {}
    for i, expert in enumerate(experts.values()):
        for module in expert.deltas:
            found.setdefault(module, []).append(i)
    return {module: tuple(indices) for module, indices in found.items()}
