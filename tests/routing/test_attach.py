"""Attaching and detaching: the model is left as it was, and what does not fit is refused."""

import pytest
import torch
from torch import nn

from adaptlib import Arrow, Expert, Library, LoRADelta, Named, Uniform, attach
from adaptlib.errors import (
    BaseMismatchError,
    BaseWarning,
    ConflictError,
    NotFoundError,
    RefusedError,
    UsageError,
)


def snapshot(model):
    hooks = {
        name: (tuple(m._forward_hooks), tuple(m._forward_pre_hooks), tuple(sorted(m.__dict__)))
        for name, m in model.named_modules()
    }
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {k: v.clone() for k, v in model.state_dict().items()}, hooks, flags, model.training


@pytest.fixture
def unchanged(prompts):
    """Asserts that a model after the block is bit for bit the model before."""
    from contextlib import contextmanager

    @contextmanager
    def check(model):
        batch = prompts("left")
        with torch.no_grad():
            before, logits = snapshot(model), model(**batch).logits
        yield batch
        with torch.no_grad():
            after, again = snapshot(model), model(**batch).logits
        assert before[1:] == after[1:]
        assert before[0].keys() == after[0].keys()
        assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
        assert torch.equal(logits, again)

    return check


def fails(call, error, *words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_the_model_is_left_as_it_was(any_model, mixed, unchanged):
    experts = mixed(any_model)
    with unchanged(any_model) as batch:
        with attach(any_model, experts, Arrow.fit(experts)) as routed:
            assert routed.model is any_model
            assert set(routed.modules) == set(routed.router.columns)
            routed(**batch).logits.sum().backward()
            routed.generate(**batch, max_new_tokens=2, do_sample=False, pad_token_id=0)
        any_model.zero_grad(set_to_none=True)


def test_also_after_an_exception(llama, mixed, unchanged):
    experts = mixed(llama)
    with unchanged(llama):
        with (
            pytest.raises(RuntimeError, match="stop"),
            attach(llama, experts, Uniform.fit(experts)) as routed,
            routed.record(),
        ):
            raise RuntimeError("stop")
        with (
            pytest.raises(ValueError, match="input_ids"),
            attach(llama, experts, Uniform.fit(experts)) as routed,
        ):
            routed(no_such_input=1)


def test_without_a_block(llama, mixed, unchanged):
    experts = mixed(llama)
    with unchanged(llama) as batch:
        routed = attach(llama, experts, Uniform.fit(experts))
        routed(**batch)
        routed.detach()
        routed.detach()
        for call in (lambda: routed(**batch), lambda: routed.generate(**batch), routed.__enter__):
            error = fails(call, UsageError, "taken off")
            assert error.hint == "call attach(...) again"


def test_experts_are_copied_not_shared(llama, make_lora, prompts):
    generator = torch.Generator().manual_seed(0)
    experts = {"one": make_lora(llama, generator, rank=2)}
    before = {name: delta.dense() for name, delta in experts["one"].deltas.items()}
    with attach(llama, experts, Uniform.fit(experts)) as routed, torch.no_grad():
        routed(**prompts("left"))
    assert all(torch.equal(d.dense(), before[n]) for n, d in experts["one"].deltas.items())


def test_one_attachment_at_a_time(llama, mixed, unchanged):
    experts = mixed(llama)
    router = Uniform.fit(experts)
    with unchanged(llama), attach(llama, experts, router) as routed:
        fails(lambda: attach(llama, experts, router), ConflictError, "attached already")
        fails(routed.__enter__, UsageError, "inside a `with` block already")
        routed.detach()
        attach(llama, experts, router).detach()


def test_a_module_called_by_keyword(tiny, mixed):
    for architecture, module, word in (
        ("gpt2", "transformer.h.0.attn.c_attn", "x"),
        ("llama", "model.layers.0.self_attn.q_proj", "input"),
    ):
        model = tiny(architecture)
        experts = mixed(model)
        layer, x = model.get_submodule(module), torch.randn(1, 3, 32)
        with attach(model, experts, Uniform.fit(experts)):
            assert torch.equal(layer(x), layer(**{word: x}))


def test_subclasses_of_linear_are_adapted(mixed, tiny):
    import copy

    class Own(nn.Linear):
        pass

    model = copy.deepcopy(tiny("llama"))
    experts = mixed(model)
    old = model.model.layers[0].self_attn.q_proj
    own = Own(32, 32, bias=False)
    own.load_state_dict(old.state_dict())
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        with attach(model, experts, Uniform.fit(experts)) as routed:
            wanted = routed(input_ids=ids).logits
        model.model.layers[0].self_attn.q_proj = own
        with attach(model, experts, Uniform.fit(experts)) as routed:
            assert torch.equal(routed(input_ids=ids).logits, wanted)


# What does not fit. Each is refused before anything is put on the model.


@pytest.fixture
def refused(llama, unchanged):
    def check(experts, error, *words, router=None):
        with unchanged(llama):
            router = router or Uniform.fit(experts)
            return fails(lambda: attach(llama, experts, router), error, *words)

    return check


def small(modules, base="llama", card=None, d_in=32, d_out=32):
    deltas = {m: LoRADelta(torch.ones(1, d_in), torch.ones(d_out, 1)) for m in modules}
    return Expert(base, deltas, card or {})


Q = "model.layers.0.self_attn.q_proj"


def test_an_expert_of_another_architecture(refused):
    experts = {"good": small([Q]), "gpt": small(["transformer.h.0.attn.c_attn"])}
    refused(experts, BaseMismatchError, "gpt matches no module", "transformer.h.0.attn.c_attn")


def test_an_expert_of_a_deeper_model(refused):
    experts = {"deep": small([Q, Q.replace("0", "7")])}
    refused(
        experts, BaseMismatchError, "deep matches only 1 of its 2", "layers.7", "closest", "layers."
    )


def test_another_shape(refused):
    experts = {"wide": small([Q], d_in=48)}
    refused(experts, BaseMismatchError, "wide", Q, "(32, 32)", "(32, 48)")


def test_a_module_that_is_not_linear(refused):
    experts = {"embed": small(["model.embed_tokens"])}
    refused(experts, BaseMismatchError, "embed adapts model.embed_tokens, which is Embedding")


def test_a_pin_to_another_base(refused):
    pin = {"id": "org/other", "digest": "sha256:" + "0" * 64}
    experts = {"pinned": small([Q], card={"base": pin})}
    refused(experts, BaseMismatchError, "pinned is pinned to another base model: org/other")


def test_another_base_of_the_same_shapes_is_a_warning(llama, prompts):
    experts = {"tuned": small([Q], base="org/other-llama")}
    llama.config._name_or_path = "org/llama"
    with pytest.warns(BaseWarning, match="tuned was trained on org/other-llama"):
        attach(llama, experts, Uniform.fit(experts)).detach()


def test_a_router_of_other_experts(refused):
    experts = {"a": small([Q]), "b": small([Q])}
    router = Uniform.fit({"a": experts["a"], "c": experts["b"]})
    refused(
        experts,
        UsageError,
        "made for other experts",
        "not given: c",
        "known to it: b",
        router=router,
    )


def test_a_router_of_an_expert_that_has_changed_since(refused):
    router = Uniform.fit({"a": small([Q, Q.replace("q_", "o_")])})
    refused({"a": small([Q])}, UsageError, "another a", "has no", "o_proj", router=router)


def test_an_expert_that_is_replaced_after_it_was_attached(tmp_path, llama, make_lora, prompts):
    """What is attached stays what it was; a router of the old expert does not take the new one."""
    old, new = (make_lora(llama, torch.Generator().manual_seed(seed), rank=2) for seed in (1, 2))
    batch = prompts("left")
    library = Library.open(tmp_path / "lib", create=True)
    library.add(old, "a")
    library.add(make_lora(llama, torch.Generator().manual_seed(3), rank=4), "b")
    router = Arrow.fit(library)
    with attach(llama, library, router) as routed, torch.no_grad():
        before = routed(**batch).logits
        library.add(new, "a", replace=True)
        assert torch.equal(routed(**batch).logits, before)
    error = fails(
        lambda: attach(llama, library, router), UsageError, "another a: its updates have changed"
    )
    assert "fit the router" in error.hint
    with attach(llama, library, Arrow.fit(library)) as routed, torch.no_grad():
        assert (routed(**batch).logits - before).abs().max() > 0.01


def test_factors_of_mixed_ranks(refused, llama, mixed):
    experts = mixed(llama)
    error = refused(
        experts, UsageError, 'mix="factors"', "ranks", router=Uniform.fit(experts, mix="factors")
    )
    assert 'mix="outputs"' in error.hint


def test_weights_that_are_not_in_memory(tiny):
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    experts = {"a": small([Q])}
    fails(lambda: attach(model, experts, Uniform.fit(experts)), RefusedError, Q, "not in memory")


def test_experts_that_a_router_cannot_choose_need_not_fit(llama, prompts):
    experts = {"good": small([Q]), "other": small(["transformer.h.0.attn.c_attn"])}
    with attach(llama, experts, Named.fit(experts, expert="good")) as routed:
        assert routed.modules == (Q,)


def test_named_without_that_expert(llama, mixed):
    fails(lambda: Named.fit(mixed(llama), expert="alne"), NotFoundError, "alne")
