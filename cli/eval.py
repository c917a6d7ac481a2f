"""adaptlib eval: which router is worth it, on your own tasks."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import out
from . import route_options as flags
from .options import JsonOption, LibraryOption, QuietOption, words
from .selection import one_base, select
from .suggest import check_choice

if TYPE_CHECKING:
    from adaptlib.evaluation import Subject
    from adaptlib.experts import Expert, Library
    from adaptlib.training import Task

EXAMPLES = (
    "adaptlib eval --router base,arrow,uniform,oracle --tasks tasks/ --rows 50",
    "adaptlib eval --router arrow,named:sums --tasks sums.jsonl --metric exact_match,loss",
    "adaptlib eval --router arrow,tp --tasks tasks/ --html eval.html --plot eval.svg",
    "adaptlib eval --router arrow --harness arc_easy --rows 100",
)
METRICS = ("exact_match", "label_accuracy", "loss", "rouge_l")
BASE, ORACLE = "base", "oracle"
SAMPLES = 20  # prompts of each expert's task, from the train rows of the tasks


def evaluate(
    router: Annotated[
        list[str] | None,
        typer.Option(
            help="What route takes, and base (no experts), oracle (the task's own expert): a,b or "
            "repeated; base, arrow, uniform and oracle if not said.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="TASKS", help="A folder of task files, or files: repeatable."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METRICS)}; exact_match if not said.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which rows: train, valid or test.")] = "test",
    rows: Annotated[
        int | None, typer.Option(help="At most so many rows a task, the first.")
    ] = None,
    by_task: Annotated[bool, typer.Option("--by-task", help="Show a line a task, too.")] = False,
    top_k: flags.TopK = None,
    temperature: flags.Temperature = None,
    mix: flags.Mix = "outputs",
    scope: flags.Scope = None,
    samples: flags.Samples = None,
    experts: flags.Experts = None,
    only_base: flags.OnlyBase = None,
    model: flags.Model = None,
    batch_size: Annotated[int, typer.Option(help="Rows side by side; changes no number.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer.")] = 512,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute everything, and keep nothing of it.")
    ] = False,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness instead, such as arc_easy; wants "
            "adaptlib[harness].",
        ),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --harness: a folder with task files of your own."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the routers: .svg or .png.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with all numbers.")
    ] = None,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score routers on tasks, with intervals, paired tests and what an oracle would have had.

    Rows that were computed once are kept in the library, so that a run that was stopped goes on
    where it was, and more rows or routers cost only what is new.
    """
    from adaptlib.errors import UsageError
    from adaptlib.experts import Library

    routers = list(dict.fromkeys(words(router))) or [BASE, "arrow", "uniform", ORACLE]
    measured = list(dict.fromkeys(words(metric))) or ["exact_match"]
    _check(measured, split, rows, batch_size, tasks, harness, plot, html)
    opened = Library.open(library)
    given = {"top_k": top_k, "temperature": temperature, "scope": scope, "mix": mix}

    from . import route_pool as given_by
    from .route_run import check

    plain = [one for one in routers if one not in (BASE, ORACLE) and not _kept(one)]
    data = _tasks(tasks) if harness is None else []
    for one in plain:
        check(one, given | {"samples": samples or (True if data else None)})
    chosen = select(opened, given_by.pool(opened, plain, words(experts)) if plain else
                    _expanded(opened, words(experts)), only_base)  # fmt: skip
    base_id, revision = one_base(opened, chosen)

    import torch

    from adaptlib.experts import base as bases
    from adaptlib.training.space import threads_for

    base, tokenizer = bases.load(model or base_id, revision=None if model else revision)
    torch.set_num_threads(threads_for(base))
    held = {name: opened[name] for name in chosen}
    from adaptlib.evaluation import own_experts

    own = own_experts(held, data)
    notes: list[str] = []
    given["samples"] = _samples(samples, held, data, own, plain, notes)
    subjects = _subjects(opened, routers, held, own, given, (base, tokenizer), notes)
    if harness is not None:
        _harness(subjects, (base, tokenizer), words(harness), rows, include, batch_size, json)
        return
    if ORACLE in routers and not own:
        raise UsageError(
            "no expert was trained on one of these tasks, so there is no oracle",
            hint="leave out oracle; adaptlib list shows the task of each expert",
        )
    document = _compare(
        opened, (base, tokenizer), subjects, data, held, own,
        metrics=measured, split=split, rows=rows, cached=not no_cache,
        limits=(batch_size, max_length), silent=json or quiet,
    )  # fmt: skip
    document["notes"] = notes + document["notes"]
    _write(document, plot, html)
    if json:
        out.document("eval", **document)
        return
    from .eval_view import print_evaluation

    print_evaluation(document, by_task=by_task, quiet=quiet)


