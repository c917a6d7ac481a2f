"""The map: the same bytes each time, every name on it, no two names on one spot."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from adaptlib.clustering import cluster
from adaptlib.clustering.features import Features
from adaptlib.clustering.plot import plane, plot, plot_map
from adaptlib.clustering.plot_layout import place, sample
from adaptlib.errors import NotFoundError, UsageError


def texts(path):
    return [e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def crowd(lora_families):
    """40 experts in tight families: the points of a family lie almost on one spot."""
    experts, _ = lora_families(sizes=(9, 8, 7, 6, 5, 3, 2), noise=0.05)
    return cluster({f"some-task_{name}": e for name, e in experts.items()}, k=7)


def test_svg_is_xml_and_the_same_bytes_each_time(crowd, tmp_path):
    one, other = plot_map(crowd, tmp_path / "one.svg"), plot_map(crowd, str(tmp_path / "b.SVG"))
    assert one.read_bytes() == other.read_bytes()
    assert ElementTree.parse(one).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert b"dc:date" not in one.read_bytes()
    assert not re.search(rb"[Mm]atplotlib v", one.read_bytes())


def test_png_is_a_png_and_the_same_bytes_each_time(crowd, tmp_path):
    one, other = (plot_map(crowd, tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert one == other
    assert one.startswith(b"\x89PNG")


def test_every_name_and_group_is_on_it(crowd, tmp_path):
    written = texts(plot_map(crowd, tmp_path / "map.svg"))
    assert set(crowd.names) <= set(written)
    assert {"0  (9)", "6  (2)"} <= set(written)
    assert any(t.startswith("40 experts in 7 groups by mbc, silhouette 0.9") for t in written)
    assert any("LoRA factors (same modules and ranks)" in t for t in written)


def test_no_two_names_overlap(crowd, monkeypatch, tmp_path):
    import adaptlib.clustering.plot_names as module

    boxes = []
    spot = module._spot

    def watched(*args):
        found = spot(*args)
        boxes.append(found[0].extents)
        return found

    monkeypatch.setattr(module, "_spot", watched)
    plot_map(crowd, tmp_path / "map.png")
    assert len(boxes) == 40
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        for a0, b0, a1, b1 in boxes[:i]:
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0


def test_names_without_room_are_counted(lora_families, tmp_path):
    experts, _ = lora_families(sizes=(80, 70), noise=0.01)
    long = {f"{'a-name-of-some-length/' * 2}{name}": e for name, e in experts.items()}
    written = texts(plot_map(cluster(long, k=2), tmp_path / "map.svg"))
    (note,) = [t for t in written if "no room for" in t]
    left_out = int(re.search(r"no room for (\d+) of 150 names", note)[1])
    assert 0 < left_out == 150 - sum("a-name" in t for t in written)


def test_hard_names(lora_families, tmp_path):
    experts, _ = lora_families(sizes=(2, 1))
    names = ["a & <b>", "$x$_{2", "x" * 100]
    found = cluster(dict(zip(names, experts.values(), strict=True)), k=2)
    written = texts(plot_map(found, tmp_path / "map.svg"))
    assert {"a & <b>", "$x$_{2"} <= set(written)
    assert "x" * 15 + "…" + "x" * 16 in written


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_and_equal_experts(lora_families, tmp_path, n):
    experts = dict(list(lora_families()[0].items())[:n])
    one = next(iter(experts.values()))
    for shown in (experts, dict.fromkeys(experts, one)):
        written = texts(plot_map(cluster(shown, k=1), tmp_path / "map.svg"))
        assert set(experts) <= set(written)
        assert f"{n} expert{'s' * (n > 1)} in 1 group by mbc" in written


def test_a_plane_holds_distances_that_fit_one():
    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, 12)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = plane(circle @ circle.T)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    wanted = np.linalg.norm(circle[:, None] - circle[None], axis=2)
    assert np.allclose(distances, wanted, atol=1e-6)


def test_unlike_groups_are_kept_apart():
    """12 families of 3, each at a right angle to the others: two principal axes cannot show it."""
    similarity = np.kron(np.eye(12), np.ones((3, 3)))
    points = plane(similarity)[::3]
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    assert distances[~np.eye(12, dtype=bool)].min() > 0.3
    assert np.linalg.norm(plane(similarity)[0] - plane(similarity)[1]) < 0.01


def many(n, k, method="mbc", groups=40):
    """`n` experts by rows alone."""
    random = np.random.default_rng(0)
    rows = np.repeat(random.standard_normal((groups, 80)), -(-n // groups), axis=0)[:n]
    rows = (rows + 0.5 * random.standard_normal(rows.shape)).astype(np.float32)
    names = tuple(f"e{i:05}" for i in range(n))
    return cluster(Features(names, rows, "sketches", "experts are sparse"), method=method, k=k)


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize(
    "how", [{"kind": "tree"}, {"kind": "heat"}, {"layout": "pca"}, {"layout": "tsne"}], ids=str
)
def test_every_picture_is_the_same_bytes_each_time(crowd, tmp_path, how, suffix):
    labels = {"0": "words of zero"}
    one, other = (plot(crowd, tmp_path / f"{i}.{suffix}", labels=labels, **how) for i in range(2))
    assert one.read_bytes() == other.read_bytes()
    if suffix == "svg":
        written = texts(one)
        assert any("0  words of zero  (9)" in text for text in written)
        assert any(text.startswith("40 experts in 7 groups by mbc") for text in written)
        assert set(crowd.names) <= set(written)


@pytest.mark.parametrize("kind", ["map", "tree", "heat"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_picture_of_few_and_equal_experts(lora_families, tmp_path, kind, n):
    experts = dict(list(lora_families()[0].items())[:n])
    for shown in (experts, dict.fromkeys(experts, next(iter(experts.values())))):
        found = cluster(shown, k=1)
        if (kind, n) == ("tree", 1):
            with pytest.raises(UsageError, match="a tree is made of two experts or more"):
                plot(found, tmp_path / "x.svg", kind=kind)
            assert not list(tmp_path.iterdir())
            continue
        for layout in ("mds", "pca", "tsne") if kind == "map" else ("mds",):
            written = texts(plot(found, tmp_path / "x.svg", kind=kind, layout=layout))
            assert set(experts) <= set(written)


@pytest.mark.parametrize("kind", ["map", "tree", "heat"])
def test_outliers_are_there(tmp_path, kind):
    found = many(60, 3, "hdbscan", groups=4)
    found = replace(
        found,
        outliers=found.names[:2],
        clusters={
            label: [name for name in names if name not in found.names[:2]]
            for label, names in found.clusters.items()
        },
    )
    written = texts(plot(found, tmp_path / "x.svg", kind=kind))
    assert "outliers  (2)" in written
    assert any("2 outliers" in text for text in written)
    assert set(found.outliers) <= set(written)


def test_many_experts_have_the_names_of_their_groups(tmp_path):
    found = many(450, 5)
    labels = {str(i): f"word{i}" for i in range(5)}
    written = texts(plot(found, tmp_path / "x.svg", labels=labels))
    assert "0  word0" in written
    assert not set(found.names) & set(written)
    assert any("450 are too many for mds" in text for text in written)
    drawn = (tmp_path / "x.svg").read_text().count("<use")
    assert drawn >= 450  # every expert has its point


def test_a_tree_of_many_has_branches_for_leaves(tmp_path):
    found = many(450, 40)
    written = texts(plot(found, tmp_path / "x.svg", kind="tree", labels={"0": "some words"}))
    counts = [
        int(c) for text in written for c in re.findall(r"^\d+(?:  [\w ]+)?  \((\d+)\)$", text)
    ]
    assert sum(counts) > 450 * 0.8  # leaves, and the legend
    assert any("a leaf is a branch" in text for text in written)


@pytest.mark.parametrize("kind", ["tree", "heat"])
def test_what_is_shown_of_thousands_is_said(tmp_path, kind):
    found = many(2500, 6)
    written = texts(plot(found, tmp_path / "x.svg", kind=kind))
    (note,) = [text for text in written if "evenly from each group" in text]
    shown = int(re.search(r"([\d,]+) of 2,500 experts", note)[1].replace(",", ""))
    assert abs(shown - (2000 if kind == "tree" else 1000)) < 10


def test_a_cut_of_the_tree_is_that_of_the_groups(tmp_path, monkeypatch):
    """Left of the dashed line there are k - 1 joints, and each group is joined right of it."""
    import adaptlib.clustering.plot_tree as module

    seen = []
    monkeypatch.setattr(module.Axes, "axvline", lambda self, at, **_: seen.append(at))
    found = many(60, 4, "agglomerative", groups=4)
    plot(found, tmp_path / "x.png", kind="tree")
    heights = np.sort(found.tree[:, 2])
    assert heights[-4] < seen[0] < heights[-3]


def test_a_sample_has_some_of_each_group():
    groups = np.repeat([0, 1, 2], [1000, 100, 1])
    chosen = sample(groups, 110)
    assert np.bincount(groups[chosen]).tolist() == [100, 10, 1]
    assert sample(groups, 1101).tolist() == list(range(1101))
    assert np.array_equal(chosen, sample(groups, 110))


def test_neighbours_stay_neighbours_in_every_layout():
    found = many(120, 4, groups=4)
    group = {name: label for label, names in found.clusters.items() for name in names}
    labels = np.array([group[name] for name in found.names])
    for layout in ("mds", "pca", "tsne"):
        points, _ = place(found.unit, layout)
        gaps = np.linalg.norm(points[:, None] - points[None], axis=2)
        np.fill_diagonal(gaps, np.inf)
        assert (labels[gaps.argmin(axis=1)] == labels).mean() == 1
    with pytest.raises(UsageError, match="no layout is called 'umap'; there are mds, pca, tsne"):
        place(found.unit, "umap")


def test_an_unknown_picture(crowd, tmp_path):
    with pytest.raises(UsageError, match="no picture is called 'pie'; there are map, tree, heat"):
        plot(crowd, tmp_path / "x.svg", kind="pie")


def test_another_suffix_and_a_directory_that_is_not_there(crowd, tmp_path):
    with pytest.raises(UsageError, match=r"an \.svg or a \.png file; got .*map\.pdf") as caught:
        plot_map(crowd, tmp_path / "map.pdf")
    assert "map.svg" in str(caught.value.hint)
    with pytest.raises(NotFoundError, match="nowhere"):
        plot_map(crowd, tmp_path / "nowhere" / "map.svg")
    assert not list(tmp_path.iterdir())
