"""What the help says of a command beside its own words: its line in the list of commands, exit
codes, files, and other commands to look at. Kept apart from the commands, so that the list is there
without importing any of them.
"""

from dataclasses import dataclass, field
from typing import Final, final

CODES: Final = {
    0: "done",
    1: "failed: the disk is full, a right is missing, or adaptlib is wrong",
    2: "usage: a word, option or value that means nothing here",
    3: "not found: a name, a file, a model or the library itself",
    4: "corrupt: bytes that are not what they claim to be",
    5: "conflict: a name that is taken, or a library that is locked",
    6: "remote: the hub or the network",
    7: "refused: unsafe or unsupported, such as a pickle",
    130: "interrupted with Ctrl-C",
    141: "whoever read the output left, as in `adaptlib list | head -1`",
    143: "ended by SIGTERM",
}
ANY: Final = (0, 1, 2, 130, 141, 143)  # what every command can end with
VARIABLES: Final = {
    "ADAPTLIB_LIBRARY": "the library, where --library does not say",
    "ADAPTLIB_NO_CONFIG": "1 leaves files of settings unread",
    "ADAPTLIB_DEBUG": "1 shows a traceback for an error, and warnings of other packages",
    "NO_COLOR": "no colours, whatever else is said",
    "FORCE_COLOR": "colours in a pipe, too; CLICOLOR_FORCE is the same",
    "COLUMNS": "how wide a table is where nobody says: 80",
    "HF_HOME, HF_TOKEN": "the cache and the token of the Hugging Face hub",
    "HF_HUB_OFFLINE": "1 for no network: base models from the cache alone",
}


@final
@dataclass(frozen=True)
class Page:
    """`exits` are exit codes beside ANY, or others' meanings here; `files` says in a sentence or
    two what else is read or written."""

    group: str
    summary: str
    exits: dict[int, str] = field(default_factory=dict)
    see: tuple[str, ...] = ()
    files: str = ""


GROUPS: Final = ("Keep", "Look", "Group and merge", "Route and score", "Train", "Care")
KEEP, LOOK, GROUP, ROUTE, TRAIN, CARE = GROUPS
NO_LIBRARY: Final = {3: "there is no such library"}
NO_NAME: Final = {3: "there is no such name, or no library"}
DAMAGED: Final = {4: "the library is damaged: adaptlib verify"}
TAKEN: Final = {5: "the name is taken, or the library is locked"}
LOCKED: Final = {5: "the library is locked by another process"}
MODEL: Final = {
    6: "a base model that is not on this machine and cannot be fetched",
    7: "the experts do not fit the base model",
}
BASE: Final = (
    "Base models are looked for where the experts' cards say: a directory, or the cache of the "
    "Hugging Face hub, which is filled from the network unless HF_HUB_OFFLINE=1."
)
RUNS: Final = (
    "A run is kept in LIBRARY/derived/runs while it lasts, to go on from after a stop; gc deletes "
    "what nobody went on with for 7 days."
)

