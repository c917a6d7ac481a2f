"""Labels say what a cluster has and others have not, and are told apart."""

import math

import pytest

from adaptlib.clustering.labels import card_text, suggest_labels

TEXTS = {
    "a": "Name the intent of the banking request.",
    "b": "Name the intent of the travel request.",
    "c": "Translate the sentence to French.",
    "d": "Translate the sentence to German.",
    "e": "Sentence: add the two numbers.",
    "f": "",
}


def test_they_are_the_words_of_the_cluster():
    labels = suggest_labels({"0": ["a", "b"], "1": ["c", "d"], "2": ["e"], "3": ["f", "g"]}, TEXTS)
    assert list(labels) == ["0", "1", "2"]  # nothing where there is no text
    assert labels["0"].split()[:2] == ["intent", "request"]
    assert labels["1"].split()[0] == "translate"
    assert labels["2"].split()[0] != "sentence"  # it says less: the others have it too
    assert all(1 <= len(label.split()) <= 3 for label in labels.values())


def test_the_weights_are_those_of_the_formula():
    """tf · log(1 + A / f) by hand: cats are in all, an owl in one of two of cluster 0."""
    texts = {"a": "cat owl", "b": "cat fox", "c": "cat dog", "d": "fox"}
    clusters = {"0": ["a", "b"], "1": ["c", "d"]}
    frequency = {"cat": 3, "owl": 1, "fox": 2}
    average = (4 + 3) / 2
    share = {"cat": 1, "owl": 0.5, "fox": 0.5}
    weights = {w: s * math.log(1 + average / frequency[w]) for w, s in share.items()}
    wanted = sorted(weights, key=lambda w: -weights[w])
    assert suggest_labels(clusters, texts)["0"].split() == wanted
    assert weights[wanted[0]] > weights[wanted[1]] > weights[wanted[2]]


def test_no_two_are_the_same():
    texts = dict.fromkeys("abcdefgh", "Negate the sentence by adding a single word.")
    labels = suggest_labels({str(i): [name] for i, name in enumerate("abcdefgh")}, texts)
    assert len({frozenset(label.split()) for label in labels.values()}) == len(labels) == 3
    assert "0" in labels
    one_word = suggest_labels({"0": ["a"], "1": ["b"]}, {"a": "antonym", "b": "antonym"})
    assert one_word == {"0": "antonym"}  # there is no second word to tell them apart by


def test_two_forms_of_a_word_are_one():
    labels = suggest_labels({"0": ["a"]}, {"a": "sentence sentences negation"})
    assert labels == {"0": "sentence negation"}


def test_the_task_comes_before_the_description():
    card = {"task": "dbpedia_14", "description": "Say the class.", "instruction": 3, "other": "x"}
    assert card_text(card) == "dbpedia_14. Say the class."
    assert card_text({}) == card_text({"task": None, "description": " "}) == ""
    assert suggest_labels({"0": ["a"]}, {"a": card_text(card)})["0"].split()[0] == "dbpedia"


@pytest.mark.parametrize("texts", [{}, {"a": "  "}, {"a": "the of and 12 3"}, {"a": "ab"}])
def test_no_text_and_no_words_are_no_labels(texts):
    assert suggest_labels({"0": ["a", "b"]}, texts) == {}
    assert suggest_labels({}, texts) == {}


def test_one_cluster_without_words_among_others():
    labels = suggest_labels({"0": ["a"], "1": ["b"]}, {"a": "12 of the", "b": "weather"})
    assert labels == {"1": "weather"}


def test_words_of_other_scripts():
    labels = suggest_labels({"0": ["a"]}, {"a": "Übersetze перевод 翻译句子"})
    assert labels == {"0": "übersetze перевод 翻译句子"}
