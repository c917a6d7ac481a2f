"""LoraRetriever: the experts whose samples are most like the prompt, with equal weight
(arXiv:2402.09997, section 4.1 for the choice, 4.2 for the mixing)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, columns_of, fingerprints
from adaptlib.routing.texts import TextEmbedding, TextRouter, texts_of

SAMPLES = 20  # texts of each expert, as in the paper


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LoraRetriever(TextRouter):
    """The `top_k` experts with the largest cos(E(prompt), E(expert)), where E(expert) is the mean
    of E over its samples (`embeddings`, scaled to length 1).

    The paper's E is an encoder trained on other tasks for this, told "Represent the sentence for
    similar task retrieval" before each text; here it is `TextEmbedding`, to which such words would
    be the same few entries in every text, so they are left out.

    The paper's "mixture" is the mean of the experts' outputs, its "fusion" the mean of their
    parameters. Of updates ΔW these are the same sum, `mix="outputs"`; with `mix="factors"` it is
    the mean of the A and of the B, which has cross terms.
    """

    embeddings: Float[Tensor, "expert width"]
    name = "loraretriever"

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        samples: Mapping[str, Sequence[str]] | None = None,
        top_k: int = 3,
        mix: Mix = "outputs",
        threshold: float | None = None,
    ) -> "LoraRetriever":
        """Embed each expert's first 20 samples, or its card where it has none.

        UsageError for no experts, an expert with neither, top_k < 1 or an unknown mix.
        """
        held = dict(experts.items())  # each is read once: a library reads files
        columns = columns_of(held)
        groups = texts_of(held, samples, most=SAMPLES)
        embedding = TextEmbedding.fit([text for texts in groups for text in texts])
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            threshold=threshold,
            idf=embedding.idf,
            top_k=min(top_k, len(held)),
            embeddings=embedding.means(groups),
        )

    def fits(self, vectors: Float[Tensor, "text width"]) -> Float[Tensor, "text expert"]:
        return vectors @ self.embeddings.T

    def share(self, top: Float[Tensor, "text k"]) -> Float[Tensor, "text k"]:
        return torch.full_like(top, 1 / top.shape[1])
