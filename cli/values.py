"""What the options and arguments take, for completing them: words, names in a library, or files.

Nothing here imports torch or NumPy, since a shell waits for it at each press of Tab; so names that
a registry holds are said here once more, and a test holds them to it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from library_store.digest import Digest

LARGEST = 16 << 20  # bytes of a saved result that names are taken from

if TYPE_CHECKING:
    from adaptlib.experts.catalog import Catalog

ROUTERS: Final = (
    *("arrow", "arrow_tuned", "cm", "lag", "logo", "loraretriever", "lorauter", "mhr", "mope"),
    *("named", "phatgoose", "poly", "random", "spectr", "tp", "uniform"),
)
KEPT: Final = ("mhr", "mope", "poly")  # routers that are there only by the name they are kept under
MERGES: Final = (
    *("breadcrumbs", "cat", "core_space", "dare_linear", "dare_ties", "della", "fisher", "iso_c"),
    *("knots", "linear", "lorahub", "magnitude_prune", "regmean", "slerp", "svd"),
    *("task_arithmetic", "ties", "tsv", "uniform_sparse", "wudi"),
)
KINDS: Final = ("lora", "sparse", "full")
SCHEDULES: Final = ("linear", "cosine", "constant")
SELECTIONS: Final = (
    *("gradient", "magnitude", "random", "sensitivity"),
    *("shira-gradient", "shira-snip", "shira-struct", "shira-weight"),
)
DTYPES: Final = ("bfloat16", "float16", "float32")
TARGETS: Final = ("all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
DEMO: Final = "adaptlib/demo-base"

Values: TypeAlias = Iterable[tuple[str, str]]  # (what can be typed, words on it)
Source: TypeAlias = Callable[["Library"], Values]


class Library:
    """The library that is asked for names. Opened when it is first asked; where there is none, or
    it cannot be read, it has no names."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def catalog(self) -> "Catalog":
        from adaptlib.experts.catalog import Catalog

        return Catalog.open(self.path)

    def names(self, *, start: str = "") -> dict[str, str]:
        """Digest by the names of saved results (`clusterings`, `routers`), or of pins."""
        listed, _ = self.catalog().store.listing()
        first = f"{start}/"
        return {
            name.removeprefix(first): digest
            for (name, _), digest in listed.items()
            if name.startswith(first)
        }

    def records(self, kind: str) -> dict[str, Any]:
        """The saved results themselves. Read without the checks of `load_record`, which imports
        NumPy: what is wrong with one is said when it is used."""
        store = self.catalog().store
        found = self.names(start=kind)
        return {
            name: json.loads(store.get(Digest(hexa)))
            for name, hexa in found.items()
            if store.size(Digest(hexa)) <= LARGEST
        }


def words(*known: str) -> Source:
    """These words."""
    return lambda _: [(word, "") for word in known]


def experts(library: Library) -> Values:
    """Names and tags, and the short digests that they lead to."""
    tags = library.catalog().tags()
    found = [(name, digest[:19]) for name, digest in tags.items()]
    digests: dict[str, list[str]] = {}
    for name, digest in tags.items():
        digests.setdefault(digest[7:19], []).append(name)
    found += [(short, names[0]) for short, names in digests.items()]
    return found + [(f"sha256:{short}", names[0]) for short, names in digests.items()]


def names(library: Library) -> Values:
    """Names and tags, which are all that can be moved or removed."""
    return [(name, digest[:19]) for name, digest in library.catalog().tags().items()]


def saved(kind: str, *more: str, prefix: str = "") -> Source:
    """The names of saved clusterings or routers, or pins."""

    def source(library: Library) -> Values:
        return [(prefix + one, kind) for one in (*library.names(start=kind), *more)]

    return source


def several(library: Library) -> Values:
    """What --experts takes: experts, and the clusters of saved clusterings."""
    return [*experts(library), *clusters(library)]


def clusters(library: Library) -> Values:
    """`cluster:NAME/LABEL` for each cluster, with its words."""
    for name, record in library.records("clusterings").items():
        for label, members in record.get("clusters", {}).items():
            said = record.get("labels", {}).get(label, "")
            yield f"cluster:{name}/{label}", f"{len(members)} experts {said}".strip()


def routers(library: Library) -> Values:
    """What --router takes."""
    yield from ((name, "") for name in ROUTERS if name not in (*KEPT, "named"))
    yield from ((f"named:{name}", "alone") for name, _ in names(library))
    for name, record in library.records("routers").items():
        yield f"saved:{name}", "a saved router"
        if record.get("router") in KEPT:
            yield f"{record['router']}:{name}", "a router that was learned"


def scored(library: Library) -> Values:
    """What `eval --router` takes."""
    return [("base", "no experts"), ("oracle", "the task's own expert"), *routers(library)]


def bases(library: Library) -> Values:
    """The base models of the experts, and the one that is bundled."""
    summaries = library.catalog().summaries().values()
    return [(base, "") for base in sorted({summary.base for _, summary in summaries} | {DEMO})]


def tasks(library: Library) -> Values:
    """The tasks that experts were trained on."""
    summaries = library.catalog().summaries().values()
    return [(task, "") for task in sorted({s.task for _, s in summaries if s.task})]


def records(library: Library) -> Values:
    """Saved clusterings and routers, as `show` and `rm` take them."""
    for kind in ("clusterings", "routers"):
        yield from ((f"{kind}/{name}", "") for name in library.names(start=kind))


