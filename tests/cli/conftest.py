"""Running commands, and a library and a base model for them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adaptlib.cli import commands, pages
from adaptlib.cli.main import invoke

from adaptlib.experts import Expert, Library
from tests import tiny
from tests.cli import documents


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error that --json writes, which is the last line of stderr."""
        document = json.loads(self.err.splitlines()[-1])
        assert document["schema"] == "adaptlib.error/1"
        assert self.out == ""
        return document["error"]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Result]:
    """Runs one command on the library in `tmp_path/library`, from within `tmp_path`. What --json
    prints is held to its schema, and the exit code to those that its help speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTLIB_LIBRARY", str(tmp_path / "library"))

    def invoked(*words: str | Path) -> Result:
        capsys.readouterr()
        code = invoke([str(word) for word in words])
        result = Result(code, *capsys.readouterr())
        name = commands.asked([str(word) for word in words[:1]])
        if name is not None:
            assert code in (*pages.ANY, *pages.PAGES[name].exits), (name, result)
        if "--json" in words:
            documents.check_output(result.out, result.err)
        return result

    return invoked


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """Three experts under four names, of a base that is not at hand."""
    library = Library.open(tmp_path / "library", create=True)
    library.add(tiny.make_expert(0, task="poems of the sea"), "poems")
    library.add(tiny.make_expert(1, kind="sparse"), "sums")
    library.add(tiny.make_expert(2), "team/sql:v1")
    library.tag("poems", "best")
    return library


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of 32 tokens of context, with its tokenizer."""
    directory = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny.save_llama(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def routed_library(tmp_path: Path, base_model: Path) -> Library:
    """Five experts for `base_model`: LoRA of three ranks, sparse, and one with fewer modules."""
    library = Library.open(tmp_path / "library", create=True)
    shapes = {
        f"model.layers.{layer}.self_attn.{name}_proj": (16, 16) for layer in (0, 1) for name in "qo"
    }
    for i in range(5):
        deltas: dict[str, Any] = {}
        for j, (module, (d_out, d_in)) in enumerate(shapes.items()):
            if i == 3 and j:
                continue
            seed = 10 * i + j
            deltas[module] = (
                tiny.sparse(seed, n=20, d_out=d_out, d_in=d_in)
                if i == 4
                else tiny.lora(seed, rank=1 + i % 3, d_out=d_out, d_in=d_in)
            )
        library.add(Expert(str(base_model), deltas), f"e{i}")
    return library


@pytest.fixture(scope="session")
def merge_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRA and two sparse experts; zero has updates of zero, apart no module of the others,
    stranger another base model."""
    directory = tmp_path_factory.mktemp("merge") / "library"
    library = Library.open(directory, create=True)
    for i, name in enumerate(("one", "two")):
        library.add(tiny.make_expert(i, task=f"task {i}"), name)
    for i, name in enumerate(("few", "some")):
        library.add(tiny.make_expert(2 + i, kind="sparse"), name)
    nothing = {module: tiny.lora(0) for module in ("layers.0.proj", "layers.1.proj")}
    zero = {m: type(d)(d.a, torch.zeros_like(d.b), d.scale) for m, d in nothing.items()}
    library.add(Expert("org/base", zero), "zero")
    library.add(Expert("org/base", {"other.proj": tiny.lora(5)}), "apart")
    library.add(tiny.make_expert(6, base="org/other"), "stranger")
    library.tag("one", "uno")
    return directory


@pytest.fixture
def merge_library(tmp_path: Path, merge_kept: Path) -> Library:
    shutil.copytree(merge_kept, tmp_path / "library")
    return Library.open(tmp_path / "library")
