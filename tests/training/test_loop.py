"""Training equals the same steps done by hand, is repeatable, and leaves the model alone."""

import dataclasses
import math

import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptlib.errors import AdaptlibError, BaseMismatchError, UsageError
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.training import TrainOptions, plan, train
from adaptlib.training.encode import IGNORED, batches, encode_task
from adaptlib.training.lora import LoRATrainee
from adaptlib.training.modules import applied, target_modules
from adaptlib.training.plan import bf16_pays
from adaptlib.training.run import schedule
from adaptlib.training.tasks import Row, Task

QUICK = TrainOptions(epochs=2, batch_size=8, rank=2, lr=1e-2, dtype=torch.float32)
KINDS = ["full", "lora", "sparse"]


def plain_loss(model: PreTrainedModel, tokenizer, task: Task, split: str) -> float:
    """Nats per answer token, one row at a time, with the model's own loss."""
    total, tokens = 0.0, 0
    for example in encode_task(tokenizer, task, split, max_length=256).examples:
        ids, labels = torch.tensor([example.ids]), torch.tensor([example.targets])
        n = int((labels != IGNORED).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * n
        tokens += n
    return total / tokens


def state(model: PreTrainedModel) -> dict[str, object]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
        "types": [type(m) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same_state(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after["weights"][n]) for n, v in before["weights"].items())
    assert torch.equal(before["rng"], after["rng"])
    for key in ("flags", "grads", "modes", "hooks", "types", "attributes"):
        assert before[key] == after[key], key


def assert_same_deltas(one: Expert, two: Expert) -> None:
    assert list(one.deltas) == list(two.deltas)
    for name, delta in one.deltas.items():
        assert torch.equal(delta.dense(), two.deltas[name].dense()), name


def test_lora_training_is_the_same_steps_by_hand(model, tokenizer, task) -> None:
    options = dataclasses.replace(QUICK, best_epoch=False, epochs=1, clip=0.5)
    expert = train(model, tokenizer, task, options=options)

    modules = target_modules(model, "all-linear")
    start = LoRATrainee(modules, options)
    a = {name: value.detach().clone().requires_grad_() for name, value in start.a.items()}
    b = {name: torch.zeros_like(value).requires_grad_() for name, value in start.b.items()}
    every = [*a.values(), *b.values()]
    optimizer = torch.optim.AdamW(every, weight_decay=0.0)
    originals = {name: module.weight.detach().clone() for name, module in modules.items()}
    examples = list(encode_task(tokenizer, task, "train", max_length=256).examples)
    order = list(batches(examples, size=8, pad=1, seed=0))
    for step, batch in enumerate(order):
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule(step / len(order), options)
        weights = {}
        for name, module in modules.items():
            update = 8.0 * (b[name] @ a[name])  # alpha / rank
            update = update.T if isinstance(module, Conv1D) else update
            weights[f"{name}.weight"] = originals[name] + update
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = torch.func.functional_call(model, weights, kwargs=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, 0.5)
        optimizer.step()

    for name, delta in expert.deltas.items():
        assert isinstance(delta, LoRADelta)
        torch.testing.assert_close(delta.a, a[name].detach(), rtol=0, atol=2e-5)
        torch.testing.assert_close(delta.b, b[name].detach(), rtol=0, atol=2e-5)
        assert delta.scale == 8.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(model, tokenizer, task, kind) -> None:
    next(model.parameters()).requires_grad_(False)
    model.get_submodule(next(iter(target_modules(model, "all-linear")))).train()
    before = state(model)
    train(model, tokenizer, task, kind=kind, options=QUICK)
    assert_same_state(before, state(model))


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_leaves_the_model_as_it_was(small, tokenizer, task, kind) -> None:
    before = state(small)

    def stop(report) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small, tokenizer, task, kind=kind, options=QUICK, progress=stop)
    assert_same_state(before, state(small))


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_expert(small, tokenizer, task, kind) -> None:
    options = dataclasses.replace(QUICK, dropout=0.1)
    first = train(small, tokenizer, task, kind=kind, options=options)
    torch.manual_seed(99)  # what was drawn before does not matter
    assert_same_deltas(first, train(small, tokenizer, task, kind=kind, options=options))
    other = dataclasses.replace(options, seed=1)
    name = next(iter(first.deltas))
    third = train(small, tokenizer, task, kind=kind, options=other)
    assert not torch.equal(first.deltas[name].dense(), third.deltas[name].dense())


