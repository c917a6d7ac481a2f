"""What every merge promises; a new one in MERGES is tested by its line there."""

import json
import math

import numpy as np
import pytest
import torch

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts import Expert, LoRADelta, SparseDelta
from adaptlib.merging import MERGES
from tests.merging.slow import matrix
from tests.tiny import lora, sparse

SIDES = {"a.proj": (10, 14), "b.proj": (14, 10)}


def lora_expert(seed, modules=tuple(SIDES), **card):
    deltas = {
        name: lora(10 * seed + i, rank=3, d_out=SIDES[name][0], d_in=SIDES[name][1])
        for i, name in enumerate(modules)
    }
    return Expert("org/base", deltas, card)


def sparse_expert(seed, modules=tuple(SIDES), **card):
    deltas = {
        name: sparse(10 * seed + i, n=40, d_out=SIDES[name][0], d_in=SIDES[name][1])
        for i, name in enumerate(modules)
    }
    return Expert("org/base", deltas, card)


def same(one, other):
    return one.deltas.keys() == other.deltas.keys() and all(
        np.array_equal(matrix(one.deltas[m]), matrix(other.deltas[m])) for m in one.deltas
    )


KINDS = {
    "lora": lambda: {f"e{i}": lora_expert(i) for i in range(3)},
    "sparse": lambda: {f"e{i}": sparse_expert(i) for i in range(3)},
    "both": lambda: {"e0": lora_expert(0), "e1": sparse_expert(1), "e2": lora_expert(2)},
}
every_merge = pytest.mark.parametrize("name", MERGES)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def merged(data_for):
    """A merge of experts, with data where it learns from that."""

    def run(name, experts, **options):
        return MERGES[name](experts, **data_for(MERGES[name], experts), **options)

    return run


def test_the_names_are_sorted_and_the_formulas_own():
    assert list(MERGES) == sorted(MERGES)
    assert [merge.name for merge in MERGES.values()] == list(MERGES)


@every_merge
def test_it_says_what_it_does_and_where_it_is_from(name):
    merge = MERGES[name]
    assert merge.summary.endswith(".")
    assert 20 < len(merge.summary) < 250
    assert "ΔW" in merge.formula.__doc__ or merge.measure is not None
    for option, value in merge.options.items():
        assert value is None or isinstance(value, bool | int | float | str), option
    json.dumps(merge.options)


@every_kind
@every_merge
def test_the_result(name, kind, merged):
    experts = KINDS[kind]()
    got = merged(name, experts)
    assert got.base == "org/base"
    assert got.shapes == SIDES
    assert got.kind == ("sparse" if kind == "sparse" else "lora")
    assert all(np.isfinite(matrix(delta)).all() for delta in got.deltas.values())
    assert any(matrix(delta).any() for delta in got.deltas.values())
    for module, delta in got.deltas.items():
        if isinstance(delta, LoRADelta):
            assert delta.rank <= min(SIDES[module])
    before = KINDS[kind]()
    assert all(same(experts[n], before[n]) for n in experts)
    said = got.card["merge"]
    assert got.card["parents"] == list(experts)
    assert said["method"] == name
    assert len(said["weights"]) == len(experts)
    assert all(isinstance(weight, float) for weight in said["weights"])
    assert said["options"].keys() <= MERGES[name].options.keys()
    assert 0 <= said["error"] <= 1
    assert json.loads(json.dumps(dict(got.card))) == dict(got.card)


@every_kind
@every_merge
def test_it_is_deterministic_and_blind_to_the_order_of_modules(name, kind, merged):
    experts = KINDS[kind]()
    one = merged(name, experts)
    torch.manual_seed(123)
    assert same(merged(name, KINDS[kind]()), one)
    turned = {
        n: Expert(e.base, dict(reversed(e.deltas.items())), e.card) for n, e in experts.items()
    }
    other = merged(name, turned)
    assert same(other, one)
    assert list(other.deltas) == list(one.deltas) == sorted(SIDES)


@every_kind
@every_merge
def test_one_expert(name, kind, merged):
    got = merged(name, {"e0": KINDS[kind]()["e0"]})
    assert got.shapes == SIDES
    assert all(np.isfinite(matrix(delta)).all() for delta in got.deltas.values())
    assert got.card["parents"] == ["e0"]


@every_kind
@every_merge
def test_the_same_expert_twice_and_thrice(name, kind, merged):
    one = KINDS[kind]()["e1"]
    for experts in ({"e0": one, "e1": one}, {"e0": one, "e1": one, "e2": one}):
        got = merged(name, experts)
        assert got.shapes == SIDES
        assert all(np.isfinite(matrix(delta)).all() for delta in got.deltas.values())


@every_merge
def test_experts_that_lack_modules(name, merged):
    experts = {"e0": lora_expert(0, ("a.proj",)), "e1": lora_expert(1), "e2": lora_expert(2)}
    got = merged(name, experts, rank=10)  # uncut
    assert got.shapes == SIDES
    zero = LoRADelta(torch.zeros(3, 10), torch.zeros(14, 3))
    filled = Expert("org/base", {**experts["e0"].deltas, "b.proj": zero}, {})
    there = merged(name, {**experts, "e0": filled}, rank=10)
    for module in SIDES:
        np.testing.assert_allclose(
            matrix(got.deltas[module]), matrix(there.deltas[module]), rtol=1e-3, atol=1e-4
        )


@every_merge
def test_experts_without_a_module_in_common(name, merged):
    got = merged(name, {"e0": lora_expert(0, ("a.proj",)), "e1": lora_expert(1, ("b.proj",))})
    assert got.shapes == SIDES
    assert all(np.isfinite(matrix(delta)).all() for delta in got.deltas.values())


