"""Choices for a token, a sequence and a prompt, and none below a threshold: against loops."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers as tf
from transformers.pytorch_utils import Conv1D

from adaptlib.errors import RefusedError, UsageError
from adaptlib.routing import Arrow, Named, attach
from adaptlib.routing.router import PromptRouter, columns_of


def dense(delta):
    return delta.dense().double()


def prototype(delta):
    return torch.linalg.svd(dense(delta), full_matrices=False).Vh[0]


@contextmanager
def by_sequence(model, experts, mask, *, top_k):
    """Each sequence's experts are chosen at each module in the first call, and stay."""
    chosen, patched = {}, []
    for name, module in model.named_modules():
        here = {e: value.deltas[name] for e, value in experts.items() if name in value.deltas}
        if not here:
            continue

        def forward(x, here=here, module=module, name=name):
            y = type(module).forward(module, x)
            batch = x.reshape(len(mask), -1, x.shape[-1]).double()
            if name not in chosen:
                chosen[name] = []
                for tokens, real in zip(batch, mask, strict=True):
                    if len(tokens) == len(real):
                        tokens = tokens[real.bool()]
                    mean = {
                        e: sum(abs(token @ prototype(delta)) for token in tokens) / len(tokens)
                        for e, delta in here.items()
                    }
                    best = sorted(mean, key=lambda e: -mean[e].item())[:top_k]
                    total = sum(mean[e].exp() for e in best)
                    chosen[name].append({e: mean[e].exp() / total for e in best})
            added = torch.stack(
                [
                    torch.stack([sum(w * (dense(here[e]) @ t) for e, w in c.items()) for t in s])
                    for s, c in zip(batch, chosen[name], strict=True)
                ]
            )
            return y + added.reshape(y.shape).to(y.dtype)

        module.forward = forward
        patched.append(module)
    try:
        yield chosen
    finally:
        for module in patched:
            del module.forward


def carried(out):
    """The cache that a model gave, as an argument of the next call, by its transformers' name."""
    name = "cache" if "cache" in out else "past_key_values"
    return {name: out[name]}


def steps(model, batch, count=3):
    """The logits of the prompt, and of some tokens after it with a cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = model(input_ids=ids, attention_mask=mask, use_cache=True)
    logits = [out.logits]
    for step in range(count):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        token = torch.full((len(mask), 1), 3 + step)
        out = model(input_ids=token, attention_mask=mask, use_cache=True, **carried(out))
        logits.append(out.logits)
    return logits


def same(got, wanted, mask):
    real = mask.bool()
    assert (got[0] - wanted[0])[real].abs().max() < 1e-5
    for one, other in zip(got[1:], wanted[1:], strict=True):
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_sequence_keeps_the_choice_of_its_prompt(any_model, mixed, prompts, side):
    experts, batch = mixed(any_model), prompts(side)
    with by_sequence(any_model, experts, batch["attention_mask"], top_k=2):
        wanted = steps(any_model, batch)
    router = Arrow.fit(experts, top_k=2, scope="sequence")
    with attach(any_model, experts, router) as routed:
        got = steps(routed, batch)
        again = steps(routed, batch)  # new prompts are chosen for anew
    same(got, wanted, batch["attention_mask"])
    same(again, wanted, batch["attention_mask"])
    with attach(any_model, experts, Arrow.fit(experts, top_k=2)) as routed:
        assert (steps(routed, batch)[-1] - wanted[-1]).abs().max() > 1e-3  # another mixture


def merged(model, experts, weights):
    """The model with Σ w_i ΔW_i in its weights."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        for module, delta in experts[name].deltas.items():
            change = weight * delta.dense()
            conv = isinstance(modules[module], Conv1D)
            modules[module].weight.data += change.T if conv else change
    return model


