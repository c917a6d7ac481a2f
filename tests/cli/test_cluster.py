"""cluster on a tiny library: the JSON contract, saved clusterings, and everything made of them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptlib.cli import cluster, cluster_run

from adaptlib.clustering import CLUSTERINGS, duplicates, groups
from adaptlib.clustering.features import KINDS
from adaptlib.clustering.plot import PICTURES
from adaptlib.clustering.plot_layout import LAYOUTS
from adaptlib.experts import Expert, Library, LoRADelta
from adaptlib.experts.records import load_record, save_record
from tests import tiny

PROMPT = ("route", "--prompt", "a b c d")
WORDS = ("poems about the sea", "sums of two numbers", "colours of an animal")


def family_member(family: int, member: int, *, base: str = "org/base", **card: Any) -> Expert:
    """Near the others of its family, far from those of another."""
    centre, noise = tiny.make_expert(family, base=base), tiny.make_expert(100 + member, base=base)
    deltas: dict[str, Any] = {}
    for name, delta in centre.deltas.items():
        other = noise.deltas[name]
        assert isinstance(delta, LoRADelta)
        assert isinstance(other, LoRADelta)
        deltas[name] = LoRADelta(delta.a + 0.2 * other.a, delta.b + 0.2 * other.b, 1.0)
    return Expert(base, deltas, card)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve experts in three families, whose cards say so."""
    path = tmp_path_factory.mktemp("families") / "library"
    library = Library.open(path, create=True)
    for family, words in enumerate(WORDS):
        for member in range(4):
            expert = family_member(family, member, description=words, category=f"c{family}")
            library.add(expert, f"f{family}-{member}")
    return path


@pytest.fixture
def families(tmp_path: Path, made: Path) -> Library:
    """A copy of them."""
    shutil.copytree(made, tmp_path / "library")
    return Library.open(tmp_path / "library")


def sets(clusters: dict[str, list[str]]) -> set[frozenset[str]]:
    return {frozenset(names) for names in clusters.values()}


FAMILIES = {frozenset(f"f{family}-{member}" for member in range(4)) for family in range(3)}


def test_the_words_of_options_are_those_of_the_library() -> None:
    assert tuple(CLUSTERINGS) == cluster_run.METHODS
    assert cluster_run.COUNTING == groups.COUNTING
    assert ("auto", *sorted(KINDS)) == cluster_run.FEATURES
    assert (cluster_run.PICTURES, cluster_run.LAYOUTS) == (PICTURES, LAYOUTS)
    assert cluster_run.THRESHOLD == duplicates.THRESHOLD