PAGES: Final = {
    "init": Page(
        KEEP,
        "Make a library, empty or with the bundled experts.",
        {5: "something else is there"},
        ("add", "list", "doctor"),
        "PATH/FORMAT and the folders beside it, as DESIGN.md draws them.",
    ),
    "add": Page(
        KEEP,
        "Keep adapters: of PEFT, of adaptlib, or from the hub.",
        {
            3: "no such source, or no library",
            4: "the source is damaged or lies",
            **TAKEN,
            6: "the hub or the network",
            7: "unsafe or unsupported: a pickle, NaN, another kind of adapter",
        },
        ("list", "show", "export"),
        "Reads the sources, writes LIBRARY/objects, refs and log. A source is read and checked "
        "whole before anything is kept.",
    ),
    "rm": Page(
        KEEP,
        "Remove names; gc takes what they led to.",
        {**NO_NAME, **DAMAGED, **LOCKED},
        ("tag", "gc", "pin"),
    ),
    "mv": Page(KEEP, "Rename an expert.", {**NO_NAME, **DAMAGED, **TAKEN}, ("tag", "log")),
    "tag": Page(
        KEEP, "Give an expert one more name or tag.", {**NO_NAME, **DAMAGED, **TAKEN}, ("mv", "rm")
    ),
    "pin": Page(
        KEEP,
        "Keep an expert whatever becomes of its names.",
        {**NO_NAME, **DAMAGED, **TAKEN},
        ("unpin", "gc"),
    ),
    "unpin": Page(KEEP, "Take a pin away.", {**NO_NAME, **DAMAGED, **LOCKED}, ("pin", "gc")),
    "export": Page(
        KEEP,
        "Write an expert for PEFT, or a whole model.",
        {**NO_NAME, **DAMAGED, 5: "the directory is not empty", **MODEL},
        ("add", "show"),
        "Writes DIRECTORY, which is new or empty. " + BASE,
    ),
    "list": Page(
        LOOK,
        "List the experts.",
        {**NO_LIBRARY, **DAMAGED},
        ("show", "log", "cluster"),
        "LIBRARY/index.db remembers what was listed; it can be deleted at any time.",
    ),
    "show": Page(
        LOOK,
        "Show an expert, a clustering or a router whole.",
        {**NO_NAME, **DAMAGED},
        ("list", "diff", "log"),
    ),
    "log": Page(LOOK, "Show when a name was moved.", {**NO_NAME, **DAMAGED}, ("show", "tag")),
    "diff": Page(
        LOOK, "Compare two experts, module by module.", {**NO_NAME, **DAMAGED}, ("show", "cluster")
    ),
    "cluster": Page(
        GROUP,
        "Group experts that do the same (MBC).",
        {3: "no such expert or clustering, or no library", **DAMAGED, **LOCKED},
        ("merge", "route", "show"),
        "Sketches of experts are kept in LIBRARY/derived. --plot writes a picture, --save a "
        "clustering that show, merge and route take by its name.",
    ),
    "merge": Page(
        GROUP,
        "Merge experts into one.",
        {3: "no such expert, recipe or library", **DAMAGED, **TAKEN, **MODEL},
        ("cluster", "show", "route"),
        "--recipe reads a YAML file, --save-recipe writes one. " + BASE,
    ),
    "route": Page(
        ROUTE,
        "Choose experts for an input, and answer.",
        {3: "no such expert, router or library, or it is empty", **DAMAGED, **LOCKED, **MODEL},
        ("cluster", "eval", "train-router"),
        "Prototypes of experts are kept in LIBRARY/derived. " + BASE,
    ),
    "eval": Page(
        ROUTE,
        "Score routers on tasks.",
        {3: "no such expert, router, task or library", **DAMAGED, **LOCKED, **MODEL},
        ("route", "bench", "train-library"),
        "What was computed is kept in LIBRARY/derived, unless --no-cache. " + BASE,
    ),
    "bench": Page(
        ROUTE,
        "Compare the methods of the papers, in hours.",
        {3: "no such tasks or base model", 5: "--out holds another comparison"},
        ("eval", "train-library"),
        "Writes --out, to go on from, and --report.",
    ),
    "train": Page(
        TRAIN,
        "Train an expert for a task.",
        {3: "no such task, base model or library", **DAMAGED, **TAKEN, **MODEL},
        ("train-library", "eval", "show"),
        RUNS + " --log writes a line of JSON a step.",
    ),
    "train-library": Page(
        TRAIN,
        "Train an expert for each of many tasks.",
        {
            1: "some of the tasks failed; the others are kept",
            3: "no such task, base model or library",
            **DAMAGED,
            **TAKEN,
            **MODEL,
        },
        ("train", "cluster", "eval"),
        RUNS,
    ),
    "train-router": Page(
        TRAIN,
        "Train a router, or gates for the experts.",
        {3: "no such task, router, base model or library", **DAMAGED, **TAKEN, **MODEL},
        ("route", "eval", "train-library"),
        RUNS,
    ),
    "verify": Page(
        CARE,
        "Check that everything is what it was.",
        {**NO_LIBRARY, 4: "something is damaged", **LOCKED},
        ("gc", "doctor"),
        "Reads every object. --repair moves what is damaged to LIBRARY/quarantine.",
    ),
    "gc": Page(
        CARE,
        "Give back the space of what nothing needs.",
        {3: "no such library, or no trash of that ID", **DAMAGED, **LOCKED},
        ("rm", "pin", "verify"),
        "What is removed stays in LIBRARY/trash for 7 days.",
    ),
    "doctor": Page(
        CARE,
        "Look at this machine and at the library.",
        {1: "a check failed"},
        ("verify",),
    ),
    "config": Page(
        CARE,
        "List settings and where each comes from; change them.",
        {3: "the file does not set that"},
        ("list", "doctor"),
        "Reads the nearest .adaptlib.toml upwards, or [tool.adaptlib] of a pyproject.toml, and "
        "config.toml in the user's configuration directory; set and unset write one of them.",
    ),
    "schema": Page(
        CARE, "Print the JSON Schemas of --json.", {3: "there is no such schema"}, ("list",)
    ),
    "completion": Page(CARE, "Print the script that completes lines in a shell.", {}, ("list",)),
}

