"""LoGo: choose once for a prompt, by how strongly each update answers its last token
(arXiv:2511.07129)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.routing.router import Mix, PromptRouter, columns_of, fingerprints
from adaptlib.routing.spectr import lengths

Score = Literal["norm", "entropy"]
# The last word of a module that makes queries, alone or with keys and values.
QUERIES = ("q_proj", "query", "q", "wq", "qkv_proj", "query_key_value", "c_attn", "Wqkv")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LoGo(PromptRouter):
    """The `top_k` experts whose ΔW h is largest, with weights proportional to that; nothing is
    trained, and the experts are chosen in one pass of the base over the prompt.

    h is the hidden state of the prompt's last token as it enters `module`. The score is ‖ΔW h‖
    (equation 2), or with score "entropy" 1 / entropy(softmax(ΔW h)) (equation 3). An expert
    that lacks `module` is never chosen, at any module.

    Two things differ from the authors' code (utils/model.py): there h is the residual stream,
    before the norm that the module sits behind, and the first pass has all adapters on. As there,
    1e-6 is added to an entropy, which may be 0.

    Of LoRA experts `rows` (all under each other, `ranks` of each, 0 for a sparse one) are R A where
    scale · B = Q R, which is enough for ‖ΔW h‖ = ‖R A h‖; for "entropy" they are A, and `out` is
    scale · B. Sparse experts are one matrix, `at` and `values`, of d_out rows each.
    """

    module: str
    score: Score
    top_k: int
    d_out: int
    ranks: Int[Tensor, " here"]
    rows: Float[Tensor, "rows d_in"]
    out: Float[Tensor, "_ d_out"]
    at: Int[Tensor, "2 entry"]
    values: Float[Tensor, " entry"]
    name = "logo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in get_args(Score):
            raise UsageError(f"score is one of {', '.join(get_args(Score))}; got {self.score!r}")
        if self.top_k < 1:
            raise UsageError(f"top_k is 1 or more; got {self.top_k}")

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        module: str | None = None,
        score: Score = "norm",
        top_k: int = 20,
        mix: Mix = "outputs",
        threshold: float | None = None,
    ) -> "LoGo":
        """Take what scores need from the experts' updates of `module`; by default a module that
        makes queries, in the last layer, of those that half of the experts or more have (the
        paper's choice; see `default_module`).

        UsageError for no experts, top_k < 1, an unknown mix or score; NotFoundError for a module
        that no expert has.
        """
        held = dict(experts.items())  # each is read once: a library reads files
        everywhere = columns_of(held)
        module = default_module(everywhere, len(held)) if module is None else module
        if module not in everywhere:
            raise NotFoundError(
                f"no expert has module {module}; {len(everywhere)} modules are adapted",
                hint=f"module={default_module(everywhere, len(held))!r}, or None",
            )
        here, values = everywhere[module], list(held.values())
        able = set(here)
        columns = {m: tuple(i for i in found if i in able) for m, found in everywhere.items()}
        parts = _Parts.of([values[i].deltas[module] for i in here], score)
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns={m: found for m, found in columns.items() if found},
            mix=mix,
            threshold=threshold,
            module=module,
            score=score,
            top_k=min(top_k, len(here)),
            d_out=values[here[0]].deltas[module].shape[0],
            ranks=parts.ranks,
            rows=parts.rows,
            out=parts.out,
            at=parts.at,
            values=parts.values,
        )

    @property
    def probes(self) -> tuple[str, ...]:
        return (self.module,)

    @property
    def most(self) -> int:
        return min(self.top_k, super().most)

    def look(
        self,
        module: str,
        x: Float[Tensor, "sequence tok d_in"],
        mask: Bool[Tensor, "sequence tok"],
    ) -> Float[Tensor, "sequence here_and_1"]:
        """The score of each expert that has the module, and after them the length of h."""
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        h = x[torch.arange(len(x), device=x.device), last.to(x.device)].float()
        scores = h.new_zeros(len(h), len(self.ranks))
        lora = (self.ranks > 0).to(x.device)
        ranks = self.ranks[self.ranks > 0]
        projected = h @ self.rows.to(x.device).T
        if self.score == "norm":
            if len(ranks):
                scores[:, lora] = lengths(projected, ranks)
            scores[:, ~lora] = torch.linalg.vector_norm(self._sparse(h), dim=2)
        else:
            sizes = ranks.tolist()
            pairs = zip(projected.split(sizes, 1), self.out.to(x.device).split(sizes), strict=True)
            answers = [part @ b for part, b in pairs]
            if answers:
                scores[:, lora] = _certainty(torch.stack(answers, dim=1))
            scores[:, ~lora] = _certainty(self._sparse(h))
        return torch.cat([scores, torch.linalg.vector_norm(h, dim=1, keepdim=True)], dim=1)

    def weigh(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, "sequence expert"]:
        scores = seen[self.module][:, :-1]
        top, place = scores.topk(self.top_k, dim=1)
        top = top + 1e-30  # where no update says anything, all weigh the same
        index = torch.tensor(self.columns[self.module], device=scores.device)[place]
        weights = scores.new_zeros(len(scores), len(self.experts))
        return weights.scatter(1, index, top / top.sum(1, keepdim=True))

    def confidence(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, " sequence"]:
        """The largest ‖ΔW h‖ / ‖h‖, which does not depend on the length of h; with "entropy" the
        largest score."""
        row = seen[self.module]
        best = row[:, :-1].amax(1)
        return best if self.score == "entropy" else best / row[:, -1].clamp_min(1e-12)

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "LoGo":
        device = devices[self.module]
        return replace(
            self,
            rows=self.rows.to(device),
            out=self.out.to(device),
            at=self.at.to(device),
            values=self.values.to(device),
        )

    def _sparse(self, h: Float[Tensor, "sequence d_in"]) -> Float[Tensor, "sequence n d_out"]:
        """ΔW h of the sparse experts."""
        n = int((self.ranks == 0).sum())
        matrix = torch.sparse_coo_tensor(
            self.at.to(h.device),
            self.values.to(h.device),
            (n * self.d_out, h.shape[1]),
            is_coalesced=True,
            check_invariants=False,
        )
        return torch.sparse.mm(matrix, h.T).T.unflatten(1, (n, self.d_out))


def default_module(columns: Mapping[str, tuple[int, ...]], experts: int) -> str:
    """Of the modules that half of the experts or more have (of all, where there is none such):
    those that make queries, if any; of these the last layer's, by the first number in the name; of
    these the one that most experts have, and then the first by name."""
    common = [m for m, here in columns.items() if 2 * len(here) >= experts] or list(columns)

    def rank(module: str) -> tuple[bool, int, int]:
        layer = re.search(r"\.(\d+)\.", module)
        asks = module.rpartition(".")[2] in QUERIES
        return asks, int(layer[1]) if layer else -1, len(columns[module])

    return max(sorted(common), key=rank)


@final
@dataclass(frozen=True, eq=False)
class _Parts:
    """What is kept of the updates of one module; see `LoGo`."""

    ranks: Int[Tensor, " here"]
    rows: Float[Tensor, "rows d_in"]
    out: Float[Tensor, "_ d_out"]
    at: Int[Tensor, "2 entry"]
    values: Float[Tensor, " entry"]

    @classmethod
    def of(cls, deltas: Sequence[Delta], score: str) -> "_Parts":
        d_out, d_in = deltas[0].shape
        ranks, rows, out = [], [torch.zeros(0, d_in)], [torch.zeros(0, d_out)]
        at, values = [torch.zeros(2, 0, dtype=torch.long)], [torch.zeros(0)]
        for delta in deltas:
            if isinstance(delta, LoRADelta):
                a, b = (
                    t.detach().cpu().double() for t in (delta.a, delta.scale * delta.b.double())
                )
                if score == "norm":
                    a = torch.linalg.qr(b).R @ a
                else:
                    out.append(b.T.float())
                rows.append(a.float())
                ranks.append(len(a))
            else:
                assert isinstance(delta, SparseDelta)
                matrix = delta.matrix().detach().cpu()
                below = torch.tensor([[(len(at) - 1) * d_out], [0]])
                at.append(matrix.indices() + below)
                values.append(matrix.values())
                ranks.append(0)
        parts = (torch.cat(rows), torch.cat(out), torch.cat(at, dim=1), torch.cat(values))
        return cls(torch.tensor(ranks), *parts)


def _certainty(answers: Float[Tensor, "sequence n d_out"]) -> Float[Tensor, "sequence n"]:
    """1 / entropy of the softmax of each answer."""
    logs = answers.log_softmax(dim=2)
    return 1 / (-(logs.exp() * logs).sum(dim=2) + 1e-6)