def test_wrong_options_are_said_without_torch(families: Library, tmp_path: Path) -> None:
    code = (
        "import sys; from adaptlib.cli.main import invoke; code = invoke(sys.argv[1:]);"
        "sys.exit(code if 'torch' not in sys.modules and 'sklearn' not in sys.modules else 99)"
    )
    for words in (
        ("--method", "mcb"),
        ("--k", "99"),
        ("--layout", "umap"),
        ("--save", "../x"),
        ("--threshold", "0.9"),
        ("--diff", "a", "b", "--save", "x"),
    ):
        where = ("-L", str(tmp_path / "library"))
        done = subprocess.run(
            [sys.executable, "-c", code, "cluster", *words, *where], capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr


@pytest.mark.usefixtures("routed_library")
def test_json_and_its_keys(run: Any) -> None:
    document = run("cluster", "--k", "2", "--json").document
    assert document["schema"] == "adaptlib.cluster/1"
    assert {"method", "k", "clusters", "silhouette", "outliers", "labels"} <= document.keys()
    assert (document["method"], document["k"]) == ("mbc", 2)
    members = [name for names in document["clusters"].values() for name in names]
    assert sorted(members) == [f"e{i}" for i in range(5)]
    assert all(document["clusters"].values())
    assert document["silhouette"] is None or -1 <= document["silhouette"] <= 1
    assert run("cluster", "--k", "2", "--json").document == document
    assert run("cluster", "--k", "2").out.startswith("CLUSTER")
    assert len(run("cluster", "--k", "2", "-q").out.splitlines()) == 2
    assert run("cluster", "--experts", "e0,e0,e1", "--k", "2", "--json").document["k"] == 2
    assert run("cluster", "--experts", "e0,e0,e1", "--k", "3").code == 2
    assert run("cluster", "--method", "random", "--k", "2", "--json").document["method"] == "random"
    assert run("cluster", "--k", "1", "--json").document["silhouette"] is None
    assert run("cluster", "--experts", "e0", "--json").document["clusters"] == {"0": ["e0"]}


@pytest.mark.parametrize("line", cluster.EXAMPLES)
def test_every_example_works(run: Any, families: Library, line: str) -> None:
    run("cluster", "--k", "3", "--save", "tasks")
    result = run(*shlex.split(line)[1:])
    assert result.code == 0, result.err


@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("method", cluster_run.METHODS)
@pytest.mark.parametrize("features", cluster_run.FEATURES)
def test_every_method_finds_the_families(run: Any, method: str, features: str) -> None:
    words = ("--method", method, "--features", features, "--json")
    k = () if method in cluster_run.COUNTING else ("--k", "3")
    document = run("cluster", *words, *k).document
    assert document["method"] == method
    found = sets(document["clusters"])
    if method == "random":
        assert sorted(map(len, found)) == [4, 4, 4]
    elif method == "hdbscan":  # it may leave some out
        assert all(any(one <= family for family in FAMILIES) for one in found)
        assert sorted(document["outliers"]) + sorted(n for one in found for n in one)
    else:
        assert found == FAMILIES


@pytest.mark.usefixtures("families")
def test_clusters_have_words(run: Any) -> None:
    document = run("cluster", "--k", "3", "--json").document
    for label, names in document["clusters"].items():
        words = document["labels"][label].split()
        assert 1 <= len(words) <= 3
        assert set(words) <= set(WORDS[int(names[0][1])].split())
    text = run("cluster", "--k", "3").out
    assert "LABEL" in text
    assert "animal" in text


def test_no_text_is_no_column(run: Any, routed_library: Library) -> None:
    result = run("cluster", "--k", "2")
    assert "LABEL" not in result.out
    assert run("cluster", "--k", "2", "--json").document["labels"] == {}


@pytest.mark.usefixtures("families")
def test_the_table_is_80_columns(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    run("cluster", "--k", "3", "--save", "tasks")
    for words in (
        ("cluster", "--k", "3", "--measure"),
        ("cluster", "--method", "hdbscan"),
        ("cluster", "--duplicates", "--threshold", "0.5"),
        ("cluster", "--diff", "tasks", "now", "--k", "2"),
        ("show", "clusterings/tasks"),
    ):
        for line in run(*words).out.splitlines():
            assert len(line.rstrip()) <= 80, line


@pytest.mark.usefixtures("families")
def test_measures_are_next_to_controls(run: Any) -> None:
    document = run("cluster", "--k", "3", "--measure", "--json").document
    rows = {row["method"]: row for row in document["measures"]}
    assert list(rows) == ["mbc", "random", "text", "category"]
    assert rows["mbc"]["ari"] == rows["mbc"]["stability"] == 1
    assert rows["random"]["ari"] < 0.5
    assert rows["mbc"]["silhouette"] == document["silhouette"]
    text = run("cluster", "--k", "3", "--measure").out
    assert re.search(r"METHOD +K +SILHOUETTE +STABILITY +ARI +NMI", text)
    assert "the 3 categories on the cards" in " ".join(text.split())
    assert "measures" not in run("cluster", "--k", "3", "--json").document


def test_a_clustering_is_kept(run: Any, families: Library, tmp_path: Path) -> None:
    result = run("cluster", "--save", "mine", "--plot", "map.png", "--k", "2", "--json")
    assert result.code == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    kept = load_record(families.store, "clusterings", "mine")
    assert kept["schema"] == "adaptlib.clustering/1"
    assert kept["clusters"] == result.document["clusters"]
    assert kept["labels"] == result.document["labels"]
    assert kept["experts"] == families.names()
    assert sorted(run("list", "-q").out.split()) == sorted(families)
    assert run("cluster", "--save", "other", "--plot", "no/such/map.svg").code == 3
    assert "other" not in json.dumps([str(ref) for ref in families.store.refs()])
    shown = run("show", "clusterings/mine").out
    assert all(word in shown for word in kept["labels"]["0"].split())
    assert "method mbc, k 2" in shown


@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("kind", cluster_run.PICTURES)
def test_every_picture(run: Any, tmp_path: Path, kind: str) -> None:
    result = run("cluster", "--k", "3", "--plot", "x.svg", "--plot-kind", kind)
    assert (result.code, "Drew x.svg" in result.err) == (0, True)
    assert "12 experts in 3 groups by mbc" in (tmp_path / "x.svg").read_text()
    if kind != "map":
        said = run("cluster", "--k", "3", "--plot", "x.svg", "--plot-kind", kind, "--layout", "pca")
        assert f"a {kind} has no --layout" in said.err


# -- growing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["factors", "sketches", "gram"])
def test_new_experts_go_to_their_family(run: Any, families: Library, features: str) -> None:
    before = run(
        "cluster", "--k", "3", "--save", "tasks", "--features", features, "--json"
    ).document
    assert run("cluster", "--assign", "tasks").out == "All experts are in tasks already\n"
    for family in range(3):
        families.add(family_member(family, 9), f"new{family}")
    families.add(tiny.make_expert(0, base="org/other"), "stranger")
    document = run("cluster", "--assign", "tasks", "--json").document
    label_of = {name: label for label, names in before["clusters"].items() for name in names}
    assert {row["name"]: row["cluster"] for row in document["assigned"]} == {
        f"new{family}": label_of[f"f{family}-0"] for family in range(3)
    }
    assert all(0.5 < row["cosine"] <= 1.001 for row in document["assigned"])
    kept = load_record(families.store, "clusterings", "tasks")
    assert kept["clusters"] == before["clusters"]  # nothing is kept that was not to be
    text = run("cluster", "--assign", "tasks", "--save", "grown")
    assert "new0" in text.out
    grown = load_record(families.store, "clusterings", "grown")
    assert grown["clusters"] == document["clusters"]
    assert sets(grown["clusters"]) == {
        family | {f"new{next(iter(family))[1]}"} for family in FAMILIES
    }
    assert grown["labels"] == kept["labels"]
    assert set(grown["experts"]) == {*families} - {"stranger"}
    assert run("cluster", "--assign", "grown").out == "All experts are in grown already\n"
    families.add(family_member(1, 11), "late")  # and so on, from what was grown
    late = run("cluster", "--assign", "grown", "--json").document["assigned"]
    assert [(row["name"], row["cluster"]) for row in late] == [("late", label_of["f1-0"])]


def test_an_expert_that_was_replaced_takes_its_place(run: Any, families: Library) -> None:
    run("cluster", "--k", "3", "--save", "tasks")
    families.add(family_member(2, 20), "f0-0", replace=True)
    document = run("cluster", "--assign", "tasks", "--save", "tasks", "--json").document
    held = [names for names in document["clusters"].values() if "f0-0" in names]
    assert held == [["f0-0", "f2-0", "f2-1", "f2-2", "f2-3"]]
    kept = load_record(families.store, "clusterings", "tasks")
    assert kept["experts"] == families.names()


def test_which_to_assign(run: Any, families: Library) -> None:
    run("cluster", "--k", "3", "--save", "tasks", "--features", "sketches")
    for family in range(3):
        families.add(family_member(family, 9), f"new{family}")
    assert (
        run("cluster", "--assign", "tasks", "--experts", "new1,f0-0", "-q").out.split()[0] == "new1"
    )
    families.add(tiny.make_expert(0, base="org/other"), "stranger")
    refused = run("cluster", "--assign", "tasks", "--experts", "stranger")
    assert refused.code == 2
    assert "another base model" in refused.err
    families.add(tiny.make_expert(7, kind="sparse"), "sparse")
    run(
        "cluster",
        "--k",
        "3",
        "--save",
        "exact",
        "--features",
        "factors",
        "--experts",
        "f0-0,f1-0,f2-0",
    )
    refused = run("cluster", "--assign", "exact", "--experts", "sparse")
    assert refused.code == 2
    assert "--features sketches --save exact" in refused.err


# -- comparing ------------------------------------------------------------------------------------


def test_what_became_of_clusters(run: Any, families: Library) -> None:
    run("cluster", "--k", "3", "--save", "old")
    same = run("cluster", "--diff", "old", "now", "--json").document
    assert same["schema"] == "adaptlib.cluster-diff/1"
    assert (same["same"], same["moved"], same["ari"]) == (True, [], 1)
    assert "The same clusters" in run("cluster", "--diff", "old", "now").out
    families.add(family_member(2, 20), "f0-0", replace=True)
    families.add(family_member(1, 9), "new")
    families.remove("f1-0")
    now = run("cluster", "--diff", "old", "now", "--json").document
    assert [move["name"] for move in now["moved"]] == ["f0-0"]
    assert (now["only_before"], now["only_after"]) == (["f1-0"], ["new"])
    assert now["changed"] == ["f0-0"]
    text = run("cluster", "--diff", "old", "now").out
    for words in ("11 experts in both", "only in old: f1-0", "only in now: new", "f0-0"):
        assert words in text
    run("cluster", "--k", "2", "--save", "two")
    two = run("cluster", "--diff", "old", "two", "--json").document
    assert two["merged"]
    assert run("cluster", "--diff", "old", "two", "-q").out.split() == [
        move["name"] for move in two["moved"]
    ]
    assert "was merged from" in run("cluster", "--diff", "old", "two").out


@pytest.mark.usefixtures("families")
def test_now_is_as_then_but_for_what_is_said(run: Any) -> None:
    run("cluster", "--k", "2", "--method", "agglomerative", "--save", "old", "--only", "layers.0")
    assert run("cluster", "--diff", "old", "now", "--json").document["same"] is True
    other = run("cluster", "--diff", "old", "now", "--k", "4", "--method", "mbc", "--json").document
    assert len(other["matched"]) + len(other["new"]) == 4


# -- near-duplicates ------------------------------------------------------------------------------


def test_near_duplicates(run: Any, families: Library) -> None:
    assert "No near-duplicates among 12 experts" in run("cluster", "--duplicates").out
    expert = families["f0-0"]
    turned: dict[str, Any] = {}
    for name, delta in expert.deltas.items():
        assert isinstance(delta, LoRADelta)
        turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
        turned[name] = LoRADelta(turn @ delta.a, delta.b @ turn.T, delta.scale)
    families.add(Expert(expert.base, turned), "turned")  # the same updates by other factors
    families.add(Expert(expert.base, dict(expert.deltas), {"task": "other"}), "other-card")
    families.tag("f0-0", "again")
    half = {n: LoRADelta(d.a, d.b, d.scale / 2) for n, d in expert.deltas.items()}  # type: ignore[attr-defined]
    families.add(Expert(expert.base, half), "half")
    document = run("cluster", "--duplicates", "--json").document
    assert document["schema"] == "adaptlib.cluster-duplicates/1"
    (one,) = document["duplicates"]
    assert one["names"] == ["again", "f0-0", "other-card", "turned"]
    assert one["copies"] == [["again", "f0-0", "other-card"]]
    assert one["cosine"] == pytest.approx(1, abs=1e-3)
    text = run("cluster", "--duplicates").out
    assert "exact copies: again, f0-0, other-card" in text
    assert run("cluster", "--duplicates", "-q").out.split() == one["names"]
    wide = run("cluster", "--duplicates", "--threshold", "0.5", "--json").document
    assert len(wide["duplicates"]) >= 3


# -- experts of a cluster -------------------------------------------------------------------------


def test_the_experts_of_a_cluster(run: Any, families: Library) -> None:
    clusters = run("cluster", "--k", "3", "--save", "tasks", "--json").document["clusters"]
    words = ("cluster", "--json", "--k", "1", "--experts")
    one = run(*words, "cluster:tasks/1").document["clusters"]["0"]
    assert one == clusters["1"]
    both = run(*words, f"cluster:tasks/1,{clusters['0'][0]}").document["clusters"]["0"]
    assert both == sorted([*clusters["1"], clusters["0"][0]])
    changed, digest = clusters["1"][0], families.digest(clusters["1"][0])
    families.add(family_member(0, 77), changed, replace=True)
    then = run(*words, "cluster:tasks/1").document["clusters"]["0"]
    assert set(then) == {digest, *clusters["1"][1:]}  # what was clustered, whatever its name means


def test_route_takes_a_cluster(run: Any, routed_library: Library) -> None:
    clusters = run("cluster", "--k", "2", "--save", "two", "--json").document["clusters"]
    document = run(*PROMPT, "--experts", "cluster:two/0", "--top-k", "9", "--json").document
    assert {one["name"] for one in document["experts"]} <= set(clusters["0"])
    assert document["experts"]
    outside = clusters["1"][0]
    assert run(*PROMPT, "--experts", "cluster:two/0", "--router", f"named:{outside}").code == 0
    compared = ("--compare", f"arrow,named:{outside}", "--experts", "cluster:two/0")
    refused = run(*PROMPT, *compared)
    assert refused.code == 2
    assert run(*PROMPT, *compared, "--experts", outside).code == 0


@pytest.mark.usefixtures("families")
def test_outliers_are_a_cluster_to_ask_for(run: Any) -> None:
    run("cluster", "--method", "hdbscan", "--save", "dense")
    document = run("show", "clusterings/dense", "--json").document["record"]
    result = run("cluster", "--k", "1", "--experts", "cluster:dense/outliers", "-q")
    if document["outliers"]:
        assert result.out.split() == document["outliers"]
    else:
        assert result.code == 3


ERRORS: list[tuple[list[str], int, str]] = [
    (["cluster", "--method", "mcb"], 2, "did you mean mbc"),
    (["cluster", "--features", "raw"], 2, "--features is one of auto, factors"),
    (["cluster", "--plot-kind", "pie", "--plot", "x.svg"], 2, "--plot-kind is one of map"),
    (["cluster", "--layout", "umap", "--plot", "x.svg"], 2, "--layout is one of mds"),
    (["cluster", "--k", "13"], 2, "13 clusters cannot be made of 12 experts"),
    (["cluster", "--only", "nothing"], 2, "no module fits 'nothing'"),
    (["cluster", "--save", "now"], 2, "the library as it is"),
    (["cluster", "--threshold", "0.9"], 2, "--duplicates"),
    (["cluster", "--duplicates", "--threshold", "2"], 2, "a cosine above 0"),
    (["cluster", "--duplicates", "--k", "3"], 2, "--duplicates goes without --k"),
    (["cluster", "--diff", "tasks"], 2, "2 arguments"),
    (["cluster", "--diff", "tasks", "absent"], 3, "there are: tasks"),
    (["cluster", "--diff", "now", "tasks"], 2, "what was before"),
    (["cluster", "--diff", "tasks", "tasks", "--k", "3"], 2, "goes without --k"),
    (["cluster", "--assign", "absent"], 3, "there are: tasks"),
    (["cluster", "--assign", "tasks", "--k", "3"], 2, "goes without --k"),
    (["cluster", "--experts", "cluster:absent/0"], 3, "there are: tasks"),
    (
        ["cluster", "--experts", "cluster:tasks/9"],
        3,
        r"cluster:tasks/9 is no cluster; .*: 0 .*\(4\)",
    ),
    (["cluster", "--experts", "cluster:tasks"], 3, "names no cluster; in tasks there are"),
    (["cluster", "--experts", "cluster:"], 2, "names no cluster"),
    (["route", "--prompt", "a", "--experts", "cluster:tasks/9"], 3, "is no cluster"),
]


@pytest.mark.parametrize(("words", "code", "message"), ERRORS, ids=lambda v: str(v)[:60])
def test_what_cannot_be_meant(
    run: Any, families: Library, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    run("cluster", "--k", "3", "--save", "tasks")
    before, refs = tiny.state(families), families.store.refs()
    result = run(*words)
    assert result.code == code, result.err
    assert re.search(message, result.err), result.err
    assert "Next: " in result.err or code == 3
    assert (tiny.state(families), families.store.refs()) == (before, refs)
    assert not (tmp_path / "x.svg").exists()


def test_an_expert_that_is_gone(run: Any, families: Library) -> None:
    clusters = run("cluster", "--k", "3", "--save", "tasks", "--json").document["clusters"]
    record = load_record(families.store, "clusterings", "tasks")
    record["experts"][clusters["0"][0]] = "sha256:" + "0" * 64
    save_record(families.store, "clusterings", "broken", record)
    result = run("cluster", "--experts", "cluster:broken/0")
    assert result.code == 4  # what refers to nothing is damage
    assert "is gone" in result.err
    assert "adaptlib cluster --save broken" in result.err
