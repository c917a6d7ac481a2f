"""`hf://` against a small hub that the test serves. huggingface_hub reads HF_ENDPOINT when it is
imported, so each fetch runs in a process of its own."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adaptlib.errors import RefusedError, UsageError
from adaptlib.experts.hub import parse_spec

OLD, NEW = "a" * 40, "b" * 40
CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 4

# repository -> commit -> file -> bytes; the first commit is also called main
REPOS: dict[str, dict[str, dict[str, bytes]]] = {
    "org/lora": {
        NEW: {
            "adapter_config.json": CONFIG,
            "adapter_model.safetensors": WEIGHTS,
            "README.md": b"# it",
            "training_args.bin": b"pickle",
            "evil.py": b"print(1)",
            "step-10/adapter_config.json": CONFIG,
            "step-10/adapter_model.safetensors": WEIGHTS[::-1],
            "step-10/optimizer.pt": b"pickle",
        },
        OLD: {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS[:99]},
    },
    "org/pickle": {NEW: {"adapter_config.json": CONFIG, "adapter_model.bin": b"PK"}},
    "org/nothing": {NEW: {"README.md": b"#", "deep/in/adapter_model.safetensors": b""}},
    "org/short": {NEW: {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}},
    "org/flipped": {NEW: {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}},
    "org/huge": {NEW: {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}},
    "org/nameless": {"../../x": {"adapter_model.safetensors": WEIGHTS}},
}
STATUS = {"org/locked": (403, ""), "org/gated": (403, "GatedRepo"), "org/down": (503, "")}


class Hub(BaseHTTPRequestHandler):
    """The three endpoints that a download needs: listing, tree and file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = self.path.split("?")[0].strip("/").split("/")
        api = words[:2] == ["api", "models"]
        repo = "/".join(words[2:4] if api else words[:2])
        if repo == "org/token":
            self.answer(401, error="", message="Invalid credentials in Authorization header")
        elif repo in STATUS:
            status, error = STATUS[repo]
            self.answer(status, error=error)
        elif repo not in REPOS:
            # what the real hub says to a caller without a token
            self.answer(401 if repo == "org/hidden" else 404, error="RepoNotFound")
        elif api:
            self.listing(
                repo, words[4] if len(words) > 4 else "", words[5] if len(words) > 5 else "main"
            )
        else:
            self.file(repo, words[3], "/".join(words[4:]))

    def listing(self, repo: str, kind: str, revision: str) -> None:
        commit = next(iter(REPOS[repo])) if revision in ("main", "v1.0") else revision
        if commit not in REPOS[repo]:
            return self.answer(404, error="RevisionNotFound")
        files = [self.entry(repo, name, data) for name, data in REPOS[repo][commit].items()]
        if kind == "tree":
            return self.answer(
                200, json.dumps([{"type": "file", **file} for file in files]).encode()
            )
        siblings = [{"rfilename": file["path"], **file} for file in files]
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        return self.answer(200, json.dumps(info).encode())

    @staticmethod
    def entry(repo: str, name: str, data: bytes) -> dict[str, Any]:
        size = 1 << 40 if repo == "org/huge" else len(data)
        entry: dict[str, Any] = {
            "path": name,
            "size": size,
            "blobId": hashlib.sha1(data).hexdigest(),
        }
        entry["oid"] = entry["blobId"]
        if name.endswith(".safetensors"):
            sha = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"size": size, "sha256": sha, "oid": sha, "pointerSize": 130}
        return entry

    def file(self, repo: str, commit: str, name: str) -> None:
        data = REPOS[repo].get(commit, {}).get(name)
        if data is None:
            return self.answer(404, error="EntryNotFound")
        with self.server.log_lock:  # type: ignore[attr-defined]
            self.server.fetched.append(name)  # type: ignore[attr-defined]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        if name.endswith(".safetensors") and self.command == "GET":
            data = data[:100] if repo == "org/short" else data
            data = b"!" + data[1:] if repo == "org/flipped" else data
        return self.answer(200, data, headers=headers)

    def answer(
        self,
        status: int,
        body: bytes = b"",
        *,
        error: str = "",
        message: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        extra = {"X-Error-Code": error, "X-Error-Message": message}
        for key, value in ((headers or {}) | {k: v for k, v in extra.items() if v}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched, server.log_lock = [], threading.Lock()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


RUN = """
import json, sys
from adaptlib.errors import AdaptlibError
from adaptlib.experts.hub import fetch
answers = []
for spec in sys.argv[1:]:
    try:
        got = fetch(spec)
        answers.append([str(got.directory), got.repo, got.revision, got.subfolder])
    except AdaptlibError as error:
        answers.append([error.exit_code, type(error).__name__, str(error), error.hint])
json.dump(answers, sys.stdout)
assert "torch" not in sys.modules
"""
Fetch = Callable[..., list[list[Any]]]


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Fetch from a port of this machine, all in one process; the answers, or class and words."""

    def run(port: int, *specs: str, offline: bool = False) -> list[list[Any]]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept = {k: v for k, v in kept.items() if not k.lower().endswith("_proxy")}
        environment = kept | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", RUN, *specs],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def names(directory: str) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in Path(directory).rglob("*") if p.is_file()}


def test_an_adapter_is_fetched_by_commit_and_nothing_else_is(hub, fetch):
    top, old, tag, folder = fetch(
        hub.server_address[1],
        "hf://org/lora",
        f"hf://org/lora@{OLD}",
        "hf://org/lora@v1.0",
        "hf://org/lora@main/step-10",
    )

    assert top[1:] == ["org/lora", NEW, None]
    assert Path(top[0], "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert old[1:] == ["org/lora", OLD, None]
    assert Path(old[0], "adapter_model.safetensors").read_bytes() == WEIGHTS[:99]
    assert names(old[0]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert tag == top
    assert folder[1:] == ["org/lora", NEW, "step-10"]
    assert Path(folder[0], "adapter_model.safetensors").read_bytes() == WEIGHTS[::-1]
    wanted = {"adapter_config.json", "adapter_model.safetensors"}
    assert names(folder[0]) == wanted
    assert names(top[0]) == wanted | {"README.md"} | {f"step-10/{name}" for name in wanted}
    assert {name.rpartition("/")[2] for name in hub.fetched} == wanted | {"README.md"}


def test_what_is_not_on_the_hub_and_what_may_not_be_read(hub, fetch):
    cases = {
        "hf://org/missing": (3, "NotFoundError", "no such repository"),
        "hf://org/hidden": (3, "NotFoundError", "no such repository"),
        "hf://org/lora@v9": (3, "NotFoundError", "no such revision"),
        "hf://org/lora/step-99": (3, "NotFoundError", "no such folder"),
        "hf://org/nothing": (3, "NotFoundError", "holds no adapter_model.safetensors"),
        "hf://org/token": (6, "RemoteError", "answered 401"),
        "hf://org/locked": (6, "RemoteError", "answered 403"),
        "hf://org/gated": (6, "RemoteError", "is gated"),
        "hf://org/down": (6, "RemoteError", "answered 503"),
        "hf://org/pickle": (7, "RefusedError", "adapter_model.bin only, a pickle"),
        "hf://org/huge": (7, "RefusedError", "at most"),
        "hf://org/nameless": (6, "RemoteError", "names no commit"),
    }
    answers = dict(zip(cases, fetch(hub.server_address[1], *cases), strict=True))
    for spec, (code, kind, words) in cases.items():
        assert answers[spec][:2] == [code, kind], answers[spec]
        assert spec in answers[spec][2]
        assert words in answers[spec][2]
    assert "HF_TOKEN" in answers["hf://org/hidden"][3]
    assert "step-10" in answers["hf://org/lora/step-99"][3]
    assert "deep/in" in answers["hf://org/nothing"][3]
    assert hub.fetched == []


def test_bytes_that_are_not_those_listed(hub, fetch, tmp_path):
    short, flipped = fetch(hub.server_address[1], "hf://org/short", "hf://org/flipped")
    assert short[:2] == [6, "RemoteError"], short
    assert "1024" in short[2]
    assert flipped[:2] == [4, "CorruptError"], flipped
    assert "SHA-256" in flipped[2]
    assert "adapter_model.safetensors" in flipped[3]


def test_a_hub_that_is_not_there(fetch):
    with socket.socket() as free:  # bound and not listening: a connection is refused
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        [answer] = fetch(port, "hf://org/lora")
        [offline] = fetch(port, "hf://org/lora", offline=True)
    assert answer[:2] == [6, "RemoteError"], answer
    assert "network" in answer[3]
    assert offline[:2] == [6, "RemoteError"], offline
    assert "HF_HUB_OFFLINE" in offline[3]


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("hf://org/repo", ("org/repo", None, None)),
        ("hf://org/repo@v1.0", ("org/repo", "v1.0", None)),
        ("hf://org/repo/a/b-1", ("org/repo", None, "a/b-1")),
        ("hf://org/re.po_2@main/a b/c", ("org/re.po_2", "main", "a b/c")),
        ("hf://org/repo/at@sign", ("org/repo", None, "at@sign")),
    ],
)
def test_a_place_on_the_hub_is_read(spec, want):
    assert parse_spec(spec) == want


@pytest.mark.parametrize(
    "spec",
    [
        "hf://",
        "hf://org",
        "hf:/org/repo",
        "https://hf.co/org/repo",
        "hf:///repo",
        "hf://-a/b",
        "hf://org/re po",
    ],
)
def test_what_is_no_place_on_the_hub(spec):
    with pytest.raises(UsageError, match=r"want hf://org/repo\[@rev\]\[/subfolder\]"):
        parse_spec(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "hf://org/repo/",
        "hf://org/repo//etc",
        "hf://org/repo/../x",
        "hf://org/repo/a/..",
        "hf://org/repo/a/./b",
        "hf://org/repo/a\\b",
        "hf://org/repo/a/",
        "hf://org/repo/a*",
        "hf://org/repo/[ab]",
        "hf://org/repo/a\nb",
        "hf://org/repo/C:",
        "hf://org/repo/end.",
        "hf://org/repo@",
        "hf://org/repo@a..b",
        "hf://org/repo@a b",
        "hf://org/repo@../x",
    ],
)
def test_a_path_trick_is_refused(spec):
    with pytest.raises(RefusedError, match=r"subfolder|revision"):
        parse_spec(spec)
