"""train_router and adapt: what was trained is what routes afterwards, the same every time."""

import dataclasses

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts import Library
from adaptlib.learned.skills import prompts_of
from adaptlib.learned.train import Learned, adapt, average, train_router
from adaptlib.routing import attach, load_router, save_router
from adaptlib.routing.per_task import TaskRouter
from adaptlib.training.encode import batches
from adaptlib.training.options import TrainOptions
from adaptlib.training.plan import plan
from adaptlib.training.run import answer_loss
from adaptlib.training.tasks import Row, Task
from tests.training.conftest import llama

OPTIONS = TrainOptions(rank=2, alpha=4.0, epochs=2, batch_size=8, dtype=torch.float32)
KINDS = [
    ("poly", {}),
    ("mhr", {"heads": 2}),
    ("mope", {}),
    ("mope", {"scope": "sequence", "temperature": 0.5}),
    ("mope", {"top_k": 2, "balance": 0.1}),
]
IDS = ["poly", "mhr", "token", "example", "top2"]


@pytest.fixture(scope="module")
def tasks():
    words = ["red", "green", "blue", "gray", "black", "white"]
    rows = [Row(f"{a} {b}", a) for a in words for b in words]
    last = [Row(row.input, row.input.split()[1]) for row in rows]
    return [
        Task(name, said, {"train": tuple(part[:24]), "valid": tuple(part[24:])})
        for name, said, part in (("first", "First word.", rows), ("last", "Last word.", last))
    ]


def learn(tokenizer, tasks, router, **options):
    return train_router(
        llama(), tokenizer, tasks, router=router, name=router, skills=3, options=OPTIONS, **options
    )


def loss_of(model, batch_list, ask):
    """The mean loss over answer tokens; `ask` runs the model on a batch."""
    total = count = 0.0
    with torch.no_grad():
        for batch in batch_list:
            total += ask(batch).item()
            count += int((batch.labels != -100).sum())
    return total / count


@pytest.mark.parametrize(("router", "options"), KINDS, ids=IDS)
def test_what_was_trained_is_what_routes(tokenizer, tasks, router, options):
    """The routed model has the validation loss that training ended with."""
    learned = learn(tokenizer, tasks, router, **options)
    model = llama()
    valid = plan(model, tokenizer, tasks, options=OPTIONS).valid
    losses = []
    for i, task in enumerate(tasks):
        mine = [example for example in valid if example.task == i]
        routing = learned.router
        if isinstance(routing, TaskRouter):
            routing = routing.answering(task.name)
        with attach(model, learned.experts, routing) as routed:
            for batch in batches(mine, size=8, pad=1):
                with routed.reading(prompts_of(batch)):
                    losses.append((answer_loss(model, batch, reduction="sum").item(), batch))
    count = sum(int((batch.labels != -100).sum()) for _, batch in losses)
    got = sum(loss for loss, _ in losses) / count
    assert got == pytest.approx(learned.metrics["valid_loss"], abs=2e-4)
    plain = sum(answer_loss(model, b, reduction="sum").item() for _, b in losses) / count
    assert got < plain - 0.1


@pytest.mark.parametrize(("router", "options"), KINDS[1:4], ids=IDS[1:4])
def test_twice_is_the_same_to_the_bit_and_the_model_as_before(tokenizer, tasks, router, options):
    model, before = llama(), llama().state_dict()
    first = train_router(
        model, tokenizer, tasks, router=router, skills=3, options=OPTIONS, **options
    )
    again = train_router(
        model, tokenizer, tasks, router=router, skills=3, options=OPTIONS, **options
    )
    assert first.key == again.key
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for name, expert in first.experts.items():
        assert expert.fingerprint == again.experts[name].fingerprint
    other = learn(tokenizer, tasks, router, router_lr=0.01, **options)
    assert other.key != first.key


