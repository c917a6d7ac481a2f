"""What is measured of a router equals loops over prompts, modules, tokens and choices."""

import math
from collections import Counter

import pytest
import torch

from adaptlib.errors import UsageError
from adaptlib.evaluation.quality import measure
from adaptlib.experts import Expert, LoRADelta, SparseDelta
from adaptlib.routing import LAG, MHR, Arrow, LoraRetriever, Named, SpectR, TaskPredictor, Uniform
from adaptlib.routing.attach import attach
from tests.tiny import make_tokenizer, save_llama

PROMPTS = ["a b c", "d", "e f g h i j k", "l m", "a a a a", "z y x w v"]
OWN = ["one", "two", None, "three", "unknown", "two"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def expert(model, seed: int, layers: tuple[int, ...], kind: str = "lora", rank: int = 2) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        for part in ("q_proj", "k_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{part}"
            d_out, d_in = model.get_submodule(name).weight.shape
            if kind == "lora":
                a = torch.randn(rank, d_in, generator=generator)
                deltas[name] = LoRADelta(a, torch.randn(d_out, rank, generator=generator), 0.3)
            else:
                index = torch.randperm(d_out * d_in, generator=generator)[:11].sort().values
                values = torch.randn(11, generator=generator)
                deltas[name] = SparseDelta(index, values, (d_out, d_in), 1)
    return Expert("llama", deltas, {"description": f"task number {seed}"})


@pytest.fixture(scope="module")
def experts(model) -> dict[str, Expert]:
    """Of two ranks and kinds; one lacks half of the modules."""
    return {
        "one": expert(model, 1, (0, 1)),
        "two": expert(model, 2, (0, 1), rank=3),
        "three": expert(model, 3, (1,)),
        "four": expert(model, 4, (0, 1), "sparse"),
    }


def entropy(weights: list[float]) -> float:
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w > 0) if total else 0.0


def slow(model, tokenizer, experts, router, own):
    """Prompt by prompt, so that nothing is padded; then loops."""
    names = router.experts
    means, choices, added, toks = [], [], 0, 0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with (
            attach(model, experts, router, tokenizer=tokenizer) as routed,
            torch.no_grad(),
            routed.record() as trace,
        ):
            routed(ids)
        total = dict.fromkeys(names, 0.0)
        for module, ((index, weight),) in trace.choices.items():
            for some, much in zip(index.tolist(), weight.tolist(), strict=True):
                choices.append(entropy(much))
                for i, w in zip(some, much, strict=True):
                    total[names[i]] += w / len(trace.choices) / ids.shape[1]
                    if w > 0:
                        delta = experts[names[i]].deltas[module]
                        d_out, d_in = delta.shape
                        rank = delta.rank if isinstance(delta, LoRADelta) else 0
                        added += rank * (d_out + d_in) if rank else len(delta.values)
        toks += ids.shape[1]
        means.append(total)
    tops = [max(names, key=total.__getitem__) if any(total.values()) else None for total in means]
    mean = [sum(total[name] for total in means) / len(means) for name in names]
    pairs = [(o, t) for o, t in zip(own, tops, strict=True) if o in names]
    return {
        "agreement": sum(o == t for o, t in pairs) / len(pairs),
        "entropy": sum(entropy([*total.values()]) for total in means) / len(means),
        "token_entropy": sum(choices) / len(choices),
        "used": math.exp(entropy(mean)),
        "above": sum(m > 0.01 * sum(mean) for m in mean),
        "chosen": tuple(tops),
        "confusion": dict(Counter(pairs)),
        "shares": dict(zip(names, mean, strict=True)),
        "added": added / toks,
    }


ROUTERS = {
    "arrow": lambda experts: Arrow.fit(experts, top_k=2),
    "arrow1": lambda experts: Arrow.fit(experts, top_k=1),
    "arrow_sequence": lambda experts: Arrow.fit(experts, top_k=2, scope="sequence"),
    "arrow_prompt": lambda experts: Arrow.fit(experts, top_k=2, scope="prompt"),
    "threshold": lambda experts: Arrow.fit(experts, top_k=2, threshold=0.45),
    "lag": lambda experts: LAG.fit(experts),
    "named": lambda experts: Named.fit(experts, expert="three"),
    "tp": lambda experts: TaskPredictor.fit(experts),
    "uniform": lambda experts: Uniform.fit(experts),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_measures_equal_loops(model, tokenizer, experts, name: str, batch_size: int) -> None:
    router = ROUTERS[name](experts)
    own = ["one", "two", None, "three", "unknown", "two"]
    found = measure(
        model, tokenizer, experts, router, PROMPTS, own=own, batch_size=batch_size, repeats=0
    )
    wanted = slow(model, tokenizer, experts, router, own)
    for key in ("agreement", "entropy", "token_entropy", "used", "above", "shares"):
        assert getattr(found, key) == pytest.approx(wanted[key], abs=1e-5), key
    if name != "uniform":  # where all weigh alike
        alone = {i for i, top in enumerate(found.chosen) if top is None}
        for i, (top, slowly) in enumerate(zip(found.chosen, wanted["chosen"], strict=True)):
            assert top == slowly or i in alone
        if not alone:
            assert dict(found.confusion) == wanted["confusion"]
        assert bool(alone) == (name == "threshold")  # of some, not of all
        assert len(alone) < len(PROMPTS)
    assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)
    assert found.varied == pytest.approx(max(1, found.used / math.exp(found.entropy)))
    assert (found.seconds, found.base_seconds) == (None, None)
    base = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert found.cost >= 1 + wanted["added"] / base - 1e-9


def test_cost_counts_products_by_hand(model, tokenizer, experts) -> None:
    """The bare model has 16 x 16 (q, o), 8 x 16 (k, v), 3 of 16 x 24, twice; and a head."""
    base = 2 * (2 * 256 + 2 * 128 + 3 * 384) + 32 * 16

    def cost(router, some=experts) -> float:
        found = measure(model, tokenizer, some, router, PROMPTS, own=[None] * 6, repeats=0)
        assert found.agreement is None
        return (found.cost - 1) * base

    one = {"one": experts["one"]}
    update = 2 * (2 * 32 + 2 * 24 + 2 * 32)  # rank (d_in + d_out) at q, k and o in two layers
    assert cost(Named.fit(one, expert="one"), one) == pytest.approx(update)
    assert cost(Arrow.fit(one), one) == pytest.approx(update + 6 * 16)  # a prototype a module
    assert cost(SpectR.fit(one), one) == pytest.approx(update + 6 * 2 * 16)
    again = cost(Arrow.fit(one, scope="prompt"), one)  # asks the base first
    assert again == pytest.approx(base + update + 6 * 16)
    assert cost(TaskPredictor.fit(one), one) == pytest.approx(update)  # reads the text
    every = 2 * 3 * 11 + update + update * 3 / 2 + update / 2
    assert cost(Uniform.fit(experts)) == pytest.approx(every)
    # a task's mixture of two skills is one update
    skills = {"one": experts["one"], "also": expert(model, 9, (0, 1))}
    logits = {module: torch.zeros(1, 1, 2) for module in experts["one"].deltas}
    mixed = MHR.fit(skills, logits=logits, tasks=["t"])
    assert cost(mixed, skills) == pytest.approx(update)


def test_of_equal_weights_the_text_router_means_the_best_fit(model, tokenizer, experts) -> None:
    samples = {"one": ["a b c d"], "two": ["l m n o"], "three": ["e f g h"], "four": ["x y z"]}
    router = LoraRetriever.fit(experts, samples=samples, top_k=3)
    found = measure(
        model,
        tokenizer,
        experts,
        router,
        ["x y z", "l m n", "e f g", "a b c"],
        own=["four", "two", "three", "one"],
        repeats=0,
    )
    assert found.chosen == ("four", "two", "three", "one")
    assert found.agreement == 1.0


def test_ids_are_prompts_too_and_time_passes(model, tokenizer, experts) -> None:
    router = Arrow.fit(experts, top_k=2)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    one = measure(model, tokenizer, experts, router, PROMPTS, own=OWN, repeats=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    two = measure(model, tokenizer, experts, router, ids, own=OWN, repeats=1)
    assert (one.shares, one.chosen) == (two.shares, two.chosen)
    assert two.seconds is not None
    assert two.base_seconds is not None
    assert min(two.seconds, two.base_seconds) > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_document_is_plain_data(model, tokenizer, experts) -> None:
    import json

    router = Named.fit(experts, expert="two")
    found = measure(model, tokenizer, experts, router, PROMPTS, own=OWN, repeats=0).document()
    assert json.loads(json.dumps(found)) == found
    assert found["agreement"] == 0.5
    assert (found["used"], found["varied"], found["above"]) == (1.0, 1.0, 1)
    assert {(p["own"], p["expert"]): p["n"] for p in found["confusion"]} == {
        ("one", "two"): 1,
        ("two", "two"): 2,
        ("three", "two"): 1,
    }


def test_what_cannot_be_asked_is_said(model, tokenizer, experts) -> None:
    router = Uniform.fit(experts)
    with pytest.raises(UsageError, match="got none, or one without tokens"):
        measure(model, tokenizer, experts, router, [], own=[])
    with pytest.raises(UsageError, match="6 of them; got 1"):
        measure(model, tokenizer, experts, router, PROMPTS, own=["one"])
    with pytest.raises(UsageError, match="batch_size is 1 or more"):
        measure(model, tokenizer, experts, router, PROMPTS, own=OWN, batch_size=0)
