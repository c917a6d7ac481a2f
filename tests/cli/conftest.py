"""Running commands, and a library and a base model for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from adaptlib.cli.main import invoke

from adaptlib.experts import Expert, Library
from tests import tiny


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
    """Runs one command on the library in `tmp_path/library`, from within `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTLIB_LIBRARY", str(tmp_path / "library"))

    def invoked(*words: str | Path) -> Result:
        capsys.readouterr()
        code = invoke([str(word) for word in words])
        return Result(code, *capsys.readouterr())

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
