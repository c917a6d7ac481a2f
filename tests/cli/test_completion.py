"""Completion: what comes next on a line, in real shells, without torch, and never an error."""

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from adaptlib.cli import commands, completion, main, values
from adaptlib.cli.complete import complete, split

from adaptlib.experts import Library
from tests.tiny import make_expert

NEEDS = pytest.mark.skipif
SLOW = ("torch", "numpy", "transformers", "scipy", "sklearn", "matplotlib", "rich")


@pytest.fixture
def names(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library of commands, with saved results; and another one beside it."""
    from adaptlib.experts.records import save_record

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTLIB_LIBRARY", str(tmp_path / "library"))
    poems, sums = library.digest("poems"), library.digest("sums")
    groups = {"clusters": {"0": ["poems"], "1": ["sums"]}, "labels": {"0": "of the sea"}}
    held = {"experts": {"poems": poems, "sums": sums}}
    save_record(library.store, "clusterings", "tasks", {**groups, **held})
    save_record(library.store, "routers", "mine", {"router": "arrow", **held})
    save_record(library.store, "routers", "skills", {"router": "mhr", **held})
    library.pin("poems", "paper")
    other = Library.open(tmp_path / "other library", create=True)
    other.add(make_expert(5), "elsewhere")
    return library


def offered(*words: str) -> list[str]:
    """What is offered for the last word."""
    return [value for value, _ in complete(words).values]


EXPERTS = ["best", "poems", "sums", "team/sql:v1"]
CASES: list[tuple[tuple[str, ...], list[str]]] = [
    (("rou",), ["route"]),
    (("train",), ["train", "train-library", "train-router"]),
    (("help", "ver"), ["verify"]),
    (("help", "verify", ""), []),
    (("--ver",), ["--version"]),
    (("--color", "al"), ["always"]),
    (("--color", "never", "sho"), ["show"]),
    (("--color", "never", "show", "po"), ["poems"]),
    (("show", ""), [*EXPERTS, "clusterings/tasks", "routers/mine", "routers/skills"]),
    (("show", "po"), ["poems"]),
    (("show", "team/sql:"), ["team/sql:v1"]),
    (("show", "nothing"), []),
    (("show", "poems", ""), []),
    (("remove", "po"), ["poems"]),
    (("rm", "poems", "su"), ["sums"]),
    (("diff", "poems", "su"), ["sums"]),
    (("mv", "poems", ""), []),
    (("tag", "su"), ["sums"]),
    (("log", "--json", "su"), ["sums"]),
    (("unpin", ""), ["paper"]),
    (("merge", "poems", "cluster:"), ["cluster:tasks/0", "cluster:tasks/1"]),
    (("merge", "--method", "dare"), ["dare_linear", "dare_ties"]),
    (("merge", "--method=dare"), ["--method=dare_linear", "--method=dare_ties"]),
    (("merge", "--kind", ""), ["lora", "sparse"]),
    (("merge", "--weight", "po"), ["poems="]),
    (("merge", "--replay", "po"), ["poems"]),
    (("route", "--router", "arr"), ["arrow", "arrow_tuned"]),
    (("route", "--router", "named:po"), ["named:poems"]),
    (("route", "--router", "saved:"), ["saved:mine", "saved:skills"]),
    (("route", "--router", "mhr:"), ["mhr:skills"]),
    (("route", "--compare", "arrow,uni"), ["arrow,uniform"]),
    (("route", "--experts", "poems,po"), []),
    (("route", "--experts", "poems,su"), ["poems,sums"]),
    (("route", "--task", "poems of"), ["poems of the sea"]),
    (("route", "--pro"), ["--prompt"]),
    (("route", "--prompt", "x", "--pro"), []),
    (("route", "--prompt", ""), []),
    (("route", "--base", "org"), ["org/base"]),
    (("eval", "--router", "or"), ["oracle"]),
    (("eval", "--metric", "loss,exact"), ["loss,exact_match"]),
    (
        ("cluster", "--method", ""),
        ["agglomerative", "category", "hdbscan", "mbc", "random", "text"],
    ),
    (("cluster", "--assign", ""), ["tasks"]),
    (("cluster", "--diff", "tasks", "n"), ["now"]),
    (("cluster", "--diff", "tasks", "now", "--sav"), ["--save"]),
    (("train-library", "tasks/", "--clusters", ""), ["tasks"]),
    (("train-router", "m"), ["mhr", "mope"]),
    (("train-router", "mhr", "tasks", "--from", "sk"), ["skills"]),
    (("train", "x", "--kind", ""), ["lora", "sparse", "full"]),
    (("schema", "train-l"), ["train-library", "train-library-plan"]),
    (("completion", ""), ["bash", "zsh", "fish"]),
    (("list", "--sort", "ra"), ["rank"]),
    (("show", "--", "--jso"), []),
    (("show", "-L", "other library", ""), ["elsewhere"]),
    (("show", "--library=other library", ""), ["elsewhere"]),
    (("show", "-Lother library", ""), ["elsewhere"]),
    (("show", "", "-L"), ["-L"]),
    (("show", "-L", "nowhere", ""), []),
    (("nonsense", "x"), []),
]


@pytest.mark.parametrize(("words", "wanted"), CASES, ids=lambda v: " ".join(v)[:50] or "none")
def test_what_fits_is_offered(names: Library, words: tuple[str, ...], wanted: list[str]) -> None:
    if words[:2] == ("show", "-L") and words[2] == "nowhere":
        with pytest.raises(Exception, match="no library"):
            complete(words)
        return
    assert offered(*words) == wanted


def test_digests_are_offered_to_who_types_one(names: Library) -> None:
    digest = names.digest("poems")
    assert offered("show", digest[:10]) == [digest[:19]]
    assert offered("show", digest[7:12]) == [digest[7:19]]
    assert set(offered("show", "sha256:")) == {d[:19] for d in names.tags().values()}


def test_paths_are_left_to_the_shell(names: Library) -> None:
    for words in (["add", ""], ["train", ""], ["route", "--plot", ""], ["eval", "--tasks", ""]):
        assert complete(words).paths == "files"
    for words in (["list", "-L", ""], ["export", "poems", ""], ["init", ""]):
        assert complete(words).paths == "directories"


def test_all_options_are_offered_and_each_once(names: Library) -> None:
    group: Any = typer.main.get_command(main.application(*commands.COMMANDS))
    for name in commands.COMMANDS:
        found = offered(name, "--")
        assert "--json" in found
        assert "--help" in found
        for param in group.commands[name].params:
            if param.param_type_name == "option" and not param.hidden:
                assert set(param.opts[:1]) <= {*found, "-L", "-q", "-a"}
        assert "--json" not in offered(name, "--json", "--")


def every_parameter() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(main.application(*commands.COMMANDS))
    for name in ("", *commands.COMMANDS):
        for param in (group.commands[name] if name else group).params:
            if param.param_type_name == "argument" or not param.is_flag:
                yield name, param


def test_it_is_said_of_every_parameter_what_it_takes(names: Library) -> None:
    """Words, names, files, or freely nothing: none is forgotten."""
    for command, param in every_parameter():
        source = values.taken(command, param.name)
        if isinstance(source, str):
            assert source in (values.FREE, values.FILES, values.DIRECTORIES)
            continue
        found = list(source(values.Library(None)))
        choices = param.type_descriptor.choices
        if choices is not None:
            assert [value for value, _ in found] == [*choices], (command, param.name)
    known = {(command, param.name) for command, param in every_parameter()}
    assert values.OF_COMMAND.keys() <= known
    assert values.TAKES.keys() <= {name for _, name in known}


def test_words_are_those_of_the_registries() -> None:
    from adaptlib.cli import cluster_run, eval, export, train_router  # noqa: A004

    from adaptlib.learned.train import train_router as learn
    from adaptlib.merging import MERGES
    from adaptlib.routing import ROUTERS
    from adaptlib.training import KINDS, SELECTIONS
    from adaptlib.training.options import SCHEDULES

    def taken(command: str, name: str) -> list[str]:
        source: Any = values.taken(command, name)
        return [value for value, _ in source(values.Library(None))]

    assert set(values.ROUTERS) == ROUTERS.keys()
    assert set(values.MERGES) == MERGES.keys()
    assert set(values.KINDS) == set(KINDS)
    assert set(values.SCHEDULES) == set(SCHEDULES)
    assert set(values.SELECTIONS) == set(SELECTIONS)
    assert values.DTYPES == export.DTYPES
    assert taken("cluster", "method") == [*cluster_run.METHODS]
    assert taken("cluster", "features") == [*cluster_run.FEATURES]
    assert taken("cluster", "plot_kind") == [*cluster_run.PICTURES]
    assert taken("cluster", "layout") == [*cluster_run.LAYOUTS]
    assert taken("eval", "metric") == [*eval.METRICS]
    assert taken("train-router", "router") == [*train_router.ROUTERS]
    assert taken("train-router", "mode") == [*train_router.MODES]
    assert {"router", "scope"} <= inspect.signature(learn).parameters.keys()


@pytest.mark.parametrize(
    ("line", "words", "bare"),
    [
        ("adaptlib ", ["adaptlib", ""], True),
        ("adaptlib show po", ["adaptlib", "show", "po"], True),
        ("adaptlib route --prompt 'a b", ["adaptlib", "route", "--prompt", "a b"], False),
        ("adaptlib route --prompt 'a b' ", ["adaptlib", "route", "--prompt", "a b", ""], True),
        (r"adaptlib show -L a\ b x:", ["adaptlib", "show", "-L", "a b", "x:"], True),
    ],
)
def test_lines_are_split_as_shells_do(line: str, words: list[str], bare: bool) -> None:
    assert split(line) == (words, bare)


# -- real shells ------------------------------------------------------------------------------


@pytest.fixture
def program(names: Library, tmp_path: Path) -> dict[str, str]:
    """An environment in which `adaptlib` is this one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "adaptlib"
    path.write_text(f"#!{sys.executable}\nfrom adaptlib.cli.main import run\nrun()\n")
    path.chmod(0o755)
    paths = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": paths, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}


def bash(program: dict[str, str], lines: list[str]) -> list[list[str]]:
    """What bash offers after each of these lines."""
    script = 'eval "$(adaptlib completion bash)"\n' + "".join(
        f"COMP_LINE={quoted(line)}; COMP_POINT=${{#COMP_LINE}}; _adaptlib adaptlib; "
        "printf '%s\\t' \"${COMPREPLY[@]}\"; echo\n"
        for line in lines
    )
    done = shell(["bash", "--norc", "-c", script], program)
    return [[word for word in row.split("\t") if word] for row in done.splitlines()]


def quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def shell(words: list[str], program: dict[str, str]) -> str:
    done = subprocess.run(
        words, env=program, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    return done.stdout


@NEEDS(not shutil.which("bash"), reason="no bash")
def test_bash_completes(program: dict[str, str], tmp_path: Path) -> None:
    lines = {
        "adaptlib rou": ["route"],
        "adaptlib show po": ["poems"],
        "adaptlib show team/sql:": ["v1"],  # bash takes team/sql: for a word before it
        'adaptlib show "team/sql:': ["team/sql:v1"],
        "adaptlib merge --method=dare_l": ["dare_linear"],
        "adaptlib merge cluster:tasks/": ["tasks/0", "tasks/1"],
        "adaptlib route --prompt 'show po' --router uni": ["uniform"],
        r"adaptlib show -L other\ library el": ["elsewhere"],
        "adaptlib show -L nowhere ": [],
        "adaptlib nonsense ": [],
        "adaptlib add ": [],
    }
    assert bash(program, [*lines]) == [*lines.values()]


@NEEDS(not shutil.which("zsh"), reason="no zsh")
def test_zsh_completes(program: dict[str, str]) -> None:
    """Its own functions, but for the one that draws the list."""
    script = """
        compdef() { :; }
        _describe() { print -rl -- "${values[@]}"; }
        _files() { print -- files "$@"; }
        eval "$(adaptlib completion zsh)"
        try() { words=("$@"); CURRENT=$#; _adaptlib; print -- --; }
        try adaptlib rou
        try adaptlib show team/
        try adaptlib show -L 'other\\ library' el
        try adaptlib list -L ''
        try adaptlib show nothing
    """
    found = shell(["zsh", "-f", "-c", script], program).split("--\n")
    assert found[0] == "route:Choose experts for an input, and answer.\n"
    assert found[1].startswith("team/sql\\:v1:sha256:")
    assert found[2].startswith("elsewhere:sha256:")
    assert found[3] == "files -/\n"
    assert found[4] == ""


@NEEDS(not shutil.which("fish"), reason="no fish")
def test_fish_completes(program: dict[str, str]) -> None:
    def asked(line: str) -> str:
        script = f"adaptlib completion fish | source; complete -C {quoted(line)}"
        return shell(["fish", "--no-config", "-c", script], program)

    assert asked("adaptlib rou") == "route\tChoose experts for an input, and answer.\n"
    assert asked("adaptlib show team/").startswith("team/sql:v1\tsha256:")
    assert asked("adaptlib show -L 'other library' el").startswith("elsewhere\t")
    assert asked("adaptlib show -L nowhere ") == ""


def test_it_answers_without_what_is_slow_and_never_with_an_error(
    names: Library, tmp_path: Path
) -> None:
    code = (
        "import sys; from adaptlib.cli.main import invoke; "
        "code = invoke(['__complete', 'zsh', 'adaptlib', *sys.argv[1:]]); "
        f"print([m for m in {SLOW} if m in sys.modules], code)"
    )
    lines = [["show", ""], ["route", "--router", ""], ["eval", "--"], ["train", "--base", ""]]
    lines += [["merge", "--method", ""], ["show", "-L", "nowhere", ""], ["cluster", "--assign", ""]]
    for words in lines:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1] == "[] 0", words


def test_a_damaged_library_or_a_strange_call_is_silence(
    run: Any, names: Library, tmp_path: Path
) -> None:
    (tmp_path / "library" / "FORMAT").chmod(0o644)
    (tmp_path / "library" / "FORMAT").write_text("{")
    wrong: list[Callable[[], Any]] = [
        lambda: run("__complete", "zsh", "adaptlib", "show", ""),
        lambda: run("__complete"),
        lambda: run("__complete", "zsh"),
        lambda: run("__complete", "bash", "adaptlib show 'x"),
        lambda: run("__complete", "tcsh", "adaptlib", "show", "x"),
    ]
    assert [one() for one in wrong] == [(0, "", "")] * len(wrong)


def test_the_scripts_are_printed(run: Any) -> None:
    for shell_, script in completion.SCRIPTS.items():
        assert run("completion", shell_).out == script
        assert run("completion", shell_, "--json").document["script"] == script
    wrong = run("completion", "zhs", "--json").error
    assert wrong["code"] == 2
    assert "did you mean zsh?" in wrong["message"]
