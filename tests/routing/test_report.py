"""The page of a routing: whole, closed to the network, and not to be broken by any name."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.routing.report import write_report

HOSTILE = [
    "<script>window.broken = 1</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><b onclick=alert(1)>',
    "'; alert(1) //",
    "\u2028\u2029\u202e\u0000",
    "{{data}} {{script}}",
    "<!--<script>",
    "&lt;script&gt; ]]>",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def document(names: list[str], texts: list[str], layers: int = 3) -> dict[str, Any]:
    """A routing in which the weight of each expert falls with its place."""
    weights = [2.0**-i for i in range(len(names))]
    shares = [
        {"name": name, "weight": weight / sum(weights)}
        for name, weight in zip(names, weights, strict=True)
    ]
    tokens = [
        {
            "token": text,
            "expert": names[i % len(names)],
            "weight": 0.5,
            "entropy": 1.25,
            "experts": [{"name": names[(i + j) % len(names)], "weight": 0.5} for j in range(2)],
            "layers": [names[i % len(names)]] * layers,
        }
        for i, text in enumerate(texts)
    ]
    one = {"experts": shares, "entropy": 1.5, "agreement": 0.25, "with_whole": 0.5}
    likely = {"token": texts[0], "probability": 0.5}
    return {
        "prompt": "".join(texts),
        "router": names[0],
        "top_k": 4,
        "mix": "outputs",
        "experts": shares,
        "notes": [],
        "text": texts[0],
        "tokens": tokens,
        "layers": [{"layer": layer, **one} for layer in range(layers)],
        "agreement": 0.25,
        "entropy": {"whole": 2.0, "token": 1.5, "choice": 1.0},
        "without": {
            "expert": names[0],
            "share": 0.5,
            "shares": [{"name": name, "before": 0.1, "after": 0.2} for name in names[1:]],
            "next": {"before": likely, "after": likely, "kl": 0.1},
            "text": texts[0],
        },
        "compare": [
            {
                "router": names[0],
                "top_k": 2,
                "experts": shares,
                "overlap": 1.0,
                "entropy": 2.0,
                "seconds": 0.1,
                "fit_seconds": 0.1,
                "text": texts[0],
            }
        ],
        "choices": {
            "names": names,
            "layers": list(range(layers)),
            "choices": [[[[0, 0.75], [len(names) - 1, 0.25]] for _ in texts]] * layers,
        },
        "map": {
            "clusters": {"0": names[::2], "1": names[1::2]},
            "positions": {name: [i % 7, i // 7] for i, name in enumerate(names)},
            "basis": names[0],
        },
    }


class Page(HTMLParser):
    """The elements of a page with their attributes, its texts, and what scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style"):
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.inside[self._open][-1] += data
        else:
            self.inside.setdefault("text", []).append(data)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    return write_report(tmp_path / "a.html", document([*HOSTILE, "plain"], [*HOSTILE, " x", ""]))


