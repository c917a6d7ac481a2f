"""Put experts and a router on a model, and take them off again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptlib.errors import BaseMismatchError, ConflictError, RefusedError, UsageError
from adaptlib.experts.base import BaseModel, check_fit
from adaptlib.experts.expert import Expert
from adaptlib.routing.bank import Bank
from adaptlib.routing.router import Router
from adaptlib.routing.scoring import ScoringRouter
from adaptlib.routing.session import Session
from adaptlib.routing.together import Together, join
from adaptlib.routing.trace import Trace

# Modules of one parent that see the same input in the architectures that name them so. A wrong
# guess costs time only: before a choice is used, the tensor is checked to be the same one.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def attach(
    model: nn.Module, experts: Mapping[str, Expert], router: Router, *, tokenizer: Any = None
) -> "Routed":
    """Run `model`, any transformers causal LM, with the experts that `router` chooses.

        with attach(model, experts, Arrow.fit(experts)) as routed:
            routed.generate(**inputs, max_new_tokens=32)

    The experts' tensors are copied to each module's device and dtype; the model's own weights are
    not touched, and leaving the block (or `detach`) takes everything off. They are those that
    `experts` gave at this moment: an expert that is replaced in a library later is not noticed,
    and a router fitted before does not fit it. A router that reads the prompt's text wants the
    model's `tokenizer`. Everything is checked
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
    _check_scope(router, modules, tokenizer)
    banks = _banks(model, modules, used, router)
    hooked = [m for m in modules if m in banks or m in router.probes]
    groups: dict[str, Together] = {}
    for group in _groups(banks, router):
        groups[group[0]], joined = join(banks, group)
        banks |= joined
    devices = {module: _device(modules[module]) for module in hooked}
    placed = router.place(devices, [group.modules for group in groups.values()])
    session = Session(placed, banks, groups, tokenizer)
    handles: list[Any] = [
        modules[module].register_forward_hook(_Hook(module, session), with_kwargs=True)
        for module in hooked
    ]
    if session.by_prompt:
        handles.append(model.register_forward_pre_hook(session.begin, with_kwargs=True))
    return Routed(model, tuple(banks), session, handles)


@contextmanager
def asking(model: nn.Module, router: Router, *, tokenizer: Any = None) -> Iterator[Session]:
    """A session without experts: its `begin` asks the router about prompts, and nothing else."""
    modules = dict(model.named_modules())
    _check_scope(router, modules, tokenizer)
    placed = router.place({module: _device(modules[module]) for module in router.probes})
    session = Session(placed, {}, {}, tokenizer)
    handles = [
        modules[module].register_forward_hook(_Hook(module, session), with_kwargs=True)
        for module in router.probes
    ]
    try:
        yield session
    finally:
        for handle in handles:
            handle.remove()


@final
class Routed:
    """A model with experts on it, until the `with` block ends or `detach` is called.

    Calling it and `generate` go to the model. `modules` are the names of the adapted modules.
    """

    __slots__ = ("_entered", "_handles", "_session", "model", "modules", "router")

    def __init__(
        self,
        model: nn.Module,
        modules: tuple[str, ...],
        session: Session,
        handles: list[Any],
    ) -> None:
        self.model: Any = model
        self.router = session.router
        self.modules = modules
        self._session = session
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

    @property
    def confidence(self) -> Float[Tensor, " sequence"] | None:
        """How well the best expert fits each of the last prompts, where the router has a
        threshold; below it the base answered alone."""
        return self._session.confidence

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Keep what is chosen in every forward pass inside the block."""
        self._check_attached()
        trace = Trace(self.router.experts, {module: [] for module in self.modules})
        self._session.traces.append(trace)
        try:
            yield trace
        finally:
            self._session.traces[:] = [t for t in self._session.traces if t is not trace]

    @contextmanager
    def reading(self, prompt: Bool[Tensor, "sequence tok"]) -> Iterator[None]:
        """Inside, only the tokens where `prompt` is true are what a choice for a whole sequence or
        prompt is made from: for calls that hold answers as well, as scoring them does. Choices
        for single tokens are as ever."""
        self._check_attached()
        self._session.reading = prompt
        try:
            yield
        finally:
            self._session.reading = None

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

    module: str
    session: Session

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        named: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor:
        (x,) = (*args, *named.values())  # Linear calls its one input `input`, Conv1D `x`
        if torch.is_autocast_enabled(x.device.type):
            # It would round the router's logits; the bank has the module's dtype without it.
            with torch.autocast(x.device.type, enabled=False):
                added = self.session.added(self.module, x)
        else:
            added = self.session.added(self.module, x)
        return output if added is None else output + added.to(output.dtype)


def _groups(banks: Mapping[str, Bank], router: Router) -> list[tuple[str, ...]]:
    """The modules to run together: of one parent, with one input and the same LoRA experts."""
    if router.scope != "token":
        return []
    held: dict[Any, list[str]] = {}
    for module, bank in banks.items():
        parent, _, last = module.rpartition(".")
        for names in TOGETHER:
            if last in names and bank.lora is not None and not (bank.sparse or bank.blended):
                table = bank.lora.a
                alike = (table.shape[1], table.dtype, table.device, router.columns[module])
                held.setdefault((parent, names, alike), []).append(module)
    return [tuple(group) for group in held.values() if len(group) > 1]


def _check_scope(router: Router, modules: Mapping[str, nn.Module], tokenizer: Any) -> None:
    if router.reads_text and tokenizer is None:
        raise UsageError(
            f"router {router.name} reads the prompt's text and has no tokenizer",
            hint="attach(model, experts, router, tokenizer=tokenizer)",
        )
    if router.scope == "sequence" and not isinstance(router, ScoringRouter):
        raise UsageError(
            f'router {router.name} scores no tokens, so it has no scope "sequence"',
            hint='scope="token"',
        )
    if missing := [module for module in router.probes if module not in modules]:
        raise BaseMismatchError(
            f"router {router.name} looks at {missing[0]}, which this model does not have"
        )


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
    prints = dict(zip(router.experts, router.fitted, strict=True)) if router.fitted else {}
    for name, expert in used.items():
        if prints.get(name) and prints[name] != expert.fingerprint:
            raise UsageError(
                f"router {router.name} was made for another {name}: its updates have changed since",
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
        deltas = {i: experts[router.experts[i]].deltas[module] for i in router.columns[module]}
        blend = router.blended(module, list(deltas.values()))
        banks[module] = Bank.of(
            module,
            deltas if blend is None else {0: blend},
            experts=len(router.experts),
            mix=router.mix,
            blended=blend is not None,
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
