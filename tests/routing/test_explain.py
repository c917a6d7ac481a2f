"""An explanation, against loops over the raw choices; and what a removed expert changes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from adaptlib import Arrow, attach
from adaptlib.errors import UsageError
from adaptlib.routing import Choice, Router, Trace
from adaptlib.routing.explain import (
    choices,
    entropy,
    explain,
    next_token,
    overlap,
    pieces,
    removed,
)
from adaptlib.routing.named import Named
from adaptlib.routing.router import columns_of

IDS = torch.randint(2, 64, (1, 7), generator=torch.Generator().manual_seed(8))
TOKENS = [f" t{i}" for i in range(7)]


@torch.no_grad()
def record(model, experts, router: Router) -> Trace:
    with attach(model, experts, router) as routed, routed.record() as trace:
        routed(input_ids=IDS)
    return trace


def slow(trace: Trace) -> dict[str, list[list[dict[str, float]]]]:
    """By layer a list of modules, each a list of tokens, each a dict of weights by name."""
    found: dict[str, list[list[dict[str, float]]]] = {}
    for module, (choice,) in trace.choices.items():
        rows = []
        for index, weight in zip(choice.index.tolist(), choice.weight.tolist(), strict=True):
            row = dict.fromkeys(trace.experts, 0.0)
            for i, w in zip(index, weight, strict=True):
                row[trace.experts[i]] += w
            rows.append(row)
        found.setdefault(module.split(".")[2], []).append(rows)
    return found


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def bits(row: Mapping[str, float]) -> float:
    total = sum(row.values())
    return -sum(w / total * math.log2(w / total) for w in row.values() if w > 0)


def top(row: Mapping[str, float]) -> str:
    return max(row, key=lambda name: row[name])


def ranked(row: Mapping[str, float]) -> list[dict[str, Any]]:
    held = sorted(((w, name) for name, w in row.items() if w > 0), reverse=True)
    return [{"name": name, "weight": pytest.approx(w)} for w, name in held]


def test_every_figure_is_the_mean_it_says(llama, mixed):
    experts = mixed(llama)
    trace = record(llama, experts, Arrow.fit(experts, top_k=2))
    found, layers = explain(trace, TOKENS), slow(trace)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    tokens = range(7)
    of_layer = {
        layer: [mean([module[t] for module in modules]) for t in tokens]
        for layer, modules in layers.items()
    }
    every = [module for modules in layers.values() for module in modules]
    whole = [mean([module[t] for module in every]) for t in tokens]
    for t, token in enumerate(found["tokens"]):
        best = top(whole[t])
        assert token == {
            "token": TOKENS[t],
            "expert": best,
            "weight": pytest.approx(whole[t][best]),
            "entropy": pytest.approx(bits(whole[t])),
            "experts": ranked(whole[t])[:5],
            "layers": [top(of_layer[layer][t]) for layer in ("0", "1")],
        }
    same = sum(top(of_layer["0"][t]) == top(of_layer["1"][t]) for t in tokens) / 7
    for layer in found["layers"]:
        rows = of_layer[str(layer["layer"])]
        assert layer == {
            "layer": layer["layer"],
            "experts": ranked(mean(rows)),
            "entropy": pytest.approx(bits(mean(rows))),
            "agreement": same,
            "with_whole": sum(top(rows[t]) == top(whole[t]) for t in tokens) / 7,
        }
    assert found["agreement"] == same
    each = [bits(row) for module in every for row in module]
    assert found["entropy"] == {
        "whole": pytest.approx(bits(mean(whole))),
        "token": pytest.approx(sum(map(bits, whole)) / 7),
        "choice": pytest.approx(sum(each) / len(each)),
    }
    assert found["entropy"]["choice"] <= found["entropy"]["token"] <= found["entropy"]["whole"]


def choose(*rows: list[int], names: str = "abc") -> Trace:
    """A record of one module a row, the row giving each token's only expert; -1 is the base."""
    return Trace(
        tuple(names),
        {
            f"layers.{i}.proj": [
                Choice(
                    torch.tensor([[max(0, e)] for e in row]),
                    torch.tensor([[float(e >= 0)] for e in row]),
                )
            ]
            for i, row in enumerate(rows)
        },
    )


def test_agreement_counts_tokens_over_all_pairs_of_layers():
    found = explain(choose([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 1, 0]), list("wxyz"))
    assert found["agreement"] == pytest.approx((3 / 4 + 2 / 4 + 3 / 4) / 3)
    assert [layer["agreement"] for layer in found["layers"]] == [0.625, 0.75, 0.625]
    assert [layer["with_whole"] for layer in found["layers"]] == [0.75, 1, 0.75]
    assert found["tokens"][3]["layers"] == ["c", "c", "a"]


def test_the_same_experts_everywhere_agree_wholly(llama, mixed):
    experts = {name: value for name, value in mixed(llama).items() if name in ("wide", "entries")}

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Whole(Router):
        """The shares of a prompt, as a router of that scope has them."""

        def route(self, module: str, x: Any) -> Choice:
            index = torch.tensor([[0, 1]]).expand(len(x), 2)
            return Choice(index, torch.tensor([[0.25, 0.75]]).expand(len(x), 2))

    whole = Whole(experts=tuple(experts), columns=columns_of(experts), mix="outputs")
    found = explain(record(llama, experts, whole), TOKENS)
    assert found["agreement"] == 1
    assert {layer["agreement"] for layer in found["layers"]} == {1}
    assert {layer["with_whole"] for layer in found["layers"]} == {1}
    quarter = pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))
    assert found["entropy"] == {"whole": quarter, "token": quarter, "choice": quarter}


