"""Bad input: a clear sentence, the right exit code, and a library that stays as it was."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from adaptlib.experts import Library
from adaptlib.experts.codec import pack, write_directory
from tests.tiny import entry, make_expert, safetensors_bytes, state

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/absent",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
GOOD = {A: torch.ones(2, 16), B: torch.ones(16, 2)}


def peft(directory: Path, *, tensors: Any = None, config: Any = None, weights: Any = None) -> Path:
    """A PEFT directory; `weights` are the file's bytes, in place of `tensors`."""
    directory.mkdir()
    text = config if isinstance(config, bytes) else json.dumps(CONFIG | (config or {})).encode()
    (directory / "adapter_config.json").write_bytes(text)
    data = weights or safetensors.torch.save(tensors or GOOD)
    (directory / "adapter_model.safetensors").write_bytes(data)
    return directory


def nan() -> dict[str, torch.Tensor]:
    return {A: torch.full((2, 16), float("nan")), B: torch.ones(16, 2)}


def without(directory: Path, name: str) -> Path:
    (peft(directory) / name).unlink()
    return directory


def pickled(directory: Path) -> Path:
    without(directory, "adapter_model.safetensors")
    torch.save(GOOD, directory / "adapter_model.bin")
    return directory


def lying_manifest(directory: Path) -> Path:
    write_directory(pack(make_expert()), directory)
    path = directory / "expert.json"
    path.write_bytes(path.read_bytes().replace(b'"rank":2', b'"rank":3'))
    return directory


VALID = safetensors.torch.save(GOOD)
MILLION = json.dumps({f"{i}": entry(0, 0, [0]) for i in range(66_000)}).encode()
TWICE = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
SOURCES: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "absent": (lambda p: p, 3, "is not there"),
    "empty directory": (lambda p: (p.mkdir(), p)[1], 3, "holds no adapter"),
    "no config": (lambda p: without(p, "adapter_config.json"), 3, "adapter_config.json"),
    "no weights": (lambda p: without(p, "adapter_model.safetensors"), 3, "adapter_model"),
    "malformed config": (lambda p: peft(p, config=b"{nope"), 4, "not JSON"),
    "config without type": (lambda p: peft(p, config=b"{}"), 4, "peft_type"),
    "config of text": (lambda p: peft(p, config=b'"x"'), 4, "object"),
    "rank is text": (lambda p: peft(p, config={"r": "2"}), 4, "r`|int"),
    "rank lies": (lambda p: peft(p, config={"r": 3}), 4, "rank 3"),
    "pickle": (pickled, 7, "pickle"),
    "pickle by another name": (
        lambda p: peft(p, weights=(pickled(p.with_name("b")) / "adapter_model.bin").read_bytes()),
        7,
        "pickle",
    ),
    "truncated": (lambda p: peft(p, weights=VALID[:-5]), 4, "adapter_model.safetensors"),
    "lying": (
        lambda p: peft(p, weights=safetensors_bytes({A: entry(0, 8)}, b"1")),
        4,
        "safetensor",
    ),
    "header key twice": (lambda p: peft(p, weights=safetensors_bytes(TWICE, bytes(4))), 7, "twice"),
    "million tensors": (lambda p: peft(p, weights=safetensors_bytes(MILLION)), 7, "65,536"),
    "nan": (lambda p: peft(p, tensors=nan()), 7, "NaN"),
    "dora": (lambda p: peft(p, config={"use_dora": True}), 7, "DoRA"),
    "ia3": (lambda p: peft(p, config={"peft_type": "IA3"}), 7, "IA3"),
    "prompt tuning": (lambda p: peft(p, config={"peft_type": "PROMPT_TUNING"}), 7, "PROMPT"),
    "modules_to_save": (
        lambda p: peft(p, config={"modules_to_save": ["lm_head"]}),
        7,
        "modules_to",
    ),
    "bias": (lambda p: peft(p, config={"bias": "all"}), 7, "bias"),
    "magnitude vector": (
        lambda p: peft(p, tensors=GOOD | {f"{Q}.lora_magnitude_vector": torch.ones(16)}),
        7,
        "DoRA",
    ),
    "half a pair": (lambda p: peft(p, tensors={A: GOOD[A]}), 4, "lora_B"),
    "other names": (lambda p: peft(p, tensors={"x": torch.ones(1)}), 7, "'x'"),
    "no base": (lambda p: peft(p, config={"base_model_name_or_path": None}), 7, "base"),
    "lying manifest": (lying_manifest, 4, "does not go|digest"),
}


