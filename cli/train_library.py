"""adaptlib train-library: an expert for each of many tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import out
from . import training_options as flags
from .options import JsonOption, LibraryOption, QuietOption
from .suggest import near_file

if TYPE_CHECKING:
    from adaptlib.experts import Library
    from adaptlib.training import Task, TrainOptions
    from adaptlib.training.farm import Report
    from adaptlib.training.jobs import Job, Layout, Result

EXAMPLES = (
    "adaptlib train-library tasks/ --kind lora",
    "adaptlib train-library tasks/ --dry-run",
    "adaptlib train-library tasks/ --joint shared",
    "adaptlib train-library tasks/ --clusters ten",
)


def train_library(
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASKS...", help="A folder of task files, or files.")
    ],
    kind: flags.Kind = "lora",
    base: flags.Base = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="P", help="Name the experts P/task.")
    ] = None,
    joint: Annotated[
        str | None, typer.Option(metavar="NAME", help="One expert by this name, over all tasks.")
    ] = None,
    clusters: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One expert a cluster of this saved clustering."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Experts side by side; one a core if memory allows, one on a GPU."),
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
        Path | None,
        typer.Option(metavar="DIR", help="Write NAME.jsonl there, a line of JSON a step."),
    ] = None,
    replace: flags.Replace = False,
    no_eval: flags.NoEval = False,
    checkpoint_every: flags.CheckpointEvery = 60.0,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train an expert for each task, side by side, into the library.

    What is there is skipped; runs that were stopped or killed go on where they were when the same
    command is given again. All experts start from one --init-seed, so that they can be compared.
    """
    given = dict(locals())
    from adaptlib.errors import UsageError
    from adaptlib.experts import Library

    if joint is not None and clusters is not None:
        raise UsageError(
            "--joint trains one expert, --clusters several; give one of the two",
            hint="adaptlib train-library --help",
        )
    opened = Library.open(library)
    chosen, revision = flags.choose_base(opened, base)
    flags.check_kind(kind)
    if kind == "full":
        raise UsageError(
            "full fine-tuning is a reference for one task; its experts are as large as the model",
            hint="adaptlib train TASK --kind full",
        )
    options = flags.train_options(given)
    data = read_all(tasks, input_column, output_column, valid_share)
    jobs = _jobs(opened, data, kind, options, given)
    for job in jobs:
        if log is not None:
            _check_log(log, job.name)
    model, tokenizer = flags.load_base(chosen, revision)

    from adaptlib.training.farm import lay_out

    layout = lay_out(
        opened,
        jobs,
        model,
        tokenizer,
        base=chosen,
        revision=revision,
        workers=workers,
        room=not dry_run,
    )
    notes = [*flags.unused(kind, given), *_notes(layout)]
    flags.say(notes, json=json)
    if dry_run:
        _preview(layout, model, tokenizer, json=json)
        return
    del model, tokenizer  # each worker loads its own
    results, seconds = _run(
        opened,
        layout,
        log=log,
        evaluate=not no_eval,
        checkpoint_every=checkpoint_every,
        silent=json or quiet,
    )
    _print(layout, results, seconds, notes, json=json, quiet=quiet)
    if any(result.error for result in results):
        raise typer.Exit(1)


def read_all(
    sources: list[str], input_column: str, output_column: str, valid_share: float
) -> "dict[str, Task]":
    """Tasks by name. UsageError where two files hold a task of one name."""
    from adaptlib.errors import NotFoundError, UsageError
    from adaptlib.training import read_task, read_tasks

    how: dict[str, Any] = {
        "input_column": input_column,
        "output_column": output_column,
        "valid_share": valid_share,
    }
    found: dict[str, Task] = {}
    for source in sources:
        folder = Path(source).is_dir()
        if not (folder or Path(source).exists() or source.startswith("hf://") or source == "-"):
            close = near_file(source)
            raise NotFoundError(
                f"there is no task file and no folder {source}"
                + (f"; did you mean {close}?" if close else ""),
                hint=close or "a folder of task files, or files: tasks/",
            )
        for task in read_tasks(source, **how).values() if folder else [read_task(source, **how)]:
            if task.name in found:
                raise UsageError(
                    f"two of the tasks are called {task.name}", hint="rename one of the files"
                )
            found[task.name] = task
    return found


def _jobs(
    opened: "Library",
    tasks: "dict[str, Task]",
    kind: Any,
    options: "TrainOptions",
    given: dict[str, Any],
) -> "list[Job]":
    from adaptlib.experts.records import load_record
    from adaptlib.experts.sources import slug
    from adaptlib.training.jobs import Job
    from adaptlib.training.pools import cluster_tasks

    prefix = f"{given['prefix'].rstrip('/')}/" if given["prefix"] else ""
    replace = given["replace"]
    if given["joint"] is not None:
        name, every = prefix + given["joint"], tuple(tasks[one] for one in sorted(tasks))
        return [Job(name, every, kind, options, label=given["joint"], replace=replace)]
    if given["clusters"] is not None:
        saved = given["clusters"]
        record = load_record(opened.store, "clusterings", saved)
        top = prefix + saved.partition(":")[0]
        return [
            Job(f"{top}/{slug(label)}", pool, kind, options, f"{saved}/{label}", replace)
            for label, pool in cluster_tasks(opened, record, tasks).items()
        ]
    return [
        Job(prefix + slug(name), (task,), kind, options, replace=replace)
        for name, task in tasks.items()
    ]


