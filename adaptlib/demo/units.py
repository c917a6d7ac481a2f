"""What `make` does, in the order in which it does it: the most important first."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from adaptlib.training.options import TrainOptions

if TYPE_CHECKING:
    from adaptlib.training.options import Kind

MAX_LENGTH = 192  # tokens; a few long inputs of dbpedia are cut, and counted in their card
EPOCHS = 5
RANK = 8
LR = {"lora": 3e-3, "element": 3e-3, "block": 3e-3, "full": 1e-3}
SELECTION = "sensitivity"
BLOCK = 16
KEEP_RATIOS = (0.1, 0.02)
CLUSTERS = 10

# The held-in tasks. An expert's place in the bundle, where there is room for some only, is by this
# order; the last eight have never been in it.
TASKS = (
    "clinc_banking",
    "subjectivity",
    "fv_animal_v_object_5",
    "name_gender",
    "pros_or_cons",
    "ii_singular_to_plural",
    "ii_num_to_verbal",
    "ii_active_to_passive",
    "rotten_tomatoes",
    "fv_choose_first_of_5",
    "fv_capitalize_first_letter",
    "ii_larger_animal",
    "clinc_home",
    "dbpedia",
    "ii_letters_list",
    "clinc_credit_cards",
    "clinc_kitchen_and_dining",
    "clinc_auto_and_commute",
    "clinc_utility",
    "clinc_meta",
    "clinc_small_talk",
    "customer_reviews",
    "ii_second_word_letter",
    "fv_choose_last_of_5",
    "fv_color_v_animal_5",
    "fv_verb_v_adjective_5",
    "ii_negation",
    "fv_capitalize",
    "fv_antonym",
    "fv_landmark_country",
    "ii_sum",
    "ii_diff",
    "ni_task875_emotion_classification",
    "fv_park_country",
    "arc_easy",
    "openbookqa",
    "social_iqa",
    "mnli",
    "winogrande",
    "fv_person_occupation",
)
# Words alone do not beat the commonest answer there, and a small model is not expected to.
CONTROLS = frozenset(
    ("arc_easy", "openbookqa", "social_iqa", "mnli", "winogrande", "fv_person_occupation")
)
FULL = TASKS[:20]  # those that docs/results-experts.md merges
# What experts of several tasks are grouped by: their parameters, and three controls.
GROUPINGS = ("mbc", "category", "text", "random")


@final
@dataclass(frozen=True)
class Unit:
    """One piece of work: an expert to train on `tasks` and score on each of them, or, with no
    `kind`, the base model to score on one task. `method` is what it is an example of."""

    name: str
    method: str
    tasks: tuple[str, ...]
    kind: "Kind | None" = None
    epochs: int = EPOCHS
    lr: float | None = None
    keep_ratio: float | None = None
    block: int = 1
    rank: int | None = None
    selection: str | None = None

    @property
    def kept(self) -> bool:
        """Whether there is an expert to write."""
        return self.kind is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the units that come first: the base's scores go into each card."""
        return () if self.kind is None else tuple(base_name(task) for task in self.tasks)

    def spec(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON has it."""
        return asdict(self) | {"tasks": list(self.tasks), "max_length": MAX_LENGTH}

    def options(self) -> TrainOptions:
        """What `train` is given."""
        defaults = TrainOptions()
        return TrainOptions(
            max_length=MAX_LENGTH,
            epochs=self.epochs,
            lr=self.lr or defaults.lr,
            rank=self.rank or defaults.rank,
            keep_ratio=self.keep_ratio or defaults.keep_ratio,
            block=self.block,
            selection=self.selection or defaults.selection,
            seed=0,
            init_seed=0,
        )


def friendly(task: str) -> str:
    """`fv_animal_v_object_5` is `animal-v-object-5`."""
    return re.sub(r"^(fv|ii)_|(?<=^ni_)task\d+_", "", task).replace("_", "-")


def base_name(task: str) -> str:
    """The name of the unit that scores the base model on a task."""
    return f"base:{task}"


def all_units(tasks: Sequence[str] = TASKS, *, epochs: int = EPOCHS) -> tuple[Unit, ...]:
    """Every unit but the clusters' experts, which are known only when the LoRA experts are."""
    names = [(friendly(task), task) for task in tasks]
    high, low = KEEP_RATIOS
    return (
        *(Unit(base_name(task), "base", (task,), epochs=0) for task in tasks),
        *(_lora(name, "lora", (task,), epochs) for name, task in names),
        _lora("joint", "joint", tuple(tasks), epochs),
        *(_sparse(f"{name}-sparse", task, high, 1, epochs) for name, task in names),
        *(_sparse(f"{name}-block", task, high, BLOCK, epochs) for name, task in names),
        *(
            Unit(f"{friendly(task)}-full", "full", (task,), "full", epochs, LR["full"])
            for task in tasks
            if task in FULL
        ),
        *(
            _sparse(f"{name}-{form}-{low}", task, low, block, epochs)
            for name, task in names
            for form, block in (("sparse", 1), ("block", BLOCK))
        ),
    )


def cluster_units(
    groups: Mapping[str, Collection[str]],
    tasks: Sequence[str] = TASKS,
    *,
    grouping: str = "mbc",
    epochs: int = EPOCHS,
) -> tuple[Unit, ...]:
    """An expert for each group of LoRA experts (label -> their names), on all their tasks."""
    return tuple(
        _lora(
            f"{grouping}-{label}", grouping, tuple(t for t in tasks if friendly(t) in group), epochs
        )
        for label, group in groups.items()
    )


def with_clusters(todo: Sequence[Unit], clusters: Sequence[Unit]) -> list[Unit]:
    """The clusters' experts come after the joint one and before all the others."""
    early = [unit for unit in todo if unit.method in ("base", "lora", "joint")]
    return [*early, *clusters, *todo[len(early) :]]


def next_unit(todo: Sequence[Unit], done: Collection[str]) -> Unit | None:
    """The first one that waits for nothing."""
    return next((unit for unit in todo if all(name in done for name in unit.needs)), None)


def seconds_left(
    left: Sequence[Unit],
    size: Mapping[str, int],
    lines: Sequence[Mapping[str, Any]],
    workers: int,
) -> float | None:
    """A guess, from what units of the same method took for the `size` of their tasks; from what
    any took where there were none of it yet. None before the first."""
    if not left:
        return 0.0
    took: dict[str, list[float]] = {}
    for line in lines:
        work = sum(size.get(task, 0) for task in line["spec"]["tasks"]) * _passes(line["spec"])
        if work:
            took.setdefault(line["method"], []).append(line["seconds"] / work)
    rates = {method: sum(values) / len(values) for method, values in took.items()}
    trained = [rate for method, rate in rates.items() if method != "base"]
    if not trained:
        return None
    usual = sum(trained) / len(trained)
    guesses = [
        rates.get(unit.method, usual)
        * sum(size[task] for task in unit.tasks)
        * _passes({"epochs": unit.epochs})
        for unit in left
    ]
    return max(max(guesses), sum(guesses) / workers)


def _passes(spec: Mapping[str, Any]) -> int:
    return max(1, spec["epochs"])


def _lora(name: str, method: str, tasks: tuple[str, ...], epochs: int) -> Unit:
    return Unit(name, method, tasks, "lora", epochs, LR["lora"], rank=RANK)


def _sparse(name: str, task: str, keep_ratio: float, block: int, epochs: int) -> Unit:
    family = "element" if block == 1 else "block"
    return Unit(
        name,
        f"{family}-{keep_ratio}",
        (task,),
        "sparse",
        epochs,
        LR[family],
        keep_ratio,
        block,
        selection=SELECTION,
    )
