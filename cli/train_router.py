"""adaptlib train-router: routers that are learned, and gates."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import out
from . import training_options as flags
from .options import JsonOption, LibraryOption, QuietOption, words
from .suggest import check_choice, closest, unknown

if TYPE_CHECKING:
    from adaptlib.experts import Expert, Library
    from adaptlib.learned.train import Learned
    from adaptlib.training import Task, TrainOptions

EXAMPLES = (
    "adaptlib train-router mhr tasks/ --name skills",
    "adaptlib train-router mhr new-task.jsonl --from skills --mode z --name skills-new",
    "adaptlib train-router mope tasks/ --name mixture --scope sequence",
    "adaptlib train-router phatgoose tasks/",
)
ROUTERS = ("mhr", "mope", "phatgoose", "poly")
MODES = ("full", "mu", "z")


def train_router(
    router: Annotated[
        str,
        typer.Argument(
            metavar="ROUTER",
            help="mhr, poly (how much of each skill a task takes), mope (a router that sees the "
            "input) or phatgoose (a gate for each expert).",
        ),
    ],
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASKS...", help="A folder of task files, or files.")
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Of the router, for --router ROUTER:NAME; skills are NAME/skill-0, ..."),
    ] = None,
    base: flags.Base = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(help="Begin with these instead of new skills: a,b or cluster:NAME/LABEL."),
    ] = None,
    only_router: Annotated[
        bool, typer.Option("--only-router", help="Leave --experts as they are.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="NAME", help="A router by task, to learn a new task."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="With --from: z (its logits alone), full (skills, too), mu (one expert that "
            "begins as the mean of the skills)."
        ),
    ] = "mu",
    skills: Annotated[int, typer.Option(help="New experts.")] = 8,
    heads: Annotated[
        int | None,
        typer.Option(help="Of mhr; they divide both sides.  [default: 8]", show_default=False),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="Of mope: token, or sequence (one mixture for an example).")
    ] = "token",
    top_k: Annotated[int | None, typer.Option(help="Of mope; all if not said.")] = None,
    temperature: Annotated[float, typer.Option(help="Of mope's softmax.")] = 1.0,
    balance: Annotated[
        float, typer.Option(help="Of mope: the weight of the loss that spreads the load.")
    ] = 0.0,
    router_lr: Annotated[
        float | None,
        typer.Option(
            help="The router's learning rate.  [default: 0.1, mope 0.003]", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of phatgoose, for each gate.")] = 100,
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
    target: flags.Target = None,
    rank: Annotated[
        int | None, typer.Option(help="Of each skill.  [default: 4]", show_default=False)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Of each skill.  [default: twice the rank]", show_default=False),
    ] = None,
    seed: flags.Seed = None,
    init_seed: flags.InitSeed = None,
    dtype: flags.Dtype = None,
    replace: flags.Replace = False,
    checkpoint_every: flags.CheckpointEvery = 60.0,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a router, and keep it in the library with its experts.

    A run that was stopped goes on where it was when the same command is given again.
    """
    given = dict(locals())
    from adaptlib.errors import UsageError
    from adaptlib.experts import Library

    _check(router, name, source, mode)
    opened = Library.open(library)
    chosen, revision = flags.choose_base(opened, base)
    if router == "phatgoose":
        _gates(opened, chosen, revision, given)
        return
    assert name is not None  # _check
    _check_free(opened, name, replace=replace, expert=source is not None and mode == "mu")
    given["rank"] = 4 if rank is None else rank
    given["alpha"] = 2.0 * given["rank"] if alpha is None else alpha
    options = flags.train_options(given)
    data = _read(given)
    if source is not None and len(data) != 1:
        raise UsageError(
            f"a router learns one new task at a time; got {len(data)}", hint="one task file"
        )
    from .selection import expand

    held = {one: opened[one] for one in expand(opened, words(experts))} if experts else None
    model, tokenizer = flags.load_base(chosen, revision)
    common = {"name": name, "model": model, "tokenizer": tokenizer, "options": options}
    found = _learn(opened, router, data, held, common, given)
    _keep(opened, router, name, found, given)


def _check(router: str, name: str | None, source: str | None, mode: str) -> None:
    """UsageError for words that mean nothing, before torch is imported."""
    from adaptlib.errors import UsageError
    from adaptlib.experts.names import expert_ref
    from adaptlib.experts.records import check_record_name

    if router not in ROUTERS:
        meant = closest(router, ROUTERS) or "mhr"
        raise UsageError(
            f"{unknown('router', router, ROUTERS)}; the others are not trained",
            hint=f"adaptlib train-router {meant} TASKS",
        )
    if router == "phatgoose":
        return
    if name is None:
        raise UsageError(f"router {router} wants a name to be kept under", hint="--name NAME")
    check_record_name("routers", name)
    expert_ref(name)
    check_choice("--mode", mode, MODES)
    if source is not None and router == "mope":
        raise UsageError(
            "--from is for routers by task, which take a new task without the others",
            hint="adaptlib train-router mhr, or poly",
        )


def _check_free(opened: "Library", name: str, *, replace: bool, expert: bool) -> None:
    """ConflictError where the name is taken, before anything is trained."""
    from adaptlib.errors import ConflictError, NotFoundError
    from adaptlib.experts.records import load_record

    if replace:
        return
    try:
        opened.digest(name) if expert else load_record(opened.store, "routers", name)
    except NotFoundError:
        return
    raise ConflictError(f"the name {name} is taken", hint="--replace, or --name OTHER")


def _read(given: Mapping[str, Any]) -> "list[Task]":
    """The tasks, sorted by name, so that the order of the files changes nothing."""
    from .train_library import read_all

    how = (given["input_column"], given["output_column"], given["valid_share"])
    return [task for _, task in sorted(read_all(given["tasks"], *how).items())]


