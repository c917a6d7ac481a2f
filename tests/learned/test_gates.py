"""Gates (PHATGOOSE): trained after the expert, kept with it, and what routing makes of them."""

import pytest
import torch

from adaptlib.errors import UsageError
from adaptlib.experts import Library
from adaptlib.learned.gates import GateLearner, train_gate
from adaptlib.routing import PHATGOOSE
from adaptlib.training import train
from adaptlib.training.encode import encode_task
from adaptlib.training.modules import target_modules
from adaptlib.training.options import TrainOptions
from adaptlib.training.run import answer_loss
from adaptlib.training.tasks import Row, Task
from tests.training.conftest import llama

OPTIONS = TrainOptions(rank=2, epochs=3, batch_size=8, dtype=torch.float32)


@pytest.fixture(scope="module")
def task():
    words = ["red", "green", "blue", "gray", "black", "white"]
    rows = tuple(Row(f"{a} {b}", a) for a in words for b in words)
    return Task("first", "First word.", {"train": rows[:24], "valid": rows[24:]})


@pytest.fixture(scope="module", params=["lora", "sparse"])
def expert(request, tokenizer, task):
    return train(llama(), tokenizer, task, kind=request.param, options=OPTIONS)


def test_the_update_is_gated_and_its_gradient_right(expert) -> None:
    """y += s(v . x) dW x, against a loop, and finite differences of the gate."""
    model = llama()
    name = next(iter(expert.deltas))
    modules = {name: target_modules(model, "all-linear")[name]}
    learner = GateLearner(modules, expert.deltas)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, expert.deltas[name].shape[1], generator=random)
    with torch.no_grad():
        learner.values[name].copy_(torch.randn(x.shape[-1], generator=random))
    plain = modules[name](x)
    with learner.installed():
        got = modules[name](x)
    dense, gate = expert.deltas[name].dense().double(), learner.values[name].detach().double()
    for s in range(2):
        for t in range(3):
            token = x[s, t].double()
            wanted = plain[s, t] + torch.sigmoid(gate @ token) * (dense @ token)
            assert (got[s, t] - wanted).abs().max() < 1e-5

    def total(values):
        return sum(
            (torch.sigmoid(values @ token) * (dense @ token)).sum()
            for token in x.double().flatten(0, 1)
        )

    with learner.installed():
        modules[name](x).sum().backward()
    step = torch.eye(len(gate), dtype=torch.double)[:5] * 1e-6
    slopes = torch.stack([(total(gate + d) - total(gate - d)) / 2e-6 for d in step])
    torch.testing.assert_close(learner.values[name].grad[:5].double(), slopes, atol=1e-4, rtol=1e-3)


def test_training_moves_the_gates_and_nothing_else(tokenizer, task, expert, tmp_path) -> None:
    model, before = llama(), llama().state_dict()
    gated = train_gate(model, tokenizer, expert, task, steps=12, options=TrainOptions(lr=0.05))
    assert set(gated.gates) == set(expert.deltas)
    assert gated.fingerprint == expert.fingerprint
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    again = train_gate(model, tokenizer, expert, task, steps=12, options=TrainOptions(lr=0.05))
    assert all(torch.equal(gated.gates[m], again.gates[m]) for m in gated.gates)
    assert gated.card["gate"]["task"]["digest"] == task.digest

    def loss(gates) -> float:
        named = dict(model.named_modules())
        learner = GateLearner({m: named[m] for m in expert.deltas}, expert.deltas)
        learner.load(gates)
        examples = encode_task(tokenizer, task, "train", max_length=256).examples
        from adaptlib.training.encode import collate

        with learner.installed(), torch.no_grad():
            return answer_loss(model, collate(examples, 1)).item()

    zeros = {m: torch.zeros_like(v) for m, v in gated.gates.items()}
    assert loss(gated.gates) < loss(zeros) - 0.01
    library = Library.open(tmp_path / "lib", create=True)
    library.add(gated, "one")
    kept = library["one"]
    assert all(torch.equal(kept.gates[m], gated.gates[m]) for m in gated.gates)


def test_routing_compares_standardised_tokens_and_gates(tokenizer, task, expert) -> None:
    """score = LN(x) . LN(v) / sqrt(d), the two best, a softmax over these."""
    model = llama()
    options = TrainOptions(lr=0.05)
    experts = {
        str(steps): train_gate(model, tokenizer, expert, task, steps=steps, options=options)
        for steps in (2, 5, 9)
    }
    router = PHATGOOSE.fit(experts)

    def normal(vector):
        return (vector - vector.mean()) / vector.var(unbiased=False).sqrt()

    for module in list(router.columns)[:3]:
        d_in = expert.deltas[module].shape[1]
        x = torch.randn(4, d_in, generator=torch.Generator().manual_seed(1))
        index, weight = router.route(module, x)
        for t, token in enumerate(x.double()):
            scores = [
                (normal(token) @ normal(one.gates[module].double()) / d_in**0.5).item()
                for one in experts.values()
            ]
            best = sorted(range(3), key=lambda i: -scores[i])[:2]
            assert index[t].tolist() == best
            powers = torch.tensor([scores[i] for i in best]).exp()
            torch.testing.assert_close(weight[t], powers / powers.sum(), atol=1e-4, rtol=1e-3)


def test_what_has_no_gate(tokenizer, task, expert) -> None:
    with pytest.raises(UsageError, match="gate") as error:
        PHATGOOSE.fit({"bare": expert})
    assert "train-router phatgoose" in str(error.value.hint)
    with pytest.raises(UsageError, match="steps is 1 or more"):
        train_gate(llama(), tokenizer, expert, task, steps=0)
