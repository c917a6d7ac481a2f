"""The record of who was chosen."""

import pytest
import torch

from adaptlib import Arrow, Named, Uniform, attach
from adaptlib.errors import UsageError


@pytest.fixture
def experts(llama, mixed):
    return mixed(llama)


def by_hand(trace):
    """(module, tok, expert) weights by loops, from the raw choices."""
    rows = []
    for calls in trace.choices.values():
        module = []
        for index, weight in calls:
            for indices, weights in zip(index.tolist(), weight.tolist(), strict=True):
                token = [0.0] * len(trace.experts)
                for i, w in zip(indices, weights, strict=True):
                    token[i] += w
                module.append(token)
        rows.append(module)
    return torch.tensor(rows)


@torch.no_grad()
def test_shares_layers_and_tokens_are_means_of_the_choices(llama, experts, prompts):
    ids = prompts("left")["input_ids"][1:]
    with attach(llama, experts, Arrow.fit(experts, top_k=2)) as routed:
        with routed.record() as trace:
            routed(input_ids=ids)
        routed(input_ids=ids)  # outside the block: not recorded
    wanted = by_hand(trace)
    assert wanted.shape == (len(routed.modules), 7, 5)
    shares = trace.shares()
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(shares.values()) == pytest.approx(1)
    assert list(trace.experts) == list(experts)
    for i, name in enumerate(experts):
        assert shares[name] == pytest.approx(wanted[:, :, i].mean().item())
    in_model = [name for name, _ in llama.named_modules() if name in routed.modules]
    assert list(trace.layers()) == in_model
    torch.testing.assert_close(torch.tensor(list(trace.layers().values())), wanted.mean(1))
    torch.testing.assert_close(trace.tokens(), wanted.mean(0))


@torch.no_grad()
def test_a_mask_leaves_padding_out(llama, experts, prompts):
    left = prompts("left")
    with attach(llama, experts, Arrow.fit(experts, top_k=2)) as routed:
        with routed.record() as trace:
            routed(input_ids=left["input_ids"][:1, 3:])
            routed(input_ids=left["input_ids"][1:])
        for side in ("left", "right"):
            batch = prompts(side)
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            with routed.record() as padded:
                routed(**batch, position_ids=positions)
            mask = batch["attention_mask"]
            for kind in (mask, mask.bool(), mask.flatten()):
                assert padded.shares(mask=kind) == pytest.approx(trace.shares(), abs=1e-5)
            assert padded.shares() != pytest.approx(trace.shares(), abs=1e-5)


def test_after_a_masked_prompt_generated_tokens_count(llama, experts, prompts):
    batch = prompts("left")
    with attach(llama, experts, Arrow.fit(experts, top_k=2)) as routed, routed.record() as trace:
        routed.generate(
            **batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
    weights = by_hand(trace)  # 14 tokens of the prompt, then 2 a step: the last one is not read
    assert weights.shape[1] == 14 + 2 * 2
    keep = torch.cat([batch["attention_mask"].flatten().bool(), torch.ones(4, dtype=torch.bool)])
    wanted = weights[:, keep].mean((0, 1))
    got = trace.shares(mask=batch["attention_mask"])
    for i, name in enumerate(experts):
        assert got[name] == pytest.approx(wanted[i].item(), abs=1e-6)


def test_a_head_that_sees_the_last_token_only_counts_whole(llama, prompts):
    from adaptlib import Expert, LoRADelta

    both = {
        "model.layers.0.self_attn.q_proj": LoRADelta(torch.ones(1, 32), torch.ones(32, 1)),
        "lm_head": LoRADelta(torch.ones(1, 32), torch.ones(64, 1)),
    }
    experts = {"a": Expert("llama", both), "b": Expert("llama", both)}
    batch = prompts("left")
    with attach(llama, experts, Uniform.fit(experts)) as routed, routed.record() as trace:
        routed(**batch, logits_to_keep=1)
    assert trace.shares(mask=batch["attention_mask"]) == {"a": 0.5, "b": 0.5}
    assert trace.tokens().shape == (14, 2)


def test_named_has_the_whole_share(llama, experts, prompts):
    router = Named.fit(experts, expert="half")
    with attach(llama, experts, router) as routed, routed.record() as trace:
        routed(**prompts("left"))
    assert trace.shares() == {"half": 1.0, "wide": 0, "alone": 0, "entries": 0, "blocks": 0}


def test_records_may_be_nested(llama, experts, prompts):
    with attach(llama, experts, Uniform.fit(experts)) as routed, routed.record() as outer:
        routed(**prompts("left"))
        with routed.record() as inner:
            routed(**prompts("left"))
    assert all(len(calls) == 2 for calls in outer.choices.values())
    assert all(len(calls) == 1 for calls in inner.choices.values())


def test_recorded_choices_hold_no_graph(llama, experts, prompts):
    with attach(llama, experts, Arrow.fit(experts)) as routed, routed.record() as trace:
        routed(**prompts("left"))
    assert not any(c.weight.requires_grad for calls in trace.choices.values() for c in calls)


def test_what_cannot_be_asked(llama, experts, prompts):
    with attach(llama, experts, Uniform.fit(experts)) as routed:
        with routed.record() as trace:
            pass
        with pytest.raises(UsageError, match="nothing was recorded"):
            trace.shares()
        with routed.record() as trace:
            routed(**prompts("left"))
    with pytest.raises(UsageError, match="mask is for 3 tokens; the first recorded call had 14"):
        trace.shares(mask=torch.ones(3))
    with pytest.raises(UsageError, match="leaves no token"):
        trace.shares(mask=torch.zeros(14))
