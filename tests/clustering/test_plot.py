"""The map: the same bytes each time, every name on it, no two names on one spot."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from adaptlib.clustering import cluster, plot_map
from adaptlib.clustering.plot import plane
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
    import adaptlib.clustering.plot as module

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


def test_another_suffix_and_a_directory_that_is_not_there(crowd, tmp_path):
    with pytest.raises(UsageError, match=r"an \.svg or a \.png file; got .*map\.pdf") as caught:
        plot_map(crowd, tmp_path / "map.pdf")
    assert "map.svg" in str(caught.value.hint)
    with pytest.raises(NotFoundError, match="nowhere"):
        plot_map(crowd, tmp_path / "nowhere" / "map.svg")
    assert not list(tmp_path.iterdir())