@pytest.mark.parametrize(("kind", "block"), [("lora", 1), ("sparse", 1), ("sparse", 16)])
def test_the_expert_lowers_the_loss_when_added_by_hand(model, tokenizer, task, kind, block) -> None:
    options = dataclasses.replace(QUICK, epochs=4, block=block, lr=2e-2)
    expert = train(model, tokenizer, task, kind=kind, options=options)
    before = plain_loss(model, tokenizer, task, "valid")
    with applied(model, expert):
        after = plain_loss(model, tokenizer, task, "valid")
    assert after < before - 0.3
    assert after == pytest.approx(expert.card["metrics"]["valid_loss"], abs=2e-4)
    assert plain_loss(model, tokenizer, task, "valid") == before


def test_experts_of_one_seed_start_from_the_same_a(small) -> None:
    modules = target_modules(small, "all-linear")
    options = TrainOptions(rank=2, init_seed=4)
    some = {name: module for name, module in modules.items() if "q_proj" in name}
    every = LoRATrainee(modules, options)
    few = LoRATrainee(some, dataclasses.replace(options, seed=9))
    for name in some:
        assert torch.equal(every.a[name], few.a[name])
        assert every.a[name].abs().max() <= 1 / math.sqrt(32)
        assert not every.b[name].any()


def test_targets_are_chosen_by_the_end_of_their_name(small, tokenizer, task) -> None:
    options = dataclasses.replace(QUICK, target=("q_proj", "layers.1.mlp.up_proj"), epochs=1)
    expert = train(small, tokenizer, task, options=options)
    assert sorted(expert.deltas) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert "lm_head" not in target_modules(small, "all-linear")
    assert len(target_modules(small, "all-linear")) == 14
    with pytest.raises(UsageError, match="'query' matches no linear module; there are: down_proj"):
        target_modules(small, ("q_proj", "query"))


def test_the_card_says_what_was_done(small, tokenizer, task) -> None:
    steps = []
    expert = train(
        small,
        tokenizer,
        task,
        kind="sparse",
        options=QUICK,
        base="me/tiny",
        progress=lambda report: steps.append((report.step, report.steps)),
    )
    assert expert.base == expert.card["base"]["id"] == "me/tiny"
    assert expert.card["task"] == "first_word"
    assert expert.card["description"] == "Say the first word."
    assert (expert.card["category"], expert.card["licence"]) == ("words", "CC0")
    recipe = expert.card["training"]
    assert (recipe["steps"], recipe["examples"], recipe["seed"]) == (10, 40, 0)
    assert recipe["best_epoch"] == 2  # the first epoch of a sparse expert is no candidate
    assert "keep_ratio" in recipe
    assert "rank" not in recipe
    assert steps == [(i, 10) for i in range(1, 11)]


