"""General knowledge subtraction against dense matrices, and against PEFT's own."""

from collections.abc import Mapping

import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts import Expert, LoRADelta, SparseDelta, write_peft
from adaptlib.routing import Arrow, subtract

EXACT = 1e-5
SHAPE = (20, 24)


def draw(seed, rank=3, shape=SHAPE, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    a = torch.randn(rank, d_in, generator=generator)
    return LoRADelta(a, torch.randn(d_out, rank, generator=generator), scale)


def entries(seed, n=30, shape=(32, 48), block=1):
    generator = torch.Generator().manual_seed(seed)
    size = shape[0] * shape[1] // block**2
    n = min(n, size // 2)
    index = torch.randperm(size, generator=generator)[:n].sort().values
    tail = () if block == 1 else (block, block)
    return SparseDelta(index, torch.randn(n, *tail, generator=generator), shape, block)


def expert(card=None, **deltas):
    return Expert("m", deltas, card or {})


def dense(delta):
    if isinstance(delta, LoRADelta):
        return delta.scale * delta.b.double() @ delta.a.double()
    return delta.dense().double()


def error(delta, wanted):
    return (dense(delta) - wanted).abs().max().item()


def test_the_updates_are_subtracted_exactly(any_model, equal):
    """Several ranks and scales, a general expert that lacks modules, on real shapes."""
    experts = equal(any_model)
    shapes = {n: s for e in experts.values() for n, s in e.shapes.items()}
    most = list(shapes)[::2]
    general = {
        "en": expert(**{m: draw(i, 2, shapes[m], -0.3) for i, m in enumerate(shapes)}),
        "fr": expert(**{m: draw(90 + i, 5, shapes[m]) for i, m in enumerate(most)}),
    }
    worst = 0.0
    for name, less in subtract(experts, general).items():
        assert less.deltas.keys() == experts[name].deltas.keys()
        for module, delta in less.deltas.items():
            wanted = dense(experts[name].deltas[module])
            for other in general.values():
                if module in other.deltas:
                    wanted = wanted - dense(other.deltas[module]) / 2
            worst = max(worst, error(delta, wanted))
            assert delta.rank == 3 + 2 + (5 if module in most else 0)
    print(f"subtract {any_model.config.model_type}: max abs error {worst:.1e}")
    assert worst < EXACT


@pytest.mark.parametrize(("mine", "theirs"), [(1, 1), (16, 16), (1, 16), (16, 1)])
def test_sparse_updates_are_subtracted_where_either_has_entries(mine, theirs):
    task = entries(0, block=mine)
    general = {name: expert(q=entries(i, block=theirs)) for i, name in enumerate("ab", 1)}
    (less,) = subtract({"t": expert(q=task)}, general).values()
    delta = less.deltas["q"]
    wanted = dense(task) - sum(dense(g.deltas["q"]) for g in general.values()) / 2
    assert error(delta, wanted) < 1e-6
    assert delta.block == (16 if mine == theirs == 16 else 1)
    if mine == theirs == 1:
        kept = [set(g.deltas["q"].index.tolist()) for g in general.values()]
        assert set(delta.index.tolist()) == set(task.index.tolist()).union(*kept)


def test_subtracting_an_expert_from_itself_leaves_nothing():
    for delta in (draw(0), entries(0)):
        (less,) = subtract({"t": expert(q=delta)}, {"g": expert(q=delta)}).values()
        assert error(less.deltas["q"], torch.zeros(delta.shape)) < 1e-6


def test_half_precision_is_subtracted_in_float32():
    task = LoRADelta(draw(0).a.bfloat16(), draw(0).b.bfloat16(), 0.3)
    (less,) = subtract({"t": expert(q=task)}, {"g": expert(q=draw(1))}).values()
    assert error(less.deltas["q"], dense(task) - dense(draw(1))) < EXACT


def test_an_expert_gets_no_module_that_it_does_not_have():
    task, general = expert(q=draw(0)), expert(q=draw(1), v=draw(2))
    (less,) = subtract({"t": task}, {"g": general}).values()
    assert set(less.deltas) == {"q"}
    (same,) = subtract({"t": task}, {"g": expert(v=draw(2))}).values()
    assert same.deltas["q"] is task.deltas["q"]


def test_on_factors_is_another_expert():
    """By how much: (B - B_g)(A - A_g) = ΔW - ΔW_g + (2 ΔW_g - B_g A - B A_g)."""
    task, other = draw(0), draw(1)
    experts, general = {"t": expert(q=task)}, {"g": expert(q=other)}
    exact = dense(subtract(experts, general)["t"].deltas["q"])
    factors = subtract(experts, general, on="factors")["t"].deltas["q"]
    assert factors.rank == task.rank
    b, a = task.b.double(), task.a.double()
    b_g, a_g = other.b.double(), other.a.double()
    cross = task.scale * (2 * b_g @ a_g - b_g @ a - b @ a_g)
    assert error(factors, exact + cross) < EXACT
    assert cross.norm() > 0.5 * exact.norm()
    # and the direction that Arrow goes by is another one
    ways = [Arrow.fit(subtract(experts, general, on=on)).prototypes["q"] for on in WAYS]
    assert abs(ways[0][0] @ ways[1][0]) < 0.95


WAYS = ("updates", "factors")


def test_on_factors_is_what_peft_does():
    config = ArrowConfig(use_gks=True)
    config.task_adapter_names, config.gks_adapter_names = ["task_0", "task_1"], ["gks_0", "gks_1"]
    layer = ArrowLoraLinearLayer(SHAPE[1], config)
    ours = {name: draw(i) for i, name in enumerate((*config.task_adapter_names, "gks_0", "gks_1"))}

    def linear(weight):
        module = torch.nn.Linear(*weight.T.shape, bias=False)
        module.weight.data.copy_(weight)
        return module

    lora_a = {name: linear(delta.a) for name, delta in ours.items()}
    lora_b = {name: linear(delta.b) for name, delta in ours.items()}
    layer.gen_know_sub(lora_a, lora_b)
    experts = {name: expert(q=ours[name]) for name in config.task_adapter_names}
    general = {name: expert(q=ours[name]) for name in config.gks_adapter_names}
    for name, less in subtract(experts, general, on="factors").items():
        torch.testing.assert_close(less.deltas["q"].a, lora_a[name].weight.detach())
        torch.testing.assert_close(less.deltas["q"].b, lora_b[name].weight.detach())


def test_the_card_says_what_was_done_and_nothing_that_is_no_longer_true(tmp_path):
    card = {
        "task": "sums",
        "metrics": {"valid_loss": 1.0},
        "peft": {"config": {"r": 3, "lora_alpha": 6, "peft_type": "LORA"}},
    }
    task = expert(card, q=draw(0))
    (less,) = subtract({"t": task}, {"en": expert(q=draw(1)), "fr": expert(q=draw(2))}).values()
    assert less.card == {
        "task": "sums",
        "subtracted": {"general": ["en", "fr"], "on": "updates"},
    }
    assert task.card == card
    write_peft(less, tmp_path / "out")  # with a config made for the new rank
    assert '"r": 9' in (tmp_path / "out" / "adapter_config.json").read_text()


@pytest.mark.usefixtures("untyped")  # the checker looks into mappings too
def test_each_expert_is_read_once():
    class Counting(Mapping):
        def __init__(self, held):
            self.held, self.reads = held, dict.fromkeys(held, 0)

        def __getitem__(self, key):
            self.reads[key] += 1
            return self.held[key]

        def __iter__(self):
            return iter(self.held)

        def __len__(self):
            return len(self.held)

    experts = Counting({"a": expert(q=draw(0)), "b": expert(q=draw(1))})
    general = Counting({"g": expert(q=draw(2)), "h": expert(q=draw(3))})
    assert set(subtract(experts, general)) == {"a", "b"}
    assert {*experts.reads.values(), *general.reads.values()} == {1}


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_subtracted():
    experts = {"t": expert(q=draw(0))}
    with pytest.raises(UsageError, match="there are no general experts to subtract"):
        subtract(experts, {})
    with pytest.raises(UsageError, match="on is one of updates, factors; got 'both'"):
        subtract(experts, {"g": expert(q=draw(1))}, on="both")
    with pytest.raises(BaseMismatchError, match=r"q of t is \(20, 24\), that of g is \(32, 48\)"):
        subtract(experts, {"g": expert(q=entries(0))})
    same = entries(0, shape=SHAPE)
    with pytest.raises(RefusedError, match=r"is lora, that of g is sparse.* low rank nor sparse"):
        subtract(experts, {"g": expert(q=same)})
    with pytest.raises(RefusedError, match="q of t is sparse and has no factors"):
        subtract({"t": expert(q=same)}, {"g": expert(q=same)}, on="factors")
    with pytest.raises(RefusedError, match=r"rank 3 and scale 0.5, that of g 2 and 0.5") as caught:
        subtract(experts, {"g": expert(q=draw(1, rank=2))}, on="factors")
    assert caught.value.hint == 'on="updates"'
    with pytest.raises(RefusedError, match=r"rank 3 and scale 0.5, that of g 3 and 2"):
        subtract(experts, {"g": expert(q=draw(1, scale=2.0))}, on="factors")