@pytest.mark.parametrize("case", SOURCES, ids=lambda case: case.replace(" ", "-"))
def test_a_bad_source_is_refused_and_nothing_changes(
    run: Any, library: Library, tmp_path: Path, case: str
) -> None:
    make, code, words = SOURCES[case]
    source = make(tmp_path / "bad")
    before = state(library)
    result = run("add", source, "--name", "new", "--json")
    assert result.code == result.error["code"] == code
    assert re.search(words, result.error["message"])
    assert "Traceback" not in result.err
    text = run("add", source, "--name", "new")
    assert text.code == code
    assert text.out == ""
    assert text.err.startswith("Error: ")
    assert state(library) == before


def test_older_layouts_are_a_stated_migration(run: Any, library: Library, tmp_path: Path) -> None:
    old = {A.replace("base_model.model.", ""): GOOD[A], B.replace("base_model.model.", ""): GOOD[B]}
    (added,) = run("add", peft(tmp_path / "old", tensors=old), "--json").document["added"]
    assert any("base_model.model. in front is missing" in note for note in added["notes"])
    assert list(library["old"].deltas) == [Q.removeprefix("base_model.model.")]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {A.replace("q_proj", "c_attn"): GOOD[A], B.replace("q_proj", "c_attn"): GOOD[B]},
            "no mod",
        ),
        (GOOD | {k.replace("q_p", "z_p"): t.clone() for k, t in GOOD.items()}, "only 1 of"),
        ({A: torch.ones(2, 15), B: GOOD[B]}, "has shape"),
    ],
    ids=["none", "some", "shape"],
)
def test_an_adapter_that_does_not_fit_its_base(
    run: Any, library: Library, base_model: Path, tmp_path: Path, tensors: Any, words: str
) -> None:
    source = peft(tmp_path / "a", tensors=tensors)
    before = state(library)
    result = run("add", source, "--base", base_model, "--json")
    assert (result.code, result.error["code"]) == (7, 7)
    assert words in result.error["message"]
    assert state(library) == before
    assert run("add", peft(tmp_path / "b"), "--base", base_model, "--json").code == 0


def test_a_base_that_is_not_there(run: Any, library: Library, tmp_path: Path) -> None:
    before = state(library)
    peft(tmp_path / "a")
    for base in ("./absent", tmp_path / "absent", "~/absent"):
        assert run("add", "a", "--base", base).code == 3
    assert state(library) == before
    for model, code in (("./absent", 3), (tmp_path, 3), ("org/absent", 6)):
        result = run("route", "--prompt", "a", "--model", model, "--experts", "poems", "--json")
        assert result.code == code
        assert "--model" in result.error["hint"]