def test_the_best_epoch_is_kept(small, tokenizer, task) -> None:
    wild = dataclasses.replace(QUICK, lr=0.5, epochs=4)
    best = train(small, tokenizer, task, options=wild)
    last = train(small, tokenizer, task, options=dataclasses.replace(wild, best_epoch=False))
    assert best.card["metrics"]["valid_loss"] <= last.card["metrics"]["valid_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_at_its_step(small, tokenizer, task, kind) -> None:
    small.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(
        AdaptlibError,
        match=r"first_word diverged: the loss is nan at step 1 of 10, training rows \d+, ",
    ):
        train(small, tokenizer, task, kind=kind, options=QUICK)


def test_a_huge_learning_rate_is_an_error_and_no_expert(small, tokenizer, task) -> None:
    options = dataclasses.replace(QUICK, lr=1e30, epochs=1)
    with pytest.raises(AdaptlibError, match="diverged"):
        train(small, tokenizer, task, options=options)


def test_cut_inputs_are_reported(small, tokenizer) -> None:
    task = Task("long", "Do.", {"train": (Row("w " * 90, "yes"),) * 4})
    options = dataclasses.replace(QUICK, max_length=60, epochs=1)
    with pytest.warns(UserWarning, match="4 of 4 inputs were cut to fit 60 tokens"):
        expert = train(small, tokenizer, task, options=options)
    assert expert.card["training"]["cut_inputs"] == 4
    assert "valid_loss" not in expert.card["metrics"]


def test_options_that_make_no_sense_are_refused(small, tokenizer, task) -> None:
    with pytest.raises(UsageError, match="epochs wants more than 0; got 0"):
        TrainOptions(epochs=0)
    with pytest.raises(UsageError, match="dropout"):
        TrainOptions(dropout=1.0)
    with pytest.raises(UsageError, match="keep_ratio"):
        train(
            small,
            tokenizer,
            task,
            kind="sparse",
            options=dataclasses.replace(QUICK, keep_ratio=0.0),
        )
    with pytest.raises(UsageError, match="kind wants"):
        plan(small, tokenizer, task, kind="ia3", options=QUICK)


def test_an_expert_of_another_model_is_not_applied(small, tokenizer, task) -> None:
    before = state(small)
    delta = LoRADelta(torch.ones(1, 8), torch.ones(8, 1))
    good = LoRADelta(torch.ones(1, 32), torch.ones(32, 1))
    q_proj = "model.layers.0.self_attn.q_proj"
    for name in (q_proj, "nowhere"):
        expert = Expert("x", {name: delta, "model.layers.1.self_attn.q_proj": good})
        with pytest.raises(BaseMismatchError, match=name), applied(small, expert):
            pass
    assert_same_state(before, state(small))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_learns_as_well(small, tokenizer, task, kind) -> None:
    options = dataclasses.replace(QUICK, epochs=4, lr=2e-2, bf16=True)
    expert = train(small, tokenizer, task, kind=kind, options=options)
    single = dataclasses.replace(options, bf16=False)
    wanted = train(small, tokenizer, task, kind=kind, options=single).card["metrics"]["valid_loss"]
    assert expert.card["metrics"]["valid_loss"] == pytest.approx(wanted, rel=0.05)
    assert expert.card["training"]["bf16"] is True


def test_bfloat16_is_for_wide_models_on_machines_that_have_it(small, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert not bf16_pays(small)
    monkeypatch.setattr(small.config, "hidden_size", 512)
    assert bf16_pays(small)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not bf16_pays(small)


def test_rows_are_the_first_of_each_task(small, tokenizer, task) -> None:
    other = Task("other", "Do.", {"train": tuple(Row(str(i), "x") for i in range(9))})
    both = plan(small, tokenizer, (task, other), options=dataclasses.replace(QUICK, rows=5))
    assert len(both.train) == 10
    assert both.train[:5] == plan(small, tokenizer, task, options=QUICK).train[:5]
    assert len(both.valid) == 12


def test_a_joint_expert_learns_all_of_its_tasks(small, tokenizer, task) -> None:
    rows = tuple(Row(f"{a} {b}", b) for a in ("red", "blue", "pink") for b in ("teal", "gray"))
    last = Task("last_word", "Say the last word.", {"train": rows * 4, "valid": rows})
    options = dataclasses.replace(QUICK, epochs=4, lr=2e-2)
    expert = train(small, tokenizer, (task, last), name="words", options=options)
    card = expert.card
    assert (card["task"], card["tasks"]) == ("words", ["first_word", "last_word"])
    assert [entry["digest"] for entry in card["training"]["data"]] == [task.digest, last.digest]
    before = [plain_loss(small, tokenizer, one, "valid") for one in (task, last)]
    with applied(small, expert):
        after = [plain_loss(small, tokenizer, one, "valid") for one in (task, last)]
    assert after[0] < before[0] - 0.3
    assert after[1] < before[1] - 0.3


def test_accumulated_steps_are_those_of_one_large_batch(small, tokenizer, task) -> None:
    """The mean is over all answers of a step, not a mean of the means of its batches."""
    rows = task.rows["train"][:16]
    uneven = Task(
        "t", "Do.", {"train": tuple(Row(r.input, r.output * (i + 1)) for i, r in enumerate(rows))}
    )
    one = dataclasses.replace(QUICK, epochs=2, batch_size=16, lr=2e-2)
    two = dataclasses.replace(one, batch_size=4, accumulate=4)
    assert_close_deltas(
        train(small, tokenizer, uneven, options=one), train(small, tokenizer, uneven, options=two)
    )


def assert_close_deltas(one: Expert, two: Expert) -> None:
    for name, delta in one.deltas.items():
        torch.testing.assert_close(delta.dense(), two.deltas[name].dense(), rtol=0, atol=1e-4)


def test_training_ends_early_where_it_does_not_get_better(small, tokenizer, task) -> None:
    wild = dataclasses.replace(QUICK, lr=0.3, epochs=12, patience=2, schedule="constant")
    seen = []
    expert = train(small, tokenizer, task, options=wild, progress=seen.append)
    losses = [report.valid_loss for report in seen if report.valid_loss is not None]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 12
    assert expert.card["training"]["best_epoch"] == best + 1
    assert expert.card["training"]["steps"] == 5 * len(losses)
    assert expert.card["metrics"]["valid_loss"] == round(min(losses), 4)


def test_schedules_rise_and_fall() -> None:
    options = {s: TrainOptions(warmup=0.1, schedule=s) for s in ("constant", "cosine", "linear")}
    for name, some in options.items():
        assert schedule(0.0, some) == 0.0, name
        assert schedule(0.05, some) == pytest.approx(0.5)
        assert schedule(0.1, some) == pytest.approx(1.0)
    assert schedule(1.0, options["constant"]) == 1.0
    assert schedule(1.0, options["linear"]) == schedule(1.0, options["cosine"]) == 0.0
    assert schedule(0.55, options["linear"]) == pytest.approx(0.5)
    assert schedule(0.55, options["cosine"]) == pytest.approx(0.5)
    assert schedule(0.325, options["cosine"]) == pytest.approx(0.5 + 0.5**1.5)


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ("re:.*layers\\.1\\..*", 7),
        ("re:.*_proj", 14),
        ("model.layers.0.mlp.up_proj", 1),
        ("mlp.up_proj", 2),
    ],
)
def test_targets_by_pattern(small, entry, count) -> None:
    assert len(target_modules(small, (entry,))) == count


