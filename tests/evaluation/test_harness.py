"""lm-evaluation-harness on a local task, without a network: against its own model, and ours."""

import json
from pathlib import Path

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.evaluation import harness
from adaptlib.routing import Arrow, attach

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of choices and one of answers; datasets keeps its copies here."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    rows = [
        {"q": f"s {'abcdef'[i % 6]} t", "choices": ["a b", "c", "d e f"], "label": i % 3}
        for i in range(12)
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/docs.jsonl
test_split: test
doc_to_text: "{{{{q}}}}"
"""
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\n{common}output_type: multiple_choice\ndoc_to_target: label\n"
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "said.yaml").write_text(
        f"task: said\n{common}output_type: generate_until\ndoc_to_target: '{{{{choices[0]}}}}'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 3\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    return tmp_path


def pairs(tokenizer):
    texts = [("s a t", " b"), ("a", " c d e"), ("x y z a b c", " d"), ("s", " e f")]
    return [
        (tokenizer(one).input_ids, tokenizer(two.strip(), add_special_tokens=False).input_ids)
        for one, two in texts
    ]


def test_likelihoods_are_those_of_the_harness(words_model, words_tokenizer) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=words_model, tokenizer=words_tokenizer, backend="causal", batch_size=2)
    given = pairs(words_tokenizer)
    wanted = theirs._loglikelihood_tokens([(None, *pair) for pair in given], disable_tqdm=True)
    got = harness.likelihoods(words_model, given, pad=0, max_length=30, batch_size=3)
    for (a, greedy), (b, other) in zip(got, wanted, strict=True):
        assert a == pytest.approx(float(b), abs=1e-4)
        assert greedy == bool(other)
    short = harness.likelihoods(words_model, given, pad=0, max_length=2, batch_size=3)
    assert short[0][0] == pytest.approx(
        harness.likelihoods(
            words_model, [(given[0][0][-2:], given[0][1])], pad=0, max_length=30, batch_size=1
        )[0][0],
        abs=1e-5,
    )


def test_an_answer_does_not_choose_its_own_expert(words_model, words_tokenizer, zoo) -> None:
    """By prompt: the context alone, and then the answer with its cache, token by token."""
    router = Arrow.fit(zoo, top_k=1, scope="prompt")
    given = pairs(words_tokenizer)
    with attach(words_model, zoo, router, tokenizer=words_tokenizer) as routed:
        got = harness.likelihoods(routed, given, pad=0, max_length=30, batch_size=4)
        for (value, _), (context, said) in zip(got, given, strict=True):
            with torch.no_grad():
                out = routed(input_ids=torch.tensor([context]), use_cache=True)
                name = "cache" if "cache" in out else "past_key_values"
                total, cache, last = 0.0, out[name], out.logits[0, -1]
                for token in said:
                    total += last.log_softmax(-1)[token].item()
                    out = routed(input_ids=torch.tensor([[token]]), **{name: cache})
                    cache, last = out[name], out.logits[0, -1]
            assert value == pytest.approx(total, abs=1e-4)


def test_a_local_task_runs_on_the_base_and_routed(
    words_model, words_tokenizer, zoo, folder
) -> None:
    def run(model):
        found = harness.run(model, words_tokenizer, ["mine", "said"], include=folder, limit=10)
        assert [(line["task"], line["metric"], line["n"]) for line in found] == [
            ("mine", "acc", 10),
            ("said", "exact_match", 10),
        ]
        return {line["task"]: line["value"] for line in found}

    base = run(words_model)
    choices = ["a b", "c", "d e f"]
    hits = 0
    for i in range(10):
        context = words_tokenizer(f"s {'abcdef'[i % 6]} t").input_ids
        tails = [words_tokenizer(c, add_special_tokens=False).input_ids for c in choices]
        scores = harness.likelihoods(
            words_model, [(context, t) for t in tails], pad=0, max_length=30, batch_size=1
        )
        hits += max(range(3), key=lambda j: scores[j][0]) == i % 3
    assert base["mine"] == pytest.approx(hits / 10)
    with attach(words_model, zoo, Arrow.fit(zoo, top_k=2), tokenizer=words_tokenizer) as routed:
        run(routed)


def test_what_the_harness_does_not_know(words_model, words_tokenizer, folder) -> None:
    with pytest.raises(NotFoundError, match="no task 'arc_eazy'") as error:
        harness.run(words_model, words_tokenizer, ["arc_eazy"])
    assert error.value.hint == "did you mean arc_easy?"
    with pytest.raises(UsageError, match="no task of the harness"):
        harness.run(words_model, words_tokenizer, [])
    with pytest.raises(NotFoundError, match="no folder"):
        harness.run(words_model, words_tokenizer, ["mine"], include=folder / "nowhere")
