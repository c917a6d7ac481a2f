"""config: which setting holds, who says so, and what changing one leaves as it was; colours."""

import ast
import os
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import typer
from adaptlib.cli.commands import COMMANDS, load
from adaptlib.cli.config_edit import with_setting, without_setting
from adaptlib.cli.environment import VARIABLES
from adaptlib.cli.main import application
from adaptlib.cli.settings import settable
from hypothesis import given
from hypothesis import strategies as st

from adaptlib.errors import UsageError
from adaptlib.experts import Library
from adaptlib.experts.location import library_path
from adaptlib.experts.settings import SettingsFile, find, parse, settings_files, user_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory within a directory, where no environment variable names a library."""
    inner = tmp_path / "project" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    monkeypatch.delenv("ADAPTLIB_LIBRARY", raising=False)
    return inner


def user_says(text: str) -> Path:
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def said(run: Any, key: str) -> tuple[Any, str]:
    [one] = run("config", "get", key, "--json").document["settings"]
    assert one["key"] == key
    return one["value"], one["origin"]


# --- which holds -----------------------------------------------------------------------------


def test_the_strongest_says_where_the_library_is(
    run: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTLIB_LIBRARY", raising=False)
    monkeypatch.chdir(place)
    assert library_path()[1] == "the user data directory"
    user = user_says('# mine\nlibrary = "experts"\n')
    assert library_path() == (user.parent / "experts", f"{user}:2")
    outer = place.parent.parent / ".adaptlib"
    Library.open(outer, create=True)
    assert library_path() == (outer, f".adaptlib in {outer.parent}")
    project = place.parent / ".adaptlib.toml"
    project.write_text('library = "../shared"\n')
    assert library_path() == (place.parent.parent / "shared", f"{project}:1")
    Library.open(place / ".adaptlib", create=True)
    assert library_path() == (place / ".adaptlib", f".adaptlib in {place}")
    monkeypatch.setenv("ADAPTLIB_LIBRARY", "elsewhere")
    assert library_path() == (Path("elsewhere"), "ADAPTLIB_LIBRARY")
    assert library_path("here") == (Path("here"), "--library")
    missing = run("list")
    assert "elsewhere (ADAPTLIB_LIBRARY)" in missing.err
    monkeypatch.delenv("ADAPTLIB_LIBRARY", raising=False)
    (place / ".adaptlib" / "FORMAT").unlink()
    missing = run("list")
    assert missing.code == 3
    assert f"({project}:1)" in missing.err


def test_options_of_a_command_have_defaults_from_files(run: Any, library: Library) -> None:
    user = user_says('[list]\nsort = "name:desc"\n')
    assert run("list", "-q").out.split() == ["team/sql:v1", "sums", "poems", "best"]
    assert run("ls", "-q").out.split() == ["team/sql:v1", "sums", "poems", "best"]
    assert run("list", "-q", "--sort", "name").out.split()[0] == "best"
    assert run("--no-config", "list", "-q").out.split()[0] == "best"
    assert said(run, "list.sort") == (["name:desc"], f"{user}:2")
    Path(".adaptlib.toml").write_text('[list]\nsort = ["rank", "name"]\nno_truncate = true\n')
    assert run("list", "-q").out.split() == ["best", "poems", "team/sql:v1", "sums"]
    assert "sha256:" in run("list").out
    found = {one["key"]: one for one in run("config", "--json").document["settings"]}
    assert found["list.sort"]["origin"] == f"{Path('.adaptlib.toml').absolute()}:2"
    assert found["list.no-truncate"]["value"] is True


def test_pyproject_is_a_project_file_where_it_has_our_table(run: Any, library: Library) -> None:
    path = Path("pyproject.toml").absolute()
    path.write_text("[project]\nname = 'x'\n[tool.adaptlibrary]\ncolor = 1\n")
    assert settings_files() == ()
    path.write_text("this is not TOML, and not ours to say so\n")
    assert run("list").code == 0
    path.write_text(
        "[project]\nname = 'x'\n\n[tool.adaptlib]\ncolor = 'never'\n"
        "[tool.adaptlib.list]\nsort='rank'\n"
    )
    assert said(run, "color") == ("never", f"{path}:5")
    assert said(run, "list.sort") == (["rank"], f"{path}:7")
    Path(".adaptlib.toml").write_text("color = 'always'\n")
    assert said(run, "color")[0] == "always"
    assert said(run, "list.sort") == (None, "default")


def test_nobody_plants_settings_where_everybody_may_write(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.parent / ".adaptlib.toml").write_text('library = "/evil"\n')
    assert len(settings_files()) == 1
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert len(settings_files()) == 1
    place.parent.chmod(0o1777)
    assert settings_files() == ()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert len(settings_files()) == 1


def test_files_can_be_left_out(run: Any, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    user_says("nonsense")
    assert run("list").code == 2
    assert run("--no-config", "list").code == 0
    assert run("list").code == 2
    monkeypatch.setenv("ADAPTLIB_NO_CONFIG", "1")
    assert run("list").code == 0


def test_the_version_reads_no_file(run: Any, library: Library) -> None:
    user_says("nonsense")
    assert run("--version").code == 0
    assert run("--help").code == 0


def test_where_the_users_file_is() -> None:
    assert user_file() == platformdirs.user_config_path("adaptlib", appauthor=False) / "config.toml"


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("library = 3\n", 1, "library is 3, wanted text"),
        ("library = ''\n", 1, "wanted text"),
        ("\ncolor = 'nevr'\n", 2, "did you mean never?"),
        ("colour = 'never'\n", 1, "there is no setting 'colour'; did you mean color?"),
        ("color = 'never'\n[rout]\ntop-k = 2\n", None, "did you mean route?"),
        ("list = 3\n", 1, "wanted a table of its options"),
        ("[list]\nsrot = 'x'\n", 2, "there is no setting 'list.srot'; did you mean sort?"),
        ("[list]\nno-truncate = 'yes'\n", 2, "wanted true or false"),
        ("[list]\nsort = true\n", 2, "wanted a list"),
        ("[list.sort]\na = 1\n", None, "wanted a list"),
        ("a = 1\na = 2\n", 2, "cannot be read"),
        ("a = \n", 1, "is not TOML"),
        ("[list\n", 1, "is not TOML"),
        ("x = " + "[" * 5000, None, "cannot be read"),
    ],
)
def test_a_bad_file_is_said_with_its_line(
    run: Any, library: Library, text: str, line: int | None, says: str
) -> None:
    path = user_says(text)
    result = run("list", "--json")
    assert result.code == 2
    assert says in result.error["message"]
    assert f"{path}:{line}" in result.error["message"] or line is None
    assert result.error["hint"]


def test_a_bad_value_of_an_option_is_said_with_its_line(run: Any, routed_library: Library) -> None:
    path = user_says("[route]\nrouter = 'arrow'\ntop-k = 'many'\n")
    result = run("route", "--prompt", "x", "--json")
    assert result.code == 2
    assert f"{path}:3: route.top-k is 'many'" in result.error["message"]
    assert "adaptlib route --help" in result.error["hint"]
    assert run("list").code == 0


def test_files_that_cannot_be_text_or_files(run: Any, library: Library) -> None:
    path = user_says("")
    path.write_bytes(b"a = 1\nb = '\xff'\n")
    result = run("list")
    assert result.code == 2
    assert f"{path}:2" in result.err
    assert "UTF-8" in result.err
    path.unlink()
    path.mkdir()
    assert run("list").code == 0
    Path(".adaptlib.toml").mkdir()
    assert run("list").code == 0


def test_config_and_doctor_work_with_a_bad_file(run: Any, library: Library) -> None:
    path = user_says("nonsense")
    assert str(path) in run("config", "path").out
    assert run("config", "env").code == 0
    for words in (["config"], ["config", "set", "color", "never"], ["config", "get", "color"]):
        result = run(*words)
        assert result.code == 2
        assert f"{path}:1" in result.err
    assert path.read_text() == "nonsense"


def test_no_file_may_say_what_is_for_once_or_needs_consent() -> None:
    """A project that somebody sends cannot make a command write a file, remove or overwrite."""
    group: Any = typer.main.get_command(application(*COMMANDS))
    some = {}
    for name in COMMANDS:
        known = settable(name, group.commands[name])
        some[name] = set(known)
        hints = typing.get_type_hints(load(name))
        for option, param in known.items():
            assert Path not in (typing.get_args(hints[param.name]) or (hints[param.name],)), option
    everything = set().union(*some.values())
    writes = {"plot", "html", "report", "save", "save-recipe", "log", "out", "layout-file"}
    consent = {"yes", "replace", "force", "allow-empty", "repair", "restore", "demo"}
    scripts = {"json", "plain", "quiet", "fields", "filter", "limit", "library", "help"}
    assert not everything & (writes | consent | scripts)
    assert {"top-k", "router", "threshold"} <= some["route"]
    assert {"rank", "lr", "epochs", "best-epoch"} <= some["train"]
    assert some["list"] == {"sort", "no-truncate"}


# --- changing it -----------------------------------------------------------------------------


def test_set_get_unset(run: Any, library: Library) -> None:
    assert run("config", "set", "color", "never").code == 0
    assert user_file().read_text() == 'color = "never"\n'
    assert run("config", "set", "train.lr", "1e-4", "--user").code == 0
    assert run("config", "set", "train.epochs", "3").code == 0
    assert run("config", "set", "train.best-epoch", "false").code == 0
    assert run("config", "set", "train.target", "q_proj, v_proj").code == 0
    assert user_file().read_text() == (
        'color = "never"\n\n[train]\nlr = 1e-4\nepochs = 3\nbest-epoch = false\n'
        'target = ["q_proj", "v_proj"]\n'
    ).replace("1e-4", '"1e-4"')
    assert run("config", "get", "train.target").out == "q_proj,v_proj\n"
    assert run("config", "get", "train.best_epoch").out == "false\n"
    assert run("config", "get", "train.kind").out == "lora\n"
    assert run("config", "get", "train.rank") == (0, "", "")
    assert said(run, "train.epochs") == (3, f"{user_file()}:5")
    assert run("config", "unset", "train.epochs").code == 0
    assert "epochs" not in user_file().read_text()
    absent = run("config", "unset", "train.epochs")
    assert absent.code == 3
    assert run("config", "set", "color", "always", "--project").code == 0
    assert Path(".adaptlib.toml").read_text() == 'color = "always"\n'
    weaker = run("config", "set", "color", "auto")
    assert "goes before it" in weaker.err
    assert said(run, "color")[0] == "always"


def test_a_path_means_the_same_from_where_it_was_said(
    run: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTLIB_LIBRARY", raising=False)
    monkeypatch.chdir(place)
    run("config", "set", "library", "lib")
    assert tomllib.loads(user_file().read_text()) == {"library": str(place / "lib")}
    run("config", "set", "library", "lib", "--project")
    assert Path(".adaptlib.toml").read_text() == 'library = "lib"\n'
    run("config", "set", "library", "~/lib")
    assert tomllib.loads(user_file().read_text()) == {"library": "~/lib"}
    assert library_path()[0] == place / "lib"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["list", "color"], 2, "takes 0 words"),
        (["get"], 2, "adaptlib config get KEY"),
        (["set", "color"], 2, "adaptlib config set KEY VALUE"),
        (["sett", "color", "never"], 2, "did you mean set?"),
        (["set", "colr", "never"], 2, "did you mean color?"),
        (["set", "color", "nevr"], 2, "did you mean never?"),
        (["set", "route.topk", "3"], 2, "did you mean top-k?"),
        (["set", "rout.top-k", "3"], 2, "did you mean route?"),
        (["set", "route", "3"], 2, "has a setting for each option"),
        (["set", "route.top-k", "x"], 2, "route.top-k is 'x'"),
        (["set", "list.no-truncate", "x"], 2, "wanted true or false"),
        (["set", "add.replace", "true"], 2, "there is no setting 'add.replace'"),
        (["set", "route.plot", "x.svg"], 2, "there is no setting 'route.plot'"),
        (["get", "route.nothing"], 2, "there is no setting"),
        (["set", "color", "never", "--user", "--project"], 2, "choose one"),
        (["--plain", "--json"], 2, "two forms"),
    ],
)
def test_bad_words_change_nothing(run: Any, words: list[str], code: int, says: str) -> None:
    result = run("config", *words)
    assert (result.code, result.out) == (code, "")
    assert says in result.err
    assert not user_file().exists()
    assert not Path(".adaptlib.toml").exists()


FILE = """\
# what I like
color = "auto"   # for now

