"""Selections against their formulas, and the same number of places for each."""

import pytest
import torch

from adaptlib.training import SELECTIONS, TrainOptions, plan, train
from adaptlib.training.masks import Candidates, kept, top
from adaptlib.training.run import mean_loss


def candidates(shape=(32, 48), keep=150) -> Candidates:
    generator = torch.Generator().manual_seed(0)
    w, u, g = (torch.randn(shape, generator=generator) for _ in range(3))
    return Candidates(w, u, g, keep, generator)


FORMULAS = {
    "gradient": lambda w, u, g: abs(g),
    "magnitude": lambda w, u, g: abs(u),
    "sensitivity": lambda w, u, g: u * g,
    "shira-gradient": lambda w, u, g: abs(g),
    "shira-snip": lambda w, u, g: abs(w * g),
    "shira-weight": lambda w, u, g: abs(w),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_are_their_formulas(name) -> None:
    of = candidates()
    score = SELECTIONS[name].score(of)
    for i, j in [(0, 0), (3, 7), (31, 47)]:
        w, u, g = (m[i, j].item() for m in (of.weight, of.update, of.gradient))
        assert score[i, j].item() == pytest.approx(FORMULAS[name](w, u, g))


def test_scores_that_need_no_gradient_do_not_look_at_it() -> None:
    for name, selection in SELECTIONS.items():
        of = candidates()
        blind = Candidates(
            of.weight, of.update, torch.zeros_like(of.gradient), of.keep, torch.Generator()
        )
        of = Candidates(of.weight, of.update, of.gradient, of.keep, torch.Generator())
        same = torch.equal(selection.score(of), selection.score(blind))
        assert same != selection.gradient, name


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (32, 32), (8, 200)])
@pytest.mark.parametrize("keep", [1, 60, 500])
def test_struct_is_a_diagonal_and_whole_rows(shape, keep) -> None:
    of = candidates(shape, keep)
    score = SELECTIONS["shira-struct"].score(of)
    mask = top(score, ratio=keep / score.numel(), block=1)
    assert mask.sum() == keep
    longest = torch.arange(max(shape))
    diagonal = mask[longest % shape[0], longest % shape[1]]
    assert diagonal.sum() == min(keep, max(shape))
    whole = (mask.sum(1) == shape[1]).sum().item()
    assert whole >= max(0, keep - max(shape)) // shape[1]


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.34, 1.0])
def test_top_keeps_the_share(block, ratio) -> None:
    score = candidates().update
    mask = top(score, ratio=ratio, block=block)
    places = score.numel() // block**2
    assert mask.sum() == kept(places, ratio) == max(1, round(ratio * places))
    assert mask.shape == (32 // block, 48 // block)


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_trains(small, tokenizer, task, name) -> None:
    options = TrainOptions(
        epochs=3, batch_size=8, lr=2e-2, selection=name, keep_ratio=0.2, dtype=torch.float32
    )
    after = train(small, tokenizer, task, kind="sparse", options=options)
    for delta in after.deltas.values():
        assert delta.params == round(0.2 * delta.shape[0] * delta.shape[1])
    assert after.card["training"]["selection"] == name
    valid = plan(small, tokenizer, task).valid
    assert after.card["metrics"]["valid_loss"] < mean_loss(small, valid, size=8, pad=1) - 0.1


def test_random_masks_come_from_the_init_seed(small, tokenizer, task) -> None:
    def places(**options) -> torch.Tensor:
        wanted = TrainOptions(epochs=1, selection="random", target=("q_proj",), **options)
        expert = train(small, tokenizer, task, kind="sparse", options=wanted)
        return expert.deltas["model.layers.0.self_attn.q_proj"].index

    assert torch.equal(places(seed=0), places(seed=1))
    assert not torch.equal(places(init_seed=0), places(init_seed=1))


def test_an_epoch_is_no_candidate_only_while_masks_are_chosen_in_it(small, tokenizer, task) -> None:
    """Masks that are chosen at the start are as good in the first epoch as later."""
    for selection, young in (("sensitivity", True), ("random", False)):
        options = TrainOptions(
            epochs=2, lr=1.0, schedule="constant", selection=selection, target=("q_proj",)
        )
        expert = train(small, tokenizer, task, kind="sparse", options=options)
        losses: list[float] = []
        train(
            small,
            tokenizer,
            task,
            kind="sparse",
            options=options,
            progress=lambda r, seen=losses: seen.append(r.valid_loss) if r.valid_loss else None,
        )
        best = 2 if young else losses.index(min(losses)) + 1
        assert expert.card["training"]["best_epoch"] == best, (selection, losses)
        assert min(losses) == losses[0]  # so that the first would be taken
