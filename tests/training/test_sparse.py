"""The sparse recipe against a slow implementation that follows the paper word by word."""

import dataclasses
import math

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from adaptlib.errors import UsageError
from adaptlib.experts.sparse import SparseDelta
from adaptlib.training import TrainOptions, train
from adaptlib.training.encode import batches, encode_task
from adaptlib.training.modules import frozen, shape_of, target_modules
from adaptlib.training.run import schedule
from adaptlib.training.sparse import SparseTrainee

OPTIONS = TrainOptions(
    epochs=2,
    batch_size=4,
    lr=1e-2,
    keep_ratio=0.1,
    reselect_every=2,
    best_epoch=False,
    dtype=torch.float32,
    target=("q_proj", "down_proj", "c_attn"),
)


def slow_masks(score: torch.Tensor, ratio: float, block: int) -> torch.Tensor:
    """Sort all blocks by the sum of their scores, highest first; ones in the first share."""
    mask = torch.zeros_like(score)
    sums = {}
    for i in range(0, score.shape[0], block):
        for j in range(0, score.shape[1], block):
            sums[i, j] = score[i : i + block, j : j + block].sum().item()
    ranked = sorted(sums, key=lambda place: -sums[place])
    for i, j in ranked[: max(1, round(ratio * len(ranked)))]:
        mask[i : i + block, j : j + block] = 1
    return mask


@pytest.mark.parametrize("block", [1, 16])
def test_training_equals_the_paper_done_slowly(model, tokenizer, task, block) -> None:
    options = dataclasses.replace(OPTIONS, block=block)
    if block == 16:
        # c_attn and the like have few blocks; keep enough to have a choice
        options = dataclasses.replace(options, keep_ratio=0.3)
    known = {name.rpartition(".")[2] for name in target_modules(model, "all-linear")}
    target = tuple(suffix for suffix in options.target if suffix in known)
    options = dataclasses.replace(options, target=target)
    expert = train(model, tokenizer, task, kind="sparse", options=options)

    modules = target_modules(model, target)
    hat = {name: torch.zeros(shape_of(m)).requires_grad_() for name, m in modules.items()}
    mask = {name: torch.ones(shape_of(m)) for name, m in modules.items()}
    originals = {name: m.weight.detach().clone() for name, m in modules.items()}

    def loss(batch, updates) -> torch.Tensor:
        weights = {}
        for name, update in updates.items():
            update = update.T if isinstance(modules[name], Conv1D) else update
            weights[f"{name}.weight"] = originals[name] + update
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = torch.func.functional_call(model, weights, kwargs=inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())

    optimizer = torch.optim.AdamW(hat.values(), weight_decay=0.0)
    examples = list(encode_task(tokenizer, task, "train", max_length=256).examples)
    per_epoch = math.ceil(len(examples) / options.batch_size)
    step, choices = 0, 0
    for epoch in range(options.epochs):
        for batch in batches(examples, size=options.batch_size, pad=1, seed=epoch):
            done = step / (per_epoch * options.epochs)
            optimizer.param_groups[0]["lr"] = options.lr * schedule(done, options)
            optimizer.zero_grad()
            loss(batch, {name: hat[name] * mask[name] for name in hat}).backward()
            torch.nn.utils.clip_grad_norm_(hat.values(), options.clip)
            optimizer.step()
            step += 1
            if epoch == 0 and step % 2 == 0:
                optimizer.zero_grad()
                loss(batch, hat).backward()  # M = 1
                for name, weight in hat.items():
                    score = weight.detach() * weight.grad
                    mask[name] = slow_masks(score, options.keep_ratio, block)
                choices += 1
    assert choices == 5

    for name, delta in expert.deltas.items():
        assert isinstance(delta, SparseDelta)
        kept = torch.zeros(delta.shape)
        rows, columns, _ = delta.entries()
        kept[rows, columns] = 1
        assert torch.equal(kept, mask[name]), name
        wanted = (hat[name] * mask[name]).detach()
        torch.testing.assert_close(delta.dense(), wanted, rtol=0, atol=1e-5)


def trainee_of(model, name: str, **options) -> SparseTrainee:
    wanted = TrainOptions(keep_ratio=0.25, **options)
    return SparseTrainee(target_modules(model, (name,)), wanted)


