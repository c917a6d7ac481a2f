"""MHR: multi-head adapter routing (arXiv:2211.03831, section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.expert import Expert
from adaptlib.routing.per_task import TaskRouter
from adaptlib.routing.router import Mix, columns_of, fingerprints


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class MHR(TaskRouter):
    """A task's mixture of skills, block by block: with h heads, the k-th part of A's input
    dimension and of B's output dimension has weights of its own (section 3.1). One head is
    Polytropon. `adaptlib train-router mhr` learns skills and logits."""

    name = "mhr"

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        logits: Mapping[str, Float[Tensor, "task head here"]],
        tasks: Sequence[str],
        task: str | None = None,
        mix: Mix = "factors",
    ) -> "MHR":
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
