"""A few words for each cluster, from what the cards of its experts say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

FIELDS = ("task", "description", "instruction")  # of a card
WORDS = 3
FAINT = 0.3  # of the weight of a label's first word: what is below it says nothing more


def card_text(card: Mapping[str, Any]) -> str:
    """What a card says of the expert's task, "" where it says nothing."""
    said = [card.get(field) for field in FIELDS]
    return ". ".join(text for text in said if isinstance(text, str) and text.strip())


def suggest_labels(
    clusters: Mapping[str, Sequence[str]], texts: Mapping[str, str], *, words: int = WORDS
) -> dict[str, str]:
    """Up to `words` words for each cluster, no two clusters the same: label -> words.

    Class-based TF-IDF (Grootendorst 2022, arXiv:2203.05794): a cluster's weight of a word is
    tf · log(1 + A / f), with tf the share of the cluster's experts whose text has the word, f the
    number of all experts that have it and A the mean number of words an expert's cluster has. So
    what all experts say is worth little. `texts` maps names to text, such as `card_text` gives; a
    cluster of which no expert has any is left out. Numbers and English stop words are no words.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    told = {
        label: [texts[name] for name in names if texts.get(name, "").strip()]
        for label, names in clusters.items()
    }
    told = {label: said for label, said in told.items() if said}
    vectorizer = CountVectorizer(binary=True, stop_words="english", token_pattern=r"[^\W\d_]{3,}")
    try:
        rows = vectorizer.fit_transform([text for said in told.values() for text in said])
    except ValueError:  # no text at all, or none with a word in it
        return {}
    vocabulary = vectorizer.get_feature_names_out()
    owner = np.repeat(np.arange(len(told)), [len(said) for said in told.values()])
    counts = np.stack([np.asarray(rows[owner == i].sum(axis=0))[0] for i in range(len(told))])
    everywhere = counts.sum(axis=0)
    share = counts / np.array([len(said) for said in told.values()])[:, None]
    weights = share * np.log1p(counts.sum() / len(told) / everywhere)
    taken: set[frozenset[str]] = set()
    labels: dict[str, str] = {}
    words_of = vectorizer.build_analyzer()
    for (label, said), row in zip(told.items(), weights, strict=True):
        weight = dict(zip(vocabulary, row.tolist(), strict=True))
        # Of words that weigh the same, the first: a card's task stands before its description.
        found = dict.fromkeys(word for text in said for word in words_of(text))
        ranked = sorted(found, key=lambda word: -weight[word])
        strong = int((row >= FAINT * row.max()).sum())
        for chosen in _choices(ranked, strong, words):
            if frozenset(chosen) not in taken:
                taken.add(frozenset(chosen))
                labels[label] = " ".join(chosen)
                break
    return labels


def _choices(ranked: Sequence[str], strong: int, words: int) -> Iterator[list[str]]:
    """The best words, and then, for where those are taken, with another last word each time."""
    apart: list[str] = []
    for word in ranked:  # not `sentence` and `sentences`: one of two forms says it
        if not any(_forms_of_one(word, other) for other in apart):
            apart.append(word)
    first = apart[: max(1, min(words, strong))]
    if not first:
        return
    yield first
    for word in apart[len(first) :]:
        yield [*first[: words - 1], word]


def _forms_of_one(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return len(short) >= 4 and long.startswith(short)