[train]
lr = 1e-4
target = [
  "q_proj",  # both
  "v_proj",
]

# about routes
[route]
top_k = 4
"""


def edited(text: str, *keys: str, value: Any = None, table: tuple[str, ...] = ()) -> str:
    path = Path("pyproject.toml" if table else "x.toml")
    file = SettingsFile("user", path, table, text, parse(text, path, table))
    return without_setting(file, keys) if value is None else with_setting(file, keys, value)


def test_a_change_leaves_other_lines_as_they_are() -> None:
    assert edited(FILE, "color", value="never") == FILE.replace(
        'color = "auto"   # for now', 'color = "never"  # for now'
    )
    assert edited(FILE, "route", "top-k", value=2) == FILE.replace("top_k = 4", "top_k = 2")
    assert edited(FILE, "train", "epochs", value=3) == FILE.replace(
        '"v_proj",\n]\n', '"v_proj",\n]\nepochs = 3\n'
    )
    assert edited(FILE, "library", value="x") == FILE.replace(
        "for now\n", 'for now\nlibrary = "x"\n'
    )
    assert edited(FILE, "eval", "rows", value=9) == FILE + "\n[eval]\nrows = 9\n"
    assert edited(FILE, "train", "lr") == FILE.replace("lr = 1e-4\n", "")
    crlf = FILE.replace("\n", "\r\n")
    assert edited(crlf, "train", "lr", value=2) == crlf.replace("lr = 1e-4", "lr = 2")
    ours = "[tool.other]\nx = 1\n\n[tool.adaptlib]\ncolor = 'auto'\n\n[tool.last]\n"
    assert edited(ours, "color", value="never", table=("tool", "adaptlib")) == ours.replace(
        "color = 'auto'", 'color = "never"'
    )
    assert edited(ours, "route", "top-k", value=2, table=("tool", "adaptlib")) == (
        ours + "\n[tool.adaptlib.route]\ntop-k = 2\n"
    )


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("train = {lr = 1, rank = 2}\n", ("train", "rank")),
        ("[train]\ntarget = [\n 1,\n]\n", ("train", "target")),
        ('[train]\ntask = """\n[train]\nlr = 3\n"""\nlr = 4\n', ("train", "lr")),
    ],
)
def test_what_is_not_on_a_line_of_its_own_is_refused(text: str, keys: tuple[str, ...]) -> None:
    for value in (7, None):
        with pytest.raises(UsageError, match="not on a line of its own"):
            edited(text, *keys, value=value)


VALUES = st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=5)
KEYS = st.sampled_from([("library",), ("train", "lr"), ("train", "top-k"), ("route", "top-k")])


@given(st.lists(st.tuples(KEYS, st.none() | VALUES | st.lists(st.text(max_size=3), max_size=2))))
def test_a_file_says_what_was_set_last(steps: list[tuple[tuple[str, ...], Any]]) -> None:
    text, expected = "# a file\n", {}
    for keys, value in steps:
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            continue
        if value is None and keys not in expected:
            continue
        text = edited(text, *keys, value=value)
        expected.pop(keys, None)
        if value is not None:
            expected[keys] = value
        assert text.startswith("# a file\n") or "# a file\n" in text
    found = tomllib.loads(text)
    flat = {(key,): value for key, value in found.items() if not isinstance(value, dict)}
    for table in ("train", "route"):
        flat |= {(table, key): value for key, value in found.get(table, {}).items()}
    assert flat == expected
    for keys in expected:
        assert find(text, keys) is not None


def test_a_file_is_replaced_whole_and_a_link_stays_one(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "dotfiles" / "config.toml"
    real.parent.mkdir()
    real.write_text("color = 'auto'\n")
    real.chmod(0o600)
    user_file().parent.mkdir(parents=True)
    user_file().symlink_to(real)
    assert run("config", "set", "color", "never").code == 0
    assert user_file().is_symlink()
    assert real.read_text() == 'color = "never"\n'
    assert real.stat().st_mode & 0o777 == 0o600

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failed = run("config", "set", "color", "always")
    assert failed.code == 1
    assert real.read_text() == 'color = "never"\n'
    assert [one.name for one in real.parent.iterdir()] == ["config.toml"]


# --- what is printed -------------------------------------------------------------------------


def test_settings_and_files_and_variables_are_listed(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("COLUMNS", "300")
    listed = run("config")
    assert re.search(r"library +.*/library +ADAPTLIB_LIBRARY", listed.out)
    assert run("config", "-q").out.split() == ["library", "color"]
    assert run("config", "--plain").out.splitlines()[0] == "setting\tvalue\torigin"
    assert run("config", "-L", "x", "--json").document["settings"][0]["origin"] == "--library"
    assert "not there" in run("config", "path").out
    assert run("config", "path", "-q").out == f"{user_file()}\n"
    user_says("")
    assert run("config", "path", "--plain").out.endswith("true\n")
    variables = run("config", "env")
    assert all(name in variables.out for name in VARIABLES)
    for form in ("--json", "--plain", "-q"):
        shown = run("config", "env", form)
        assert shown.code == 0
        assert "hf_secret" not in shown.out + variables.out


def test_every_variable_that_is_read_is_documented() -> None:
    """Whatever the code asks the environment for is in `adaptlib config env`."""
    asked = set()
    for folder in ("adaptlib", "cli", "library_store"):
        for path in (ROOT / folder).rglob("*.py"):
            if "bundle" not in path.parts:
                asked |= set(_asked(ast.parse(path.read_text())))
    assert {"ADAPTLIB_LIBRARY", "NO_COLOR", "COLUMNS", "TERM", "XDG_CONFIG_HOME"} <= asked
    assert asked <= VARIABLES.keys()


def _asked(tree: ast.AST) -> Any:
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            called, key = ast.unparse(node.value), node.slice
        elif isinstance(node, ast.Call) and node.args:
            called, key = ast.unparse(node.func), node.args[0]
        else:
            continue
        if not re.fullmatch(r"(os\.)?(environ(\.get|\.pop|\.setdefault)?|getenv)", called):
            continue
        if isinstance(key, ast.Constant):
            yield key.value
        elif isinstance(key, ast.Name) and key.id in constants:
            yield constants[key.id]
        elif isinstance(key, ast.Name) and key.id == "VARIABLE":  # of another module
            yield "ADAPTLIB_LIBRARY"
        elif isinstance(key, ast.Name):  # over names that are written out in the same function
            names = [c.value for c in ast.walk(tree) if isinstance(c, ast.Constant)]
            yield from (
                n for n in names if isinstance(n, str) and re.fullmatch(r"[A-Z]+_[A-Z_]+", n)
            )
