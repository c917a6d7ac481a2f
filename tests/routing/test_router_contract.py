"""What every router in ROUTERS promises. A new router is held to it before it has a test."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.routing import ROUTERS, Choice, attach

NEEDED = {"named": {"expert": "half"}}  # options without a default


@pytest.fixture(params=list(ROUTERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def experts(llama, mixed):
    return mixed(llama)


@pytest.fixture
def router(name, experts):
    return ROUTERS[name].fit(experts, **NEEDED.get(name, {}))


def inputs(experts, module, tok=9, seed=0, dtype=torch.float32):
    d_in = next(e.deltas[module].shape[1] for e in experts.values() if module in e.deltas)
    return torch.randn(tok, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_registry_is_sorted_and_named_after_its_routers():
    assert list(ROUTERS) == sorted(ROUTERS)
    assert {key: router.name for key, router in ROUTERS.items()} == {key: key for key in ROUTERS}


def test_it_knows_its_experts_in_the_order_given(router, experts):
    assert router.experts == tuple(experts)
    assert set(router.used) <= set(experts)
    assert router.columns


def test_weights_sum_to_one_and_indices_are_experts_that_have_the_module(router, experts):
    names = list(experts)
    for module in router.columns:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            choice = router.route(module, inputs(experts, module, dtype=dtype))
            assert isinstance(choice, Choice)
            index, weight = choice
            assert index.shape == weight.shape == (9, index.shape[1])
            assert index.dtype == torch.long
            assert weight.dtype == torch.float32
            assert bool((weight >= 0).all())
            torch.testing.assert_close(weight.sum(-1), torch.ones(9))
            assert all(module in experts[names[i]].deltas for i in index.unique().tolist())
            assert all(len(set(row)) == len(row) for row in index.tolist())


def test_a_token_is_routed_alone(router, experts):
    """The choice of a token does not depend on the tokens beside it."""
    for module in router.columns:
        x = inputs(experts, module)
        together = router.route(module, x)
        for i in range(len(x)):
            alone = router.route(module, x[i : i + 1])
            assert torch.equal(alone.index[0], together.index[i])
            torch.testing.assert_close(alone.weight[0], together.weight[i])


def test_no_tokens_are_no_choices(router, experts):
    module = next(iter(router.columns))
    assert len(router.route(module, inputs(experts, module, tok=0)).index) == 0


def test_it_is_deterministic_and_leaves_its_input_alone(router, experts, name):
    again = ROUTERS[name].fit(experts, **NEEDED.get(name, {}))
    for module in router.columns:
        x = inputs(experts, module)
        before = x.clone()
        first, second = router.route(module, x), again.route(module, x)
        assert torch.equal(x, before)
        assert torch.equal(first.index, second.index)
        assert torch.equal(first.weight, second.weight)


def test_it_is_frozen(router):
    for field in ("experts", "columns", "mix"):
        with pytest.raises(FrozenInstanceError):
            setattr(router, field, None)


def test_placing_it_makes_an_equal_router(router, experts):
    placed = router.place({module: torch.device("cpu") for module in router.columns})
    for module in router.columns:
        x = inputs(experts, module)
        assert torch.equal(placed.route(module, x).index, router.route(module, x).index)


def test_a_module_that_no_expert_has_is_not_found(router):
    with pytest.raises(NotFoundError, match="no expert has module nowhere"):
        router.route("nowhere", torch.zeros(1, 4))
    with pytest.raises(LookupError):
        router.route("nowhere", torch.zeros(1, 4))


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_fitted(name, experts):
    options = NEEDED.get(name, {})
    with pytest.raises(UsageError, match="mix is one of outputs, factors; got 'sum'"):
        ROUTERS[name].fit(experts, mix="sum", **options)
    with pytest.raises((UsageError, NotFoundError)):
        ROUTERS[name].fit({}, **options)


@pytest.mark.usefixtures("untyped")  # the checker looks into mappings too
def test_each_expert_is_read_once(name, experts, llama):
    """A library reads and verifies a file on each look-up."""

    class Counting(Mapping):
        def __init__(self):
            self.reads = dict.fromkeys(experts, 0)

        def __getitem__(self, key):
            self.reads[key] += 1
            return experts[key]

        def __iter__(self):
            return iter(experts)

        def __len__(self):
            return len(experts)

    library = Counting()
    router = ROUTERS[name].fit(library, **NEEDED.get(name, {}))
    assert max(library.reads.values()) == 1
    attach(llama, library, router).detach()
    assert max(library.reads.values()) == 2


def test_it_runs_a_model_and_generates(router, experts, llama, prompts):
    with attach(llama, experts, router) as routed, routed.record() as trace:
        routed.generate(**prompts("left"), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert sum(trace.shares().values()) == pytest.approx(1)
    assert {name for name, share in trace.shares().items() if share} <= set(router.used)