@pytest.mark.parametrize("router", ["mhr", "mope"])
def test_it_goes_on_after_an_interruption(tokenizer, tasks, router, tmp_path):
    whole = learn(tokenizer, tasks, router)
    path = tmp_path / "run.safetensors"

    def stop(progress):
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(tokenizer, tasks, router, checkpoint=path, progress=stop)
    assert path.exists()
    steps = []
    rest = learn(tokenizer, tasks, router, checkpoint=path, progress=lambda p: steps.append(p.step))
    assert steps[0] > 6
    for name, expert in whole.experts.items():
        assert rest.experts[name].fingerprint == expert.fingerprint
    for field in dataclasses.fields(whole.router):
        one, other = getattr(whole.router, field.name), getattr(rest.router, field.name)
        if field.name in ("logits", "rows", "bias"):
            assert all(torch.equal(one[m], other[m]) for m in one)


def test_it_is_kept_in_a_library_and_answers_by_task(tokenizer, tasks, tmp_path):
    learned = learn(tokenizer, tasks, "mhr", heads=2)
    library = Library.open(tmp_path / "lib", create=True)
    for name, expert in learned.experts.items():
        library.add(expert, name)
    save_router(library, "mine", learned.router)
    router, held = load_router(library, "mine")
    assert isinstance(router, TaskRouter)
    assert router.tasks == ("first", "last")
    model, ids = llama(), torch.arange(2, 14)[None]
    found = []
    for task in ("first", "last", None):
        for experts, one in ((held, router), (learned.experts, learned.router)):
            with attach(model, experts, one.answering(task)) as routed, torch.no_grad():
                found.append(routed(ids).logits)
        assert torch.equal(*found[-2:])
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    with pytest.raises(NotFoundError, match="learned no task 'frist'") as error:
        router.answering("frist")
    assert "--task first" in str(error.value.hint)


def test_a_new_task_by_its_logits_by_all_or_by_the_mean(tokenizer, tasks):
    old, new = tasks[:1], tasks[1]
    learned = learn(tokenizer, old, "mhr", heads=2)
    model = llama()
    given = (model, tokenizer, new, learned.router, learned.experts)
    z = adapt(*given, mode="z", options=OPTIONS)
    assert isinstance(z, Learned)
    assert isinstance(z.router, TaskRouter)
    assert z.router.tasks == ("last",)
    assert {n: e.fingerprint for n, e in z.experts.items()} == {
        n: e.fingerprint for n, e in learned.experts.items()
    }
    full = adapt(*given, mode="full", name="full", options=OPTIONS)
    assert isinstance(full, Learned)
    assert full.metrics["valid_loss"] < z.metrics["valid_loss"]
    mu = adapt(*given, mode="mu", options=OPTIONS)
    assert not isinstance(mu, Learned)
    assert mu.card["metrics"]["valid_loss"] < z.metrics["valid_loss"]
    # what MHR-mu begins with: factors averaged, each alike
    mean = average(learned.router, learned.experts)
    for module, delta in mean.deltas.items():
        parts = [expert.deltas[module] for expert in learned.experts.values()]
        a = sum(part.a for part in parts) / 3
        b = sum(part.b * part.scale for part in parts) / 3
        torch.testing.assert_close(delta.dense(), b @ a)
    with pytest.raises(UsageError, match="mode is z, full or mu"):
        adapt(*given, mode="nu", options=OPTIONS)


def test_a_router_on_experts_that_there_are_moves_nothing_else(tokenizer, tasks):
    learned = learn(tokenizer, tasks, "mope")
    again = train_router(
        llama(),
        tokenizer,
        tasks,
        router="mope",
        experts=learned.experts,
        only_router=True,
        options=OPTIONS,
    )
    assert dict(again.experts) == dict(learned.experts)
    assert again.router.experts == tuple(learned.experts)


def test_what_cannot_be_trained(tokenizer, tasks):
    for options, said in (
        ({"router": "arrow"}, "not one that is trained"),
        ({"router": "mhr", "scope": "sequence"}, "has no scope"),
        ({"router": "poly", "heads": 2}, "has no heads"),
        ({"router": "mope", "scope": "prompt"}, "by token or by sequence"),
        ({"router": "mope", "top_k": 0}, "top_k is 1 or more"),
        ({"router": "mope", "balance": -1.0}, "balance is 0 or more"),
        ({"router": "mope", "only_router": True}, "on experts that there are"),
    ):
        with pytest.raises(UsageError, match=said):
            train_router(llama(), tokenizer, tasks, **options)
