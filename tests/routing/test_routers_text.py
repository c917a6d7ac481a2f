"""The routers that read the prompt's text, against their definitions in loops."""

import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils import murmurhash3_32

from adaptlib.errors import UsageError
from adaptlib.experts import Expert, LoRADelta
from adaptlib.routing import LORAUTER, LoraRetriever, TaskPredictor
from adaptlib.routing.texts import HALF, TextEmbedding, card_text, texts_of

EXACT = 1e-5
ROUTERS = [LoraRetriever, LORAUTER, TaskPredictor]
SAMPLES = {
    "sums": ["Add the numbers: 2 + 3", "Add the numbers: 17 + 4 + 9", "What is 3 plus 8?"],
    "french": ["Translate to French: the house is big", "Translate to French: we eat bread"],
    "sentiment": [
        "Is this review positive? The film was a waste of time.",
        "Is this review positive? I loved every minute of it.",
        "Is this review positive? Dull, dull, dull.",
        "Is this review positive? A joy.",
    ],
}
PROMPTS = [
    "Add the numbers: 5 + 6",
    "Translate to French: the dog sleeps",
    "Is this review positive? The film was fun.",
]


def expert(**card):
    return Expert("m", {"q": LoRADelta(torch.ones(1, 4), torch.ones(3, 1))}, card)


@pytest.fixture
def experts():
    return {name: expert() for name in SAMPLES}


# -- the embedding --------------------------------------------------------------------------------


def grams(text, half):
    """The n-grams of a text, one by one."""
    found = []
    words = re.findall(r"\w+", text.lower())
    if half == "words":
        found += words
        found += [f"{a} {b}" for a, b in pairwise(words)]
        return found
    for word in text.lower().split():
        padded = f" {word} "
        for n in (3, 4, 5):
            found += [padded[i : i + n] for i in range(max(1, len(padded) - n + 1))]
            if len(padded) <= n:
                break
    return found


def slow_counts(text):
    row = np.zeros(2 * HALF)
    for offset, half in ((0, "words"), (HALF, "characters")):
        counts = np.zeros(HALF)
        for gram in grams(text, half):
            hashed = murmurhash3_32(gram)  # signed
            counts[abs(hashed) % HALF] += 1 if hashed >= 0 else -1
        counts = np.array([math.copysign(1 + math.log(abs(c)), c) if c else 0.0 for c in counts])
        length = np.linalg.norm(counts)
        row[offset : offset + HALF] = counts / length if length else counts
    return row


def slow_embed(texts, known):
    rows = [slow_counts(text) for text in known]
    df = sum((row != 0).astype(int) for row in rows)
    idf = np.array([math.log((1 + len(known)) / (1 + d)) + 1 for d in df])
    found = []
    for text in texts:
        row = slow_counts(text) * idf
        length = np.linalg.norm(row)
        found.append(row / length if length else row)
    return np.stack(found)


KNOWN = [text for texts in SAMPLES.values() for text in texts]


def test_the_embedding_is_hashed_words_and_runs_of_characters_by_rarity():
    texts = [*PROMPTS, *KNOWN, "a a a a b", "Größe, naïve 東京!"]
    embedding = TextEmbedding.fit(KNOWN)
    got = embedding.embed(texts)
    wanted = slow_embed(texts, KNOWN)
    worst = np.abs(got.double().numpy() - wanted).max()
    print(f"embedding: max abs error {worst:.1e}")
    assert worst < 1e-6
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.norm(dim=1), torch.ones(len(texts)))


def test_equal_texts_have_equal_vectors_and_like_ones_like_vectors():
    embedding = TextEmbedding.fit(KNOWN)
    one, same, like, other = embedding.embed(
        ["count the vowels", "count the vowels", "count the vowel", "xyzzy qwop"]
    )
    assert torch.equal(one, same)
    assert one @ like > 0.5 > 0.1 > one @ other


def test_texts_without_a_letter_and_no_texts():
    embedding = TextEmbedding.fit(KNOWN)
    assert embedding.embed(["", "   \n"]).abs().sum() == 0
    assert embedding.embed([]).shape == (0, 2 * HALF)
    assert embedding.means([["", ""]]).abs().sum() == 0
    assert TextEmbedding.fit([""]).embed(["a word"]).norm() == pytest.approx(1)


def test_means_are_of_the_vectors_and_have_length_one():
    embedding = TextEmbedding.fit(KNOWN)
    got = embedding.means(list(SAMPLES.values()))
    for row, texts in zip(got, SAMPLES.values(), strict=True):
        mean = slow_embed(texts, KNOWN).sum(0)
        assert np.abs(row.double().numpy() - mean / np.linalg.norm(mean)).max() < 1e-6


# -- what an expert is known by -------------------------------------------------------------------


