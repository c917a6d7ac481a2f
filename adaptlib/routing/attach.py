"""Put experts and a router on a model, and take them off again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn

from adaptlib.errors import BaseMismatchError, ConflictError, RefusedError, UsageError
from adaptlib.experts.base import BaseModel, check_fit
from adaptlib.experts.expert import Expert
from adaptlib.routing.bank import Bank
from adaptlib.routing.router import Choice, Router
from adaptlib.routing.trace import Trace


def attach(model: nn.Module, experts: Mapping[str, Expert], router: Router) -> "Routed":
    """Run `model`, any transformers causal LM, with the experts that `router` chooses.

        with attach(model, experts, Arrow.fit(experts)) as routed:
            routed.generate(**inputs, max_new_tokens=32)

    The experts' tensors are copied to each module's device and dtype; the model's own weights are
    not touched, and leaving the block (or `detach`) takes everything off. Everything is checked
    before anything is put on: BaseMismatchError where an expert does not fit the model, UsageError
    where the router was made for other experts or cannot mix these, ConflictError where the model
    has experts attached, RefusedError where its weights are not in memory.
    """
    modules = dict(model.named_modules())
    if any(isinstance(hook, _Hook) for m in modules.values() for hook in m._forward_hooks.values()):
        raise ConflictError(
            "this model has experts attached already",
            hint="leave the `with` block, or call detach() on what attach returned",
        )
    used = _experts_of(router, experts)
    base = BaseModel.of(model)
    for name, expert in used.items():
        _check_kinds(name, expert, modules, base)
        pin = {"id": expert.base} | dict(expert.card.get("base") or {})
        check_fit(name, expert.shapes, pin, base)
    banks = _banks(model, modules, used, router)
    placed = router.place({module: _device(modules[module]) for module in banks})
    traces: list[Trace] = []
    handles = [
        modules[module].register_forward_hook(_Hook(module, placed, bank, traces), with_kwargs=True)
        for module, bank in banks.items()
    ]
    return Routed(model, placed, tuple(banks), traces, handles)


@final
class Routed:
    """A model with experts on it, until the `with` block ends or `detach` is called.

    Calling it and `generate` go to the model. `modules` are the names of the adapted modules.
    """

    __slots__ = ("_entered", "_handles", "_traces", "model", "modules", "router")

    def __init__(
        self,
        model: nn.Module,
        router: Router,
        modules: tuple[str, ...],
        traces: list[Trace],
        handles: list[Any],
    ) -> None:
        self.model: Any = model
        self.router = router
        self.modules = modules
        self._traces = traces
        self._handles = handles
        self._entered = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._check_attached()
        return self.model(*args, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        """The model's own `generate`, with the experts."""
        self._check_attached()
        return self.model.generate(*args, **options)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Keep what is chosen in every forward pass inside the block."""
        self._check_attached()
        trace = Trace(self.router.experts, {module: [] for module in self.modules})
        self._traces.append(trace)
        try:
            yield trace
        finally:
            self._traces[:] = [other for other in self._traces if other is not trace]

    def detach(self) -> None:
        """Take the experts off; the model is exactly what it was. Does nothing the second time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "Routed":
        self._check_attached()
        if self._entered:
            raise UsageError("this routed model is inside a `with` block already")
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def _check_attached(self) -> None:
        if not self._handles:
            raise UsageError("the experts were taken off this model", hint="call attach(...) again")


@final
@dataclass(frozen=True, eq=False)
class _Hook:
    """Adds the chosen experts' updates to the output of one module."""

    name: str
    router: Router
    bank: Bank
    traces: list[Trace]

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        named: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor:
        (x,) = (*args, *named.values())  # Linear calls its one input `input`, Conv1D `x`
        flat = x.reshape(-1, x.shape[-1])
        # Autocast would round the router's logits; the bank has the module's dtype without it.
        with torch.autocast(x.device.type, enabled=False):
            choice = self.router.route(self.name, flat)
            added = self.bank(flat, choice)
        for trace in self.traces:
            trace.choices[self.name].append(Choice(choice.index.detach(), choice.weight.detach()))
        return output + added.to(output.dtype).reshape(output.shape)


def _experts_of(router: Router, experts: Mapping[str, Expert]) -> dict[str, Expert]:
    """The experts that the router can choose; each is read once, since a library reads files."""
    if set(router.experts) != set(experts):
        missing = sorted(set(router.experts) - set(experts))
        extra = sorted(set(experts) - set(router.experts))
        raise UsageError(
            f"router {router.name} was made for other experts: it knows {len(router.experts)}, "
            f"got {len(experts)}; not given: {_first(missing)}; not known to it: {_first(extra)}",
            hint="fit the router to the experts that you attach",
        )
    used = {name: experts[name] for name in router.used}
    for module, columns in router.columns.items():
        for i in columns:
            if module not in used[router.experts[i]].deltas:
                raise UsageError(
                    f"router {router.name} was made for another {router.experts[i]}: "
                    f"this one has no {module}",
                    hint="fit the router to the experts that you attach",
                )
    return used


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _check_kinds(
    name: str, expert: Expert, modules: Mapping[str, nn.Module], base: BaseModel
) -> None:
    for module in expert.deltas:
        if module in modules and module not in base.modules:
            raise BaseMismatchError(
                f"{name} adapts {module}, which is {type(modules[module]).__name__} in "
                f"{base.label}; experts adapt nn.Linear and Conv1D"
            )


def _banks(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    experts: Mapping[str, Expert],
    router: Router,
) -> dict[str, Bank]:
    """A bank for each module at which the router routes, in model order."""
    banks: dict[str, Bank] = {}
    for module in modules:
        if module not in router.columns:
            continue
        device = _device(modules[module])
        if device.type == "meta":
            raise RefusedError(
                f"the weights of {module} are not in memory (device meta)",
                hint="load the model without disk or CPU offload",
            )
        dtype = _weight(modules[module]).dtype
        banks[module] = Bank.of(
            module,
            {i: experts[router.experts[i]].deltas[module] for i in router.columns[module]},
            experts=len(router.experts),
            mix=router.mix,
            # quantised weights are integers; the rest of the model then says what it computes in
            dtype=dtype if dtype.is_floating_point else _compute_dtype(model),
            device=device,
        )
    return banks


def _compute_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _device(module: nn.Module) -> torch.device:
    return _weight(module).device
