"""A run that was stopped anywhere ends as one that was not, to the last bit."""

import dataclasses
import errno
import os

import pytest
import torch

from adaptlib.errors import AdaptlibError, ConflictError, CorruptError
from adaptlib.experts.codec import pack
from adaptlib.experts.expert import Expert
from adaptlib.training import TrainOptions, train
from adaptlib.training.checkpoint import read_checkpoint, write_checkpoint

# dropout, accumulation, several choices of masks, an epoch that is not the best
OPTIONS = TrainOptions(
    epochs=3, batch_size=4, accumulate=2, lr=2e-2, rank=2, dropout=0.1, reselect_every=2, seed=3
)
RUNS = [
    ("lora", OPTIONS),
    ("full", OPTIONS),
    ("sparse", OPTIONS),
    ("sparse", dataclasses.replace(OPTIONS, block=16, selection="shira-snip", schedule="cosine")),
]


def as_bytes(expert: Expert) -> tuple[bytes, bytes]:
    packed = pack(expert)
    return b"".join(packed.blob()), packed.manifest("").encode()


class Stop(BaseException):
    """Something that does not let the loop save: a kill."""


@pytest.mark.parametrize(("kind", "options"), RUNS, ids=["lora", "full", "sparse", "block"])
@pytest.mark.parametrize("stopped", [KeyboardInterrupt, Stop])
def test_stopped_runs_end_as_undisturbed_ones(
    tmp_path, small, tokenizer, task, kind, options, stopped
) -> None:
    whole = train(small, tokenizer, task, kind=kind, options=options)
    steps = whole.card["training"]["steps"]
    assert steps == 15
    file = tmp_path / "checkpoint"
    before = {name: value.clone() for name, value in small.state_dict().items()}
    seen = []
    for _ in range(steps + 1):

        def report(progress) -> None:
            seen.append(progress.step)
            if len(seen) in (1, 4, 6, 10, 11):
                raise stopped

        try:
            # A kill leaves the last checkpoint there was: here that of the step before.
            every = 0.0 if stopped is Stop else 1e9
            again = train(
                small, tokenizer, task, kind=kind, options=options, progress=report,
                checkpoint=file, checkpoint_every=every,
            )  # fmt: skip
            break
        except stopped:
            torch.randn(7)  # chance outside has no part in it
            assert all(torch.equal(v, before[n]) for n, v in small.state_dict().items())
    assert len(seen) == steps  # nothing was done twice
    assert as_bytes(again) == as_bytes(whole)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, small, tokenizer, task) -> None:
    file = tmp_path / "checkpoint"
    options = dataclasses.replace(OPTIONS, epochs=1)
    train(small, tokenizer, task, options=options, checkpoint=file, checkpoint_every=0.0)
    other = dataclasses.replace(options, lr=1e-3)
    with pytest.raises(ConflictError, match="of another run"):
        train(small, tokenizer, task, options=other, checkpoint=file)
    weights = small.model.layers[0].mlp.up_proj.weight.data
    weights += 1  # the same shapes, other weights
    with pytest.raises(ConflictError, match="of another run"):
        train(small, tokenizer, task, options=options, checkpoint=file)


def test_a_finished_checkpoint_gives_the_expert_again(tmp_path, small, tokenizer, task) -> None:
    file = tmp_path / "checkpoint"
    options = dataclasses.replace(OPTIONS, epochs=1)
    first = train(small, tokenizer, task, options=options, checkpoint=file, checkpoint_every=0.0)
    seen = []
    again = train(small, tokenizer, task, options=options, checkpoint=file, progress=seen.append)
    assert not seen
    assert as_bytes(again) == as_bytes(first)


@pytest.mark.parametrize("content", [b"", b"not one", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_broken_file_is_no_checkpoint(tmp_path, content) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(content)
    with pytest.raises(CorruptError, match="no checkpoint"):
        read_checkpoint(file)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch) -> None:
    file = tmp_path / "a" / "checkpoint"
    write_checkpoint(file, {"x": torch.ones(2)}, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdaptlibError, match="the disk is full"):
        write_checkpoint(file, {"x": torch.zeros(2)}, {"step": 2})
    monkeypatch.undo()
    kept = read_checkpoint(file)
    assert kept is not None
    assert kept[0]["x"].tolist() == [1, 1]
    assert kept[1] == {"step": 1}
    assert [entry.name for entry in file.parent.iterdir()] == ["checkpoint"]


def test_checkpoints_hold_any_text(tmp_path) -> None:
    write_checkpoint(tmp_path / "c", {}, {"name": "ü\u2028", "loss": 0.1})
    assert read_checkpoint(tmp_path / "c") == ({}, {"name": "ü\u2028", "loss": 0.1})
