"""What `make` does when, and what it takes for done."""

import json

import pytest

from adaptlib.demo.make import check_base, is_done, lock, read_lines
from adaptlib.demo.units import (
    CONTROLS,
    FULL,
    TASKS,
    Unit,
    all_units,
    base_name,
    cluster_units,
    friendly,
    next_unit,
    seconds_left,
    with_clusters,
)


def methods(units) -> list[str]:
    return list(dict.fromkeys(unit.method for unit in units))


def test_the_forty_tasks_are_trained_in_every_way():
    units = all_units()
    counts = {method: sum(u.method == method for u in units) for method in methods(units)}
    assert len({*TASKS}) == 40
    assert {*TASKS} >= CONTROLS | {*FULL}
    assert counts == {
        "base": 40,
        "lora": 40,
        "joint": 1,
        "element-0.1": 40,
        "block-0.1": 40,
        "full": 20,
        "element-0.02": 40,
        "block-0.02": 40,
    }
    assert len({unit.name for unit in units}) == len(units)


def test_clusters_come_after_the_joint_expert_and_cover_every_task_once():
    tasks = TASKS[:5]
    groups = {"0": [friendly(t) for t in tasks[:3]], "1": [friendly(t) for t in tasks[3:]]}
    clusters = cluster_units(groups, tasks)
    order = methods(with_clusters(all_units(tasks), clusters))
    assert order[:5] == ["base", "lora", "joint", "mbc", "element-0.1"]
    assert [unit.tasks for unit in clusters] == [tasks[:3], tasks[3:]]
    joint = next(unit for unit in all_units(tasks) if unit.method == "joint")
    assert joint.tasks == tasks
    assert (joint.options(), joint.kind) == (clusters[0].options(), "lora")


def test_a_unit_waits_for_the_base_models_scores_on_its_tasks():
    one, two = Unit("one", "lora", ("a", "b"), "lora"), Unit("two", "lora", ("c",), "lora")
    assert next_unit([one, two], {base_name("a")}) is None
    assert next_unit([one, two], {base_name("a"), base_name("c")}) is two
    assert next_unit([one, two], {base_name(task) for task in "abc"}) is one


def test_options_are_the_units():
    sparse = next(unit for unit in all_units() if unit.method == "block-0.02")
    options = sparse.options()
    assert (options.keep_ratio, options.block, options.lr) == (0.02, 16, sparse.lr)
    assert (options.seed, options.init_seed) == (0, 0)


def test_done_means_the_same_recipe_and_an_expert_that_is_there(tmp_path, scored):
    unit = next(unit for unit in all_units(TASKS[:1]) if unit.method == "lora")
    lines = {unit.name: json.loads(json.dumps(scored(unit)))}
    assert not is_done(unit, lines, tmp_path)
    folder = tmp_path / "experts" / unit.name
    folder.mkdir(parents=True)
    (folder / "expert.json").write_text("{}")
    assert is_done(unit, lines, tmp_path)
    again = next(u for u in all_units(TASKS[:1], epochs=2) if u.name == unit.name)
    assert not is_done(again, lines, tmp_path)


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"name": "a", "v": 1}\n{"name": "a", "v": 2}\n{"name": "b')
    assert read_lines(path) == {"a": {"name": "a", "v": 2}}
    assert path.read_text().endswith("2}\n")


def test_two_base_models_or_two_runs_are_not_mixed(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    check_base(tmp_path / "one", tmp_path)
    check_base(tmp_path / "one", tmp_path)
    with pytest.raises(SystemExit, match="another base model"):
        check_base(tmp_path / "two", tmp_path)
    with lock(tmp_path), pytest.raises(SystemExit, match="another run"):
        lock(tmp_path)


def test_the_time_that_is_left_is_that_of_the_longest_or_of_all(scored):
    tasks = TASKS[:4]
    units = all_units(tasks)
    size = dict.fromkeys(tasks, 100)
    loras = [unit for unit in units if unit.method == "lora"]
    joint = [unit for unit in units if unit.method == "joint"]
    assert seconds_left(loras, size, [], 2) is None
    lines = [scored(loras[0])]  # two seconds a task
    assert seconds_left([], size, lines, 2) == 0
    assert seconds_left(loras[1:], size, lines, 2) == pytest.approx(3)
    assert seconds_left(joint, size, lines, 2) == pytest.approx(8)