def test_what_a_card_says():
    assert card_text(expert()) == ""
    assert card_text(expert(task=None, description=" ", metrics={"x": 1})) == ""
    card = {"task": "flan/arc_easy-v2", "description": "Answer it.", "instruction": "Answer it."}
    assert card_text(expert(**card)) == "flan arc easy v2\nAnswer it."
    joint = {"task": "joint", "tasks": ["a_b", "c", 3], "description": "2 tasks"}
    assert card_text(expert(**joint)) == "joint\na b\nc\n2 tasks"


def test_samples_come_before_the_card():
    experts = {"a": expert(task="sums"), "b": expert(task="songs"), "c": expert(task="x")}
    samples = {"a": ["1 + 1", "2 + 2", "3 + 3"], "b": [], "elsewhere": ["z"]}
    assert texts_of(experts, samples, most=2) == [["1 + 1", "2 + 2"], ["songs"], ["x"]]
    assert texts_of(experts, None, most=2) == [["sums"], ["songs"], ["x"]]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("router", ROUTERS)
def test_an_expert_without_a_text(router, experts):
    with pytest.raises(
        UsageError, match="expert french has no samples, and its card names no"
    ) as e:
        router.fit(experts, samples={name: SAMPLES[name] for name in ("sums", "sentiment")})
    assert "samples={'french': [some prompts of its task]}" in str(e.value.hint)
    with pytest.raises(UsageError, match="samples of sums are a list of texts; got one text"):
        router.fit(experts, samples=SAMPLES | {"sums": "1 + 1"})


@pytest.mark.parametrize("router", ROUTERS)
def test_cards_do_where_there_are_no_samples(router):
    experts = {
        "a": expert(task="translate_french", description="Translate the sentence to French."),
        "b": expert(task="sentiment", description="Is the review positive or negative?"),
        "c": expert(task="addition", description="Add the numbers."),
    }
    fitted = router.fit(experts, top_k=1)
    prompts = ["Add the two numbers 3 and 4", "Translate this sentence: I eat"]
    assert fitted.weigh({}, prompts).tolist() == [[0, 0, 1], [1, 0, 0]]


# -- retrieval ------------------------------------------------------------------------------------


def slow_similarities(prompts):
    rows = slow_embed(prompts, KNOWN)
    found = []
    for row in rows:
        similarities = {}
        for name, texts in SAMPLES.items():
            mean = sum(slow_embed(texts, KNOWN)) / len(texts)
            similarities[name] = float(row @ mean / np.linalg.norm(mean))
        found.append(similarities)
    return found


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_loraretriever_takes_the_most_alike_with_equal_weight(experts, top_k):
    router = LoraRetriever.fit(experts, samples=SAMPLES, top_k=top_k)
    weights, confidence = router.weigh({}, PROMPTS), router.confidence({}, PROMPTS)
    for row, best, similarities in zip(
        weights.tolist(), confidence, slow_similarities(PROMPTS), strict=True
    ):
        chosen = sorted(similarities, key=lambda n: -similarities[n])[:top_k]
        assert row == pytest.approx([1 / top_k if n in chosen else 0 for n in SAMPLES])
        assert best.item() == pytest.approx(max(similarities.values()), abs=EXACT)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_lorauter_weighs_by_a_softmax_over_similarities(experts, top_k, temperature):
    router = LORAUTER.fit(experts, samples=SAMPLES, top_k=top_k, temperature=temperature)
    weights = router.weigh({}, PROMPTS)
    worst = 0.0
    for row, similarities in zip(weights.tolist(), slow_similarities(PROMPTS), strict=True):
        chosen = sorted(similarities, key=lambda n: -similarities[n])[:top_k]
        total = sum(math.exp(similarities[n] / temperature) for n in chosen)
        for got, (name, s) in zip(row, similarities.items(), strict=True):
            wanted = math.exp(s / temperature) / total if name in chosen else 0.0
            worst = max(worst, abs(got - wanted))
    print(f"LORAUTER: max abs error {worst:.1e}")
    assert worst < EXACT


def test_loraretriever_reads_the_first_twenty_samples(experts):
    many = [f"{'Add' if i < 20 else 'Translate'} {i}" for i in range(40)]
    one = LoraRetriever.fit(experts, samples=SAMPLES | {"sums": many})
    other = LoraRetriever.fit(experts, samples=SAMPLES | {"sums": many[:20]})
    assert torch.equal(one.embeddings, other.embeddings)


# -- the task predictor ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_tp_minimises_the_penalised_loss(count):
    """The gradient of it, in loops, is zero: class weights are n / (classes · class size)."""
    samples = dict(list(SAMPLES.items())[:count])
    router = TaskPredictor.fit({name: expert() for name in samples}, samples=samples, top_k=count)
    texts = [(i, text) for i, group in enumerate(samples.values()) for text in group]
    vectors = slow_embed([t for _, t in texts], [t for _, t in texts])
    coefficients = router.coefficients.double().numpy()
    intercepts = router.intercepts.double().numpy()
    # two classes are one row z to sklearn, penalised once: half of it on each side is half of that
    penalty = coefficients / 10.0 * (2 if count == 2 else 1)
    slope, slope_b = penalty.copy(), np.zeros(count)
    for (label, _), x in zip(texts, vectors, strict=True):
        logits = np.array([c @ x + b for c, b in zip(coefficients, intercepts, strict=True)])
        p = np.exp(logits - logits.max())
        p /= p.sum()
        weight = len(texts) / (count * len(list(samples.values())[label]))
        for c in range(count):
            slope[c] += weight * (p[c] - (c == label)) * x
            slope_b[c] += weight * (p[c] - (c == label))
    assert np.abs(slope).max() < 1e-3
    assert np.abs(slope_b).max() < 1e-3
    assert np.abs(penalty).max() > 0.05  # or this would show nothing


