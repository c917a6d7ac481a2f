"""One row of numbers for each expert: its LoRA factors, sketches of its deltas, exact products."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from adaptlib.clustering.gram import gram_matrix
from adaptlib.clustering.modules import chosen
from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.projection import module_seed

# kind -> its name in a table
KINDS = {
    "factors": "LoRA factors",
    "gram": "exact inner products",
    "sketches": "delta sketches",
}


@final
@dataclass(frozen=True, eq=False)
class Features:
    """One row for each expert, which kind of row it is, and why that kind.

    `names` are sorted. `options` say how such rows are made again: `modules` for all, `sparsity`
    for factors, `seed` and `size` for sketches. `cards` are the experts' own, for methods that read
    texts. Rows of kind `gram` are the inner products with all experts; those of sketches may be
    float16, each at a scale of its own, for only their directions count.
    """

    names: tuple[str, ...]
    matrix: Float[np.ndarray, "expert feature"]
    kind: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    cards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} ({self.why})"


def features(
    experts: Mapping[str, Expert],
    kind: str = "auto",
    *,
    seed: int = 0,
    size: int = 16,
    sparsity: float = 0.5,
    only: Sequence[str | int] = (),
) -> Features:
    """Rows to compare these experts by: their factors where that is possible, else sketches.

    `kind` is `auto`, `factors` (MBC as published: LoRA of the same modules and ranks only),
    `sketches` (any experts of one base model) or `gram` (the same exactly, for hundreds of
    experts). `seed` and `size` are those of the sketches, `sparsity` is that of factors, see
    `embed`. `only` restricts the comparison to some modules, see `modules.chosen`.

    Raises UsageError for an unknown kind, for no experts, and for factors that do not line up.
    """
    if kind != "auto" and kind not in KINDS:
        *most, last = ("auto", *KINDS)
        raise UsageError(f"features are {', '.join(most)} or {last}; got {kind!r}")
    experts = _restricted(_checked(experts), only)
    modules = sorted({module for expert in experts.values() for module in expert.deltas})
    cards = {name: expert.card for name, expert in experts.items()}
    obstacle = _obstacle(experts)
    why = "asked for" if kind != "auto" else obstacle or "same modules and ranks"
    options: dict[str, Any] = {"modules": modules}
    if kind == "factors" or (kind == "auto" and obstacle is None):
        options["sparsity"] = sparsity
        matrix, names = factor_features(experts)
        return Features(tuple(names), matrix, "factors", why, options, cards)
    if kind == "gram":
        matrix = gram_features(experts, modules)
        return Features(tuple(experts), matrix, "gram", why, options, cards)
    options |= {"seed": seed, "size": size}
    matrix, names = sketch_features(experts, seed=seed, size=size)
    return Features(tuple(names), matrix, "sketches", why, options, cards)


def factor_features(
    experts: Mapping[str, Expert],
) -> tuple[Float[np.ndarray, "expert feature"], list[str]]:
    """θ_i, all entries of A and B of expert i in one row, and the names of the rows.

    Rows are sorted by name; within a row modules are sorted, A before B; float32. `scale` is not
    in it. Factors are not unique: A -> R A, B -> B R⁻¹ is the same expert and another row, so rows
    are comparable only for experts trained from the same initial A. Raises UsageError unless all
    experts are LoRA with the same modules and ranks. Model-based clustering of Ostapenko et
    al. 2024 (arXiv:2405.11157).
    """
    experts = _checked(experts)
    obstacle = _obstacle(experts)
    if obstacle is not None:
        raise UsageError(
            f"factors are compared entry by entry and these do not line up: {obstacle}",
            hint="compare sketches: features='sketches', or leave it at 'auto'",
        )
    first = next(iter(experts.values()))
    matrix = np.empty((len(experts), first.params), dtype=np.float32)
    for row, (name, expert) in zip(matrix, experts.items(), strict=True):
        at = 0
        for module, factor in _factors(expert):
            row[at : at + factor.numel()] = _numbers(name, module, factor)
            at += factor.numel()
    return matrix, list(experts)


def sketch_features(
    experts: Mapping[str, Expert], *, seed: int = 0, size: int = 16
) -> tuple[Float[np.ndarray, "expert feature"], list[str]]:
    """A small random projection of each ΔW, side by side in one row, and the names of the rows.

    size² numbers for each module that any expert has, zeros where an expert lacks it; sorted as
    `factor_features`. The inner product of two rows has the mean Σ_module <ΔW, ΔW'>, whatever the
    kinds and ranks and however a LoRA is factored. Each module has its own seed, so that the errors
    of the modules are independent and average out. With the seed and size of `experts.sketches` the
    rows are those that a library keeps, but for the rounding of float16.
    """
    experts = _checked(experts)
    if size < 1:
        raise UsageError(f"a sketch has a size of 1 or more; got {size}")
    modules = sorted({module for expert in experts.values() for module in expert.deltas})
    matrix = np.zeros((len(experts), len(modules) * size * size), dtype=np.float32)
    for j, module in enumerate(modules):
        columns = slice(j * size * size, (j + 1) * size * size)
        for row, (name, expert) in zip(matrix, experts.items(), strict=True):
            if module in expert.deltas:
                sketch = expert.deltas[module].sketch(seed=module_seed(seed, module), size=size)
                row[columns] = _numbers(name, module, sketch)
    return matrix, list(experts)


def gram_features(
    experts: Mapping[str, Expert], modules: Sequence[str]
) -> Float[np.ndarray, "expert expert"]:
    """Σ_module <ΔW_i, ΔW_j>, exactly, for the experts sorted by name; see `gram_matrix`."""
    experts = _checked(experts)
    with np.errstate(invalid="ignore", over="ignore"):
        gram = gram_matrix(experts, experts, modules)
    for name, square in zip(experts, gram.diagonal(), strict=True):
        if not np.isfinite(square):
            raise _ill(name, _ill_module(experts[name]))
    return (gram + gram.T) / 2


def _checked(experts: Mapping[str, Expert]) -> dict[str, Expert]:
    """The experts sorted by name, each read once; an error unless they share one base model."""
    if not experts:
        raise UsageError("there are no experts to group", hint="adaptlib add SOURCE")
    found = {name: experts[name] for name in sorted(experts)}
    first_of_base: dict[str, str] = {}
    first_of_module: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, expert in found.items():
        first_of_base.setdefault(expert.base, name)
        for module, shape in expert.shapes.items():
            other, wanted = first_of_module.setdefault(module, (name, shape))
            if shape != wanted and len(first_of_base) == 1:
                raise BaseMismatchError(
                    f"experts {other!r} and {name!r} name one base model, {expert.base!r}, and "
                    f"disagree on {module!r}: {wanted} and {shape}"
                )
    if len(first_of_base) > 1:
        listed = ", ".join(f"{base!r} ({name!r})" for base, name in first_of_base.items())
        raise BaseMismatchError(
            f"experts of {len(first_of_base)} base models cannot be compared: {listed}",
            hint="group the experts of one base model at a time",
        )
    return found


def _restricted(experts: dict[str, Expert], only: Sequence[str | int]) -> dict[str, Expert]:
    """The experts with some of their modules."""
    if not only:
        return experts
    kept = set(chosen({module for one in experts.values() for module in one.deltas}, only))
    found: dict[str, Expert] = {}
    for name, expert in experts.items():
        deltas = {module: expert.deltas[module] for module in expert.deltas if module in kept}
        if not deltas:
            raise lacking(name, only)
        found[name] = Expert(expert.base, deltas, expert.card)
    return found


def lacking(name: str, only: Sequence[str | int]) -> UsageError:
    """What is said of an expert that has none of the modules to compare."""
    return UsageError(
        f"expert {name!r} has no module that fits {', '.join(map(str, only))}",
        hint="leave it out, or compare other modules",
    )


class Outline(NamedTuple):
    """What decides whether factors line up: the kind, the modules, and their ranks."""

    kind: str
    modules: tuple[str, ...]
    ranks: tuple[int | None, ...]


def obstacle(outlines: Iterable[Outline]) -> str | None:
    """Why the factors of these experts do not line up entry by entry; None where they do."""
    kinds, modules, ranks = (set(part) for part in zip(*outlines, strict=True))
    if kinds == {"sparse"}:
        return "experts are sparse"
    if len(kinds) > 1:
        return "LoRA and sparse experts"
    if len(modules) > 1:
        return "modules differ"
    return "ranks differ" if len(ranks) > 1 else None


def _obstacle(experts: Mapping[str, Expert]) -> str | None:
    return obstacle(
        Outline(
            expert.kind,
            tuple(expert.deltas),
            tuple(d.rank if isinstance(d, LoRADelta) else None for d in expert.deltas.values()),
        )
        for expert in experts.values()
    )


def _factors(expert: Expert) -> Iterator[tuple[str, Tensor]]:
    for module, delta in expert.deltas.items():
        assert isinstance(delta, LoRADelta)
        yield module, delta.a
        yield module, delta.b


def _numbers(name: str, module: str, tensor: Tensor) -> Float[np.ndarray, " feature"]:
    numbers = tensor.detach().float().cpu().numpy().reshape(-1)
    if not np.isfinite(numbers).all():
        raise _ill(name, module)
    return numbers


def _ill(name: str, module: str) -> RefusedError:
    return RefusedError(
        f"expert {name!r} holds NaN or infinity in {module!r}, so it is like no other",
        hint="leave it out, or train it again",
    )


def _ill_module(expert: Expert) -> str:
    return next((m for m, d in expert.deltas.items() if not np.isfinite(d.norm())), "its modules")
