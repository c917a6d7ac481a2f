"""Recipes: what a file may say, what a card holds, and the same expert from both."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.experts import Expert, Library
from adaptlib.experts.recipe import (
    Parent,
    Recipe,
    Rows,
    parse_recipe,
    pin,
    read_recipe,
    recipe_of,
    write_recipe,
)
from adaptlib.merging import MERGES
from adaptlib.merging.estimate import estimate
from adaptlib.merging.make import checked, digest_of, find_merge, make, typed
from tests.tiny import lora, make_expert, same_expert, sparse, state

FREE = [name for name, merge in MERGES.items() if merge.measure is None]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = Library.open(tmp_path / "library", create=True)
    for i, name in enumerate("abc"):
        library.add(make_expert(i), name)
    return library


def model_sized(*kinds: str) -> dict[str, Expert]:
    """Experts with two types of module in four layers, of sizes at which threads matter."""
    shapes = {
        f"layers.{i}.{n}": s for i in range(4) for n, s in (("up", (96, 64)), ("o", (64, 64)))
    }
    found = {}
    for seed, kind in enumerate(kinds):
        deltas: dict[str, Any] = {}
        for i, (module, (d_out, d_in)) in enumerate(shapes.items()):
            deltas[module] = (
                lora(100 * seed + i, rank=4 + seed, d_out=d_out, d_in=d_in)
                if kind == "lora"
                else sparse(100 * seed + i, n=300, d_out=d_out, d_in=d_in)
            )
        found[f"{kind}{seed}"] = Expert("org/base", deltas)
    return found


# -- files --


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    whole = Recipe(
        experts=("a", Parent("b", "sha256:" + "0" * 64), "cluster:x/1"),
        method="ties",
        weights={"a": 0.5, "yes": -1.0},
        options={"density": 0.2, "elect": "total", "flag": True, "none": None, "steps": 3},
        kind="lora",
        rank=4,
        on="factors",
        name="n:v1",
        description="two: lines\nand 'quotes'",
        data=Rows("sha256:" + "1" * 64, 32),
    )
    for recipe in (whole, Recipe(experts=("a",))):
        write_recipe(recipe, tmp_path / "r.yaml")
        assert read_recipe(tmp_path / "r.yaml") == recipe
    assert (tmp_path / "r.yaml").read_text() == "experts:\n- a\n"


WRONG = {
    "experts: [a, b]\nmethd: ties": "line 2: a recipe has no field 'methd'; did you mean method?",
    "experts: [a]\nrank: four": "line 2: rank: want int | null; got str 'four'",
    "experts: [a]\nrank: 0": "line 2: rank: want int >= 1; got '0'",
    "experts: [a]\n\nkeep_ratio: 1.5": "line 3: keep_ratio: want float <= 1.0; got '1.5'",
    "experts: [a]\nkind: dense": "line 2: kind: Invalid enum value 'dense'",
    "experts: [a]\nweights:\n  a: half": "line 2: weights: want float; got str",
    "experts: [a]\nweights:\n  b: 1\n  a: .nan": "line 4: the weight of a is nan",
    "experts: [a]\nweights: {a: .inf}": "line 2: the weight of a is inf",
    "experts:\n- a\n- 1234567": "line 3: experts: want str | object; got int '1234567'",
    "experts:\n- a\n- {name: b}": "line 3: digest is missing",
    "experts:\n- name: b\n  digest: c\n  diges: x": "line 4: a recipe has no field 'diges'",
    "experts: a": "line 1: experts: want array; got str 'a'",
    "experts: []": "line 1: experts: want array of length >= 1",
    "experts: [a]\noptions: {x: [1]}": "line 2: options: want",
    "experts: [a]\non: updates\non: factors": "line 3: on is there twice",
    "experts: [a]\noptions: {b: 1, b: 2}": "line 2: b is there twice",
    "method: ties": "experts is missing",
    "": "a recipe is `field: value` lines; got NoneType",
    "- a\n- b": "got list",
    "experts: [a": "line 1: this is not YAML",
    "experts: [a]\n\tmethod: x": "line 2: this is not YAML",
    "experts: !!python/object/apply:os.system [ls]": "line 1: this is not YAML",
    "experts: [a]\n---\nexperts: [b]": "line 2: this is not YAML",
    "experts: [a]\nname: 2024-13-45": "month must be in 1..12",
    "experts: \0": "this is not YAML",
    "[" * 5000: "this is not YAML",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_wrong_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_recipe("r.yaml", text)
    assert str(raised.value).startswith("r.yaml")
    assert message in str(raised.value)


def test_a_few_lines_do_not_stand_for_a_billion() -> None:
    lines = ["experts: [x]", "options:", "  a0: &a0 [x, x]"]
    lines += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(UsageError, match="options"):
        parse_recipe("bomb.yaml", "\n".join(lines))


def test_a_number_as_a_name_is_to_be_put_in_quotes() -> None:
    with pytest.raises(UsageError) as raised:
        parse_recipe("r.yaml", "experts: [12345678]")
    assert raised.value.hint == "put it in quotes"


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no recipe"):
        read_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    with pytest.raises(UsageError, match="above 262,144 bytes"):
        read_recipe(tmp_path / "large.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no text file"):
        read_recipe(tmp_path / "binary.yaml")


# -- names --


def test_pinning_takes_names_and_digests(library: Library) -> None:
    digests = library.names()
    short = digests["c"][7:20]
    pinned = pin(library, Recipe(experts=("b", short, Parent("x", digests["a"])), method="ties"))
    assert pinned.parents == {"b": digests["b"], short: digests["c"], "x": digests["a"]}
    assert pinned.method == "ties"
    library.add(make_expert(9), "b", replace=True)
    assert pin(library, pinned) == pinned  # it is the digest that counts
    library.add(make_expert(8, base="org/other"), "stranger")
    two = Recipe(experts=("a", "stranger"))
    assert list(pin(library, two, base="org/base").parents) == ["a"]
    with pytest.raises(NotFoundError, match="none of these is an expert of base model 'x'"):
        pin(library, two, base="x")


def test_pinning_refuses_a_name_twice_and_weights_for_others(library: Library) -> None:
    for recipe, message in (
        (Recipe(experts=("a", "b", "a")), "a is merged twice"),
        (Recipe(experts=("a", "b"), weights={"aa": 1.0}), "'aa'.*did you mean a"),
    ):
        with pytest.raises(UsageError, match=message):
            pin(library, recipe)
    with pytest.raises(NotFoundError, match="no expert named 'x'"):
        pin(library, Recipe(experts=("x",)))
    gone = Recipe(experts=(Parent("a", "sha256:" + "7" * 64),))
    with pytest.raises(NotFoundError, match="a as it was, sha256:777777777777, is gone"):
        pin(library, gone)


# -- options --


def test_options_are_read_by_the_types_that_a_method_wants() -> None:
    merge = find_merge("Task-Arithmetic")
    assert merge.name == "task_arithmetic"
    assert typed(merge, {"scale": "1"}) == {"scale": 1.0}
    assert isinstance(typed(merge, {"scale": 1})["scale"], float)
    for value in ("x", "nan", "inf", "", True, [1]):
        with pytest.raises(UsageError, match=r"scale of task_arithmetic is a number; got"):
            typed(merge, {"scale": value})
    with pytest.raises(UsageError, match="no option 'scal'; did you mean scale"):
        typed(merge, {"scal": 1})
    with pytest.raises(UsageError, match="no merge 'linaer'; did you mean linear"):
        find_merge("linaer")


@pytest.mark.parametrize("name", MERGES)
def test_every_method_takes_its_own_defaults_as_text(name: str) -> None:
    merge = MERGES[name]
    said = {k: str(v) for k, v in merge.options.items() if v is not None}
    assert typed(merge, said) == {k: v for k, v in merge.options.items() if v is not None}


def test_what_contradicts_itself_is_refused_before_a_tensor_is_read() -> None:
    with pytest.raises(UsageError, match="rank"):
        checked(Recipe(experts=("a",), rank=2, keep_ratio=0.5))


# -- experts --


def test_the_card_holds_the_recipe_by_digest(library: Library) -> None:
    recipe = Recipe(experts=("a", "b"), method="task-arithmetic", weights={"b": -2.0}, rank=1)
    made = make(library, msgspec.structs.replace(recipe, description="a less b"))
    library.add(made, "merged")
    card = library["merged"].card
    assert card["parents"] == [{"name": n, "digest": library.digest(n)} for n in "ab"]
    assert card["merge"]["weights"] == [1.0, -2.0]
    assert card["merge"]["kept"] == {"kind": None, "rank": 1, "keep_ratio": None, "on": "updates"}
    assert card["description"] == "a less b"
    again = recipe_of("merged", library.manifest("merged"))
    assert again.parents == {n: library.digest(n) for n in "ab"}
    assert (again.method, again.rank, again.options) == ("task_arithmetic", 1, {"scale": 0.4})


@pytest.mark.parametrize("method", FREE)
def test_a_card_makes_the_same_expert_again(library: Library, method: str) -> None:
    """Whatever its experts are called by then."""
    recipe = Recipe(experts=("a", "b"), method=method, weights={"a": 1.5})
    library.add(make(library, recipe), "merged")
    manifest, digest = library.manifest("merged"), library.digest("merged")
    library.rename("a", "other")
    library.add(make_expert(7), "a")
    made = make(library, recipe_of("merged", manifest))
    assert same_expert(made, library["merged"])
    assert digest_of(made, manifest) == digest


def test_the_digest_does_not_depend_on_threads(tmp_path: Path) -> None:
    library = Library.open(tmp_path / "library", create=True)
    for name, expert in model_sized("lora", "sparse", "lora").items():
        library.add(expert, name)
    recipe = Recipe(experts=tuple(library), method="svd", rank=5)
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            made.append(make(library, recipe))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same_expert(made[0], made[1])
    assert same_expert(made[0], made[2])


HOSTILE: dict[str, Any] = {
    "not an object": {"merge": "ties", "parents": []},
    "no parents": {"merge": {"method": "ties"}},
    "parents of another form": {
        "merge": {"method": "linear", "weights": [1], "options": {}, "kept": {}},
        "parents": ["a"],
    },
    "weights for others": {
        "merge": {"method": "linear", "weights": [1, 2], "options": {}, "kept": {}},
        "parents": [{"name": "a", "digest": "sha256:0"}],
    },
    "kept with more": {
        "merge": {"method": "linear", "weights": [1], "options": {}, "kept": {"x": 1}},
        "parents": [{"name": "a", "digest": "sha256:0"}],
    },
    "kept as a list": {
        "merge": {"method": "linear", "weights": [1], "options": {}, "kept": [1]},
        "parents": [{"name": "a", "digest": "sha256:0"}],
    },
}


@pytest.mark.parametrize("card", HOSTILE.values(), ids=HOSTILE)
def test_a_card_from_anybody_is_no_recipe(library: Library, card: dict[str, Any]) -> None:
    library.add(make_expert(5, **card), "hostile")
    with pytest.raises((CorruptError, UsageError), match=r"card (holds no recipe|cannot be read)"):
        recipe_of("hostile", library.manifest("hostile"))


# -- estimates --


@pytest.mark.parametrize(
    ("kinds", "recipe"),
    [
        (("lora", "lora"), {"method": "linear"}),
        (("lora", "lora"), {"method": "svd", "rank": 3}),
        (("lora", "sparse"), {"method": "linear"}),
        (("sparse", "sparse"), {"method": "linear"}),
        (("sparse", "lora"), {"method": "linear", "keep_ratio": 0.02}),
    ],
)
def test_an_estimate_is_near_what_comes(
    tmp_path: Path, kinds: tuple[str, ...], recipe: dict[str, Any]
) -> None:
    library = Library.open(tmp_path / "library", create=True)
    for name, expert in model_sized(*kinds).items():
        library.add(expert, name)
    asked = Recipe(experts=tuple(library), **recipe)
    before = state(library)
    seen = estimate(library, asked)
    assert state(library) == before
    real = library.add(make(library, asked), "real")
    manifest = real.manifest
    assert (seen.kind, seen.rank, seen.modules) == (manifest.kind, manifest.rank, 8)
    assert seen.params == pytest.approx(manifest.params, rel=0.02)
    assert seen.bytes == pytest.approx(manifest.blob.size, rel=0.05, abs=200 * 8)
    assert seen.error == pytest.approx(manifest.card["merge"]["error"], abs=0.05)
    assert len(seen.tried) == 2
    assert len({re.search(r"\d+", module).group() for module in seen.tried}) == 2  # type: ignore[union-attr]


def test_an_estimate_looks_at_every_expert(tmp_path: Path) -> None:
    library = Library.open(tmp_path / "library", create=True)
    experts = model_sized("lora", "lora")
    library.add(experts["lora0"], "whole")
    one = dict([next(iter(experts["lora1"].deltas.items()))])
    library.add(Expert("org/base", one), "part")
    seen = estimate(library, Recipe(experts=("whole", "part")))
    assert set(one) <= set(seen.tried)
    assert seen.modules == 8


def test_memory_is_the_peak_so_far_and_what_is_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library.open(tmp_path / "library", create=True)
    for name, expert in model_sized("lora", "lora").items():
        library.add(expert, name)
    monkeypatch.setattr("adaptlib.merging.estimate.peak_memory", lambda: 1_000_000)
    seen = estimate(library, Recipe(experts=tuple(library)))
    assert seen.memory == 1_000_000 + seen.bytes * 3 // 4  # two of eight modules were tried
    monkeypatch.setattr("adaptlib.merging.estimate.peak_memory", lambda: None)
    assert estimate(library, Recipe(experts=tuple(library))).memory is None