@pytest.mark.parametrize("count", [2, 3])
def test_tp_gives_the_probabilities_of_scikit_learn(count):
    samples = dict(list(SAMPLES.items())[:count])
    router = TaskPredictor.fit({name: expert() for name in samples}, samples=samples, top_k=2)
    embedding = TextEmbedding(router.idf)
    x = embedding.embed([t for texts in samples.values() for t in texts]).double().numpy()
    y = [i for i, texts in enumerate(samples.values()) for _ in texts]
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(x, y)
    wanted = model.predict_proba(embedding.embed(PROMPTS).double().numpy())
    got = router.fits(embedding.embed(PROMPTS)).double().numpy()
    print(f"TP: max abs error {np.abs(got - wanted).max():.1e}")
    assert np.abs(got - wanted).max() < 1e-3  # both stop near the minimum, not at it
    weights = router.weigh({}, PROMPTS)
    for row, p in zip(weights.tolist(), got, strict=True):
        best = sorted(range(count), key=lambda i: -p[i])[:2]
        assert row == pytest.approx(
            [p[i] / sum(p[j] for j in best) if i in best else 0 for i in range(count)], abs=EXACT
        )
    torch.testing.assert_close(
        router.confidence({}, PROMPTS), torch.from_numpy(got).amax(1).float(), atol=1e-6, rtol=0
    )


def test_tp_of_many_experts_with_one_card_each():
    """scikit-learn warns of so many classes, and warnings are errors here."""
    experts = {f"e{i}": expert(task=f"{a} {b}") for i, (a, b) in enumerate(PAIRS)}
    router = TaskPredictor.fit(experts)
    found = router.weigh({}, [f"please {a} the {b}" for a, b in PAIRS]).argmax(1)
    assert found.tolist() == list(range(len(PAIRS)))


VERBS, NOUNS = ("sort", "count", "translate", "rhyme"), ("stones", "birds", "cars", "hats", "songs")
PAIRS = [(verb, noun) for verb in VERBS for noun in (*NOUNS, "rivers", "clocks")]


def test_tp_of_one_expert():
    router = TaskPredictor.fit({"a": expert(task="x")})
    assert router.weigh({}, ["anything"]).tolist() == [[1.0]]


# -- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_they_find_the_task_of_a_prompt_that_they_have_not_seen(router):
    """Eight tasks of one form each with random words; twenty samples, ten other prompts."""
    draw = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rt", "sk")]
    forms = [
        "Reverse the list: {}",
        "Sort these words: {}",
        "Count the letters in {}",
        "Translate to Latin: {}",
        "Is this a question? {}",
        "Which one is longest: {}?",
        "Rewrite in capitals. {}",
        "Find the odd one out among {}",
    ]
    prompts = {
        f"t{i}": [form.format(" ".join(draw.sample(words, 8))) for _ in range(30)]
        for i, form in enumerate(forms)
    }
    experts = {name: expert() for name in prompts}
    fitted = router.fit(experts, samples={n: texts[:20] for n, texts in prompts.items()}, top_k=1)
    right = 0
    for i, texts in enumerate(prompts.values()):
        right += int((fitted.weigh({}, texts[20:]).argmax(1) == i).sum())
    print(f"{fitted.name}: {right} of 80")
    assert right >= 76


@pytest.mark.parametrize("router", ROUTERS)
def test_an_unfamiliar_prompt_has_less_confidence(router, experts):
    fitted = router.fit(experts, samples=SAMPLES)
    known, odd = fitted.confidence({}, [PROMPTS[1], "zqx wvk pfgh"])
    assert known > odd


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("router", ROUTERS)
def test_what_cannot_be_meant(router, experts):
    with pytest.raises(UsageError, match="top_k is 1 or more; got 0"):
        router.fit(experts, samples=SAMPLES, top_k=0)
    fitted = router.fit(experts, samples=SAMPLES, top_k=9)
    assert fitted.top_k == fitted.most == 3
    for ask in (fitted.weigh, fitted.confidence):
        with pytest.raises(UsageError, match="reads the prompts' texts; got none"):
            ask({}, None)


def test_a_temperature_of_lorauter_that_cannot_be_meant(experts):
    with pytest.raises(UsageError, match="temperature is more than 0; got 0"):
        LORAUTER.fit(experts, samples=SAMPLES, temperature=0.0)
