"""Merges with data are their formulas: against dense loops in double precision."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptlib.experts import Expert, LoRADelta
from adaptlib.merging import MERGES, Data, Part
from adaptlib.merging.fisher import Information, fisher
from tests.merging.on_data import (
    HIDDEN,
    NAMES,
    VOCAB,
    add,
    batch,
    close,
    data_for,
    dense_of,
    gpt2,
    llama,
    lora_at,
    make,
    mixed,
    shapes_of,
    slow_fisher,
    slow_inputs,
    slow_objective,
)


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return request.param().eval()


@pytest.fixture
def small() -> Any:
    torch.manual_seed(3)
    return llama().eval()


# --- RegMean ---


@pytest.mark.parametrize(("alpha", "normalize"), [(1.0, True), (0.9, False), (0.0, True)])
def test_regmean_is_its_formula(model: Any, alpha: float, normalize: bool) -> None:
    experts, data = mixed(model), data_for(model)
    weights = {"one": 1.0, "two": 0.5, "three": 2.0}
    merged = MERGES["regmean"](
        experts,
        weights=weights,
        data=data,
        alpha=alpha,
        ridge=1e-4,
        normalize=normalize,
        rank=HIDDEN,
    )
    rows = {name: slow_inputs(model, experts[name], data.batches[name]) for name in NAMES}
    for module, shape in shapes_of(model).items():
        d_in = shape[1]
        total = torch.zeros(d_in, d_in, dtype=torch.float64)
        right = torch.zeros(shape, dtype=torch.float64)
        grams = {}
        for name in NAMES:
            gram = rows[name][module].T @ rows[name][module]
            gram /= len(rows[name][module]) if normalize else 1
            grams[name] = alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())
        summed = add(weights[name] * grams[name] for name in NAMES)
        mean = summed.diagonal().mean() / sum(weights.values())
        for name in NAMES:
            gram = grams[name] + 1e-4 * mean * torch.eye(d_in)
            total += weights[name] * gram
            right += weights[name] * dense_of(experts[name], module, shape) @ gram
        close(merged.deltas[module].dense(), right @ torch.linalg.inv(total), 2e-3)


def test_regmean_of_lora_is_exact_at_the_sum_of_ranks(small: Any) -> None:
    experts = {"one": make(small, 1, rank=2), "two": make(small, 2, rank=3)}
    merged = MERGES["regmean"](experts, data=data_for(small, ("one", "two")))
    assert {lora_at(merged, module).rank for module in merged.deltas} == {5}
    assert merged.card["merge"]["error"] == 0
    assert merged.card["merge"]["measured"] == {"tokens": [25, 24]}
    for module in merged.deltas:  # the B's stay as they are
        b = torch.cat([lora_at(experts[name], module).b * 0.35 for name in experts], dim=1)
        torch.testing.assert_close(lora_at(merged, module).b, b)


def test_regmean_minimises_the_distance_of_outputs(small: Any) -> None:
    """The law by which it is made, for each module alone: a zero gradient, and no step helps."""
    experts, data = mixed(small), data_for(small)
    merged = MERGES["regmean"](
        experts, data=data, alpha=1.0, ridge=1e-7, normalize=False, rank=HIDDEN
    )
    rows = {name: slow_inputs(small, experts[name], data.batches[name]) for name in NAMES}
    generator = torch.Generator().manual_seed(0)
    for module, shape in shapes_of(small).items():
        update = merged.deltas[module].dense().double()
        own = {name: dense_of(experts[name], module, shape) for name in NAMES}

        def distance(update: Tensor, own=own, module=module) -> float:
            return sum(
                float((rows[name][module] @ (update - own[name]).T).square().sum())
                for name in NAMES
            )

        gradient = add(
            (update - own[name]) @ rows[name][module].T @ rows[name][module] for name in NAMES
        )
        scale = add(
            (own[name] @ rows[name][module].T @ rows[name][module]).norm() for name in NAMES
        )
        assert float(gradient.norm()) < 1e-4 * float(scale)
        least = distance(update)
        for _ in range(3):
            step = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01
            assert distance(update + step) > least
        mean = add(own.values()) / 3
        assert distance(mean) > least


def test_regmean_of_equal_inputs_is_the_mean(small: Any) -> None:
    """What enters the first layer does not depend on the expert."""
    experts = mixed(small)
    one = data_for(small, ("one",)).batches["one"]
    data = Data(small, dict.fromkeys(NAMES, one))
    merged = MERGES["regmean"](experts, data=data, rank=HIDDEN)
    mean = MERGES["linear"](experts, rank=HIDDEN)
    for name in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.0.self_attn.{name}"
        close(merged.deltas[module].dense(), mean.deltas[module].dense(), 1e-4)
    module = "model.layers.1.mlp.down_proj"
    assert not torch.allclose(merged.deltas[module].dense(), mean.deltas[module].dense(), atol=0.1)


def test_regmean_is_the_mean_where_no_input_is(small: Any) -> None:
    """Three tokens in sixteen dimensions leave the rest open."""
    experts = {"one": make(small, 1), "two": make(small, 2)}
    short = {"one": [batch(0, (2,))], "two": [batch(1, (1,))]}
    merged = MERGES["regmean"](experts, data=Data(small, short), alpha=1.0, ridge=1e-2)
    mean = MERGES["linear"](experts)
    for module in shapes_of(small):
        rows = torch.cat(
            [slow_inputs(small, experts[name], short[name])[module] for name in experts]
        )
        there = torch.linalg.svd(rows, full_matrices=True).Vh
        unseen = there[3:].T
        found, wanted = (e.deltas[module].dense().double() @ unseen for e in (merged, mean))
        close(found, wanted, 1e-3)
        seen = there[:3].T
        found, wanted = (e.deltas[module].dense().double() @ seen for e in (merged, mean))
        assert (found - wanted).norm() > 0.1 * wanted.norm()


def test_a_module_that_never_runs_gets_the_mean(small: Any) -> None:
    small.unused = nn.Linear(4, 3)
    experts = {
        name: Expert("tiny", {"unused": LoRADelta(torch.ones(1, 4) * i, torch.ones(3, 1))})
        for i, name in enumerate(("one", "two"), start=1)
    }
    data = data_for(small, ("one", "two"))
    for method in ("regmean", "fisher"):
        merged = MERGES[method](experts, data=data)
        torch.testing.assert_close(merged.deltas["unused"].dense(), torch.full((3, 4), 1.5))


# --- Fisher ---


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_is_its_formula(model: Any, normalize: bool) -> None:
    experts, data = mixed(model), data_for(model)
    weights = {"one": 1.0, "two": 0.5, "three": 2.0}
    merged = MERGES["fisher"](
        experts, weights=weights, data=data, kind="sparse", keep_ratio=1.0, normalize=normalize
    )
    about = {name: slow_fisher(model, experts[name], data.batches[name]) for name in NAMES}
    if normalize:
        for squares in about.values():
            norm = torch.cat([square.flatten().double() for square in squares.values()]).norm()
            squares.update({module: square / norm for module, square in squares.items()})
    for module, shape in shapes_of(model).items():
        below = add(weights[name] * about[name][module].double() for name in NAMES)
        above = add(
            weights[name] * about[name][module].double() * dense_of(experts[name], module, shape)
            for name in NAMES
        )
        assert bool((below > 0).all())
        close(merged.deltas[module].dense(), above / below, 1e-3)
    assert merged.card["merge"]["measured"] == {"sequences": [5, 5, 5]}


def test_fisher_is_the_mean_where_nothing_is_known() -> None:
    """One entry that matters to both, one to one alone, one to none."""
    one = LoRADelta(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 1))
    two = LoRADelta(torch.tensor([[5.0, 6.0, 7.0]]), torch.ones(1, 1))
    squares = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[6.0, 3.0, 0.0]])
    moved = squares[0] * one.dense() * 0.5 + squares[1] * two.dense() * 0.25
    known = Information(squares[0] * 0.5 + squares[1] * 0.25, moved, 0.75)
    part = Part("m", (one, two), (0.5, 0.25), 2, (0, 1), (known, known))
    first = (0.5 * 2 * 1 + 0.25 * 6 * 5) / (0.5 * 2 + 0.25 * 6)
    third = (0.5 * 3 + 0.25 * 7) / 0.75
    torch.testing.assert_close(fisher(part), torch.tensor([[first, 6.0, third]]))


def test_what_is_measured_does_not_grow_with_the_experts(small: Any) -> None:
    """One sum for all experts, not a matrix for each."""
    experts = mixed(small)
    for method in ("regmean", "fisher"):
        measure = MERGES[method].measure
        assert measure is not None
        facts = measure(experts, dict.fromkeys(NAMES, 1.0), data_for(small)).facts
        for module in facts["three"]:
            assert facts["one"][module].total is facts["three"][module].total


class Twice(nn.Module):
    """A model that runs one linear module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, 8)
        self.inner = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.words(input_ids)
        x = x + self.inner(x).tanh()
        return SimpleNamespace(logits=self.head(x + self.inner(x).tanh()), x=x)


