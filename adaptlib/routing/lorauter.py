"""LORAUTER: the tasks most like the prompt, and their experts by how much (arXiv:2601.21795)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, columns_of, fingerprints
from adaptlib.routing.texts import TextEmbedding, TextRouter, texts_of

SAMPLES = 200  # texts of each task; more of them change a mean little


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LORAUTER(TextRouter):
    """The `top_k` tasks (3 in the paper) with the largest cos(E(prompt), E(task)), where E(task) is
    the mean of E over a small validation set (`embeddings`, scaled to length 1); the weights of
    their experts are a softmax over these similarities divided by `temperature`.

    The paper's E is a sentence encoder, here it is `TextEmbedding`, whose similarities are smaller
    and closer together: with temperature 1 the weights are nearly equal, and a temperature of 0.1
    or less makes them differ. The paper also finds, by successive halving on the validation sets,
    which adapter of a pool is best for each task; here each expert is the one of its own task.
    """

    embeddings: Float[Tensor, "expert width"]
    temperature: float
    name = "lorauter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise UsageError(f"temperature is more than 0; got {self.temperature}")

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        samples: Mapping[str, Sequence[str]] | None = None,
        top_k: int = 3,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        threshold: float | None = None,
    ) -> "LORAUTER":
        """Embed each expert's task: its samples, or its card where it has none.

        UsageError for no experts, an expert with neither, top_k < 1, temperature <= 0 or an unknown
        mix.
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
            temperature=temperature,
        )

    def fits(self, vectors: Float[Tensor, "text width"]) -> Float[Tensor, "text expert"]:
        return vectors @ self.embeddings.T

    def share(self, top: Float[Tensor, "text k"]) -> Float[Tensor, "text k"]:
        return (top / self.temperature).softmax(1)