def test_nothing_is_asked_of_the_network(hostile: Path) -> None:
    page = Page(hostile.read_text(encoding="utf-8"))
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form", "video", "audio")
        assert not any(name.startswith("on") for name in attributes), attributes
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    for text in page.inside["style"]:
        assert not re.search(r"url\(|@import|https?:", text)
    script = page.inside["script"][1]
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon|eval\(", script)
    assert re.findall(r"https?:[^\"]*", script) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", script)


def test_only_the_pages_own_script_and_style_may_run(hostile: Path) -> None:
    page = Page(hostile.read_text(encoding="utf-8"))
    policies = [
        a["content"] for t, a in page.elements if "content-security-policy" in str(a).lower()
    ]
    (policy,) = policies
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind, text in (("style", page.inside["style"][0]), ("script", page.inside["script"][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert [tag for tag, _ in page.elements].count("script") == 2  # data and code, no other


def test_hostile_names_and_tokens_are_text(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    page = Page(text)
    raw = page.inside["script"][0]
    assert raw.isascii()
    assert not set("<>&") & set(raw)
    data = json.loads(raw)
    assert set(data["names"]) == {*HOSTILE, "plain"}
    assert [token["token"] for token in data["tokens"]] == [*HOSTILE, " x", ""]
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "link", "title", "style", "script", "body", "header", "h1", "h2"),
        *("h3", "pre", "dl", "div", "dt", "dd", "bdi", "small", "noscript", "p", "main", "section"),
        *("table", "thead", "tbody", "tr", "th", "td", "button", "span", "details", "summary"),
    }
    shown = "".join(page.inside["text"])
    for name in HOSTILE[:4]:
        assert shown.count(name) >= 4  # in the tables too, which need no script
        assert html.escape(name) in text


def test_the_numbers_are_in_tables_too(tmp_path: Path) -> None:
    path = write_report(tmp_path / "a.html", document(["sums", "poems"], [" a", " b"]))
    shown = " ".join(Page(path.read_text(encoding="utf-8")).inside["text"])
    for wanted in ("sums", "poems", "66.7%", "33.3%", "25.0%", "1.25", "2.0 bits", "0.1 bits"):
        assert wanted in shown


@pytest.mark.parametrize("experts", [1, 2, 40, 200])
@pytest.mark.parametrize("tokens", [1, 500])
def test_any_size(tmp_path: Path, experts: int, tokens: int) -> None:
    names = [f"e{i}" for i in range(experts)]
    path = write_report(tmp_path / "a.html", document(names, [" x"] * tokens, layers=24))
    data = json.loads(Page(path.read_text()).inside["script"][0])
    assert len(data["tokens"]) == tokens
    assert all(len(layer["weights"]) == experts for layer in data["layers"])
    assert path.stat().st_size < 1_500_000


def test_what_explain_says_is_enough(tmp_path: Path) -> None:
    """And what is not a number does no harm."""
    whole = document(["sums"], [" a"])
    least = {key: whole[key] for key in ("experts", "tokens", "layers")}
    least["layers"][0] |= {"agreement": None, "entropy": float("nan")}
    data = json.loads(
        Page(write_report(tmp_path / "a.html", least).read_text()).inside["script"][0]
    )
    assert (data["map"], data["choices"]) == (None, None)
    assert data["layers"][0]["entropy"] is None
    alone = {"token": " a", "expert": None, "weight": 0.0, "entropy": 0.0, "experts": []}
    nobody = {"experts": [], "tokens": [alone], "layers": [{"layer": 0, "experts": []}]}
    text = write_report(tmp_path / "b.html", nobody).read_text()
    assert json.loads(Page(text).inside["script"][0])["tokens"][0]["expert"] == -1
    assert "the base answers alone" in text


def test_the_same_routing_is_the_same_bytes(tmp_path: Path) -> None:
    one, two = (
        write_report(tmp_path / name, document(["a", "b"], ["x"])) for name in ("a.html", "b.html")
    )
    assert one.read_bytes() == two.read_bytes()


def test_a_wrong_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.html file; got"):
        write_report(tmp_path / "a.svg", document(["a"], ["x"]))
    with pytest.raises(NotFoundError, match="not there"):
        write_report(tmp_path / "no" / "a.html", document(["a"], ["x"]))


# What only a browser can say. Without Chromium on this machine these tests are not there, rather
# than skipped: the tests above hold what can be held without one.
if CHROMIUM is not None:
    browser = CHROMIUM

    def dump(path: Path, profile: Path) -> tuple[str, str]:
        """The page as Chromium has it after its scripts, and what went to the console."""
        done = subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *(f"--user-data-dir={profile}", "--enable-logging=stderr", "--log-level=0"),
                *("--virtual-time-budget=2000", "--dump-dom", path.as_uri()),
            ],
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=True,
        )
        said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return done.stdout, "\n".join(said)

    def test_in_a_browser_hostile_names_do_nothing(hostile: Path, tmp_path: Path) -> None:
        text, said = dump(hostile, tmp_path / "profile")
        assert said == ""
        page = Page(text)
        classes = [attributes.get("class") or "" for _, attributes in page.elements]
        assert sum("tok" in of.split() for of in classes) == len(HOSTILE) + 2
        assert not {"img", "b"} & {tag for tag, _ in page.elements}
        assert any(tag == "svg" for tag, _ in page.elements)
        assert ("main", {"id": "page"}) in page.elements  # no longer hidden

    def test_in_a_browser_a_click_shows_an_expert_everywhere(tmp_path: Path) -> None:
        """Driven by a script of the test, which the page's policy would not let in."""
        names = [f"e{i}" for i in range(30)]
        path = write_report(tmp_path / "a.html", document(names, [f" t{i}" for i in range(30)]))
        drive = """
            const said = {};
            const count = (query) => document.querySelectorAll(query).length;
            const text = (id) => document.getElementById(id).textContent;
            const click = (query) => document.querySelector(query).dispatchEvent(
                new MouseEvent("click", {bubbles: true}));
            const key = (key) => document.activeElement.dispatchEvent(
                new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
            said.columns = count("#heat thead button");
            click(".tok:nth-of-type(3)");
            said.token = text("token"), said.pressed = count(".tok[aria-pressed=true]");
            said.stacks = count("#token .stack");
            click("#legend button[data-expert='1']");
            said.expert = text("expert");
            said.has = count(".tok.has"), said.dim = count(".tok.dim");
            said.cells = count("#heat td.on"), said.away = count("#map g.dim");
            key("Escape");
            said.after = [".tok.dim", "#heat td.on", ".tok[aria-pressed=true]"].map(count);
            click("#map g[data-expert='29']");
            said.more = count("#heat thead button");
            document.querySelector("#tokens [tabindex='0']").focus();
            key("ArrowRight"), key("ArrowRight");
            said.focused = text("h-token");
            document.title = JSON.stringify(said);
        """
        page = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text())
        page = page.replace("</body>", f"<script>{drive}</script></body>")
        path.write_text(page)
        text, said = dump(path, tmp_path / "profile")
        assert said == ""
        title = re.search(r"<title>(.*?)</title>", text, re.DOTALL)
        assert title is not None
        found = json.loads(html.unescape(title[1]))
        assert found["columns"] == 12
        assert " t2" in found["token"]
        assert (found["pressed"], found["stacks"]) == (1, 3)
        assert found["expert"].startswith("e1: 25% of the weight, first at 1 of 30 tokens")
        # it is the first at one token, the second at another, and none of the few at the others
        assert (found["has"], found["dim"], found["cells"]) == (1, 28, 3)
        assert found["away"] == 15  # those of the other cluster
        assert found["after"] == [0, 0, 0]
        assert found["more"] == 13  # an expert without a column gets one while it is chosen
        assert found["focused"] == "Token 3 of 30"