def test_one_choice_for_the_whole_prompt_counts_for_each_token():
    once = Trace(
        ("a", "b"),
        {
            f"layers.{i}.proj": [Choice(torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.25]]))]
            for i in range(2)
        },
    )
    found = explain(once, list("xyz"))
    assert [(token["expert"], token["weight"]) for token in found["tokens"]] == [("b", 0.75)] * 3
    assert found["agreement"] == 1
    assert choices(once, 3)["choices"] == [[[[1, 0.75], [0, 0.25]]] * 3] * 2


def test_the_base_alone_is_no_expert():
    found = explain(choose([0, -1], [-1, -1]), ["x", "y"])
    assert [token["expert"] for token in found["tokens"]] == ["a", None]
    assert found["tokens"][1] == {
        "token": "y",
        "expert": None,
        "weight": 0.0,
        "entropy": 0.0,
        "experts": [],
        "layers": [None, None],
    }
    assert found["layers"][1]["experts"] == []
    assert found["agreement"] == 0.5
    assert all(math.isfinite(value) for value in found["entropy"].values())


def test_one_layer_has_no_other_to_agree_with():
    found = explain(choose([0, 1]), ["x", "y"])
    assert found["agreement"] is None
    assert found["layers"][0]["agreement"] is None
    assert found["layers"][0]["with_whole"] == 1


def test_a_head_that_saw_the_last_token_only_counts_for_no_token():
    trace = choose([0, 1, 1])
    trace.choices["lm_head"] = [Choice(torch.tensor([[2]]), torch.tensor([[1.0]]))]
    found = explain(trace, list("xyz"))
    assert [layer["layer"] for layer in found["layers"]] == [0, "lm_head"]
    assert found["layers"][1]["experts"] == [{"name": "c", "weight": 1.0}]
    assert found["layers"][1]["with_whole"] is None
    assert [token["expert"] for token in found["tokens"]] == ["a", "b", "b"]
    assert [len(token["layers"]) for token in found["tokens"]] == [1, 1, 1]
    assert choices(trace, 3)["layers"] == [0]


def test_texts_of_another_number_are_refused():
    with pytest.raises(UsageError, match="record is of 3 tokens; got the texts of 2"):
        explain(choose([0, 1, 1]), ["x", "y"])


def test_choices_by_layer_and_token(llama, mixed):
    experts = mixed(llama)
    trace = record(llama, experts, Arrow.fit(experts, top_k=2))
    found, layers = choices(trace, 7), slow(trace)
    assert found["names"] == list(experts)
    for layer, rows in zip(found["layers"], found["choices"], strict=True):
        for t, row in enumerate(rows):
            wanted = mean([module[t] for module in layers[str(layer)]])
            best = [w for w in sorted(wanted.values(), reverse=True)[:4] if w >= 0.0005]
            assert [w for _, w in row] == pytest.approx(best, abs=6e-4)
            for i, w in row:
                assert w == pytest.approx(wanted[found["names"][i]], abs=6e-4)


def test_who_takes_the_weight_of_the_removed():
    before, after = {"a": 0.5, "b": 0.3, "c": 0.2, "d": 0.0}, {"c": 0.6, "b": 0.4}
    assert removed("a", before, after) == {
        "expert": "a",
        "share": 0.5,
        "shares": [
            {"name": "c", "before": 0.2, "after": 0.6},
            {"name": "b", "before": 0.3, "after": 0.4},
        ],
    }
    assert removed("a", {"a": 1.0}, {}) == {"expert": "a", "share": 1.0, "shares": []}


def test_the_next_token_before_and_after():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    found = next_token(p.log(), q.log() + 3, lambda ids: f"<{ids[0]}>")
    kl = sum(a * math.log2(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert found["kl"] == pytest.approx(kl)
    assert found["before"] == {"token": "<0>", "probability": pytest.approx(0.5)}
    assert found["after"] == {"token": "<1>", "probability": pytest.approx(0.5)}
    assert next_token(p.log(), p.log(), str)["kl"] == 0
    broken = next_token(p.log(), p * torch.nan, str)
    assert (broken["kl"], broken["after"]["probability"]) == (None, None)
    never = torch.tensor([0.0, 1.0, 1.0]).log()  # -inf where both are is no difference
    assert next_token(never, never, str)["kl"] == 0


def test_overlap_is_the_weight_that_both_give():
    one, other = {"a": 0.5, "b": 0.5}, {"b": 0.7, "c": 0.3}
    assert overlap(one, other) == overlap(other, one) == 0.5
    assert overlap(one, one) == 1
    assert overlap(one, {"c": 1.0}) == 0


def test_entropy_is_in_bits_of_weights_by_their_sum():
    assert entropy([0.25] * 4) == 2
    assert entropy([3.0, 3.0]) == 1
    assert entropy([1.0]) == entropy([]) == entropy([0.0, 0.0]) == 0
    assert entropy([0.5, 0.25, 0.25, 0.0]) == 1.5


def test_a_character_of_several_tokens_stands_at_the_last():
    text = "aé€".encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    assert pieces(decode, list(text)) == ["a", "", "é", "", "", "€"]
    assert "".join(pieces(decode, list(text))) == "aé€"
    assert pieces(decode, [0x61, 0xC3]) == ["a", "\ufffd"]


def test_named_is_its_expert_at_every_token(llama, mixed):
    experts = mixed(llama)
    found = explain(record(llama, experts, Named.fit(experts, expert="wide")), TOKENS)
    assert {token["expert"] for token in found["tokens"]} == {"wide"}
    assert (found["agreement"], found["entropy"]["whole"]) == (1, 0)
