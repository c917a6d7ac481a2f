"""Libraries from strangers: what is wrong is refused or left out; nothing outside is touched."""

import shutil
from pathlib import Path

import pytest

from tests.hostile import make
from tests.hostile.conftest import Run, tree
from tests.hostile.libraries import LIBRARIES, outside
from tests.soak import report

SECONDS, PEAK, SAID = 2.0, 256.0, 20_000
ALWAYS = (
    ["list"],
    ["show", "evil"],
    ["verify", "--deep"],
    ["tag", "good", "again"],
    ["gc", "--grace", "0", "--history", "0"],
)
# And where the first word of the library's name is this one.
ALSO = {
    "card": (["export", "evil", "exported"], ["show", "evil", "--json"]),
    "expert": (["export", "evil", "exported"], ["rm", "evil"]),
    "clustering": (["show", "clusterings/evil"],),
    "router": (["show", "routers/evil"], ["show", "routers/evil", "--json"]),
    "log": (["log", "good"], ["log", "good", "--json"]),
    "index": (["list", "--json"],),
    "trash": (["gc", "--restore", "20260101T000000Z-00000000"],),
}
ONLY = {"lock": (["tag", "good", "again"],)}  # which waits for seconds
_seen: dict[str, float] = {"runs": 0, "seconds": 0, "peak": 0}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, one of them without a name, a log and an index."""
    from adaptlib.experts import Library

    folder = tmp_path_factory.mktemp("honest")
    library = Library.open(folder / "library", create=True)
    library.add(make.adapter(folder / "good"), "good")
    library.add(make.adapter(folder / "gone", weights=make.pair(1)), "gone")
    library.remove("gone")
    library.summaries()
    return folder / "library"


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_command_leaves_a_hostile_library(
    name: str, watched: Run, honest: Path, tmp_path: Path
) -> None:
    root, elsewhere = tmp_path / "library", outside(tmp_path / "outside")
    shutil.copytree(honest, root)
    LIBRARIES[name](root, elsewhere)
    (tmp_path / "moved").mkdir(exist_ok=True)
    before = tree(elsewhere), tree(tmp_path / "moved")
    first = name.split("-")[0]
    for words in ONLY.get(first, (*ALWAYS, *ALSO.get(first, ()))):
        outcome = watched(*words, "-L", root, write=[root, tmp_path / "here"])
        said = outcome.out + outcome.err
        where = f"{words}: exit {outcome.code}\n{said[-1500:]}"
        assert outcome.code in (0, 1, 2, 3, 4, 5, 7), where
        assert outcome.deeds == [], (where, outcome.deeds)
        assert "Traceback" not in said, where
        assert "bug in adaptlib" not in said, where
        assert all(line.isprintable() for line in said.split("\n")), where
        assert len(said) < SAID or "--json" in words, where[:500]
        assert outcome.seconds < SECONDS, (where, outcome.seconds)
        assert outcome.peak < PEAK, (where, outcome.peak)
        assert (tree(elsewhere), tree(tmp_path / "moved")) == before, where
        _seen["runs"] += 1
        _seen["seconds"] = max(_seen["seconds"], outcome.seconds)
        _seen["peak"] = max(_seen["peak"], outcome.peak)


def test_an_honest_one_works_with_every_command(watched: Run, honest: Path, tmp_path: Path) -> None:
    """Or a command could pass the others by failing at once."""
    root = tmp_path / "library"
    shutil.copytree(honest, root)
    for words in (*ALWAYS, *(words for some in ALSO.values() for words in some)):
        if not any("evil" in word or word == "--restore" for word in words):
            outcome = watched(*words, "-L", root, write=[root])
            assert outcome.code == 0, outcome.err
            assert outcome.deeds == []


def test_there_are_enough_of_them() -> None:
    assert len(LIBRARIES) >= 60
    report("hostile.libraries", libraries=len(LIBRARIES), **_seen)
