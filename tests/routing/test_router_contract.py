"""What every router in ROUTERS promises. A new router is held to it before it has a test."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.routing import ROUTERS, Choice, attach
from adaptlib.routing.router import PromptRouter
from adaptlib.routing.scoring import ScoringRouter
from tests import tiny as made

TEXTS = {  # sample prompts of each expert, in the words of `tiny.make_tokenizer`
    "wide": ["a b c d", "b c d e"],
    "alone": ["f g h", "g h i j"],
    "half": ["k l m n o", "l m"],
    "entries": ["p q r s", "q r s t u"],
    "blocks": ["v w x", "w x y z"],
}
PROMPTS = ["a b c", "z y x w", "k l p q m"]


BY_TOKEN = [name for name, router in ROUTERS.items() if not issubclass(router, PromptRouter)]
# those that choose for a whole prompt, or can; LAG has scores for a token alone
SCORING = [n for n, router in ROUTERS.items() if issubclass(router, ScoringRouter) and n != "lag"]
ONLY_BY_PROMPT = [name for name in ROUTERS if name not in BY_TOKEN]


@pytest.fixture
def tokenizer():
    return made.make_tokenizer()


@pytest.fixture
def experts(llama, mixed, request):
    """Of several kinds and ranks, each with gates; LoRA alone where factors are averaged."""
    asked = getattr(request.node, "callspec", None)
    only_lora = asked is not None and {"mhr", "poly"} & {
        value for value in asked.params.values() if isinstance(value, str)
    }
    random = torch.Generator().manual_seed(8)
    return {
        name: replace(
            expert,
            gates={
                module: torch.randn(delta.shape[1], generator=random)
                for module, delta in expert.deltas.items()
            },
        )
        for name, expert in mixed(llama).items()
        if expert.kind == "lora" or not only_lora
    }


def learned(experts, router):
    """What training would have found, for any experts."""
    random, found = torch.Generator().manual_seed(9), {}
    for module in {m: None for expert in experts.values() for m in expert.deltas}:
        deltas = [e.deltas[module] for e in experts.values() if module in e.deltas]
        sizes = {"rows": (len(deltas), deltas[0].shape[1]), "bias": (len(deltas),)}
        if router != "mope":
            sizes = {"logits": (2, 2 if router == "mhr" else 1, len(deltas))}
        for kind, size in sizes.items():
            found.setdefault(kind, {})[module] = torch.randn(size, generator=random)
    return found if router == "mope" else found | {"tasks": ["one", "two"], "task": "two"}


@pytest.fixture
def needed(llama, tokenizer):
    """The options that have no default, by router."""
    return {
        "arrow_tuned": {"model": llama, "tokenizer": tokenizer, "samples": TEXTS},
        "cm": {"model": llama, "tokenizer": tokenizer, "samples": TEXTS},
        "loraretriever": {"samples": TEXTS},
        "lorauter": {"samples": TEXTS},
        "named": {"expert": "half"},
        "tp": {"samples": TEXTS},
    }


@pytest.fixture
def fit(needed, experts):
    all_of_them = experts

    def fitted(name, experts, **options):
        given = dict(needed.get(name, {}))
        if name in ("mhr", "mope", "poly"):
            given |= learned(all_of_them, name) if experts else {"tasks": []}
            given.setdefault("logits" if name != "mope" else "rows", {})
        if name == "mope":
            given = {"rows": {}, "bias": {}} | {k: v for k, v in given.items() if k != "tasks"}
        return ROUTERS[name].fit(experts, **given, **options)

    return fitted


@pytest.fixture(params=list(ROUTERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def router(name, experts, fit):
    return fit(name, experts)


@pytest.fixture(params=BY_TOKEN)
def by_token(request, experts, fit):
    return fit(request.param, experts)


@pytest.fixture(params=[*SCORING, *ONLY_BY_PROMPT])
def by_prompt(request, experts, fit):
    options = {"scope": "prompt"} if request.param in SCORING else {}
    return fit(request.param, experts, **options)


def inputs(experts, module, tok=9, seed=0, dtype=torch.float32):
    d_in = next(e.deltas[module].shape[1] for e in experts.values() if module in e.deltas)
    return torch.randn(tok, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompts_of(router, experts, *, side="left", dtype=torch.float32):
    """What `look` gives for three prompts of 5, 3 and 4 tokens, and their texts."""
    mask = torch.ones(3, 5).bool()
    for row, padding in ((1, 2), (2, 1)):
        mask[row, slice(None, padding) if side == "left" else slice(5 - padding, None)] = False
    xs = {m: inputs(experts, m, 15, dtype=dtype).unflatten(0, (3, 5)) for m in router.probes}
    return {m: router.look(m, x, mask) for m, x in xs.items()}, PROMPTS


def test_the_registry_is_sorted_and_named_after_its_routers():
    assert list(ROUTERS) == sorted(ROUTERS)
    assert {key: router.name for key, router in ROUTERS.items()} == {key: key for key in ROUTERS}


def test_it_knows_its_experts_in_the_order_given(router, experts):
    assert router.experts == tuple(experts)
    assert set(router.used) <= set(experts)
    assert router.columns
    for module, here in router.columns.items():
        assert here
        assert list(here) == sorted(set(here))
        assert all(module in experts[router.experts[i]].deltas for i in here)


def test_it_can_be_kept(router):
    """Its fields are numbers, strings, tensors, and mappings and tuples of these."""
    for value in vars(router).values():
        if isinstance(value, Mapping):
            assert all(isinstance(key, str) for key in value)
            assert all(isinstance(item, torch.Tensor | tuple) for item in value.values())
        elif isinstance(value, tuple):
            assert all(isinstance(item, str) for item in value)
        else:
            assert isinstance(value, torch.Tensor | str | int | float | None)


# -- a choice for each token ----------------------------------------------------------------------


def test_weights_sum_to_one_and_indices_are_experts_that_have_the_module(by_token, experts):
    names = list(experts)
    for module in by_token.columns:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            choice = by_token.route(module, inputs(experts, module, dtype=dtype))
            assert isinstance(choice, Choice)
            index, weight = choice
            assert index.shape == weight.shape == (9, index.shape[1])
            assert index.shape[1] <= by_token.most
            assert index.dtype == torch.long
            assert weight.dtype == torch.float32
            assert bool((weight >= 0).all())
            torch.testing.assert_close(weight.sum(-1), torch.ones(9))
            assert all(module in experts[names[i]].deltas for i in index.unique().tolist())
            assert all(len(set(row)) == len(row) for row in index.tolist())


def test_a_token_is_routed_alone(by_token, experts):
    """The choice of a token does not depend on the tokens beside it."""
    for module in by_token.columns:
        x = inputs(experts, module)
        together = by_token.route(module, x)
        for i in range(len(x)):
            alone = by_token.route(module, x[i : i + 1])
            assert torch.equal(alone.index[0], together.index[i])
            torch.testing.assert_close(alone.weight[0], together.weight[i])


def test_no_tokens_are_no_choices(by_token, experts):
    module = next(iter(by_token.columns))
    assert len(by_token.route(module, inputs(experts, module, tok=0)).index) == 0


def test_it_is_deterministic_and_leaves_its_input_alone(by_token, experts, fit):
    again = fit(by_token.name, experts)
    for module in by_token.columns:
        x = inputs(experts, module)
        before = x.clone()
        first, second = by_token.route(module, x), again.route(module, x)
        assert torch.equal(x, before)
        assert torch.equal(first.index, second.index)
        assert torch.equal(first.weight, second.weight)


def test_placing_it_makes_an_equal_router(by_token, experts):
    placed = by_token.place({module: torch.device("cpu") for module in by_token.columns})
    for module in by_token.columns:
        x = inputs(experts, module)
        assert torch.equal(placed.route(module, x).index, by_token.route(module, x).index)


# -- a choice for each prompt ---------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_weights_of_a_prompt_sum_to_one(by_prompt, experts, side):
    reachable = torch.tensor([name in by_prompt.used for name in experts])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        seen, texts = prompts_of(by_prompt, experts, side=side, dtype=dtype)
        assert all(row.dtype == torch.float32 for row in seen.values())
        weights = by_prompt.weigh(seen, texts)
        assert weights.shape == (3, len(experts))
        assert weights.dtype == torch.float32
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones(3))
        assert bool((weights[:, ~reachable] == 0).all())


def test_a_prompt_is_weighed_alone(by_prompt, experts):
    seen, texts = prompts_of(by_prompt, experts)
    together = by_prompt.weigh(seen, texts), by_prompt.confidence(seen, texts)
    for i in range(3):
        one = {module: row[i : i + 1] for module, row in seen.items()}
        alone = by_prompt.weigh(one, texts[i : i + 1]), by_prompt.confidence(one, texts[i : i + 1])
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(part[0], whole[i])


def test_padding_is_not_seen(by_prompt, experts):
    """The same with other numbers, of any size, where the mask is False."""
    mask = torch.tensor([[False, False, True, True, True]])
    for module in by_prompt.probes:
        x = inputs(experts, module, 5)[None]
        other = torch.where(mask[..., None], x, 1e4 * x)
        assert torch.equal(by_prompt.look(module, x, mask), by_prompt.look(module, other, mask))


def test_confidence_is_one_number_for_each_prompt(by_prompt, experts):
    confidence = by_prompt.confidence(*prompts_of(by_prompt, experts))
    assert confidence.shape == (3,)
    assert confidence.dtype == torch.float32
    assert bool(confidence.isfinite().all())


def test_no_prompts_are_no_weights(by_prompt, experts):
    seen = {module: row[:0] for module, row in prompts_of(by_prompt, experts)[0].items()}
    assert by_prompt.weigh(seen, []).shape == (0, len(experts))
    assert by_prompt.confidence(seen, []).shape == (0,)


def test_weighing_is_deterministic_and_the_same_where_it_is_placed(by_prompt, experts):
    devices = {m: torch.device("cpu") for m in {*by_prompt.columns, *by_prompt.probes}}
    placed = by_prompt.place(devices)
    for other in (by_prompt, placed):
        first = by_prompt.weigh(*prompts_of(by_prompt, experts))
        assert torch.equal(first, other.weigh(*prompts_of(other, experts)))


@pytest.mark.parametrize("name", ONLY_BY_PROMPT)
def test_a_router_of_prompts_routes_no_token(router, experts):
    module = next(iter(router.columns))
    with pytest.raises(UsageError, match="chooses for a prompt, not for a token"):
        router.route(module, inputs(experts, module))


@pytest.mark.parametrize("name", [n for n, router in ROUTERS.items() if router.reads_text])
def test_a_router_that_reads_text_wants_it(router):
    for ask in (router.weigh, router.confidence):
        with pytest.raises(UsageError, match="reads the prompts' texts; got none"):
            ask({}, None)


# -- all of them ----------------------------------------------------------------------------------


def test_it_is_frozen(router):
    for field in ("experts", "columns", "mix"):
        with pytest.raises(FrozenInstanceError):
            setattr(router, field, None)


def test_a_module_that_no_expert_has_is_not_found(router):
    with pytest.raises(NotFoundError, match="no expert has module nowhere"):
        router.route("nowhere", torch.zeros(1, 4))
    with pytest.raises(LookupError):
        router.route("nowhere", torch.zeros(1, 4))


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_fitted(name, experts, fit):
    with pytest.raises(UsageError, match="mix is one of outputs, factors; got 'sum'"):
        fit(name, experts, mix="sum")
    with pytest.raises((UsageError, NotFoundError)):
        fit(name, {})


@pytest.mark.usefixtures("untyped")  # the checker looks into mappings too
def test_each_expert_is_read_once(name, experts, llama, fit, tokenizer):
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
    router = fit(name, library)
    assert max(library.reads.values()) == 1
    attach(llama, library, router, tokenizer=tokenizer).detach()
    assert max(library.reads.values()) == 2


def test_it_runs_a_model_and_generates(router, experts, llama, prompts, tokenizer):
    with (
        attach(llama, experts, router, tokenizer=tokenizer) as routed,
        routed.record() as trace,
    ):
        routed.generate(**prompts("left"), max_new_tokens=2, do_sample=False, pad_token_id=0)
    shares = trace.shares()
    whole = sum(shares.values())
    # of a whole prompt's experts, those that lack a module add nothing there
    assert 0 < whole <= 1 + 1e-6 if router.scope == "prompt" else whole == pytest.approx(1)
    assert {name for name, share in shares.items() if share} <= set(router.used)