def _check(
    measured: Sequence[str],
    split: str,
    rows: int | None,
    batch_size: int,
    tasks: list[str] | None,
    harness: list[str] | None,
    plot: Path | None,
    html: Path | None,
) -> None:
    """UsageError for words that mean nothing, before torch is imported."""
    from adaptlib.errors import UsageError
    from adaptlib.paths import check_path

    for name in measured:
        check_choice("--metric", name, METRICS)
    check_choice("--split", split, ("test", "train", "valid"))
    for option, count in (("--rows", rows), ("--batch-size", batch_size)):
        if count is not None and count < 1:
            raise UsageError(f"{option} is 1 or more; got {count}", hint=f"{option} 50")
    if (harness is None) == (not tasks):
        raise UsageError(
            "tasks to score on are --tasks, your own, or --harness, those of lm-evaluation-harness"
            + ("" if harness is None else "; give one of the two"),
            hint="adaptlib eval --router arrow --tasks tasks/",
        )
    if plot is not None:
        check_path(plot)
    if html is not None:
        from adaptlib.routing.report import check_report

        check_report(html)


def _kept(word: str) -> bool:
    return ":" in word and word.partition(":")[0] != "named"


def _expanded(opened: "Library", names: list[str]) -> list[str]:
    from .selection import expand

    return expand(opened, names) or list(opened)


def _tasks(sources: list[str] | None) -> "list[Task]":
    """The tasks, in the order of their names; NotFoundError with a near name for one that a folder
    does not have."""
    from .train_library import read_all

    paths = [one.strip() for source in sources or [] for one in source.split(",") if one.strip()]
    return [task for _, task in sorted(read_all(paths, "input", "output", 0.0).items())]


def _samples(
    folder: Path | None,
    experts: "Mapping[str, Expert]",
    tasks: "Sequence[Task]",
    own: Mapping[str, str],
    routers: Sequence[str],
    notes: list[str],
) -> dict[str, list[str]] | None:
    """Prompts that routers know the experts' tasks by: of a folder, else of the train rows of the
    tasks that are scored."""
    import inspect

    from adaptlib.routing import ROUTERS
    from adaptlib.training import Row

    from . import route_pool as given_by

    if folder is not None:
        return given_by.samples(folder, experts)
    named = [one for one in routers if one in ROUTERS]
    wanting = [o for o in named if "samples" in inspect.signature(ROUTERS[o].fit).parameters]
    if not wanting:
        return None
    found: dict[str, list[str]] = {}
    for task in tasks:
        rows = task.rows.get("train", ())[:SAMPLES]
        if task.name in own and rows:
            found[own[task.name]] = [task.prompt(row) for row in rows if isinstance(row, Row)]
    if found:
        notes.append(
            f"for {', '.join(wanting)}, {out.count(len(found), 'expert')} known by {SAMPLES} train "
            "prompts of these tasks; --samples DIR gives those of others"
        )
    return found or None