@every_kind
@every_merge
def test_zero_updates(name, kind, merged):
    def zeroed(delta):
        if isinstance(delta, LoRADelta):
            return LoRADelta(delta.a, 0 * delta.b, delta.scale)
        return SparseDelta(delta.index, 0 * delta.values, delta.shape, delta.block)

    experts = {
        n: Expert(e.base, {m: zeroed(d) for m, d in e.deltas.items()}, {})
        for n, e in KINDS[kind]().items()
    }
    got = merged(name, experts)
    assert got.shapes == SIDES
    assert not any(matrix(delta).any() for delta in got.deltas.values())
    assert got.card["merge"]["error"] == 0
    some = merged(name, {**experts, "e1": KINDS[kind]()["e1"]})
    assert all(np.isfinite(matrix(delta)).all() for delta in some.deltas.values())


@every_merge
def test_weights_that_sum_to_zero(name, merged):
    one = lora_expert(0)
    experts = {"e0": one, "e1": one, "e2": lora_expert(2)}
    if name in ("fisher", "regmean"):  # they divide by the weights
        with pytest.raises(UsageError, match="wants weights of 0 or more; 'e1' has"):
            merged(name, experts, weights=[1.0, -1.0, 0.0])
        return
    got = merged(name, experts, weights=[1.0, -1.0, 0.0])
    assert all(np.isfinite(matrix(delta)).all() for delta in got.deltas.values())


@every_kind
@pytest.mark.parametrize(
    "form",
    [
        {"rank": 1},
        {"rank": 4},
        {"rank": 10},
        {"kind": "lora"},
        {"kind": "sparse"},
        {"kind": "sparse", "keep_ratio": 0.1},
        {"keep_ratio": 0.5},
    ],
    ids=lambda form: "-".join(map(str, form.values())),
)
@every_merge
def test_the_form_and_the_stated_error(name, form, kind, merged):
    """The error is that to what the method gives when nothing is cut."""
    experts = KINDS[kind]()
    whole = merged(name, experts, kind="sparse", keep_ratio=1.0)
    got = merged(name, experts, **form)
    assert whole.card["merge"]["error"] < 1e-6
    wanted = form.get("kind") or ("lora" if "rank" in form else "sparse")
    assert got.kind == wanted
    away = size = 0.0
    for module, delta in got.deltas.items():
        d_out, d_in = SIDES[module]
        if "rank" in form:
            assert delta.rank <= form["rank"]
        if "keep_ratio" in form:
            assert delta.params <= max(1, round(form["keep_ratio"] * d_out * d_in))
        w = matrix(whole.deltas[module])
        away += ((matrix(delta) - w) ** 2).sum()
        size += (w**2).sum()
    assert got.card["merge"]["error"] == pytest.approx(math.sqrt(away / size), rel=5e-3, abs=1e-5)
    kept = {"kind": None, "rank": None, "keep_ratio": None, "on": "updates"} | form
    assert got.card["merge"]["kept"] == kept


@every_merge
def test_an_unknown_option_gets_a_suggestion(name, merged):
    with pytest.raises(UsageError, match=f"{name} takes no 'nonsense'"):
        merged(name, KINDS["lora"](), nonsense=1)
    for option in MERGES[name].options:
        with pytest.raises(UsageError, match=f"did you mean {option}"):
            merged(name, KINDS["lora"](), **{option + "s": 1})


@every_kind
@every_merge
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_refused(name, kind, bad, merged):
    experts = KINDS[kind]()
    delta = experts["e1"].deltas["b.proj"]
    tensor = delta.b if isinstance(delta, LoRADelta) else delta.values
    tensor.view(-1)[3] = bad
    with pytest.raises(RefusedError, match=r"'e1' holds NaN or infinity in b\.proj"):
        merged(name, experts)


@every_merge
def test_experts_of_several_bases_or_shapes_are_refused(name, merged):
    experts = KINDS["lora"]()
    other = Expert("org/other", experts["e1"].deltas, {})
    with pytest.raises(BaseMismatchError, match="org/other"):
        merged(name, {**experts, "e1": other})
    wide = Expert("org/base", {"a.proj": lora(0, d_out=10, d_in=15)}, {})
    with pytest.raises(BaseMismatchError, match=r"disagree on a\.proj"):
        merged(name, {**experts, "e1": wide})


@every_merge
def test_what_cannot_be_merged(name, merged):
    with pytest.raises(UsageError, match="no experts"):
        MERGES[name]({})
    experts = KINDS["lora"]()
    for options, said in (
        ({"rank": 11}, "rank 11 is above what any module can hold, 10"),
        ({"rank": 0}, "1 or more"),
        ({"weights": [1.0]}, "3 experts want as many weights; got 1"),
        ({"weights": {"e7": 1.0}}, "'e7'"),
        ({"weights": {"e1": math.nan}}, "'e1' is nan"),
        ({"keep_ratio": 0.5, "rank": 2}, "a rank is of a LoRA"),
    ):
        with pytest.raises(UsageError, match=said):
            merged(name, experts, **options)


def test_the_error_counts_every_module_where_experts_are_of_both_kinds():
    """A LoRA expert on one module and a sparse one on another: the result is LoRA, all of it."""
    one = Expert("org/base", {"x": lora(1)})
    other = Expert("org/base", {"y": sparse(2, n=9)})
    merged = MERGES["linear"]({"a": one, "b": other})
    assert merged.kind == "lora"
    before = [one.deltas["x"].dense() / 2, other.deltas["y"].dense() / 2]
    after = [merged.deltas["x"].dense(), merged.deltas["y"].dense()]
    pairs = zip(before, after, strict=True)
    lost = sum(float((b - a).square().sum()) for b, a in pairs)
    whole = sum(float(b.square().sum()) for b in before)
    assert lost > 0
    assert merged.card["merge"]["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