# Options in groups, by the names of parameters, for commands that have many.
_DATA: Final = (
    *("instruction", "input_column", "output_column", "valid_share", "rows", "max_length"),
    "drop_long",
)
_STEPS: Final = (
    *("epochs", "patience", "best_epoch", "lr", "schedule", "warmup", "batch_size", "accumulate"),
    *("clip", "weight_decay", "bf16", "seed"),
)
_LORA: Final = ("target", "rank", "alpha", "rslora", "dropout", "init_seed", "dtype")
_SPARSE: Final = ("keep_ratio", "block", "selection", "reselect_every")
_RUN: Final = ("dry_run", "log", "plot", "keep", "replace", "no_eval", "checkpoint_every")
_CHOICE: Final = ("top_k", "temperature", "mix", "scope", "samples")
_EXPERTS: Final = ("experts", "only_base", "model")
PANELS: Final = {
    "cluster": {
        "Which experts": ("experts", "only_base", "only"),
        "How": ("k", "method", "features", "seed", "measure"),
        "Pictures": ("plot", "plot_kind", "layout"),
        "Saved clusterings": ("save", "assign", "diff"),
        "Duplicates": ("duplicates", "threshold"),
        "Output": ("plain",),
    },
    "merge": {
        "How": ("method", "methods", "weight", "on", "set_", "only_base"),
        "The result": ("name", "description", "kind", "rank", "keep_ratio", "replace", "dry_run"),
        "Methods that learn": ("data", "rows", "model"),
        "Recipes": ("recipe", "save_recipe", "replay"),
    },
    "route": {
        "The input": ("prompt", "instruction", "task"),
        "Which experts": (*_EXPERTS, "shortlist"),
        "How": ("router", "compare", *_CHOICE, "threshold", "calibrate", "save"),
        "The answer": ("generate", "max_new_tokens"),
        "Why": ("explain", "plot", "html"),
    },
    "eval": {
        "What": ("router", "tasks", "metric", "split", "rows", "harness", "include"),
        "Which experts": _EXPERTS,
        "How routers choose": _CHOICE,
        "How it runs": ("batch_size", "max_length", "no_cache"),
        "What is shown": ("by_task", "plot", "html"),
    },
    "bench": {
        "What": ("data", "base", "only", "seeds"),
        "The budget": ("rows", "epochs", "score_rows", "shots", "shot_epochs", "workers"),
        "Where": ("folder", "report"),
    },
    "train": {
        "The expert": ("name", "base", "kind"),
        "The task": _DATA,
        "LoRA": _LORA,
        "Sparse": _SPARSE,
        "Steps": _STEPS,
        "The run": _RUN,
    },
    "train-library": {
        "The experts": ("kind", "base", "prefix", "joint", "clusters", "workers"),
        "The tasks": _DATA,
        "LoRA": _LORA,
        "Sparse": _SPARSE,
        "Steps": _STEPS,
        "The run": _RUN,
    },
    "train-router": {
        "The router": ("name", "base", "experts", "only_router", "source", "mode", "skills"),
        "How it routes": (
            "heads",
            "scope",
            "top_k",
            "temperature",
            "balance",
            "router_lr",
            "steps",
        ),
        "The tasks": _DATA,
        "Skills": _LORA,
        "Steps": _STEPS,
        "The run": _RUN,
    },
}


def panel(command: str, parameter: str) -> str:
    """The heading that an option is under in the help of its command."""
    for heading, names in PANELS.get(command, {}).items():
        if parameter in names:
            return heading
    return "Options"
