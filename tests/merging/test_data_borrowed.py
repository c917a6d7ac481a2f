"""Merges with data leave the model as it was, say what is wrong, and do the same twice."""

from typing import Any

import jaxtyping
import pytest
import torch

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts import Expert, LoRADelta
from adaptlib.merging import MERGES, Data
from adaptlib.merging.running import running
from tests.merging.on_data import (
    VOCAB,
    Q,
    batch,
    data_for,
    dense,
    gpt2,
    llama,
    mixed,
)

LEARNT = ("fisher", "lorahub", "regmean")


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return request.param().eval()


@pytest.fixture
def small() -> Any:
    torch.manual_seed(3)
    return llama().eval()


@pytest.mark.parametrize("method", LEARNT)
def test_it_is_deterministic(small: Any, method: str) -> None:
    experts, data = mixed(small), data_for(small)
    options: dict[str, Any] = {"budget": 8} if method == "lorahub" else {}
    torch.manual_seed(1)
    first = MERGES[method](experts, data=data, **options)
    torch.manual_seed(2)
    again = MERGES[method](experts, data=data, **options)
    assert again.fingerprint == first.fingerprint
    assert again.card == first.card


def state(model: Any) -> tuple:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


def same_state(one: tuple, two: tuple) -> bool:
    weights, *rest = one
    others, *more = two
    equal = all(torch.equal(weights[name], others[name]) for name in weights)
    grads = all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(rest[1], more[1], strict=True)
    )
    return (
        equal
        and grads
        and rest[0] == more[0]
        and rest[2:4] == more[2:4]
        and torch.equal(rest[4], more[4])
        and rest[5] == more[5]
    )


@pytest.mark.parametrize("method", LEARNT)
def test_the_model_is_left_as_it_was(model: Any, method: str) -> None:
    model.train()  # with dropout, for GPT-2
    list(model.modules())[3].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(i % 2))
        parameter.grad = torch.full_like(parameter, 0.5) if i % 3 else None
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    experts, data = mixed(model), data_for(model)
    options: dict[str, Any] = {"budget": 3} if method == "lorahub" else {}
    before = state(model)
    merged = MERGES[method](experts, data=data, **options)
    assert same_state(before, state(model))
    model.eval()
    model.requires_grad_(False)
    with torch.no_grad():  # it matters to none of them how the model came
        again = MERGES[method](experts, data=data, **options)
    assert again.fingerprint == merged.fingerprint


@pytest.mark.parametrize("method", LEARNT)
def test_the_model_is_left_as_it_was_after_an_error(small: Any, method: str) -> None:
    small.train()
    experts, data = mixed(small), data_for(small)
    before = state(small)
    bad = batch(9, (4,))
    bad["input_ids"][0, 1] = VOCAB + 5
    batches = {name: [*some, bad] for name, some in data.batches.items()}
    with pytest.raises(IndexError):
        MERGES[method](experts, data=Data(small, batches))
    assert same_state(before, state(small))
    strange = {**experts, "three": Expert("tiny", {"nowhere.proj": experts["one"].deltas[Q]})}
    with pytest.raises(BaseMismatchError, match=r"nowhere\.proj, which this model does not have"):
        MERGES[method](strange, data=data)
    assert same_state(before, state(small))


def test_running_is_the_model_with_the_update_added(model: Any) -> None:
    experts = mixed(model)
    some = batch(0, (6, 4))
    ids, mask = some["input_ids"], some["attention_mask"]
    for expert in experts.values():
        with dense(model, expert), torch.no_grad():
            wanted = model(ids, attention_mask=mask).logits
        with running(model, {m: (d,) for m, d in expert.deltas.items()}), torch.no_grad():
            found = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_another_shape_is_another_base(small: Any) -> None:
    experts = {"one": Expert("tiny", {Q: LoRADelta(torch.ones(1, 5), torch.ones(16, 1))})}
    with pytest.raises(BaseMismatchError, match=r"\(16, 16\) in this model and \(16, 5\)"):
        MERGES["regmean"](experts, data=data_for(small, ("one",)))


@pytest.fixture
def untyped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for users: signatures are not checked at run time, so the code's own checks speak."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("untyped")
def test_bad_data_is_said(small: Any) -> None:
    experts, good = mixed(small), dict(data_for(small).batches)
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in good["two"]]
    silent = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in good["two"]]
    cut = [{**b, "labels": b["labels"][:, 1:]} for b in good["two"]]

    def refused(method: str, batches: Any, match: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=match):
            MERGES[method](experts, data=Data(small, batches), **options)

    for method in ("regmean", "fisher"):
        refused(method, {k: v for k, v in good.items() if k != "two"}, "no batches for 'two'")
        refused(method, {**good, "four": good["one"]}, "'four', which is not merged here; there")
        refused(method, {**good, "two": []}, "batches for 'two' are empty")
        refused(method, {**good, "two": [{}]}, "'two' has no input_ids; got nothing")
        refused(method, good, "0 or more; 'two' has -1.0", weights=(1, -1, 1))
        refused(method, good, "one weight above 0", weights=(0, 0, 0))
    for method in ("fisher", "lorahub"):
        refused(method, {**good, "two": unlabelled}, "has no labels; got input_ids, attention")
        refused(method, {**good, "two": silent}, "no label but -100")
        refused(method, {**good, "two": cut}, r"labels of shape \(2, 6\) and input_ids of \(2, 7\)")
    refused("lorahub", {}, "there are no batches")
    refused("lorahub", good, "budget is 1 or more", budget=0)
    refused("lorahub", good, "weight of 'one' is 2.0", weights=(2, 0, 0))
    refused("regmean", good, "alpha is between 0 and 1", alpha=1.5)
    refused("regmean", good, "ridge is above 0", ridge=0.0)
    MERGES["regmean"](experts, data=Data(small, {**good, "two": unlabelled}))  # needs none
    with pytest.raises(UsageError, match="learnt from data"):
        MERGES["fisher"](experts)


def test_factors_are_refused_where_there_is_no_way(small: Any) -> None:
    experts, data = mixed(small), data_for(small)
    for method in ("regmean", "fisher"):
        with pytest.raises(RefusedError, match=f"{method} weighs whole updates"):
            MERGES[method](experts, data=data, on="factors")
    with pytest.raises(RefusedError, match="not LoRA of one rank in all experts"):
        MERGES["lorahub"](experts, data=data, on="factors")


def test_a_model_that_says_nan_is_refused(small: Any) -> None:
    experts, data = mixed(small), data_for(small)
    small.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RefusedError, match="loss is NaN or infinite at all"):
        MERGES["lorahub"](experts, data=data, budget=3)
    with pytest.raises(RefusedError, match="the Fisher information of expert 'one'"):
        MERGES["fisher"](experts, data=data)
    small.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(RefusedError, match="the inputs of expert 'one'"):
        MERGES["regmean"](experts, data=data)
