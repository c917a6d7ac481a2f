"""adaptlib train: an expert from a task."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from . import out
from . import training_options as flags
from .options import JsonOption, LibraryOption, QuietOption

if TYPE_CHECKING:
    from adaptlib.experts import Library
    from adaptlib.training import Plan, Progress
    from adaptlib.training.jobs import Job, Result

EXAMPLES = (
    "adaptlib train task.jsonl --name poems --instruction 'Write a poem on this.'",
    "adaptlib train task.jsonl --dry-run",
    "adaptlib train task.csv --kind sparse --keep-ratio 0.05 --log run.jsonl --plot run.svg",
)


def train(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="A .jsonl, .json, .csv, .tsv or .txt file, hf://datasets/org/name, or - (JSONL).",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Its name, or name:tag; else the task's.")
    ] = None,
    base: flags.Base = None,
    kind: flags.Kind = "lora",
    instruction: Annotated[
        str | None, typer.Option(help="What to do with each input; else that of the task.")
    ] = None,
    input_column: flags.InputColumn = "input",
    output_column: flags.OutputColumn = "output",
    valid_share: flags.ValidShare = 0.0,
    rows: flags.Rows = None,
    max_length: flags.MaxLength = None,
    drop_long: flags.DropLong = None,
    epochs: flags.Epochs = None,
    patience: flags.Patience = None,
    best_epoch: flags.BestEpoch = None,
    lr: flags.Lr = None,
    schedule: flags.Schedule = None,
    warmup: flags.Warmup = None,
    batch_size: flags.BatchSize = None,
    accumulate: flags.Accumulate = None,
    clip: flags.Clip = None,
    weight_decay: flags.WeightDecay = None,
    bf16: flags.Bf16 = None,
    target: flags.Target = None,
    rank: flags.Rank = None,
    alpha: flags.Alpha = None,
    rslora: flags.RsLora = None,
    dropout: flags.Dropout = None,
    keep_ratio: flags.KeepRatio = None,
    block: flags.Block = None,
    selection: flags.Selection = None,
    reselect_every: flags.ReselectEvery = None,
    seed: flags.Seed = None,
    init_seed: flags.InitSeed = None,
    dtype: flags.Dtype = None,
    dry_run: flags.DryRun = False,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line of JSON a step.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the losses: .svg or .png.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Store what --kind full gives: large, as sparse.")
    ] = False,
    replace: flags.Replace = False,
    no_eval: flags.NoEval = False,
    checkpoint_every: flags.CheckpointEvery = 60.0,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train an expert for a task, and keep it in the library.

    A run that was stopped goes on where it was when the same command is given again.
    """
    given = dict(locals())
    from adaptlib.experts import Library
    from adaptlib.experts.names import expert_ref
    from adaptlib.paths import check_path

    from .run_log import check_log

    if plot is not None:
        check_path(plot)
    if log is not None:
        check_log(log)
    if name is not None:
        expert_ref(name)
    opened = Library.open(library)
    chosen, revision = flags.choose_base(opened, base)
    flags.check_kind(kind)
    options = flags.train_options(given)

    from adaptlib.experts.sources import slug
    from adaptlib.training import read_task
    from adaptlib.training.jobs import Job

    data = read_task(
        task,
        instruction=instruction,
        input_column=input_column,
        output_column=output_column,
        valid_share=valid_share,
    )
    job = Job(name or slug(data.name), (data,), kind, options, replace=replace)  # type: ignore[arg-type]
    model, tokenizer = flags.load_base(chosen, revision)
    notes = flags.unused(kind, given)
    stored = kind != "full" or keep
    if keep and kind != "full":
        notes.append("--keep is for --kind full; other kinds are always kept")
    plan, done = _planned(opened, job, chosen, model, tokenizer, stored=stored, room=not dry_run)
    notes += _lost(plan)
    flags.say(notes, json=json)
    if dry_run:
        _preview(plan, model, tokenizer, json=json)
        return
    if done is not None:
        _print(opened, done, plan, None, notes, json=json, quiet=quiet)
        return
    result, seconds = _run(
        opened,
        job,
        plan,
        (model, tokenizer),
        stored=stored,
        log=log,
        plot=plot,
        evaluate=not no_eval,
        checkpoint_every=checkpoint_every,
        silent=json or quiet,
    )
    _print(opened, result, plan, seconds, notes, json=json, quiet=quiet)


def _planned(
    opened: "Library",
    job: "Job",
    base: str,
    model: Any,
    tokenizer: Any,
    *,
    stored: bool,
    room: bool,
) -> "tuple[Plan, Result | None]":
    """The plan, and the expert where it is there already. Everything that can be refused is
    refused here: data, options, a name that is taken, a full disk."""
    from adaptlib.errors import ConflictError
    from adaptlib.training.jobs import find, is_done, plan_job
    from adaptlib.training.space import check_disk, memory_warning

    planned = plan_job(job, model, tokenizer, base=base)
    if not stored:
        return planned, None
    if done := is_done(opened, job.name, planned.key):
        return planned, done
    if not room:
        return planned, None
    if not job.replace and (found := find(opened, job.name)):
        raise ConflictError(
            f"the name {job.name} is taken by another expert, {out.short(found.digest or '')}",
            hint="--replace, or --name OTHER",
        )
    if opened.path is not None:
        check_disk(opened.path, [planned])
    if model.device.type == "cpu" and (text := memory_warning(planned)):
        out.note(f"Warning: {text}")
    return planned, None


