"""The arrows of DESIGN.md, section 3: who may import whom, and who never pays for torch."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "sklearn", "scipy", "matplotlib", "peft")

# cli -> papers -> evaluation -> learned -> {clustering, merging, routing, training} -> experts
# -> library_store
SIBLINGS = ("clustering", "merging", "routing", "training")
BELOW = {
    "cli": ("papers", "evaluation", "learned", *SIBLINGS, "experts", "demo"),
    "papers": ("evaluation", "learned", *SIBLINGS, "experts"),
    "evaluation": ("learned", *SIBLINGS, "experts"),
    "learned": (*SIBLINGS, "experts"),
    **dict.fromkeys(SIBLINGS, ("experts",)),
    "experts": (),
    "demo": ("evaluation", *SIBLINGS, "experts"),
}
# of no layer; they import nothing of ours but these
EVERYBODYS = ("adaptlib.errors", "adaptlib.figures", "adaptlib.paths")


def modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "bundle" not in path.parts]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in a file, in functions and for types too, and the
    level of a relative import. `from a import b` gives `a.b` as well, where b may be a module."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.module:
                yield node.module, node.level
            for name in names:
                yield f"{node.module}.{name}" if node.module else name, node.level


def lazily(path: Path) -> set[str]:
    """What a file takes from `adaptlib` itself, which could be of any layer."""
    tree = ast.parse(path.read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "adaptlib"
    }


def layers(name: str) -> str | None:
    """The part of adaptlib that a module name is in."""
    parts = name.split(".")
    return parts[1] if parts[0] == "adaptlib" and len(parts) > 1 and parts[1] in BELOW else None


@pytest.mark.parametrize("layer", [name for name in BELOW if name != "cli"])
def test_a_layer_imports_itself_and_what_is_below(layer: str) -> None:
    folder = ROOT / "adaptlib" / layer
    for path in modules(folder):
        for name, level in imports(path):
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert level == 0, f"{where} relatively"
            assert not name.startswith("adaptlib.cli"), where
            other = layers(name)
            assert other in (None, layer, *BELOW[layer]), where
            if name in ("adaptlib", "adaptlib.__version__"):
                assert lazily(path) <= {"__version__"}, where
            elif other is None and name.split(".")[0] == "adaptlib":
                assert name.startswith(EVERYBODYS), f"{where}; say which part"


def test_what_is_everybodys_imports_nothing_of_ours() -> None:
    for name in EVERYBODYS:
        for found, _ in imports(ROOT / f"{name.replace('.', '/')}.py"):
            assert not found.startswith("library_store")
            assert found.split(".")[0] != "adaptlib" or found.startswith(EVERYBODYS)


def test_the_store_imports_the_standard_library_and_itself() -> None:
    for path in modules(ROOT / "library_store"):
        for name, level in imports(path):
            top = name.split(".")[0]
            known = top == "library_store" or top in sys.stdlib_module_names
            assert level or known, f"{path.name} imports {name}"


def test_the_command_line_is_a_package_inside_adaptlib() -> None:
    """`cli/` is installed as adaptlib.cli, so it must not name itself."""
    for path in modules(ROOT / "cli"):
        for name, level in imports(path):
            where = f"cli/{path.name} imports {name}"
            assert level in (0, 1), where
            assert level or name.split(".")[0] != "cli", where
            assert level or not name.startswith("adaptlib.cli"), where


def test_nobody_below_knows_the_command_line() -> None:
    for path in [*modules(ROOT / "adaptlib"), *modules(ROOT / "library_store")]:
        for name, _ in imports(path):
            assert not name.startswith(("cli", "adaptlib.cli", "typer", "click", "rich")), path


def loaded(code: str, *arguments: str, cwd: Path) -> tuple[int, list[str]]:
    """The exit code and the heavy packages that a fresh interpreter has after this code."""
    script = f"{code}\nimport json, sys\nprint()\nprint(json.dumps([code, sorted(sys.modules)]))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    code_, names = json.loads(done.stdout.splitlines()[-1])
    return code_, [name for name in HEAVY if name in names]


def test_importing_adaptlib_costs_nothing(tmp_path: Path) -> None:
    code = "code = 0\nimport adaptlib, adaptlib.experts, library_store"
    assert loaded(code, cwd=tmp_path) == (0, [])


def test_every_public_name_is_there() -> None:
    import adaptlib

    names = [name for name in dir(adaptlib) if not name.startswith("_")]
    assert {"Arrow", "Expert", "Library", "LoRADelta", "SparseDelta", "attach", "mbc"} <= {*names}
    assert [name for name in names if not hasattr(adaptlib, name)] == []
    assert list(adaptlib._HOME) == sorted(adaptlib._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        adaptlib.nothing  # noqa: B018


def expert_directory(directory: Path) -> None:
    """An adaptlib directory, without torch."""
    import numpy as np

    from adaptlib.experts.codec import Module, Packed, write_directory
    from adaptlib.experts.tensors import RawTensor

    def raw(*shape: int) -> RawTensor:
        data = np.ones(shape, np.float32).reshape(-1).view(np.uint8)
        return RawTensor("F32", shape, memoryview(data))

    tensors = {"m.lora_a": raw(2, 5), "m.lora_b": raw(3, 2)}
    packed = Packed("lora", "org/base", {"m": Module((3, 5), rank=2, scale=1.0)}, tensors)
    write_directory(packed, directory)


def test_no_command_imports_torch_before_it_needs_it(tmp_path: Path) -> None:
    """One interpreter runs them all in turn, so whichever is heavy fails here by name."""
    expert_directory(tmp_path / "one")
    commands = [
        ["--version"],
        ["--help"],
        ["route", "--help"],
        ["init", "library"],
        ["add", "one", "-L", "library"],
        ["list", "-L", "library"],
        ["list", "-L", "library", "--json"],
        [
            "list",
            "-L",
            "library",
            "--filter",
            "rank>1",
            "--sort",
            "added",
            "--fields",
            "name,added",
        ],
        ["config", "-L", "library"],
        ["doctor", "--no-device", "-L", "library"],
        ["show", "one", "-L", "library"],
        ["tag", "one", "one:v1", "-L", "library"],
        ["mv", "one:v1", "two", "-L", "library"],
        ["log", "one", "-L", "library"],
        ["verify", "-L", "library"],
        ["verify", "--deep", "-L", "library"],
        ["export", "one", "out", "-L", "library"],
        ["export", "one", "out2", "--format", "adaptlib", "-L", "library"],
        ["add", "out", "--name", "back", "-L", "library"],
        ["rm", "two", "-L", "library"],
        ["gc", "-L", "library"],
    ]
    code = (
        "import json, sys\nfrom adaptlib.cli.main import invoke\ncode = []\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    status = invoke(command)\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    code.append([command, status, heavy])\n"
    )
    results, _ = loaded(code, json.dumps(commands), cwd=tmp_path)
    assert results == [[command, 0, []] for command in commands]


def test_listing_waits_for_neither_numpy_nor_pydantic(tmp_path: Path) -> None:
    """Each takes as long as everything else that a list does."""
    expert_directory(tmp_path / "one")
    code = (
        "import sys\nfrom adaptlib.cli.main import invoke\n"
        "invoke(sys.argv[1:])\n"
        "code = [name for name in ('numpy', 'pydantic', 'rich') if name in sys.modules]\n"
    )
    for words in (["init", "library"], ["add", "one", "-L", "library"]):
        loaded(code, *words, cwd=tmp_path)
    for words in (["list"], ["list", "-q"], ["list", "--json"], ["list", "--sort", "task"]):
        heavy, _ = loaded(code, *words, "-L", "library", cwd=tmp_path)
        assert heavy == [], words


def test_the_readme_names_every_part() -> None:
    readme = (ROOT / "README.md").read_text()
    parts = [*(ROOT / "adaptlib").iterdir()]
    parts += [ROOT / name for name in ("cli", "library_store", "tests", "benchmarks", "examples")]
    for part in parts:
        if part.name.startswith("__"):
            continue
        wanted = f"{part.name}/" if part.is_dir() else part.name
        assert wanted in readme, f"README.md does not mention {part.relative_to(ROOT)}"
