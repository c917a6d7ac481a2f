"""The options that `train` and `train-library` share, written once.

A flag that is not given is None, and TrainOptions decides; what `--help` shows as its default is
held to that by a test.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import out
from .options import words
from .selection import one_base
from .suggest import check_choice

if TYPE_CHECKING:
    from adaptlib.experts import Library
    from adaptlib.training import TrainOptions

Kind = Annotated[
    str, typer.Option(help="lora, sparse or full (all weights of the linear modules).")
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="ID|DIR",
        help="The base model; else that of the library's experts. adaptlib/demo-base is bundled.",
    ),
]
InputColumn = Annotated[str, typer.Option(help="Of the task's rows.")]
OutputColumn = Annotated[str, typer.Option(help="Of the task's rows.")]
ValidShare = Annotated[
    float, typer.Option(help="Share of the training rows to validate on, if none are marked.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")
]
NoEval = Annotated[
    bool, typer.Option("--no-eval", help="Do not score the expert on the rows of split test.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Move a name that is taken.")]
CheckpointEvery = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="How often a run is kept, to go on from after a kill."),
]


def _flag(what: str, default: str = "", *names: str) -> Any:
    shown = f"{what}  [default: {default}]" if default else what
    return typer.Option(*names, help=shown, show_default=False)


Epochs = Annotated[int | None, _flag("Times each row is seen.", "5")]
Patience = Annotated[
    int | None, _flag("End after so many epochs without a better loss on split valid.")
]
BestEpoch = Annotated[
    bool | None,
    _flag("Keep the epoch that does best on valid.", "best", "--best-epoch/--last-epoch"),
]
Lr = Annotated[float | None, _flag("The highest learning rate.", "0.003", "--lr")]
Schedule = Annotated[str | None, _flag("linear, cosine or constant.", "linear")]
Warmup = Annotated[float | None, _flag("Share of the steps in which lr rises.", "0.06")]
BatchSize = Annotated[int | None, _flag("Rows side by side.", "16")]
Accumulate = Annotated[int | None, _flag("Batches a step.", "1")]
Clip = Annotated[float | None, _flag("The norm that gradients are clipped to.", "1.0")]
WeightDecay = Annotated[float | None, _flag("AdamW's.", "0.0")]
Bf16 = Annotated[
    bool | None, _flag("Compute in bfloat16; where it pays if not said.", "", "--bf16/--no-bf16")
]
Seed = Annotated[int | None, _flag("Of the order of rows, and dropout.", "0")]
MaxLength = Annotated[
    int | None, _flag("Tokens of a row; longer inputs are cut.", "512 or the context")
]
DropLong = Annotated[
    bool | None, _flag("Leave out rows whose answer does not fit.", "", "--drop-long")
]
Rows = Annotated[int | None, _flag("At most so many training rows a task.")]
Target = Annotated[
    list[str] | None,
    _flag("Modules: q_proj,v_proj or re:REGEX; repeatable.", "all-linear"),
]
Rank = Annotated[int | None, _flag("LoRA's.", "8")]
Alpha = Annotated[float | None, _flag("LoRA's; the update is scaled by alpha/rank.", "16.0")]
RsLora = Annotated[bool | None, _flag("Scale by alpha over the root of the rank.", "", "--rslora")]
Dropout = Annotated[float | None, _flag("Of what enters the LoRA factors.", "0.0")]
KeepRatio = Annotated[float | None, _flag("Share of the weights, sparse.", "0.1")]
Block = Annotated[int | None, _flag("1 (entries) or 16 (16x16 blocks), sparse.", "1")]
Selection = Annotated[str | None, _flag("How sparse entries are chosen.", "sensitivity")]
ReselectEvery = Annotated[
    int | None, _flag("Steps between choices in the first epoch, sparse.", "100")
]
InitSeed = Annotated[
    int | None, _flag("Experts of one init seed can be compared by their factors.", "0")
]
Dtype = Annotated[str | None, _flag("Of what is stored: bfloat16, float16, float32.", "bfloat16")]


def train_options(flags: Mapping[str, Any]) -> "TrainOptions":
    """TrainOptions from a command's own variables, of which others are left alone."""
    from dataclasses import fields

    import torch

    from adaptlib.training import SELECTIONS, TrainOptions
    from adaptlib.training.options import SCHEDULES

    names = [field.name for field in fields(TrainOptions)]
    given = {name: flags[name] for name in names if flags.get(name) is not None}
    if "target" in given:
        given["target"] = _targets(given["target"])
    if "dtype" in given:
        known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        check_choice("--dtype", given["dtype"], [*known])
        given["dtype"] = known[given["dtype"]]
    check_choice("--selection", given.get("selection"), [*SELECTIONS])
    check_choice("--schedule", given.get("schedule"), SCHEDULES)
    return TrainOptions(**given)


def _targets(values: list[str]) -> tuple[str, ...]:
    """`a,b` and repetition are the same; a regular expression may have commas of its own."""
    found: list[str] = []
    for value in values:
        found += [value] if value.startswith("re:") else words([value])
    return tuple(found)


def check_kind(kind: str) -> None:
    """UsageError where there is no such kind of training."""
    from adaptlib.training import KINDS

    check_choice("--kind", kind, [*KINDS])


def unused(kind: str, flags: Mapping[str, Any]) -> list[str]:
    """Sentences on the flags that were given and that this kind of training has no use for."""
    from adaptlib.training import KINDS

    of_one_kind = {name for known in KINDS.values() for name in known.own} - KINDS[kind].own
    return [
        f"--{name.replace('_', '-')} is not used by --kind {kind}"
        for name, value in flags.items()
        if name in of_one_kind and value is not None
    ]


def choose_base(library: "Library", base: str | None) -> tuple[str, str | None]:
    """(id or directory, revision) of the model to train: the one that was said, else the one that
    all experts here are of. UsageError where there is neither."""
    from adaptlib.errors import UsageError

    if base is not None:
        return base, None
    names = list(library.names())
    if not names:
        raise UsageError(
            "the library is empty, so nothing says which base model to train",
            hint="--base MODEL; --base adaptlib/demo-base is the small one that is bundled",
        )
    return one_base(library, names)


def load_base(base: str, revision: str | None) -> tuple[Any, Any]:
    """(model, tokenizer), with torch's threads set for it; an error tells to say --base."""
    import torch

    from adaptlib.errors import AdaptlibError
    from adaptlib.experts import base as bases
    from adaptlib.training.space import threads_for

    try:
        model, tokenizer = bases.load(base, revision=revision)
        torch.set_num_threads(threads_for(model))
        return model, tokenizer
    except AdaptlibError as error:
        if error.hint and "--model" in error.hint:
            error.hint = error.hint.replace("--model", "--base")
        raise


def say(notes: list[str], *, json: bool) -> None:
    """Notes for the reader; --json has them in its document."""
    if not json:
        for text in notes:
            out.note(f"Note: {text}")