def _learn(
    opened: "Library",
    router: str,
    data: "list[Task]",
    held: "dict[str, Expert] | None",
    common: dict[str, Any],
    given: Mapping[str, Any],
) -> "Learned | Expert":
    from adaptlib.errors import UsageError
    from adaptlib.learned.train import adapt, train_router
    from adaptlib.routing import load_router
    from adaptlib.routing.per_task import TaskRouter
    from adaptlib.training.jobs import checkpoint_path

    from .progress import Meter, one_run

    model, tokenizer = common.pop("model"), common.pop("tokenizer")
    meter = Meter()
    with one_run(common["name"], quiet=given["json"] or given["quiet"]) as show:

        def step(progress: Any) -> None:
            show(progress, meter.add(progress))

        if given["source"] is not None:
            routing, skills = load_router(opened, given["source"])
            if not isinstance(routing, TaskRouter) or routing.name != router:
                raise UsageError(
                    f"{given['source']} is a router {routing.name}; --from wants {router}",
                    hint="adaptlib train-router "
                    f"{routing.name if isinstance(routing, TaskRouter) else 'mhr'}",
                )
            lr = {} if given["router_lr"] is None else {"router_lr": given["router_lr"]}
            return adapt(
                model, tokenizer, data[0], routing, skills, mode=given["mode"], progress=step,
                **common, **lr,
            )  # fmt: skip
        kept = ("skills", "heads", "only_router", "scope", "top_k", "temperature", "balance")
        return train_router(
            model,
            tokenizer,
            data,
            router=router,
            experts=held,
            router_lr=given["router_lr"],
            progress=step,
            checkpoint=lambda key: checkpoint_path(opened, key, model),
            checkpoint_every=given["checkpoint_every"],
            **common,
            **{key: given[key] for key in kept},
        )


def _keep(
    opened: "Library", router: str, name: str, found: "Learned | Expert", given: Mapping[str, Any]
) -> None:
    """Keep what was learned, and say so."""
    import shutil

    from adaptlib.experts.derived import training_run
    from adaptlib.experts.expert import Expert
    from adaptlib.routing import save_router

    replace = bool(given["replace"])
    if isinstance(found, Expert):
        added = opened.add(found, name, replace=replace)
        entries = [{"name": added.name, "digest": added.digest, "new": added.new}]
        fields = {"name": name, "digest": added.digest, "steps": found.card["training"]["steps"]}
        metrics, then = dict(found.card["metrics"]), f"named:{name}"
    else:
        entries = []
        for one, expert in found.experts.items():
            if one in opened and opened[one].fingerprint == expert.fingerprint:
                entries.append({"name": one, "digest": opened.digest(one), "new": False})
                continue
            added = opened.add(expert, one, replace=replace)
            entries.append({"name": added.name, "digest": added.digest, "new": added.new})
        fields = {"name": name, "digest": save_router(opened, name, found.router)}
        fields |= {"steps": found.steps}
        metrics, then = dict(found.metrics), f"{router}:{name}"
        if opened.path is not None:
            shutil.rmtree(training_run(opened.path, found.key), ignore_errors=True)
    if given["json"]:
        out.document("train-router", router=router, experts=entries, metrics=metrics, **fields)
        return
    if given["quiet"]:
        out.line(name)
        return
    from .train import describe

    out.line(f"Trained  {then}  {out.short(str(fields['digest']))}")
    new = sum(bool(entry["new"]) for entry in entries)
    out.line(f"  {out.count(len(entries), 'expert')}, {new} new: {entries[0]['name']}, ...")
    out.line(f"  {describe(metrics)}, {out.count(int(fields['steps']), 'step')}")
    out.note(f"  Next: adaptlib route --prompt TEXT --router {then}")


def _gates(opened: "Library", base: str, revision: str | None, given: Mapping[str, Any]) -> None:
    """A gate for each expert whose task is among those given; its name moves to what has one."""
    from adaptlib.errors import NotFoundError
    from adaptlib.learned.gates import GATES, train_gate

    from .selection import expand

    names = expand(opened, words(given["experts"])) or list(opened.names())
    tasks = {task.name: task for task in _read(given)}
    chosen = [n for n in names if str(opened.manifest(n).card.get("task")) in tasks]
    if not chosen:
        raise NotFoundError(
            f"none of {out.count(len(names), 'expert')} was trained on one of these tasks: "
            f"{', '.join(list(tasks)[:5])}",
            hint="adaptlib list shows the task of each",
        )
    options = _gate_options(GATES, given)
    model, tokenizer = flags.load_base(base, revision)
    entries = []
    for i, name in enumerate(chosen, 1):
        expert = opened[name]
        gated = train_gate(
            model,
            tokenizer,
            expert,
            tasks[str(expert.card.get("task"))],
            steps=given["steps"],
            options=options,
        )
        added = opened.add(gated, name, replace=True)
        entries.append({"name": name, "digest": added.digest, "new": added.new})
        if not (given["json"] or given["quiet"]):
            loss = gated.card["gate"]["train_loss"]
            out.line(f"Gate {i} of {len(chosen)}  {name}  loss {loss:.3f}")
    if given["json"]:
        out.document("train-router", router="phatgoose", name=None, experts=entries)
    elif not given["quiet"]:
        out.note("  Next: adaptlib route --prompt TEXT --router phatgoose")


def _gate_options(defaults: "TrainOptions", given: Mapping[str, Any]) -> "TrainOptions":
    from dataclasses import replace

    names = ("lr", "schedule", "warmup", "batch_size", "accumulate", "clip", "weight_decay")
    names += ("max_length", "drop_long", "rows", "seed")
    return replace(defaults, **{n: given[n] for n in names if given[n] is not None})
