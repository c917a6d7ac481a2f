"""Scores against loops over single rows, a cache that loses nothing, and comparisons by hand."""

import json

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.evaluation import METRICS, Cache, Limits, Subject, compare, evaluate, own_experts
from adaptlib.evaluation.metrics import rouge_l
from adaptlib.evaluation.statistics import interval, paired
from adaptlib.routing import Arrow, attach
from adaptlib.training.tasks import answer

LIMITS = Limits(batch_size=4, max_length=30)


def slow_answer(model, tokenizer, task, row, most):
    """Greedy, one token at a time, without a cache."""
    ids = tokenizer(task.prompt(row)).input_ids
    said = []
    for _ in range(most):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
        ids = [*ids, token]
    return tokenizer.decode(said, skip_special_tokens=True).split("\n")[0].strip()


def slow_loss(model, tokenizer, task, row, output):
    """(sum of log-likelihoods of the answer and its eos, tokens)."""
    prompt = tokenizer(task.prompt(row)).input_ids
    tail = tokenizer(answer(output), add_special_tokens=False).input_ids
    tail = [*tail, tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([prompt + tail])).logits[0].float().log_softmax(-1)
    return sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(tail)), len(tail)


@pytest.mark.parametrize("scope", [None, "token", "prompt"])
def test_metrics_are_what_loops_over_rows_give(
    words_model, words_tokenizer, tasks, zoo, scope
) -> None:
    subject = Subject("base")
    if scope is not None:
        router = Arrow.fit(zoo, top_k=2, scope=scope)
        subject = Subject("arrow", zoo, router)

    def run(task, metric):
        return evaluate(
            words_model, words_tokenizer, subject, task, metric=metric, limits=LIMITS
        ).values

    for task in tasks[::2]:
        most = max(
            len(words_tokenizer(answer(r.output), add_special_tokens=False).input_ids)
            for rows in task.rows.values()
            for r in rows
        )
        got = {name: run(task, name) for name in METRICS if METRICS[name].unfit(task) is None}
        for i, row in enumerate(task.split("test")):
            if scope is None:
                said = slow_answer(words_model, words_tokenizer, task, row, most + 1)
                assert got["exact_match"][i] == float(said == row.output)
                assert got["rouge_l"][i] == rouge_l(said, row.output)
            if scope == "prompt":  # the loops would choose from the answer as well
                continue
            if scope is None:
                total, n = slow_loss(words_model, words_tokenizer, task, row, row.output)
            else:
                with attach(words_model, zoo, subject.router) as routed:
                    total, n = slow_loss(routed, words_tokenizer, task, row, row.output)
            assert got["loss"][i] == pytest.approx(-total / n, abs=1e-4)
            if task.labels and scope is None:
                means = {}
                for label in task.labels:
                    total, n = slow_loss(words_model, words_tokenizer, task, row, label)
                    means[label] = total / n
                best = max(means, key=means.__getitem__)
                assert got["label_accuracy"][i] == float(best == row.output)


def test_batches_change_nothing(words_model, words_tokenizer, tasks, zoo) -> None:
    for router in (Arrow.fit(zoo, top_k=2), Arrow.fit(zoo, top_k=1, scope="prompt")):
        subject = Subject("a", zoo, router)
        for metric in ("rouge_l", "loss"):
            found = [
                evaluate(
                    words_model, words_tokenizer, subject, tasks[2], metric=metric,
                    limits=Limits(batch_size=size, max_length=30),
                ).values
                for size in (1, 5)
            ]  # fmt: skip
            assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_rouge_is_that_of_its_package() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts = ["", "a", "The cat sat.", "the CAT sat on, the mat!", "b-c d_e 12", "mat the on"]
    for said in texts:
        for wanted in texts:
            theirs = scorer.score(wanted, said)["rougeL"].fmeasure
            assert rouge_l(said, wanted) == pytest.approx(theirs)


def test_nothing_is_computed_twice_and_nothing_stale(
    words_model, words_tokenizer, tasks, zoo, tmp_path
) -> None:
    cache = Cache.of(tmp_path, words_model, words_tokenizer)
    subject = Subject("arrow", zoo, Arrow.fit(zoo, top_k=2))

    def run(subject=subject, task=tasks[2], **options):
        options = {"limits": LIMITS, "cache": cache} | options
        return evaluate(words_model, words_tokenizer, subject, task, **options)

    first = run(rows=5)
    assert first.computed == 5
    more = run(rows=9)
    assert (more.computed, more.values[:5]) == (4, first.values)
    assert run(rows=9, metric="rouge_l").computed == 0  # of the same answers
    assert run(rows=9, metric="loss").computed == 9
    assert run(rows=3).computed == 0
    others = [
        {"subject": Subject("arrow", zoo, Arrow.fit(zoo, top_k=1))},
        {"subject": Subject("base")},
        {"task": tasks[0]},
        {"split": "train"},
        {"limits": Limits(max_length=29)},
    ]
    assert [run(rows=3, **other).computed for other in others] == [3] * 5
    changed = dict(zoo) | {"one": zoo["other"]}
    assert run(Subject("a", changed, Arrow.fit(changed, top_k=2)), rows=3).computed == 3
    with torch.no_grad():
        words_model.lm_head.weight[3] += 0.01
    cache = Cache.of(tmp_path, words_model, words_tokenizer)
    assert run(rows=3, cache=cache).computed == 3


