"""The routed model is the slow, obvious sum, on every architecture."""

import copy

import pytest
import torch

from adaptlib.routing import ROUTERS, Arrow, Named, Uniform, attach


@pytest.fixture
def close(request):
    """Asserts 1e-5 where the mask is 1; pytest -rP shows the errors."""

    def check(got, wanted, mask):
        error = (got - wanted).abs()[mask.bool()].max().item()
        print(f"{request.node.name}: max abs error {error:.1e}")
        assert wanted.abs().max() > 1  # else 1e-5 would be no promise
        assert error < 1e-5

    return check


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_arrow_mixing_outputs_of_mixed_experts(any_model, mixed, slow, prompts, close, side):
    experts, batch = mixed(any_model), prompts(side)
    with slow(any_model, experts, top_k=2, temperature=0.8) as reference:
        wanted = reference(**batch).logits
    base = any_model(**batch).logits
    with attach(any_model, experts, Arrow.fit(experts, top_k=2, temperature=0.8)) as routed:
        got = routed(**batch).logits
    assert (got - base).abs().max() > 0.1
    close(got, wanted, batch["attention_mask"])


@torch.no_grad()
def test_arrow_mixing_factors(any_model, equal, slow, prompts, close):
    experts, batch = equal(any_model), prompts("left")
    with slow(any_model, experts, top_k=2, mix="factors") as reference:
        wanted = reference(**batch).logits
    with attach(any_model, experts, Arrow.fit(experts, top_k=2, mix="factors")) as routed:
        got = routed(**batch).logits
    with attach(any_model, experts, Arrow.fit(experts, top_k=2)) as routed:
        outputs = routed(**batch).logits
    assert (got - outputs).abs().max() > 0.01  # they are two different mixtures
    close(got, wanted, batch["attention_mask"])


@torch.no_grad()
def test_uniform_and_named(llama, mixed, equal, slow, prompts, close):
    batch = prompts("right")
    cases = [
        (mixed(llama), "uniform", "outputs"),
        (equal(llama), "uniform", "factors"),
        (mixed(llama), "named", "outputs"),
        (equal(llama), "named", "factors"),
    ]
    for experts, name, mix in cases:
        only = list(experts)[2]
        with slow(llama, experts, router=name, mix=mix, only=only) as reference:
            wanted = reference(**batch).logits
        router = (
            Uniform.fit(experts, mix=mix)
            if name == "uniform"
            else Named.fit(experts, expert=only, mix=mix)
        )
        with attach(llama, experts, router) as routed:
            close(routed(**batch).logits, wanted, batch["attention_mask"])


@torch.no_grad()
def test_named_is_the_model_with_that_update_added_to_its_weights(tiny, mixed, prompts, close):
    batch = prompts("left")
    for architecture in ("gpt2", "llama"):
        model = tiny(architecture)
        experts = mixed(model)
        for name in experts:
            modules = dict(model.named_modules())
            saved = {m: modules[m].weight.data.clone() for m in experts[name].deltas}
            for m, delta in experts[name].deltas.items():
                update = delta.dense()
                modules[m].weight.data += update.T if architecture == "gpt2" else update
            wanted = model(**batch).logits
            for m, weight in saved.items():
                modules[m].weight.data.copy_(weight)
            with attach(model, experts, Named.fit(experts, expert=name)) as routed:
                close(routed(**batch).logits, wanted, batch["attention_mask"])


@torch.no_grad()
def test_padding_changes_nothing(any_model, mixed, prompts, close):
    experts = mixed(any_model)
    with attach(any_model, experts, Arrow.fit(experts, top_k=3)) as routed:
        left, right = prompts("left"), prompts("right")
        alone = routed(input_ids=left["input_ids"][:1, 3:]).logits
        for batch, where in ((left, slice(3, None)), (right, slice(0, 4))):
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            got = routed(**batch, position_ids=positions).logits
            close(got[:1, where], alone, torch.ones(1, 4))


@torch.no_grad()
def test_greedy_generation_with_a_cache_is_that_of_the_slow_model_without(
    any_model, mixed, slow, prompts
):
    experts, steps = mixed(any_model), 4
    prompt = prompts("left")["input_ids"][1:]
    ids = prompt
    with slow(any_model, experts, top_k=2) as reference:
        for _ in range(steps):
            best = reference(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], -1)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    with attach(any_model, experts, Arrow.fit(experts, top_k=2)) as routed:
        got = routed.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options
        )
        batch = routed.generate(**prompts("left"), pad_token_id=0, **options)
    assert torch.equal(got, ids)
    assert torch.equal(batch[1:], ids)  # beside a padded neighbour