def mean_scores(model, experts, batch, i):
    """Of each expert: the mean of |x · v| over the tokens of prompt i, then over its modules."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, module in model.named_modules()
        if any(name in e.deltas for e in experts.values())
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"][i].bool()
    return {
        name: torch.stack(
            [
                (seen[m].unflatten(0, (2, -1)) if seen[m].ndim == 2 else seen[m])[i][real]
                .double()
                .matmul(prototype(d))
                .abs()
                .mean()
                for m, d in expert.deltas.items()
            ]
        ).mean()
        for name, expert in experts.items()
    }


@torch.no_grad()
def test_a_prompt_has_one_mixture_at_all_modules(any_model, mixed, prompts):
    """So it is the model with that mixture in its weights."""
    experts, batch = mixed(any_model), prompts("left")
    router = Arrow.fit(experts, top_k=2, scope="prompt")
    with attach(any_model, experts, router) as routed, routed.record() as trace:
        got = steps(routed, batch)
    assert set(trace.shares()) == set(experts)
    for i, real in enumerate(batch["attention_mask"].bool()):
        mean = mean_scores(any_model, experts, batch, i)
        best = sorted(mean, key=lambda e: -mean[e].item())[:2]
        weights = torch.stack([mean[e] for e in best]).softmax(0).tolist()
        wanted = steps(merged(any_model, experts, dict(zip(best, weights, strict=True))), batch)
        assert (got[0][i] - wanted[0][i])[real].abs().max() < 2e-5
        for one, other in zip(got[1:], wanted[1:], strict=True):
            assert (one[i] - other[i]).abs().max() < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("scope", ["sequence", "prompt"])
def test_neighbours_and_padding_change_no_choice(llama, mixed, prompts, scope):
    experts, batch = mixed(llama), prompts("left")
    with attach(llama, experts, Arrow.fit(experts, top_k=2, scope=scope)) as routed:
        together = routed(**batch).logits
        for i, real in enumerate(batch["attention_mask"].bool()):
            alone = routed(batch["input_ids"][i][real][None]).logits[0]
            assert (together[i][real] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_the_base_answers_alone_below_the_threshold(llama, mixed, prompts):
    experts, batch = mixed(llama), prompts("left")
    base = steps(llama, batch)
    for scope in ("token", "sequence", "prompt"):
        router = Arrow.fit(experts, top_k=2, scope=scope, threshold=0.0)
        with attach(llama, experts, router) as routed:
            open_ = steps(routed, batch)
        with attach(llama, experts, replace(router, threshold=None)) as routed:
            same(open_, steps(routed, batch), batch["attention_mask"])
        with attach(llama, experts, replace(router, threshold=2.0)) as routed:
            closed = steps(routed, batch)
        assert all(torch.equal(a, b) for a, b in zip(closed, base, strict=True))


@torch.no_grad()
def test_each_prompt_of_a_batch_meets_the_threshold_alone(llama, mixed, prompts):
    experts, batch = mixed(llama), prompts("left")
    base = llama(**batch).logits
    router = Arrow.fit(experts, top_k=2, threshold=0.0)
    with attach(llama, experts, router) as routed:
        every = routed(**batch).logits
        both = routed.confidence
    middle = replace(router, threshold=both.mean().item())
    higher = int(both.argmax())
    with attach(llama, experts, middle) as routed:
        got = routed(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(got[1 - higher], base[1 - higher])
    assert (got[higher] - every[higher])[real[higher]].abs().max() < 1e-5


@torch.no_grad()
def test_generate_is_the_greedy_steps(llama, mixed, prompts):
    experts, batch = mixed(llama), prompts("left")
    for scope in ("sequence", "prompt"):
        with attach(llama, experts, Arrow.fit(experts, top_k=2, scope=scope)) as routed:
            said = routed.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
            out = routed(**batch, use_cache=True)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            for _ in range(4):
                token = out.logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, token], 1)
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                out = routed(input_ids=token, attention_mask=mask, **carried(out))
        assert torch.equal(said, ids)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["sequence", "prompt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_changes_no_choice(tiny, mixed, prompts, scope, attention):
    """For it, `generate` makes a mask of another form, with room for what is to come."""
    model = copy.deepcopy(tiny("llama"))
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    experts = mixed(model)
    with attach(model, experts, Arrow.fit(experts, top_k=2, scope=scope)) as routed:
        grown, static = (
            torch.stack(routed.generate(**prompts("left"), **options, **cache).logits)
            for cache in ({}, {"cache_implementation": "static"})
        )
    assert (grown - static).abs().max() < 1e-5


@torch.no_grad()
def test_a_cache_of_other_prompts_is_refused(llama, mixed, prompts):
    experts, batch = mixed(llama), prompts("left")
    router = Arrow.fit(experts, top_k=2, scope="sequence")
    with attach(llama, experts, router) as routed:
        out = routed(**batch, use_cache=True)
        (cache,) = carried(out).values()
        for name in ("cache", "past_key_values"):  # whichever the model asks for
            with pytest.raises(UsageError, match="with 1 sequences; experts were chosen for 2"):
                routed(input_ids=torch.ones(1, 1).long(), **{name: cache})
        with pytest.raises(RefusedError, match="a list does not say whether it holds tokens"):
            routed(input_ids=torch.ones(2, 1).long(), state=[torch.zeros(2, 4)])


class Reader(PromptRouter):
    """Chooses the expert whose number the text ends with."""

    name = "reader"
    reads_text = True

    def weigh(self, seen, texts):
        rows = [[float(text.endswith(str(i))) for i in range(len(self.experts))] for text in texts]
        return torch.tensor(rows)


class Digits:
    """A tokenizer that writes ids as numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(map(str, row)) for row in rows]