def _log_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '-').replace(':', '-')}.jsonl"


def _check_log(folder: Path, name: str) -> None:
    from .run_log import check_log

    folder.mkdir(exist_ok=True)
    check_log(_log_file(folder, name))


def _notes(layout: "Layout") -> list[str]:
    notes = [layout.limited[:1].upper() + layout.limited[1:]] if layout.limited else []
    for what, how in (("cut", "inputs were cut to fit"), ("dropped", "rows were left out")):
        lost = {one.job.name: getattr(one.plan, what) for one in layout.planned}
        lost = {name: count for name, count in lost.items() if count}
        if lost:
            names = ", ".join(f"{name} {count:,}" for name, count in list(lost.items())[:5])
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            notes.append(f"{sum(lost.values()):,} {how}: {names}{more}")
    return notes


def _preview(layout: "Layout", model: Any, tokenizer: Any, *, json: bool) -> None:
    import torch

    from adaptlib.training.space import time_steps

    from .preview import layout_rows, print_layout

    left = layout.open
    speed = None
    if left:
        torch.set_num_threads(1)  # as each worker has it
        job = left[0].job
        speed = time_steps(model, tokenizer, job.tasks, kind=job.kind, options=job.options)
    rows = layout_rows(layout, speed)
    if json:
        out.document(
            "train-library-plan",
            base=layout.base,
            workers=layout.workers,
            tokens_per_second=speed,
            experts=rows,
        )
        return
    print_layout(layout, rows)


def _run(
    opened: "Library",
    layout: "Layout",
    *,
    log: Path | None,
    evaluate: bool,
    checkpoint_every: float,
    silent: bool,
) -> "tuple[list[Result], float]":
    import time

    from adaptlib.training.farm import run

    from .progress import Meter, many_runs
    from .run_log import RunLog
    from .scoring import scores_on_test

    keys = {one.job.name: one.plan.key for one in layout.planned}
    tokens = {one.job.name: one.plan.tokens * one.plan.options.epochs for one in layout.planned}
    meters: dict[str, Meter] = {}
    logs: dict[str, RunLog] = {}
    done = [one.job.name for one in layout.planned if one.done is not None]
    began = time.perf_counter()

    def tell(report: "Report") -> None:
        speed = None
        if report.progress is not None:
            name = report.name
            speed = meters.setdefault(name, Meter()).add(report.progress)
            if log is not None:
                logs.setdefault(name, RunLog(_log_file(log, name), keys[name]))
                logs[name].add(report.progress, speed)
        elif report.state == "training":
            meters[report.name] = Meter()
        elif report.name in logs:
            logs.pop(report.name).close()
        show(report, speed)

    try:
        with many_runs(tokens, done=done, workers=layout.workers, quiet=silent) as show:
            results = run(
                opened,
                layout,
                progress=tell,
                score=scores_on_test if evaluate else None,
                checkpoint_every=checkpoint_every,
            )
    except KeyboardInterrupt:
        out.note("Stopped. What was trained is in the library, the rest is kept half-way")
        out.note("  Next: the same command, to go on from there")
        raise
    finally:
        for one in logs.values():
            one.close()
    return results, time.perf_counter() - began


def _print(
    layout: "Layout",
    results: "list[Result]",
    seconds: float,
    notes: list[str],
    *,
    json: bool,
    quiet: bool,
) -> None:
    good = [result for result in results if result.error is None]
    bad = [result for result in results if result.error is not None]
    if json:
        out.document(
            "train-library",
            base=layout.base,
            seconds=round(seconds, 1),
            trained=[
                {"name": r.name, "digest": r.digest, "metrics": dict(r.metrics), "new": r.new}
                for r in good
            ],
            failed=[{"name": r.name, "error": r.error, "hint": r.hint} for r in bad],
            notes=notes,
        )
        return
    if quiet:
        for result in good:
            out.line(result.name)
    elif good:
        _table(good)
        from .progress import clock

        new = sum(result.new for result in good)
        there = f", {len(good) - new} there before" if new < len(good) else ""
        out.line()
        out.line(f"{out.count(new, 'expert')} trained in {clock(seconds)}{there}")
    for result in bad:
        out.note(f"Failed: {result.name}: {result.error}")
        if result.hint:
            out.note(f"  Next: {result.hint}")
    if bad and not quiet:
        out.note(f"{len(bad)} of {len(results)} failed; the same command tries those again")


def _table(results: "list[Result]") -> None:
    metrics = {
        "LOSS": ("train_loss", ".3f"),
        "VALID": ("valid_loss", ".3f"),
        "EXACT": ("test_exact_match", ".1%"),
    }
    known = {
        heading: [
            format(result.metrics[metric], form) if metric in result.metrics else ""
            for result in results
        ]
        for heading, (metric, form) in metrics.items()
    }
    known = {heading: cells for heading, cells in known.items() if any(cells)}
    out.table(
        [
            ("NAME", "cut"),
            ("DIGEST", "left"),
            *((heading, "right") for heading in known),
            ("STATE", "left"),
        ],
        [
            [result.name, out.short(result.digest or ""), *cells, "new" if result.new else "there"]
            for result, *cells in zip(results, *known.values(), strict=True)
        ],
    )