@torch.no_grad()
def test_the_head_can_be_adapted(llama, slow, prompts, close):
    from adaptlib import Expert, LoRADelta

    generator = torch.Generator().manual_seed(1)
    experts = {
        f"e{i}": Expert(
            "llama",
            {
                "lm_head": LoRADelta(
                    torch.randn(2, 32, generator=generator), torch.randn(64, 2, generator=generator)
                )
            },
        )
        for i in range(3)
    }
    batch = prompts("right")
    with slow(llama, experts, top_k=2) as reference:
        wanted = reference(**batch).logits
    with attach(llama, experts, Arrow.fit(experts, top_k=2)) as routed:
        close(routed(**batch).logits, wanted, batch["attention_mask"])


def test_gradients_are_those_of_the_slow_model(llama, mixed, equal, slow, prompts):
    start = llama.get_input_embeddings()(prompts("left")["input_ids"][1:]).detach()
    for experts, mix in ((mixed(llama), "outputs"), (equal(llama), "factors")):

        def gradient(model, start=start):
            x = start.clone().requires_grad_()
            model(inputs_embeds=x).logits.square().mean().backward()
            return x.grad

        with slow(llama, experts, top_k=2, mix=mix) as reference:
            wanted = gradient(reference)
        with attach(llama, experts, Arrow.fit(experts, top_k=2, mix=mix)) as routed:
            got = gradient(routed)
        llama.zero_grad()
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(tiny, mixed, equal, slow, prompts, dtype):
    batch = prompts("left")
    mask = batch["attention_mask"].bool()
    for architecture in ("gpt2", "llama"):
        model = copy.deepcopy(tiny(architecture)).to(dtype)
        for experts, mix in ((mixed(model), "outputs"), (equal(model), "factors")):
            router = Arrow.fit(experts, top_k=2, mix=mix)
            with slow(model, experts, top_k=2, mix=mix) as reference:
                wanted = reference(**batch).logits[mask].float()
            with attach(model, experts, router) as routed, routed.record() as trace:
                logits = routed(**batch).logits
            got = logits[mask].float()
            assert logits.dtype == dtype
            choices = [choice for calls in trace.choices.values() for choice in calls]
            assert all(choice.weight.dtype == torch.float32 for choice in choices)
            # a rounded near-tie may choose another expert for a token, so the mean is held
            assert (got - wanted).abs().mean() < 0.1 * wanted.abs().mean()


@torch.no_grad()
def test_autocast_leaves_the_logits_in_float32(llama, mixed, prompts):
    experts, batch = mixed(llama), prompts("left")
    with attach(llama, experts, Arrow.fit(experts, top_k=2)) as routed:
        with routed.record() as trace, torch.autocast("cpu", dtype=torch.bfloat16):
            got = routed(**batch).logits
        plain = routed(**batch).logits
    weights = [c.weight for calls in trace.choices.values() for c in calls]
    assert all(w.dtype == torch.float32 for w in weights)
    assert (got.float() - plain).abs().mean() < 0.1 * plain.abs().mean()


@pytest.mark.parametrize("name", ["lag", "random", "spectr"])
@torch.no_grad()
def test_other_routers_run_as_they_choose(any_model, mixed, prompts, close, name):
    """Their choices are held to slow ones elsewhere; here the sum over them, module by module."""
    experts, batch = mixed(any_model), prompts("left")
    router = ROUTERS[name].fit(experts, top_k=2)
    values, patched = list(experts.values()), []
    for module_name, module in any_model.named_modules():
        if module_name not in router.columns:
            continue

        def forward(x, module=module, module_name=module_name):
            y = type(module).forward(module, x)
            rows = []
            for token in x.reshape(-1, x.shape[-1]):
                index, weight = router.route(module_name, token[None])
                rows.append(
                    sum(
                        w * (values[i].deltas[module_name].dense().double() @ token.double())
                        for i, w in zip(index[0].tolist(), weight[0].double(), strict=True)
                    )
                )
            return y + torch.stack(rows).reshape(y.shape).to(y.dtype)

        module.forward = forward
        patched.append(module)
    try:
        wanted = any_model(**batch).logits
    finally:
        for module in patched:
            del module.forward
    with attach(any_model, experts, router) as routed:
        close(routed(**batch).logits, wanted, batch["attention_mask"])