def _lost(plan: "Plan") -> list[str]:
    notes = []
    total = len(plan.train) + len(plan.valid) + plan.dropped
    if plan.cut:
        notes.append(f"{plan.cut:,} of {total:,} inputs were cut to {plan.max_length} tokens")
    if plan.dropped:
        notes.append(f"{plan.dropped:,} of {total:,} rows were left out: their answers do not fit")
    return notes


def _preview(plan: "Plan", model: Any, tokenizer: Any, *, json: bool) -> None:
    from adaptlib.training.space import time_steps

    from .preview import numbers, print_plan

    speed = time_steps(model, tokenizer, plan.tasks, kind=plan.kind, options=plan.options)  # type: ignore[arg-type]
    seen = numbers(plan, model, tokenizer, speed)
    if json:
        out.document("train-plan", **seen)
    else:
        print_plan(seen)


def _run(
    opened: "Library",
    job: "Job",
    plan: "Plan",
    loaded: tuple[Any, Any],
    *,
    stored: bool,
    log: Path | None,
    plot: Path | None,
    evaluate: bool,
    checkpoint_every: float,
    silent: bool,
) -> "tuple[Result, float]":
    """Train, score and keep; what came of it, and the seconds it took."""
    import time

    from adaptlib.training.jobs import train_into

    from .progress import Meter, one_run
    from .run_log import RunLog
    from .scoring import scores_on_test

    meter, kept, careful = Meter(), RunLog(log, plan.key), _BetweenSteps()
    last: list[Progress] = []

    def step(progress: "Progress") -> None:
        speed = meter.add(progress)
        kept.add(progress, speed)
        last[:] = [progress]
        show(progress, speed)
        careful.step_done()

    def score(*parts: Any) -> "Mapping[str, float]":
        careful.steps_over()
        return scores_on_test(*parts)

    try:
        with one_run(job.name, quiet=silent) as show, careful.installed():
            result = train_into(
                opened,
                job,
                plan,
                *loaded,
                progress=step,
                score=score if evaluate else None,
                checkpoint_every=checkpoint_every,
                stored=stored,
            )
    except KeyboardInterrupt:
        if careful.over:
            out.note("Stopped while scoring; the same command trains the last steps again")
            out.note("  Next: the same with --no-eval, which leaves scoring out")
        elif last:
            out.note(f"Stopped after step {last[0].step} of {last[0].steps}, which is kept")
            out.note("  Next: the same command, to go on from there")
        raise
    finally:
        kept.close()
    if plot is not None:
        from adaptlib.training.curve import plot_curve

        plot_curve(plot, kept.steps, title=f"{job.name}: {plan.kind} on {plan.name}")
        if not silent:
            out.note(f"Drew {plot}")
    return result, time.perf_counter() - meter.began


@final
class _BetweenSteps:
    """Ctrl-C waits for the end of a step, where the run is kept whole; a second one does not."""

    def __init__(self) -> None:
        self.stepping = self.asked = self.over = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _asked(self, number: int, frame: object) -> None:
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = True

    def step_done(self) -> None:
        self.stepping = True
        if self.asked:
            raise KeyboardInterrupt

    def steps_over(self) -> None:
        self.stepping, self.over = False, True
        if self.asked:
            raise KeyboardInterrupt


def _print(
    opened: "Library",
    result: "Result",
    plan: "Plan",
    seconds: float | None,
    notes: list[str],
    *,
    json: bool,
    quiet: bool,
) -> None:
    manifest = opened.manifest(result.digest) if result.digest else None
    if json:
        out.document(
            "train",
            name=result.name if manifest else None,
            digest=result.digest,
            new=result.new,
            kind=plan.kind,
            base=plan.pin["id"],
            task=plan.name,
            params=manifest.params if manifest else plan.trainable,
            bytes=manifest.blob.size if manifest else None,
            steps=result.steps,
            seconds=None if seconds is None else round(seconds, 1),
            metrics=result.metrics,
            notes=notes,
        )
        return
    if quiet:
        if manifest:
            out.line(result.name)
        return
    if manifest is None:
        out.line(f"Trained  {plan.kind} on {plan.name}, not kept (--keep stores it)")
    else:
        verb = "Trained" if seconds is not None else "Already there"
        rank = f", rank {manifest.rank}" if manifest.rank else ""
        out.line(f"{verb}  {result.name}  {out.short(result.digest or '')}")
        out.line(
            f"  {plan.kind}{rank}, {manifest.params:,} parameters in "
            f"{out.count(len(manifest.modules), 'module')}, {out.size(manifest.blob.size)}"
        )
    out.line(f"  {describe(result.metrics)}")
    if seconds is not None:
        from .progress import clock

        out.line(f"  {out.count(result.steps or plan.steps, 'step')} in {clock(seconds)}")
    if manifest is not None:
        out.note(f"  Next: adaptlib show {result.name}")


def describe(metrics: Any) -> str:
    """Losses and score in a line."""
    said = [f"loss {metrics['train_loss']:.3f}"] if "train_loss" in metrics else []
    if "valid_loss" in metrics:
        said.append(f"valid loss {metrics['valid_loss']:.3f}")
    if "test_exact_match" in metrics:
        rows = out.count(int(metrics["test_rows"]), "test row")
        said.append(f"exact match {metrics['test_exact_match']:.1%} of {rows}")
    return ", ".join(said)
