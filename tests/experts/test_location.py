"""Which library is meant, when nobody says."""

from pathlib import Path

import pytest

from adaptlib.experts.location import library_path


def make(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "FORMAT").write_text("{}")
    return directory


def test_the_nearest_word_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "project" / "src" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    own, why = library_path()
    assert own == tmp_path / "xdg" / "adaptlib" / "library"
    assert why == "the user data directory"

    above = make(tmp_path / "project" / ".adaptlib")
    (inside / ".adaptlib").mkdir()  # without FORMAT it is no library
    assert library_path() == (above, f".adaptlib in {tmp_path / 'project'}")
    nearer = make(tmp_path / "project" / "src" / ".adaptlib")
    assert library_path()[0] == nearer

    monkeypatch.setenv("ADAPTLIB_LIBRARY", "~/experts")
    assert library_path() == (tmp_path / "home" / "experts", "ADAPTLIB_LIBRARY")
    assert library_path("~/mine") == (tmp_path / "home" / "mine", "--library")
    assert library_path(Path("here")) == (Path("here"), "--library")
    assert library_path("~nobody-here/x") == (Path("~nobody-here/x"), "--library")
    monkeypatch.setenv("ADAPTLIB_LIBRARY", "")
    assert library_path()[0] == nearer
