"""The picture of a routing: well-formed, the same every time, whatever the tokens are."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.routing.plot import plot_routing

TOKENS = [
    {"token": token, "expert": expert, "weight": 0.5}
    for token, expert in [(" a", "sql"), ("\n", "poems"), (" <b>&", "sql"), ("$x_1$", "x" * 40)]
] * 30
LAYERS = [
    {"layer": 0, "experts": [{"name": "sql", "weight": 0.7}, {"name": "poems", "weight": 0.3}]},
    {"layer": "lm_head", "experts": [{"name": "x" * 40, "weight": 1.0}]},
]


def test_the_svg_is_well_formed_and_the_same_every_time(tmp_path: Path) -> None:
    one, two = (plot_routing(tmp_path / name, TOKENS, LAYERS) for name in ("a.svg", "b.svg"))
    assert one.read_bytes() == two.read_bytes()
    text = "".join(ElementTree.parse(one).getroot().itertext())
    for wanted in ("sql", "poems", "<b>&", "$x_1$", "70%", "lm_head"):
        assert wanted in text


def test_png_too(tmp_path: Path) -> None:
    assert plot_routing(tmp_path / "a.png", TOKENS[:3], LAYERS).read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_place_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.svg or a \.png"):
        plot_routing(tmp_path / "a.jpg", TOKENS, LAYERS)
    with pytest.raises(NotFoundError, match="not there"):
        plot_routing(tmp_path / "no" / "a.svg", TOKENS, LAYERS)