@pytest.mark.parametrize("entry", ["re:up_proj", "re:(", "proj", "", "embed_tokens", "lm_head"])
def test_targets_that_match_nothing_say_what_there_is(small, entry) -> None:
    with pytest.raises(UsageError, match=r"no linear module; there are: down_proj|no regular"):
        target_modules(small, (entry,))


def test_what_does_not_fit_is_refused_before_the_first_step(small, tokenizer, task) -> None:
    seen = []

    def attempt(task_=task, kind="lora", **options) -> None:
        wanted = dataclasses.replace(QUICK, **options)
        train(small, tokenizer, task_, kind=kind, options=wanted, progress=seen.append)

    with pytest.raises(UsageError, match=r"rank 17 is above what model\.layers\.0\.\S+ can have"):
        attempt(rank=17)  # k_proj is 16 x 32
    with pytest.raises(UsageError, match="its context is 256 tokens"):
        attempt(max_length=257)
    with pytest.raises(UsageError, match="no training rows"):
        attempt(Task("t", "Do.", {"test": (Row("a", "b"),)}))
    with pytest.raises(UsageError, match="nothing to train on"):
        attempt(())
    assert not seen


def test_out_of_memory_says_what_to_lower(small, tokenizer, task, monkeypatch) -> None:
    def full(*args, **options):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    before = state(small)
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(AdaptlibError, match="out of memory while training on first_word") as error:
        train(small, tokenizer, task, options=QUICK)
    assert "--batch-size 4 --accumulate 2" in str(error.value.hint)
    assert_same_state(before, state(small))


def test_the_key_names_what_decides_the_expert(small, tokenizer, task) -> None:
    def key(task_=task, kind="lora", model=small, **options) -> str:
        wanted = dataclasses.replace(QUICK, **options)
        return plan(model, tokenizer, task_, kind=kind, options=wanted).key

    rows = {**task.rows, "train": task.rows["train"][::-1]}
    same = Task("another name", task.instruction, task.rows)
    assert key() == key(same)
    assert key(keep_ratio=0.5) == key()  # that is for sparse
    others = [
        key(kind="sparse"),
        key(kind="sparse", keep_ratio=0.5),
        key(lr=0.5),
        key(init_seed=1),
        key(max_length=200),
        key(target=("q_proj",)),
        key(Task("t", "Other.", task.rows)),
        key(Task("t", task.instruction, rows)),
    ]
    small.model.norm.weight.data[0] += 1e-3
    others.append(key())
    assert len({key(), *others}) == len(others)  # the last is `key()` now