def test_a_module_that_runs_twice_counts_twice() -> None:
    torch.manual_seed(0)
    model, some = Twice(), batch(0, (5, 5))
    experts = {
        name: Expert("tiny", {"inner": LoRADelta(torch.randn(8, 8), torch.eye(8), 0.3)})
        for name in ("one", "two")
    }
    data = Data(model, {name: [some] for name in experts})
    whole: dict[str, Any] = {"data": data, "kind": "sparse", "keep_ratio": 1.0}
    fishers = MERGES["fisher"](experts, **whole, normalize=False).deltas["inner"].dense()
    regmeans = MERGES["regmean"](experts, **whole, alpha=1.0, ridge=1e-9).deltas["inner"].dense()
    squares, grams, updates = [], [], []
    plain = model.inner.weight.data
    for expert in experts.values():
        updates.append(expert.deltas["inner"].dense())
        model.inner.weight.data = plain + updates[-1]
        first = model.words(some["input_ids"]).reshape(-1, 8)
        second = model(some["input_ids"]).x.reshape(-1, 8)
        grams.append((first.T @ first + second.T @ second).detach())
        square = torch.zeros(8, 8)
        for ids, labels in zip(some["input_ids"], some["labels"], strict=True):
            logits = model(ids[None]).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            square += torch.autograd.grad(loss, model.inner.weight)[0].square()
        squares.append(square)
    model.inner.weight.data = plain
    wanted = add(s * u for s, u in zip(squares, updates, strict=True)) / add(squares)
    close(fishers, wanted, 1e-4)
    wanted = add(u @ g for u, g in zip(updates, grams, strict=True)) @ torch.linalg.inv(add(grams))
    close(regmeans, wanted, 1e-3)