def schemas(_: Library) -> Values:
    from .schema import FOLDER

    return [(file.stem, "") for file in sorted(FOLDER.glob("*.json"), key=lambda f: f.stem)]


def commands(_: Library) -> Values:
    from .commands import COMMANDS

    return [(name, "") for name in COMMANDS]


def fields(_: Library) -> Values:
    from .filters import FIELDS

    return [(name, kind) for name, kind in FIELDS.items()]


def settings(_: Library) -> Values:
    from .settings import TOP

    return list(TOP.items())


def weights(library: Library) -> Values:
    """The start of `NAME=W`."""
    return [(f"{name}=", "") for name, _ in names(library)]


def trash(library: Library) -> Values:
    """What gc removed, by its id."""
    path = library.catalog().path
    folder = Path() if path is None else path / "trash"
    return [(one.name, "") for one in sorted(folder.iterdir(), reverse=True) if one.is_dir()]


FILES, DIRECTORIES = "files", "directories"  # the shell completes these itself
FREE: Final = "free"  # a number, or words that nobody knows before

_FREE: Final = (
    "accumulate",
    "alpha",
    "balance",
    "batch_size",
    "block",
    "checkpoint_every",
    "clip",
    "description",
    "dropout",
    "epochs",
    "grace",
    "harness",
    "heads",
    "history",
    "init_seed",
    "input_column",
    "instruction",
    "joint",
    "keep_ratio",
    "label",
    "limit",
    "lr",
    "max_length",
    "max_new_tokens",
    "new",
    "only",
    "output_column",
    "patience",
    "prefix",
    "prompt",
    "rank",
    "reselect_every",
    "router_lr",
    "rows",
    "score_rows",
    "seed",
    "seeds",
    "set_",
    "shortlist",
    "shot_epochs",
    "shots",
    "skills",
    "steps",
    "temperature",
    "threshold",
    "top_k",
    "valid_share",
    "warmup",
    "weight_decay",
    "workers",
)
# By the name of a parameter, and before that by command and name.
TAKES: Final[Mapping[str, Source | str]] = {
    **dict.fromkeys(
        ("library", "data", "samples", "folder", "include", "directory", "path"), DIRECTORIES
    ),
    **dict.fromkeys(("plot", "html", "report", "recipe", "save_recipe", "calibrate"), FILES),
    **dict.fromkeys(("tasks", "sources", "log"), FILES),
    **dict.fromkeys(("experts", "names"), several),
    **dict.fromkeys(("a", "b", "name", "replay"), experts),
    "old": names,
    **dict.fromkeys(("base", "only_base", "model"), bases),
    **dict.fromkeys(("router", "compare"), routers),
    **dict.fromkeys(("fields", "filters", "sort"), fields),
    "clusters": saved("clusterings"),
    "dtype": words(*DTYPES),
    "features": words("auto", "factors", "gram", "sketches"),
    "k": words("auto"),
    "kind": words(*KINDS),
    "layout": words("mds", "pca", "tsne"),
    "metric": words("exact_match", "label_accuracy", "loss", "rouge_l"),
    "mix": words("outputs", "factors"),
    "mode": words("full", "mu", "z"),
    "plot_kind": words("map", "tree", "heat"),
    "schedule": words(*SCHEDULES),
    "scope": words("token", "sequence", "prompt"),
    "selection": words(*SELECTIONS),
    "source": saved("routers"),
    "split": words("train", "valid", "test"),
    "target": words(*TARGETS),
    "task": tasks,
    "weight": weights,
    # Numbers, and names and sentences that are new:
    **dict.fromkeys(_FREE, FREE),
}
OF_COMMAND: Final[Mapping[tuple[str, str], Source | str]] = {
    ("", "color"): words("auto", "always", "never"),  # before the command
    ("add", "name"): FREE,
    ("add", "task"): tasks,
    ("bench", "what"): words("papers"),
    ("cluster", "assign"): saved("clusterings"),
    ("cluster", "diff"): saved("clusterings", "now"),
    ("cluster", "method"): words("agglomerative", "category", "hdbscan", "mbc", "random", "text"),
    ("cluster", "save"): saved("clusterings"),
    ("config", "action"): words("list", "get", "set", "unset", "path", "env"),
    ("config", "key"): settings,
    ("config", "value"): FREE,
    ("completion", "shell"): words("bash", "zsh", "fish"),
    ("export", "format"): words("peft", "adaptlib"),
    ("gc", "restore"): trash,
    ("merge", "kind"): words("lora", "sparse"),
    ("merge", "method"): words(*MERGES),
    ("merge", "name"): FREE,
    ("merge", "on"): words("updates", "factors"),
    ("rm", "names"): lambda library: [*names(library), *records(library)],
    ("route", "save"): saved("routers"),
    ("schema", "name"): schemas,
    ("show", "name"): lambda library: [*experts(library), *records(library)],
    ("eval", "router"): scored,
    ("train", "name"): FREE,
    ("train", "task"): FILES,
    ("train-router", "name"): FREE,
    ("train-router", "router"): words("mhr", "mope", "phatgoose", "poly"),
    ("train-router", "scope"): words("token", "sequence"),
    ("unpin", "label"): saved("pins"),
}


def taken(command: str, parameter: str) -> Source | str:
    """What a parameter of a command takes. KeyError where that was not said."""
    return OF_COMMAND.get((command, parameter)) or TAKES[parameter]