COMMANDS: list[tuple[list[str], int, str]] = [
    ([], 2, "Usage"),
    (["no-such-command"], 2, "no-such-command"),
    (["list", "--no-such-option"], 2, "no-such-option"),
    (["show"], 2, "NAME|name"),
    (["show", "absent"], 3, "no expert named 'absent'"),
    (["show", "poem"], 3, "did you mean poems"),
    (["show", "../x"], 3, "no expert"),
    (["rm", "poem"], 3, "did you mean"),
    (["mv", "absent", "x"], 3, "no expert"),
    (["mv", "poems", "sums"], 5, "taken"),
    (["mv", "poems", "../x"], 2, "not a ref"),
    (["tag", "poems", "sums"], 5, "taken"),
    (["tag", "poems", "a b"], 2, "not a ref"),
    (["log", "absent"], 3, "no expert"),
    (["diff", "poems", "absent"], 3, "no expert"),
    (["export", "absent", "out"], 3, "no expert"),
    (["export", "poems", "library"], 5, "not empty"),
    (["export", "poems", "out", "--format", "gguf"], 2, "gguf"),
    (["gc", "--grace", "soon"], 2, "--grace"),
    (["gc", "--grace", "99999999999999999999d"], 2, "--grace"),
    (["gc", "--grace", "999999d"], 2, "--grace"),
    (["gc", "--restore", "absent"], 3, "no trash"),
    (["gc", "--restore", "../objects"], 3, "no trash"),
    (["list", "-L", "nowhere"], 3, "no library at nowhere"),
    (["init", "afile"], 5, "afile"),
    (["init", "full"], 5, "not empty"),
    (["add", "a", "b", "--name", "x"], 2, "--name names one"),
    (["add", "hf://"], 2, ""),
    (["route", "--prompt", ""], 2, "prompt is empty"),
    (["route", "--prompt", " \n "], 2, "prompt is empty"),
    (["route"], 2, "--prompt"),
    (["route", "--prompt", "a", "--top-k", "0"], 2, "--top-k"),
    (["route", "--prompt", "a", "--top-k", "x"], 2, "--top-k"),
    (["route", "--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
    (["route", "--prompt", "a", "--mix", "soup"], 2, "--mix"),
    (["route", "--prompt", "a", "--router", "oracle"], 2, "oracle"),
    (["route", "--prompt", "a", "--router", "named"], 2, "named"),
    (["route", "--prompt", "a", "--router", "named:absent"], 3, "absent"),
    (["route", "--prompt", "a", "--temperature", "0"], 2, "temperature"),
    (["route", "--prompt", "a", "--experts", "poem"], 3, "did you mean"),
    (["cluster", "--k", "0"], 2, "--k"),
    (["cluster", "--k", "many"], 2, "--k"),
    (["cluster", "--k", "99"], 2, "99"),
    (["cluster", "--method", "guess"], 2, "guess"),
    (["cluster", "--experts", "absent"], 3, "no expert"),
    (["cluster", "--save", "../x"], 2, "not a ref"),
]


@pytest.mark.parametrize(("words", "code", "message"), COMMANDS, ids=lambda v: str(v)[:60])
def test_a_wrong_command_changes_nothing(
    run: Any, library: Library, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    (tmp_path / "afile").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = state(library)
    result = run(*words)
    assert result.code == code, result.err
    assert re.search(message, result.err)
    assert result.out == ""
    assert "Traceback" not in result.err
    assert "bug in adaptlib" not in result.err
    if words:
        error = run(*words, "--json").error
        assert error["code"] == code
        assert error.keys() == {"code", "message", "hint"}
    assert state(library) == before


MEANT: list[tuple[str, int, str, str]] = [  # (words, code, what was meant, what to type next)
    ("rout", 2, "route", "adaptlib --help"),
    ("remvoe poems", 2, "remove", "adaptlib --help"),
    ("help verfy", 2, "verify", "adaptlib --help"),
    ("route --promt x", 2, "--prompt", "adaptlib route --help"),
    ("ls --qiet", 2, "--quiet", "adaptlib ls --help"),
    ("show pomes", 3, "poems", "adaptlib list"),
    ("route --prompt x --router arow", 2, "arrow", "--router arrow"),
    ("route --prompt x --compare uniform,arrwo", 2, "arrow", "--router arrow"),
    ("route --prompt x --mix outputz", 2, "outputs", "--mix outputs"),
    ("route --prompt x --scope tokens", 2, "token", "--scope token"),
    ("eval --tasks x --router arow", 3, "", "tasks/"),
    ("eval --tasks x --metric rougel", 2, "rouge_l", "--metric rouge_l"),
    ("eval --tasks x --split tests", 2, "test", "--split test"),
    ("merge poems sums --method tis", 2, "ties", "adaptlib merge --methods"),
    ("merge poems --kind lra", 2, "lora", "--kind lora"),
    ("cluster --method hdbcan", 2, "hdbscan", "--method hdbscan"),
    ("cluster --features sketch", 2, "sketches", "--features sketches"),
    ("train x --base b --kind spars", 2, "sparse", "--kind sparse"),
    ("train tasks/sum.jsonl --base b", 3, "tasks/sums.jsonl", ""),
    ("train-library tasks/sum.jsonl --base b", 3, "tasks/sums.jsonl", ""),
    ("train-router mrh x --name y", 2, "mhr", "adaptlib train-router mhr TASKS"),
    ("bench papers --data x --only arow", 2, "arrow", "--only arrow"),
    ("export poems out --format pft", 2, "peft", "--format peft"),
    ("schema lits", 3, "list", "adaptlib schema"),
    ("completion bsh", 2, "bash", "adaptlib completion bash"),
]


@pytest.mark.parametrize(("line", "code", "meant", "hint"), MEANT, ids=lambda v: str(v)[:50])
def test_a_near_word_is_said(
    run: Any, library: Library, tmp_path: Path, line: str, code: int, meant: str, hint: str
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.jsonl").write_text("")
    before = state(library)
    result = run(*line.split())
    assert result.code == code, result.err
    assert f"did you mean {meant}?" in result.err or not meant
    assert f"Next: {hint}" in result.err or not hint or hint in result.err
    assert result.err.count("did you mean") == bool(meant)
    assert state(library) == before


def test_where_nothing_is_near_it_is_said_what_there_is(run: Any, library: Library) -> None:
    for line, there in {
        "xyzzy": "init, add, list",
        "schema xyzzy": "cluster-diff",
        "route --prompt x --router xyzzy": "phatgoose",
        "merge poems sums --method xyzzy": "task_arithmetic",
        "cluster --method xyzzy": "agglomerative",
        "completion xyzzy": "bash, zsh, fish",
        "export poems out --format xyzzy": "peft, adaptlib",
    }.items():
        result = run(*line.split())
        assert result.code in (2, 3)
        assert there in result.err
        assert "did you mean" not in result.err


def test_options_on_the_wrong_side_of_a_command(run: Any, library: Library) -> None:
    result = run("--json", "list")
    assert (result.code, result.out) == (2, "")
    assert "--json comes after the command" in result.err
    assert "adaptlib list --json" in result.err


def test_what_is_missing_is_said_with_an_example(run: Any) -> None:
    for line, what, example in (
        ("add", "SOURCE", "adaptlib add ./my-lora --name sql  (adaptlib add --help)"),
        ("route", "--prompt", "adaptlib route --prompt"),
        ("diff poems", "b", "adaptlib diff sql:v1 sql:v2"),
    ):
        result = run(*line.split())
        assert result.code == 2
        assert what in result.err.splitlines()[0]
        assert example in result.err


def test_an_empty_library_is_said(run: Any) -> None:
    run("init")
    for words in (["route", "--prompt", "a"], ["cluster"]):
        result = run(*words, "--json")
        assert result.code == 3
        assert "the library is empty" in result.error["message"]
    assert "empty" in run("show", "x", "--json").error["hint"]


def test_a_taken_name_is_a_conflict(run: Any, library: Library, tmp_path: Path) -> None:
    write_directory(pack(make_expert(5)), tmp_path / "new")
    before = state(library)
    result = run("add", "new", "--name", "poems", "--json")
    assert (result.code, result.error["code"]) == (5, 5)
    assert "--replace" in result.error["hint"]
    assert state(library) == before
    assert run("add", "new", "--name", "poems", "--replace").code == 0


@pytest.mark.parametrize("name", ["../evil", "/abs", "a/../../b", "UP", "x.lock", "clusterings/a"])
def test_tricks_in_names(run: Any, library: Library, tmp_path: Path, name: str) -> None:
    write_directory(pack(make_expert(5)), tmp_path / "new")
    before, files = state(library), sorted(tmp_path.rglob("*"))
    assert run("add", "new", "--name", name).code == 2
    assert state(library) == before
    assert sorted(tmp_path.rglob("*")) == files


def test_a_damaged_library_is_said_with_its_code(
    run: Any, library: Library, tmp_path: Path
) -> None:
    root = tmp_path / "library"
    (root / "refs" / "poems" / "latest").write_text("nonsense")
    for words in (["list"], ["show", "sums"], ["verify"]):
        assert run(*words, "--json").code == 4
    (root / "FORMAT").chmod(0o644)
    (root / "FORMAT").write_text("{")
    assert run("list").code == 4
    assert run("doctor").code == 1