def _subjects(
    opened: "Library",
    routers: Sequence[str],
    experts: "Mapping[str, Expert]",
    own: Mapping[str, str],
    given: Mapping[str, Any],
    loaded: tuple[Any, Any],
    notes: list[str],
) -> "list[Subject]":
    from adaptlib.evaluation import Subject

    from . import route_pool as given_by
    from .route_run import fit

    found = []
    for one in routers:
        if one == BASE:
            found.append(Subject(BASE))
        elif one == ORACLE:
            found.append(Subject(ORACLE, experts, own=own))
        elif _kept(one):
            kept = given_by.saved(opened, [one], [], None)
            assert kept is not None
            found.append(Subject(one, dict(kept[1]), kept[0]))
        else:
            options = {k: v for k, v in given.items() if k != "mix" or v != "outputs"}
            fitted = fit(one, experts, options, *loaded)
            notes += [note for note in fitted.notes if note not in notes and "samples" not in note]
            found.append(Subject(one, experts, fitted.router))
    return found


def _compare(
    opened: "Library",
    loaded: tuple[Any, Any],
    subjects: "Sequence[Subject]",
    tasks: "Sequence[Task]",
    experts: "Mapping[str, Expert]",
    own: Mapping[str, str],
    *,
    metrics: Sequence[str],
    split: str,
    rows: int | None,
    cached: bool,
    limits: tuple[int, int],
    silent: bool,
) -> dict[str, Any]:
    from adaptlib.evaluation import Cache, Limits, compare

    cache = Cache.of(opened.path, *loaded) if cached and opened.path is not None else None
    last: list[Any] = []

    def show(step: Any) -> None:
        last[:] = [step]
        if not silent and sys.stderr.isatty():
            sys.stderr.write(
                f"\r\x1b[K{step.number} of {step.of}  {step.router} on {step.task}  "
                f"{step.done} of {step.rows} rows"
            )
            sys.stderr.flush()

    try:
        return compare(
            *loaded, subjects, tasks, experts=experts, own=own, metrics=metrics, split=split,
            rows=rows, limits=Limits(*limits), cache=cache, progress=show,
        )  # fmt: skip
    except KeyboardInterrupt:
        if last and cache is not None:
            out.note(
                f"\nStopped at {last[0].router} on {last[0].task}, {last[0].number} of "
                f"{last[0].of}; what was computed is kept"
            )
            out.note("  Next: the same command, to go on from there")
        raise
    finally:
        if not silent and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")


def _write(document: dict[str, Any], plot: Path | None, html: Path | None) -> None:
    if plot is not None:
        from adaptlib.evaluation.plot import draw

        draw(plot, document)
        out.note(f"Drew {plot}")
    if html is not None:
        from adaptlib.evaluation.report import write

        write(html, document)
        out.note(f"Wrote {html}")


def _harness(
    subjects: "Sequence[Subject]",
    loaded: tuple[Any, Any],
    tasks: list[str],
    rows: int | None,
    include: Path | None,
    batch_size: int,
    json: bool,
) -> None:
    """Tasks of lm-evaluation-harness, by each router."""
    from contextlib import nullcontext

    from adaptlib.errors import UsageError
    from adaptlib.evaluation.harness import run
    from adaptlib.routing import attach

    results = []
    for subject in subjects:
        if subject.own is not None:
            raise UsageError("the harness's tasks have no oracle here", hint="leave out oracle")
        on = (
            nullcontext(loaded[0])
            if subject.router is None
            else attach(loaded[0], subject.experts, subject.router, tokenizer=loaded[1])
        )
        with on as model:
            found = run(model, loaded[1], tasks, limit=rows, include=include, batch_size=batch_size)
        results += [{"router": subject.label, **line} for line in found]
    if json:
        out.document("eval", results=results, notes=[])
        return
    columns = [("Router", "left"), ("Task", "fold"), ("Metric", "left"), ("Value", "right")]
    out.table(
        [*columns, ("Rows", "right")],
        ([r["router"], r["task"], r["metric"], f"{r['value']:.3f}", str(r["n"])] for r in results),
    )