# --- LoraHub ---


def test_lorahub_finds_better_weights_and_is_the_sum_at_them(model: Any) -> None:
    experts, data = mixed(model), data_for(model, ("new task",))
    start = dict.fromkeys(NAMES, 1 / 3)
    merged = MERGES["lorahub"](experts, data=data, rank=HIDDEN)
    about = merged.card["merge"]
    weights: dict[str, float] = dict(zip(NAMES, about["weights"], strict=True))
    assert all(abs(weight) <= 1.5 for weight in weights.values())
    assert weights != start
    assert about["measured"]["start"] == pytest.approx(
        slow_objective(model, experts, data, start), rel=1e-4
    )
    assert about["measured"]["best"] == pytest.approx(
        slow_objective(model, experts, data, weights), rel=1e-4
    )
    assert about["measured"]["best"] < about["measured"]["start"] - 0.01
    assert about["measured"]["evaluations"] <= 40
    same = MERGES["linear"](experts, weights=weights, rank=HIDDEN)
    for module, delta in merged.deltas.items():
        assert torch.equal(delta.dense(), same.deltas[module].dense())


def test_lorahub_begins_at_the_weights_given_and_keeps_the_best(small: Any) -> None:
    experts, data = mixed(small), data_for(small, ("x", "y"))
    start = {"one": 0.5, "two": -1.0, "three": 0.0}
    once = MERGES["lorahub"](experts, weights=start, data=data, budget=1)
    assert once.card["merge"]["weights"] == list(start.values())
    assert once.card["merge"]["measured"]["evaluations"] == 1
    best = [
        MERGES["lorahub"](experts, weights=start, data=data, budget=budget).card["merge"][
            "measured"
        ]["best"]
        for budget in (1, 2, 3, 4, 5, 6, 30)
    ]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]
    narrow = MERGES["lorahub"](experts, weights=(0.0, 0.0, 0.0), data=data, bound=0.1)
    assert max(abs(w) for w in narrow.card["merge"]["weights"]) <= 0.1


def test_lorahub_on_factors_is_the_original(small: Any) -> None:
    experts = {name: make(small, i) for i, name in enumerate(NAMES)}
    data = data_for(small, ("new",))
    merged = MERGES["lorahub"](experts, data=data, on="factors", budget=12)
    weights = merged.card["merge"]["weights"]
    assert merged.card["merge"]["kept"]["on"] == "factors"
    updates = {}
    for module in shapes_of(small):
        deltas = [lora_at(experts[name], module) for name in NAMES]
        a = add(w * d.a for w, d in zip(weights, deltas, strict=True))
        b = add(w * d.b for w, d in zip(weights, deltas, strict=True))
        updates[module] = 0.7 * b @ a
        assert lora_at(merged, module).rank == 2
        torch.testing.assert_close(merged.deltas[module].dense(), updates[module])
    # The search, too, was of that: its best is the loss of what came out.
    found = slow_objective(small, {"m": merged}, data, {"m": 1.0}) - 0.05
    penalty = 0.05 * sum(map(abs, weights)) / 3
    assert merged.card["merge"]["measured"]["best"] == pytest.approx(found + penalty, rel=1e-4)
    other = MERGES["lorahub"](experts, data=data, budget=12)
    assert other.card["merge"]["weights"] != weights
