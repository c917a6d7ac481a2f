"""Named: one expert, chosen by hand. With the task's own expert it is the oracle."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import NotFoundError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Choice, Mix, Router


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Named(Router):
    """Every token to one expert, at the modules that it has; the others are left alone."""

    name = "named"

    @classmethod
    def fit(cls, experts: Mapping[str, Expert], *, expert: str, mix: Mix = "outputs") -> "Named":
        """NotFoundError where there is no expert of that name; UsageError for an unknown mix."""
        names = tuple(experts)
        if expert not in names:
            close = difflib.get_close_matches(expert, names, n=1)
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise NotFoundError(
                f"no expert {expert!r} among {len(names)}: {shown or 'there are none'}",
                hint=f"did you mean {close[0]}?" if close else None,
            )
        chosen = experts[expert]
        return cls(
            experts=names,
            fitted=tuple(chosen.fingerprint if name == expert else "" for name in names),
            columns={module: (names.index(expert),) for module in chosen.deltas},
            mix=mix,
        )

    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        (column,) = self.columns_at(module)
        index = torch.full((len(x), 1), column, device=x.device)
        return Choice(index, torch.ones(len(x), 1, device=x.device))
