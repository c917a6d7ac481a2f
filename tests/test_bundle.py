"""The bundle is what it says: a base model, and experts that fit it and do something."""

import json
import warnings

import pytest
import torch

from adaptlib.demo import BUNDLE, DEMO_BASE, expert_directories
from adaptlib.experts.base import check_fit, describe, locate
from adaptlib.experts.codec import Packed, check_content, read_directory


@pytest.fixture(scope="module")
def experts() -> dict[str, Packed]:
    return {path.name: read_directory(path) for path in expert_directories()}


def test_there_are_enough_of_each_kind(experts):
    kinds = [expert.kind for expert in experts.values()]
    categories = {expert.card["category"] for expert in experts.values()}
    assert kinds.count("lora") >= 16
    assert kinds.count("sparse") >= 6
    assert len(categories) >= 8


def test_it_stays_small():
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    assert size <= 60e6


def test_each_expert_fits_the_base_and_is_pinned_to_it(experts):
    directory = locate(DEMO_BASE)
    assert directory is not None
    base = describe(directory, DEMO_BASE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, expert in experts.items():
            check_content(name, expert)
            assert expert.base == DEMO_BASE
            assert expert.card["base"]["digest"] == base.digest
            check_fit(name, expert.shapes, expert.card["base"], base)


def test_each_card_says_how_to_make_it_again_and_what_it_is_worth(experts):
    for name, expert in experts.items():
        card = expert.card
        assert card["task"], name
        assert card["description"], name
        assert card["training"], name
        assert card["metrics"]["test_exact_match"] > card["metrics"]["test_exact_match_base"], name
        assert all(tensor.dtype in ("BF16", "I32") for tensor in expert.tensors.values()), name


def test_generation_ends_at_the_tokenizers_eos():
    from adaptlib.experts.base import load

    model, tokenizer = load(DEMO_BASE)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_an_expert_changes_the_answer_of_the_base():
    from adaptlib import Named, attach
    from adaptlib.demo import experts
    from adaptlib.experts.base import load
    from adaptlib.training import prompt

    name = "clinc-banking"
    alone = {name: experts()[name]}
    model, tokenizer = load(DEMO_BASE)
    assert json.loads((BUNDLE / "base" / "config.json").read_text())["dtype"] == "bfloat16"
    text = prompt("Name the intent of the request.", "how much money is in my account")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :])
    with attach(model, alone, Named.fit(alone, expert=name)) as routed:
        after = tokenizer.decode(
            routed.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True
        )
    assert after.strip() == "balance"
    assert before != after
