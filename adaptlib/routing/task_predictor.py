"""Task predictor: a classifier that says which expert's task a prompt is of (TP in
arXiv:2405.11157, among its baselines)."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, columns_of, fingerprints
from adaptlib.routing.texts import TextEmbedding, TextRouter, texts_of

SAMPLES = 1000  # texts of each expert at most
STRENGTH = 10.0  # inverse of the penalty: with 1, vectors of length 1 hardly move a probability


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TaskPredictor(TextRouter):
    """The `top_k` experts to whose task the prompt belongs most probably, weighed by these
    probabilities divided by their sum.

    Logistic regression on `TextEmbedding`, trained on prompts of each expert's task; the paper
    trains a small language model for this. Only the `coefficients` and `intercepts` are kept.
    """

    coefficients: Float[Tensor, "expert width"]
    intercepts: Float[Tensor, " expert"]
    name = "tp"

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        samples: Mapping[str, Sequence[str]] | None = None,
        top_k: int = 1,
        mix: Mix = "outputs",
        threshold: float | None = None,
    ) -> "TaskPredictor":
        """Train on each expert's samples, or its card where it has none. Every expert counts the
        same, however many samples it has.

        UsageError for no experts, an expert with neither, top_k < 1 or an unknown mix.
        """
        held = dict(experts.items())  # each is read once: a library reads files
        columns = columns_of(held)
        groups = texts_of(held, samples, most=SAMPLES)
        embedding = TextEmbedding.fit([text for texts in groups for text in texts])
        coefficients, intercepts = _train(embedding, groups)
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            threshold=threshold,
            idf=embedding.idf,
            top_k=min(top_k, len(held)),
            coefficients=coefficients,
            intercepts=intercepts,
        )

    def fits(self, vectors: Float[Tensor, "text width"]) -> Float[Tensor, "text expert"]:
        return (vectors @ self.coefficients.T + self.intercepts).softmax(1)

    def share(self, top: Float[Tensor, "text k"]) -> Float[Tensor, "text k"]:
        return top / top.sum(1, keepdim=True)


def _train(
    embedding: TextEmbedding, groups: Sequence[Sequence[str]]
) -> tuple[Float[Tensor, "expert width"], Float[Tensor, " expert"]]:
    from sklearn.linear_model import LogisticRegression

    if len(groups) == 1:
        return torch.zeros(1, len(embedding.idf)), torch.zeros(1)
    vectors = embedding.sparse([text for texts in groups for text in texts])
    labels = np.repeat(np.arange(len(groups)), [len(texts) for texts in groups])
    model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
    with warnings.catch_warnings():
        # one text a class is what a card is
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        model.fit(vectors, labels)
    weight, bias = model.coef_, model.intercept_
    if len(groups) == 2:  # sklearn keeps one row z with the odds; softmax(-z/2, z/2) is the same
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
