"""Hostile names, of everything that has one: refused in a sentence, and never a path."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import make
from tests.hostile.conftest import Outcome, Run, tree

NAMES: dict[str, str] = {
    "empty": "",
    "space": " ",
    "dot": ".",
    "dots": "..",
    "up": "../evil",
    "up-far": "../../../../../../tmp/evil",
    "up-inside": "a/../../evil",
    "up-encoded": "%2e%2e%2fevil",
    "up-backslash": "..\\..\\evil",
    "up-mixed": "a/..\\evil",
    "up-overlong": "..\u2215evil",
    "here": "./a",
    "absolute": "/tmp/evil",
    "home": "~/evil",
    "drive": "C:evil",
    "drive-backslash": "C:\\evil",
    "unc": "\\\\server\\share",
    "unc-slashes": "//server/share",
    "device-path": "\\\\?\\C:\\evil",
    "url": "file:///etc/passwd",
    "nul": "a\0b",
    "newline": "a\nb",
    "carriage-return": "a\rError: no",
    "tab": "a\tb",
    "escape": "a\x1b[31mb",
    "title": "\x1b]0;evil\x07",
    "c1": "a\x9b31mb",
    "bell": "\x07",
    "trailing-dot": "a.",
    "trailing-space": "a ",
    "leading-dot": ".hidden",
    "device": "con",
    "device-with-suffix": "nul.txt",
    "device-in-part": "a/aux",
    "stream": "a:$data",
    "upper-case": "SQL",
    "turkish-i": "sqİ",
    "look-alike": "\u0455ql",  # Cyrillic
    "full-width": "\uff53\uff51\uff4c",
    "not-nfc": "cafe\u0301",
    "bidi": "a\u202eb",
    "zero-width": "a\u200bb",
    "no-character": "a\ufffeb",
    "half-a-pair": "a\ud800b",
    "not-utf-8": "a\udcffb",
    "long": "a" * 201,
    "very-long": "a" * 100_000,
    "deep": "/".join("abcdefghi"),
    "two-slashes": "a//b",
    "slash-at-end": "a/",
    "two-colons": "a:b:c",
    "digest": "sha256:" + "0" * 64,
    "digest-name": "sha256",
    "option": "--library",
    "dash": "-",
    "lock": "a.lock",
    "temporary": "a.tmp",
    "log": "a.jsonl/b",
    "reserved": "clusterings/a",
    "reserved-pin": "pins/a",
    "shell": "a;touch ran",
    "substitution": "$(touch ran)",
    "wildcard": "*",
    "python": "__import__('os')",
}

SPECS: dict[str, str] = {
    name: f"hf://{text}"
    for name, text in {
        "nothing": "",
        "one-word": "repo",
        "up": "../..",
        "up-in-folder": "org/repo/../../../etc",
        "absolute-folder": "org/repo//etc/passwd",
        "backslash": "org\\repo",
        "folder-backslash": "org/repo/a\\..\\b",
        "drive": "org/repo/C:",
        "nul": "org/re\0po",
        "newline": "org/repo\n@main",
        "escape": "org/\x1b[2J",
        "revision-up": "org/repo@../../x",
        "revision-path": "org/repo@refs/pr/1/../..",
        "revision-empty": "org/repo@",
        "revision-option": "org/repo@--upload-pack",
        "host": "evil.example:80/org/repo",
        "user": "user:pass@evil.example/repo",
        "query": "org/repo?x=1",
        "fragment": "org/repo#x",
        "encoded": "org/repo/%2e%2e",
        "wildcard": "org/repo/*",
        "trailing-dot": "org/repo/a.",
        "trailing-space": "org/repo/a ",
        "long": "a" * 50_000 + "/b",
        "look-alike": "\u043erg/repo",  # Cyrillic
        "bidi": "org/repo/\u202ea",
        "half-a-pair": "org/repo/\ud800",
    }.items()
}

USES: dict[str, Callable[[str, Path], list[str | Path]]] = {
    "add": lambda name, source: ["add", source, f"--name={name}"],
    "tag": lambda name, _: ["tag", "good", "--", name],
    "mv": lambda name, _: ["mv", "good", "--", name],
    "rm": lambda name, _: ["rm", "--", name],
    "show": lambda name, _: ["show", "--", name],
    "log": lambda name, _: ["log", "--", name],
    "export": lambda name, _: ["export", "--", name, "exported"],
    "cluster": lambda name, _: ["show", "--", f"clusterings/{name}"],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from adaptlib.experts import Library

    folder = tmp_path_factory.mktemp("names")
    opened = Library.open(folder / "library", create=True)
    opened.add(make.adapter(folder / "good"), "good")
    opened.add(make.adapter(folder / "other", weights=make.pair(1)), "other")
    return folder / "library"


def refused(outcome: Outcome, codes: tuple[int, ...]) -> None:
    assert outcome.code in codes, (outcome.code, outcome.out[:300], outcome.err[-1500:])
    assert outcome.deeds == []
    said = outcome.err + outcome.out
    assert "Traceback" not in said
    assert "bug in adaptlib" not in said
    assert all(line.isprintable() for line in said.split("\n")), said
    assert len(said) < 1200, said[:2000]


# Every name for the use that makes one, and each other use with some of them.
PAIRS = [("add", name) for name in NAMES]
PAIRS += [(use, name) for i, use in enumerate(USES) for name in list(NAMES)[i::9] if use != "add"]


@pytest.mark.parametrize(("use", "name"), PAIRS)
def test_a_hostile_name_is_refused(
    use: str, name: str, watched: Run, library: Path, tmp_path: Path
) -> None:
    before = tree(library)
    words = USES[use](NAMES[name], library.parent / "good")
    outcome = watched(*words[:1], "-L", library, *words[1:], write=[library, tmp_path / "here"])
    refused(outcome, (0, 2, 3, 7) if use == "log" else (2, 3, 7))
    assert tree(library) == before
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("spec", SPECS)
def test_a_hostile_place_on_the_hub_is_refused_before_anybody_is_asked(
    spec: str, watched: Run, library: Path
) -> None:
    before = tree(library)
    refused(watched("add", SPECS[spec], "-L", library, write=[library]), (2, 7))
    assert tree(library) == before


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a\0b",
        "a" * 5000,
        "/" + "a/" * 3000,
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/proc/self/fd/0",
        "/etc/passwd",
        "~nobody-of-this-name/x",
        "\x1b[2J",
        "-",
        "a\ud800",
        "../../../../../..",
    ],
    ids=repr,
)
def test_a_hostile_library_path_is_refused(path: str, watched: Run) -> None:
    if len(path) > 500:
        path = path[:5000]
    refused(watched("list", f"--library={path}"), (2, 3, 4))


@pytest.mark.parametrize(
    "source",
    ["a\0b", "a" * 5000, "/dev/zero", "/proc/self/mem", "~nobody/x", "", "\ud800", "\x1b[2J"],
)
@pytest.mark.parametrize("json", [True, False])
def test_a_hostile_source_is_refused(source: str, json: bool, watched: Run, library: Path) -> None:
    outcome = watched("add", "-L", library, *["--json"] * json, "--", source, write=[library])
    refused(outcome, (2, 3, 7))


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) + len(SPECS) >= 40