@torch.no_grad()
def test_a_router_that_reads_gets_the_text_without_padding(llama, equal):
    experts = equal(llama)
    router = Reader(experts=tuple(experts), columns=columns_of(experts), mix="outputs")
    ids = torch.tensor([[0, 0, 12, 21], [4, 5, 6, 2]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(UsageError, match="reads the prompt's text and has no tokenizer"):
        attach(llama, experts, router)
    with attach(llama, experts, router, tokenizer=Digits()) as routed:
        got = routed(input_ids=ids, attention_mask=mask).logits
        with pytest.raises(UsageError, match="inputs_embeds have none"):
            routed(inputs_embeds=torch.zeros(1, 2, 32))
    names = list(experts)
    for i, name in enumerate((names[1], names[2])):
        with attach(llama, experts, Named.fit(experts, expert=name)) as routed:
            wanted = routed(input_ids=ids, attention_mask=mask).logits
        assert (got[i] - wanted[i])[mask[i].bool()].abs().max() < 1e-5


def mamba():
    """A model whose cache is a state: transformers gives it by another name or of another class."""
    torch.manual_seed(0)
    config = tf.MambaConfig(
        vocab_size=64,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tf.MambaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("architecture", "adapted"), [("gpt2", "c_attn"), ("llama", "o_proj"), ("mamba", "in_proj")]
)
@torch.no_grad()
def test_a_prompt_chooses_for_all_that_is_generated(architecture, adapted, tiny, make_lora):
    model = mamba() if architecture == "mamba" else tiny(architecture)
    modules = [name for name, _ in model.named_modules() if name.endswith(adapted)]
    generator = torch.Generator().manual_seed(0)
    experts = {
        name: make_lora(model, generator, rank=3, modules=modules) for name in ("a", "b", "c")
    }
    router = Reader(experts=tuple(experts), columns=columns_of(experts), mix="outputs")
    ids = torch.tensor([[9, 8, 12, 21], [4, 5, 6, 2]])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with attach(model, experts, router, tokenizer=Digits()) as routed:
        said = torch.stack(routed.generate(ids, **options).logits, 1)
    for i, name in enumerate(("b", "c")):
        alone = merged(model, experts, {name: 1.0}).generate(ids, **options)
        alone = torch.stack(alone.logits, 1)
        assert (said[i] - alone[i]).abs().max() < 1e-4
        assert ((said[1 - i] - alone[1 - i]).abs().amax(-1) > 1e-2).all()


@pytest.mark.usefixtures("untyped")
def test_what_a_scope_cannot_be(llama, mixed):
    experts = mixed(llama)
    with pytest.raises(UsageError, match="scope is one of token, sequence, prompt; got 'word'"):
        replace(Arrow.fit(experts), scope="word")
    with pytest.raises(UsageError, match='router named scores no tokens, so it has no scope "seq'):
        attach(llama, experts, replace(Named.fit(experts, expert="half"), scope="sequence"))
    named = replace(Named.fit(experts, expert="half"), threshold=0.5)
    with (
        attach(llama, experts, named) as routed,
        pytest.raises(UsageError, match="router named has no measure of how well"),
    ):
        routed(torch.ones(1, 2).long())


def test_gradients_reach_the_input_through_shared_choices(llama, mixed):
    experts = mixed(llama)
    for scope in ("token", "sequence", "prompt"):
        embeds = torch.randn(2, 3, 32, requires_grad=True)
        with attach(llama, experts, Arrow.fit(experts, top_k=2, scope=scope)) as routed:
            routed(inputs_embeds=embeds).logits.square().mean().backward()
        assert embeds.grad is not None
        assert embeds.grad.abs().sum() > 0


@pytest.mark.parametrize("scope", ["sequence", "prompt"])
def test_an_answer_does_not_choose_its_own_experts(llama, mixed, scope):
    """A prompt with its answer in one call is the prompt, and then the answer with its cache."""
    experts = mixed(llama)
    router = Arrow.fit(experts, top_k=2, scope=scope)
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    prompt = torch.zeros(3, 9).bool()
    prompt[:, :5] = True
    with attach(llama, experts, router) as routed, torch.no_grad():
        first = routed(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"
        then = routed(input_ids=ids[:, 5:], attention_mask=mask, **{name: first[name]})
        expected = torch.cat([first.logits, then.logits], 1)
        with routed.reading(prompt):
            got = routed(input_ids=ids, attention_mask=mask).logits
        whole = routed(input_ids=ids, attention_mask=mask).logits
        with pytest.raises(UsageError, match="reading wants"), routed.reading(prompt[:2]):
            routed(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-4)
