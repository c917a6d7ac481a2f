"""TrainOptions: everything that can be chosen about a training run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch

from adaptlib.errors import UsageError
from adaptlib.training.modules import ALL_LINEAR

Kind = Literal["full", "lora", "sparse"]
Schedule = Literal["constant", "cosine", "linear"]
SCHEDULES = ("constant", "cosine", "linear")

_POSITIVE = ("epochs", "lr", "batch_size", "accumulate", "max_length", "rows", "rank", "alpha")
_POSITIVE += ("reselect_every", "clip", "patience")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Everything that can be chosen about a training run; the defaults suit a small model.

    Length of the run: `epochs`, and `patience`, the epochs without a lower loss on the `valid`
    split after which it ends early. With `best_epoch` the weights of the epoch with the lowest
    such loss are returned, else the last.

    Steps: `lr` is the peak; it rises over the first `warmup` of the steps and falls to zero along
    `schedule`. A step is `accumulate` batches of `batch_size` rows; gradients are clipped to norm
    `clip`. `bf16` is autocast to bfloat16 (None: where it pays, see `plan.bf16_pays`).

    Data: `max_length` in tokens, prompt and answer together (None: 512, or the model's context
    where that is less), `drop_long` leaves rows out whose answer does not fit, `rows` is the most
    training rows taken of one task, the first ones.

    What is trained: `target` is `all-linear`, or names, ends of names and `re:` patterns (see
    `modules.target_modules`). LoRA: `rank`, `alpha`, `rslora` (scale alpha/√rank,
    arXiv:2312.03732, instead of alpha/rank), `dropout`. Sparse: `keep_ratio` of each module's
    entries, in blocks of `block` (1 or 16), chosen by `selection` (see `masks.SELECTIONS`), every
    `reselect_every` steps of the first epoch where the selection is one that is repeated.

    `init_seed` decides how A and random masks start, `seed` the order of the rows and dropout.
    Experts that are to be compared by their factors want one `init_seed`. `dtype` is that of the
    stored values.
    """

    epochs: int = 5
    patience: int | None = None
    best_epoch: bool = True
    lr: float = 3e-3
    schedule: Schedule = "linear"
    warmup: float = 0.06
    batch_size: int = 16
    accumulate: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    bf16: bool | None = None
    max_length: int | None = None
    drop_long: bool = False
    rows: int | None = None
    target: str | tuple[str, ...] = ALL_LINEAR
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    keep_ratio: float = 0.1
    block: int = 1
    selection: str = "sensitivity"
    reselect_every: int = 100
    seed: int = 0
    init_seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} wants more than 0; got {value}")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} wants a share in [0, 1); got {getattr(self, name)}")
        if not 0 < self.keep_ratio <= 1:
            raise UsageError(f"keep_ratio wants a share in (0, 1]; got {self.keep_ratio}")
        if not self.weight_decay >= 0:
            raise UsageError(f"weight_decay wants 0 or more; got {self.weight_decay}")
        if self.block not in (1, 16):
            raise UsageError(f"block wants 1 (entries) or 16 (16x16 blocks); got {self.block}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule wants {', '.join(SCHEDULES)}; got {self.schedule!r}")
        if not self.dtype.is_floating_point:
            raise UsageError(f"dtype wants a floating point type; got {self.dtype}")

    def recipe(self) -> dict[str, Any]:
        """All of them as JSON."""
        recipe = asdict(self)
        recipe["dtype"] = str(self.dtype).removeprefix("torch.")
        if isinstance(self.target, tuple):
            recipe["target"] = list(self.target)
        return recipe


DEFAULTS = TrainOptions()
