"""Hostile adapters through `adaptlib add`: refused in a sentence, quickly, with nothing done."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.hostile import make
from tests.hostile.conftest import Outcome, Run, tree
from tests.hostile.corpus import ENTRIES, Entry
from tests.hostile.make import A, B
from tests.hostile.pickles import PICKLES
from tests.hostile.watch import DEEDS
from tests.soak import report

SECONDS = 1.0  # of processor time
PEAK = 256.0  # MiB
FULL = np.ones((2, 100_000), np.float32)
SAID = 500  # characters of a message, without the path of what was added
_worst: dict[str, float] = {"entries": 0, "seconds": 0, "peak": 0}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good expert, so that there is something to spoil."""
    from adaptlib.experts import Library

    folder = tmp_path_factory.mktemp("hostile")
    Library.open(folder / "library", create=True).add(make.adapter(folder / "good"), "good")
    return folder / "library"


def check(outcome: Outcome, entry: Entry, source: Path) -> None:
    """It was refused as it should be, or taken, and nothing else happened."""
    assert outcome.code in entry.codes, (outcome.code, outcome.out[-500:], outcome.err[-2000:])
    assert outcome.deeds == []
    said = outcome.err + outcome.out
    assert "Traceback" not in said
    assert "bug in adaptlib" not in said
    assert all(line.isprintable() for line in said.split("\n")), said
    assert len(said.replace(str(source), "")) < SAID, said
    assert len(outcome.err.split("\n")) <= 4, said
    assert outcome.seconds < SECONDS, outcome.seconds
    assert outcome.peak < PEAK, outcome.peak
    _worst["entries"] += 1
    _worst["seconds"] = max(_worst["seconds"], outcome.seconds)
    _worst["peak"] = max(_worst["peak"], outcome.peak)


def added(entry: Entry, watched: Run, library: Path, tmp_path: Path) -> tuple[Outcome, Path]:
    folder = tmp_path / "hostile"
    folder.mkdir()
    made = entry.make(folder)
    source = made if isinstance(made, Path) and made.is_file() else folder
    words = ["add", source, "--name", tmp_path.name.replace("_", "-").lower()]
    return watched(*words, "-L", library, write=[library]), source


@pytest.mark.parametrize("name", ENTRIES)
def test_it_is_refused_and_the_library_is_as_it_was(
    name: str, watched: Run, library: Path, tmp_path: Path
) -> None:
    before = tree(library)
    outcome, source = added(ENTRIES[name], watched, library, tmp_path)
    check(outcome, ENTRIES[name], source)
    assert tree(library) == before


@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_is_loaded(name: str, watched: Run, library: Path, tmp_path: Path) -> None:
    before = tree(library)
    outcome, source = added(PICKLES[name], watched, library, tmp_path)
    check(outcome, PICKLES[name], source)
    assert not list(tmp_path.rglob("ran"))
    if outcome.code == 0:  # what is beside good weights is not even opened
        opened = {Path(path).name for path in outcome.opened if str(source) in path}
        assert opened <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        return
    assert tree(library) == before


def test_there_are_enough_of_them() -> None:
    assert len(ENTRIES) >= 60
    assert len(PICKLES) >= 10
    report("hostile.corpus", pickles=len(PICKLES), **_worst)


@pytest.mark.parametrize("deed", [deed for deed in DEEDS if not deed.startswith("add")])
def test_the_watch_sees_each_deed(deed: str, watched: Run, tmp_path: Path) -> None:
    outcome = watched(deed=deed, write=[tmp_path / "here"])
    assert outcome.code == 0, outcome.err
    assert bool(outcome.deeds) == (deed != "nothing"), outcome.deeds


def test_a_good_adapter_is_still_added(watched: Run, library: Path, tmp_path: Path) -> None:
    """Or everything above would be refused for a reason of its own."""
    for i, source in enumerate(
        (make.adapter(tmp_path / "a"), make.shira(tmp_path / "b"), make.expert(tmp_path / "c"))
    ):
        outcome = watched("add", source, "--name", f"fine{i}", "-L", library, write=[library])
        assert outcome.code == 0, outcome.err
        assert outcome.deeds == []


def test_a_file_that_shrinks_while_it_is_read_harms_nobody_else(
    watched: Run, library: Path, tmp_path: Path
) -> None:
    """Whoever may write where it is read from can end the reading process, and no more: its pages
    are gone. The library is as it was, and sound."""
    here = tmp_path / "here"
    shutil.copytree(library, here / "library")
    make.adapter(here / "shrinking", weights={A: FULL, B: FULL.T.copy()})
    before = tree(here / "library")
    outcome = watched(deed="add what shrinks", write=[here])
    assert outcome.code == -signal.SIGBUS or "CorruptError" in outcome.err, outcome
    assert kept(tree(here / "library")) == kept(before)
    assert watched("verify", "--deep", "-L", here / "library", write=[here]).code == 0


def kept(found: dict[str, str]) -> dict[str, str]:
    """Without what a process that was ended leaves for gc."""
    return {name: what for name, what in found.items() if not name.startswith("tmp/")}
