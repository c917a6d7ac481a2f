"""Base models from strangers: no pickle, no code, and no more modules than can be."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.errors import AdaptlibError
from adaptlib.experts import base as bases
from tests import tiny
from tests.hostile import make
from tests.hostile.watch import MARK, Payload

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer."""
    tiny.save_llama(tmp_path / "base")
    tiny.make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _pickled(model: Path, name: str) -> None:
    """Weights as torch.save writes them, and among them what runs when it is unpickled."""
    weights: dict[str, Any] = {"x": Payload(model.parent / "ran")}
    torch.save(weights, model / name)


def _only_pickle(model: Path) -> None:
    (model / WEIGHTS).unlink()
    _pickled(model, "pytorch_model.bin")


def _index_of_pickles(model: Path) -> None:
    (model / WEIGHTS).unlink()
    _pickled(model, "evil.bin")
    (model / "unused.safetensors").write_bytes(make.file({}))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "evil.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_elsewhere(model: Path) -> None:
    (model / WEIGHTS).unlink()
    _pickled(model.parent, "evil.bin")
    (model / "unused.safetensors").write_bytes(make.file({}))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../evil.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter_beside(model: Path) -> None:
    config = make.CONFIG | {"megatron_config": {}, "megatron_core": MARK}
    (model / "adapter_config.json").write_text(json.dumps(config))
    _pickled(model, "adapter_model.bin")


def _called_safetensors(model: Path) -> None:
    (model / WEIGHTS).write_bytes(pickle.dumps(Payload(model.parent / "ran")))


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return spoil


def _code(model: Path) -> None:
    (model / f"{MARK}.py").write_text(f"open({str(model.parent / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": f"{MARK}.C", "AutoModelForCausalLM": f"{MARK}.M"}
    _config(auto_map=names, model_type=MARK, architectures=[MARK])(model)
    tokenizer = model / "tokenizer_config.json"
    said = json.loads(tokenizer.read_text()) | {
        "auto_map": {"AutoTokenizer": [f"{MARK}.T", f"{MARK}.T"]},
        "tokenizer_class": MARK,
    }
    tokenizer.write_text(json.dumps(said))


BASES: dict[str, Callable[[Path], Any]] = {
    "pickle-only": _only_pickle,
    "index-of-pickles": _index_of_pickles,
    "index-of-pickles-elsewhere": _index_elsewhere,
    "adapter-beside": _adapter_beside,
    "pickle-called-safetensors": _called_safetensors,
    "code": _code,
    "config-nested": lambda model: (model / "config.json").write_text("[" * 100_000),
    "config-a-list": lambda model: (model / "config.json").write_text("[]"),
    "config-nothing": lambda model: (model / "config.json").write_text(""),
    "model-type-unknown": _config(model_type=MARK),
    "dtype-of-its-own": _config(dtype="save", torch_dtype="load"),
    "layers-negative": _config(hidden_size=-1),
    "layers-as-text": _config(num_hidden_layers="many"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_hostile_base_is_refused_before_anything_of_it_runs(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(torch.serialization, "_load", lambda *_, **__: ran.append("unpickled"))
    monkeypatch.setattr(torch.serialization, "_legacy_load", lambda *_, **__: ran.append("old"))
    BASES[name](model)
    load = torch.load
    with pytest.raises(AdaptlibError) as caught:
        bases.load(str(model))
    assert caught.value.exit_code in (3, 4, 7), caught.value
    assert torch.load is load
    assert ran == []
    assert not (tmp_path / "ran").exists()


def test_torch_would_have_unpickled_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would hold for anything."""
    from transformers import AutoModelForCausalLM

    ran: list[object] = []

    def load(*_: object, **__: object) -> Any:
        ran.append("unpickled")
        raise RuntimeError("no further")

    monkeypatch.setattr(torch, "load", load)
    _index_of_pickles(model)
    with pytest.raises(RuntimeError, match="no further"):
        AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
    assert ran == ["unpickled"]


def test_a_config_of_a_billion_layers_is_not_built(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "MAX_MODULES", 500)
    _config(num_hidden_layers=10**9)(model)
    with pytest.raises(AdaptlibError, match="more than 500 modules") as caught:
        bases.describe(model, "evil")
    assert caught.value.exit_code == 7
    _config(num_hidden_layers=2)(model)
    assert len(bases.describe(model, "evil").modules) > 10


def test_a_config_that_is_no_file_is_not_waited_for(model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(AdaptlibError, match="not a regular file"):
        bases.describe(model, "evil")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    with pytest.raises(AdaptlibError, match="not a regular file"):
        bases.describe(model, "evil")