def test_an_interruption_loses_a_batch_at_most(
    words_model, words_tokenizer, tasks, tmp_path
) -> None:
    cache, seen = Cache.of(tmp_path, words_model, words_tokenizer), []

    def run(progress=None):
        return evaluate(
            words_model, words_tokenizer, Subject("base"), tasks[2], limits=LIMITS,
            cache=cache, progress=progress,
        )  # fmt: skip

    def stop(done: int) -> None:
        seen.append(done)
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert seen == [0, 4, 8]
    (path,) = (tmp_path / "derived" / "evaluation").glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b'{"row": 3, "ans')  # a kill in the middle of a line
    rest = run()
    assert rest.computed == 14 - 8
    lines = path.read_bytes().split(b"\n")
    whole = [json.loads(line) for line in lines if line.endswith(b"}")]
    assert sorted(line["row"] for line in whole) == list(range(14))
    whole = evaluate(words_model, words_tokenizer, Subject("base"), tasks[2], limits=LIMITS)
    assert rest.values == whole.values


def test_what_does_not_fit(words_model, words_tokenizer, tasks, texts, zoo) -> None:
    given = (words_model, words_tokenizer, Subject("base"))
    with pytest.raises(UsageError, match="label_accuracy does not fit task free") as error:
        evaluate(*given, tasks[2], metric="label_accuracy")
    assert error.value.hint == "--metric exact_match,loss,rouge_l"
    with pytest.raises(UsageError, match="it is of texts"):
        evaluate(*given, texts)
    assert evaluate(*given, texts, metric="loss").n == 2
    with pytest.raises(NotFoundError, match="did you mean exact_match"):
        evaluate(*given, tasks[0], metric="exact_mach")
    with pytest.raises(NotFoundError, match="no rows in split 'valid'"):
        evaluate(*given, tasks[0], split="valid")
    router = Arrow.fit(zoo)
    other = {name: zoo[name] for name in ("one", "two")}
    with pytest.raises(UsageError, match="made for other experts"):
        evaluate(words_model, words_tokenizer, Subject("a", other, router), tasks[0])
    changed = dict(zoo) | {"one": zoo["two"]}
    with pytest.raises(UsageError, match="made for another one"):
        evaluate(words_model, words_tokenizer, Subject("a", changed, router), tasks[0])


def test_a_comparison_is_what_one_computes_by_hand(
    words_model, words_tokenizer, tasks, zoo
) -> None:
    own = own_experts(zoo, tasks)
    assert own == {"one": "one", "two": "two"}
    subjects = [
        Subject("base"),
        Subject("arrow", zoo, Arrow.fit(zoo, top_k=2)),
        Subject("oracle", zoo, own=own),
    ]
    document = compare(
        words_model, words_tokenizer, subjects, tasks, experts=zoo, own=own,
        metrics=("rouge_l", "loss"), limits=LIMITS,
    )  # fmt: skip
    value = {(r["router"], r["task"], r["metric"]): r["value"] for r in document["results"]}
    assert ("oracle", "free", "loss") not in value
    for row in document["routers"]:
        names = [t for t in ("one", "two", "free") if (row["router"], t, row["metric"]) in value]
        mean = np.mean([value[row["router"], t, row["metric"]] for t in names])
        assert row["value"] == pytest.approx(mean)
        mine = np.mean([value[row["router"], t, row["metric"]] for t in ("one", "two")])
        theirs = np.mean([value["oracle", t, row["metric"]] for t in ("one", "two")])
        sign = -1 if row["metric"] == "loss" else 1
        assert row["regret"] == pytest.approx(sign * (theirs - mine))
        assert (row["agreement"] is None) == (row["router"] != "arrow")
    losses = [row for row in document["comparisons"] if row["metric"] == "loss"]
    means = {
        r: np.mean([value[r, t, "loss"] for t in ("one", "two", "free")]) for r in ("base", "arrow")
    }
    best = min(means, key=means.__getitem__)
    assert {row["b"] for row in losses} == {best}
    assert any("no expert was trained on free" in note for note in document["notes"])
    assert document["oracle"] == {"one": "one", "two": "two", "free": None}
    json.dumps(document)


def test_intervals_and_tests_against_loops() -> None:
    random = np.random.default_rng(0)
    a = [random.random(n) for n in (30, 50)]
    b = [np.clip(x - 0.2 * random.random(len(x)), 0, 1) for x in a]
    mean, low, high = interval(a, resamples=2000)
    assert mean == pytest.approx(np.mean([a[0].mean(), a[1].mean()]))
    slow = []
    for _ in range(2000):
        drawn = [a[i] for i in random.integers(2, size=2)]
        slow.append(np.mean([random.choice(task, len(task)).mean() for task in drawn]))
    assert [low, high] == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.02)
    found = paired(a, b, resamples=500, permutations=2000)
    diff = [x - y for x, y in zip(a, b, strict=True)]
    total = np.mean([d.mean() for d in diff])
    assert found.difference == pytest.approx(total)
    worse = 0
    for _ in range(2000):
        signs = [random.choice([-1, 1], len(d)) for d in diff]
        flipped = np.mean([(d * s).mean() for d, s in zip(diff, signs, strict=True)])
        worse += abs(flipped) >= total
    assert found.p == pytest.approx((1 + worse) / 2001, abs=0.02)
    assert paired(a, a).p == 1.0
    noise = [np.zeros(40), np.array([1.0, -1.0] * 20)]
    assert paired(noise, [np.zeros(40)] * 2, permutations=500).p > 0.5