def test_the_score_is_signed(small) -> None:
    """Entries whose product is most negative are the last to be kept, not the first."""
    name = "model.layers.0.self_attn.q_proj"
    trainee = trainee_of(small, name)
    gradient = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    trainee.weight[name].data.copy_(torch.linspace(-1, 1, 1024).view(32, 32))
    trainee.select(lambda: (trainee.weight[name] * gradient).sum())
    score = trainee.weight[name].detach() * gradient
    mask = trainee.mask[name]
    assert mask is not None
    assert mask.sum() == 256
    assert score[mask].min() > score[~mask].max()


def test_values_survive_a_choice_that_leaves_them_out(small) -> None:
    name = "model.layers.0.self_attn.q_proj"
    trainee = trainee_of(small, name)
    trainee.weight[name].data.copy_(torch.linspace(-1, 1, 1024).view(32, 32))
    before = trainee.weight[name].detach().clone()
    trainee.select(lambda: trainee.weight[name].sum())
    assert torch.equal(trainee.weight[name], before)
    optimizer = torch.optim.AdamW(trainee.parameters())
    trainee.settle(optimizer, 0)
    delta = trainee.deltas(torch.float32)[name]
    assert delta.params == 256
    assert torch.equal(delta.dense()[delta.dense() != 0], before[before >= before.quantile(0.75)])


@pytest.mark.parametrize("selection", ["sensitivity", "random", "shira-snip"])
@pytest.mark.parametrize("block", [1, 16])
def test_after_the_freeze_there_is_nothing_dense(model, selection, block) -> None:
    """Values, gradients and moments have as many entries as the expert keeps, and no tensor of the
    size of a module lives on."""
    name = next(iter(target_modules(model, "all-linear")))
    trainee = trainee_of(model, name, selection=selection, block=block)
    x = torch.randn(3, shape_of(target_modules(model, (name,))[name])[1])
    module = trainee.modules[name]

    def loss() -> torch.Tensor:
        return module(x).square().sum()

    with frozen(model), trainee.installed():
        trainee.begin([loss])
        if selection == "sensitivity":
            trainee.select(loss)
        optimizer = torch.optim.AdamW(trainee.parameters())
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        optimizer = trainee.settle(optimizer, 0)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        (values,) = trainee.parameters()
        kept = round(0.25 * module.weight.numel() / block**2) * block**2
        assert values.numel() == values.grad.numel() == kept
        moments = optimizer.state[values]
        assert moments["exp_avg"].numel() == moments["exp_avg_sq"].numel() == kept
        assert not trainee.weight
        assert set(trainee.mask.values()) == {None}


def test_a_short_epoch_still_chooses_a_mask(small, tokenizer, task) -> None:
    options = dataclasses.replace(
        OPTIONS, batch_size=64, epochs=1, reselect_every=100, target=("q_proj",)
    )
    expert = train(small, tokenizer, task, kind="sparse", options=options)  # one step in all
    assert {delta.params for delta in expert.deltas.values()} == {round(0.1 * 32 * 32)}


def test_the_mask_is_fixed_after_the_first_epoch(small, tokenizer, task, monkeypatch) -> None:
    calls = []
    real = SparseTrainee.select

    def counted(self, loss) -> None:
        calls.append(len(steps))
        real(self, loss)

    monkeypatch.setattr(SparseTrainee, "select", counted)
    steps: list[int] = []
    options = dataclasses.replace(OPTIONS, epochs=3, reselect_every=100)
    train(
        small,
        tokenizer,
        task,
        kind="sparse",
        options=dataclasses.replace(options, target=("q_proj",)),
        progress=lambda report: steps.append(report.step),
    )
    assert calls == [1, 3, 5, 7, 9]  # ten steps an epoch: every 10 // 4 = 2, before progress


def test_blocks_that_do_not_fit_are_refused(small) -> None:
    small.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj is \(40, 32\)"):
        trainee_of(small, "up_proj", block=16)
    with pytest.raises(UsageError, match="block wants 1"):
        TrainOptions(block=8)
    with pytest.raises(UsageError, match="no selection 'best'; there are: gradient, magnitude"):
        trainee_of(small, "up_proj", selection="best")
