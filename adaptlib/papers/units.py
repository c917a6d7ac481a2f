"""What is compared: methods, seeds, budgets, and the units of work that give the numbers.

Every method that trains sees the same rows of the same tasks as often, so that methods are compared
and not budgets. A unit is one file in the output folder; those that are there are not done again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

# of the tasks that the bundle has experts for, and others that some of these are near to
HELD_IN = (
    "clinc_auto_and_commute",
    "clinc_banking",
    "clinc_credit_cards",
    "clinc_home",
    "clinc_kitchen_and_dining",
    "clinc_meta",
    "clinc_small_talk",
    "clinc_utility",
    "customer_reviews",
    "dbpedia",
    "fv_animal_v_object_5",
    "fv_capitalize",
    "fv_capitalize_first_letter",
    "fv_choose_first_of_5",
    "fv_choose_last_of_5",
    "fv_color_v_animal_5",
    "fv_verb_v_adjective_5",
    "ii_active_to_passive",
    "ii_larger_animal",
    "ii_negation",
    "ii_singular_to_plural",
    "mnli",
    "name_gender",
    "ni_task875_emotion_classification",
    "pros_or_cons",
    "subjectivity",
)
HELD_OUT = (
    "ni_task1687_sentiment140_classification",
    "copa",
    "clinc_travel",
    "clinc_work",
    "fv_capitalize_last_letter",
    "fv_fruit_v_animal_5",
    "fv_choose_middle_of_5",
    "fv_present_past",
    "fv_country_capital",
    "arc_challenge",
    "svamp",
    "fv_person_sport",
)
CONTROLS = ("arc_challenge", "copa", "mnli", "svamp")  # hard for words alone; in no mean

# by name: what it trains into the library
TRAININGS = ("private", "joint", "poly", "mhr", "mope_token", "mope_example", "mbc", "sparse")
GATES = "gates"  # of the private experts, for PHATGOOSE

# systems by the training that they need, and whether they can answer tasks that nobody trained on
PRIVATE = ("uniform", "oracle", "arrow", "arrow_prompt1", "spectr", "lag", "logo", "cm", "tp")
PRIVATE += ("arrow_tuned", "merge_linear", "merge_ties")
SYSTEMS: dict[str, tuple[str, ...]] = {
    "base": (),
    **dict.fromkeys(PRIVATE, ("private",)),
    "phatgoose": ("private", GATES),
    "joint": ("joint",),
    "poly": ("poly",),
    "mhr": ("mhr",),
    "mope_token": ("mope_token",),
    "mope_example": ("mope_example",),
    "mbc_uniform": ("mbc",),
    "mbc_arrow": ("mbc",),
    "mbc_oracle": ("mbc",),
    "sparse_uniform": ("sparse",),
    "sparse_arrow": ("sparse",),
    "sparse_oracle": ("sparse",),
    "sparse_merge": ("sparse",),
}
FEW_SHOT: dict[str, tuple[str, ...]] = {
    "lora": (),
    "joint_tuned": ("joint",),
    "lorahub": ("private",),
    "poly_z": ("poly",),
    "poly_full": ("poly",),
    "mhr_z": ("mhr",),
    "mhr_full": ("mhr",),
    "mhr_mu": ("mhr",),
}


@final
@dataclass(frozen=True)
class Budget:
    """How much of everything: rows a task and epochs in training, rows a task in scoring, and rows
    and epochs for a new task."""

    rows: int = 150
    epochs: int = 2
    score_rows: int = 50
    shots: int = 32
    shot_epochs: int = 10


@final
@dataclass(frozen=True)
class Unit:
    """One piece of work. `kind` is train, score or adapt."""

    kind: str
    what: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.what}-{self.seed}"


def units(seeds: int, only: tuple[str, ...] = ()) -> Iterator[Unit]:
    """Everything, a seed after the other, each unit after those that it needs. `only` names
    systems, ways to adapt, and nothing else."""
    for seed in range(seeds):
        systems = [name for name in SYSTEMS if not only or name in only]
        adapted = [name for name in FEW_SHOT if not only or name in only]
        needed = {need for name in systems for need in SYSTEMS[name]}
        needed |= {need for name in adapted for need in FEW_SHOT[name]}
        for name in (*TRAININGS, GATES):
            if name in needed and (name != GATES or seed == 0):
                yield Unit("train", name, seed)
        for name in systems:
            if (name == "base" and seed) or (GATES in SYSTEMS[name] and seed):
                continue  # one base; gates take as long as all else, so they are of one seed
            yield Unit("score", name, seed)
        for name in adapted:
            yield Unit("adapt", name, seed)


def needs(unit: Unit) -> list[Unit]:
    """The units that have to be done before."""
    if unit.kind == "train":
        first = {"mbc": "private", GATES: "private"}.get(unit.what)
        return [Unit("train", first, unit.seed)] if first else []
    wanted = SYSTEMS[unit.what] if unit.kind == "score" else FEW_SHOT[unit.what]
    return [Unit("train", name, unit.seed) for name in wanted]
