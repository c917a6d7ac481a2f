"""Routing by the prompt's text: texts as vectors, and what each expert's texts are.

A text becomes its words and pairs of words, and its runs of 3 to 5 characters, each hashed into one
of WIDTH entries and weighed by how rare it is. Nothing is downloaded, and equal texts have equal
vectors everywhere. It knows words, not meanings: the papers' routers use trained sentence encoders,
which know that "film" is near "movie".
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import PromptRouter

HALF = 1 << 13  # entries for words, and as many for runs of characters
WIDTH = 2 * HALF


@final
@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """From texts to vectors of length 1. `idf`, the rarity of each entry, is all there is to keep;
    an entry that was in no text is the rarest, so unfamiliar words make a text less like any."""

    idf: Float[Tensor, " width"]

    @classmethod
    def fit(cls, texts: Sequence[str]) -> "TextEmbedding":
        """idf = ln((1 + n) / (1 + df)) + 1 for an entry that is in df of the n texts."""
        df = np.bincount(_counts(texts).indices, minlength=WIDTH)
        return cls(torch.from_numpy(np.log((1 + len(texts)) / (1 + df)) + 1).float())

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        """One row for each text, of length 1; zeros for a text without a letter."""
        return torch.from_numpy(self.sparse(texts).toarray()).float()

    def sparse(self, texts: Sequence[str]) -> Any:
        """`embed` as a scipy matrix (text, width), float64: a text has few of the entries."""
        from sklearn.preprocessing import normalize

        weighed = _counts(texts).multiply(self.idf.cpu().double().numpy()).tocsr()
        return normalize(weighed) if len(texts) else weighed

    def means(self, groups: Sequence[Sequence[str]]) -> Float[Tensor, "group width"]:
        """The mean vector of each group of texts, scaled to length 1."""
        from sklearn.preprocessing import normalize

        rows = [np.asarray(self.sparse(texts).mean(axis=0)).reshape(-1) for texts in groups]
        return torch.from_numpy(normalize(np.stack(rows))).float()


def _counts(texts: Sequence[str]) -> Any:
    """1 + ln(count) of the n-grams that hash to each entry, with the hash's sign: the words' half
    and the characters' half of each row have length 1, so that both have a say."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize

    if not len(texts):
        return csr_matrix((0, WIDTH))
    every: dict[str, Any] = {"n_features": HALF, "norm": None}
    halves = []
    for hashing in (
        HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **every),
        HashingVectorizer(ngram_range=(3, 5), analyzer="char_wb", **every),
    ):
        counts: Any = hashing.transform(list(texts))
        counts.eliminate_zeros()  # where two n-grams of opposite sign met
        counts.data = np.sign(counts.data) * (1 + np.log(np.abs(counts.data)))
        halves.append(normalize(counts))
    return hstack(halves, format="csr")


def card_text(expert: Expert) -> str:
    """What the expert's card says of its task: `task`, `tasks`, `instruction` and `description`,
    one a line; empty where it says nothing. Names are taken apart at `_`, `-`, `.`, `/` and `:`."""
    card = expert.card
    listed = card.get("tasks")
    tasks = [card.get("task"), *(listed if isinstance(listed, list | tuple) else ())]
    said = [re.sub(r"[_\-./:]+", " ", task) for task in tasks if isinstance(task, str)]
    said += [card[key] for key in ("instruction", "description") if isinstance(card.get(key), str)]
    return "\n".join(text for text in dict.fromkeys(said) if text.strip())


def texts_of(
    experts: Mapping[str, Expert], samples: Mapping[str, Sequence[str]] | None, *, most: int
) -> list[list[str]]:
    """For each expert the texts it is known by: the first `most` of its samples, prompts of its
    task; where it has none, what its card says. `samples` may be of more experts than these.

    UsageError for an expert with neither, and for one text where a list of them is wanted.
    """
    samples = {} if samples is None else samples
    found = []
    for name, expert in experts.items():
        given = samples.get(name, ())
        if isinstance(given, str):
            raise UsageError(f"samples of {name} are a list of texts; got one text")
        texts = list(given[:most]) or [text for text in [card_text(expert)] if text]
        if not texts:
            raise UsageError(
                f"expert {name} has no samples, and its card names no task, description or "
                "instruction: there is no text to know it by",
                hint=f"samples={{{name!r}: [some prompts of its task]}}, or add it to the library "
                "with --task or --description",
            )
        found.append(texts)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRouter(PromptRouter):
    """A router that chooses by the prompt's text alone; it runs on the CPU. Subclasses give `fits`
    and `share`."""

    idf: Float[Tensor, " width"]
    top_k: int
    reads_text = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise UsageError(f"top_k is 1 or more; got {self.top_k}")

    @abstractmethod
    def fits(self, vectors: Float[Tensor, "text width"]) -> Float[Tensor, "text expert"]:
        """How well each expert fits each text; larger is better."""

    @abstractmethod
    def share(self, top: Float[Tensor, "text k"]) -> Float[Tensor, "text k"]:
        """The weights of those that fit best, from how well they fit; a row sums to 1."""

    @property
    def most(self) -> int:
        return min(self.top_k, super().most)

    def weigh(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, "sequence expert"]:
        fits = self._fits(texts)
        top, index = fits.topk(self.top_k, dim=1)
        return torch.zeros_like(fits).scatter(1, index, self.share(top))

    def confidence(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, " sequence"]:
        """How well the best expert fits, by `fits`."""
        return self._fits(texts).amax(1)

    def _fits(self, texts: Sequence[str] | None) -> Float[Tensor, "text expert"]:
        if texts is None:
            raise UsageError(
                f"router {self.name} reads the prompts' texts; got none",
                hint="attach(model, experts, router, tokenizer=tokenizer)",
            )
        return self.fits(TextEmbedding(self.idf).embed(texts))
