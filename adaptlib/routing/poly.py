"""Polytropon: skills and how much of each a task takes (arXiv:2202.13914, section 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.per_task import TaskRouter
from adaptlib.routing.router import Mix, columns_of, fingerprints


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Polytropon(TaskRouter):
    """A task's mixture of skills, with one weight for each skill at a module: MHR with one head, as
    arXiv:2211.03831 section 2.2 has it. `adaptlib train-router poly` learns skills and logits."""

    name = "poly"

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = {z.shape[1] for z in self.logits.values()}
        if heads != {1}:
            raise UsageError(f"Polytropon has one head; got {heads}", hint="MHR has several")

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        logits: Mapping[str, Float[Tensor, "task head here"]],
        tasks: Sequence[str],
        task: str | None = None,
        mix: Mix = "factors",
    ) -> "Polytropon":
        """With logits that were learned, for these skills and tasks. UsageError where they do not
        fit each other, NotFoundError for a task that is not among them."""
        held = dict(experts.items())  # each is read once: a library reads files
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns_of(held),
            mix=mix,
            tasks=tuple(tasks),
            logits=dict(logits),
            task=task,
        )
