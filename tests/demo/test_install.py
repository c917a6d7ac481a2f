"""What goes into the bundle."""

import pytest

from adaptlib.demo.install import choose, install
from adaptlib.demo.units import TASKS, all_units, cluster_units, friendly

TASKS = TASKS[:4]
LORA, BLOCK, ELEMENT, POOLED = 10, 20, 100, 5  # bytes


def lines_of(scored, weak=()):
    units = [*all_units(TASKS), *cluster_units({"0": [friendly(task) for task in TASKS]}, TASKS)]
    sizes = {"lora": LORA, "block-0.1": BLOCK, "element-0.1": ELEMENT}
    return [
        scored(
            unit,
            size=sizes.get(unit.method, POOLED),
            valid=0.25 if unit.kind is None else 0.29 if unit.name in weak else 0.31,
        )
        for unit in reversed(units)  # in whatever order they were finished
    ]


def test_only_what_beats_the_floor_on_the_validation_split(scored):
    weak = friendly(TASKS[1])
    chosen, pooled, said = choose(lines_of(scored, weak=[weak]), 0)
    assert weak not in chosen
    assert said == [f"dropped {weak}: 0.290, floor 0.250"]
    assert len(chosen) == 3 * len(TASKS) - 1
    assert sorted(pooled) == ["joint", "mbc-0"]


def test_element_sparse_experts_are_those_that_fit_in_the_order_of_the_tasks(scored):
    others = 4 * LORA + 4 * BLOCK + 2 * POOLED
    chosen, _, said = choose(lines_of(scored), 7, limit=7 + others + 2 * ELEMENT)
    sparse = [name for name in chosen if name.endswith("-sparse")]
    assert sparse == [f"{friendly(task)}-sparse" for task in TASKS[:2]]
    assert said == [f"no room for {friendly(task)}-sparse" for task in TASKS[2:]]
    chosen, *_ = choose(lines_of(scored), 7, limit=7 + others)
    assert len(chosen) == 8
    with pytest.raises(SystemExit, match="more than"):
        choose(lines_of(scored), 8, limit=7 + others)


def test_a_bundle_that_would_be_too_large_is_left_as_it_was(tmp_path, scored):
    base, bundle, lines = tmp_path / "base", tmp_path / "bundle", lines_of(scored)
    base.mkdir()
    (base / "model.safetensors").write_text("model")
    for line in lines:
        folder = tmp_path / "experts" / line["name"].replace(":", "-")
        folder.mkdir(parents=True)
        (folder / "expert.json").write_text("{}")
    (bundle / "experts" / "old").mkdir(parents=True)
    with pytest.raises(SystemExit, match="more than"):
        install(tmp_path, base, lines, bundle, limit=20)
    assert (bundle / "experts" / "old").is_dir()
    assert "12 + 2 experts" in install(tmp_path, base, lines, bundle)
    assert not (bundle / "experts" / "old").exists()
    assert (bundle / "base" / "model.safetensors").read_text() == "model"
    assert {path.name for path in (bundle / "pooled").iterdir()} == {"joint", "mbc-0"}
    assert (bundle / "experts" / friendly(TASKS[0]) / "expert.json").is_file()


def test_the_bundles_own_base_stays(tmp_path, scored):
    base = tmp_path / "bundle" / "base"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_text("model")
    lines = [
        scored(unit, valid=0.1) for unit in all_units(TASKS) if unit.method in ("base", "lora")
    ]
    assert "0 + 0 experts" in install(tmp_path, base, lines, tmp_path / "bundle")
    assert (base / "model.safetensors").read_text() == "model"
