"""Base models: described the same by every path, and experts that do not fit are told so."""

import json
import os
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from adaptlib.errors import (
    BaseMismatchError,
    BaseWarning,
    CorruptError,
    NotFoundError,
    RefusedError,
    RemoteError,
)
from adaptlib.experts.base import (
    BUNDLE,
    DEMO_BASE,
    BaseModel,
    base_id,
    check_fit,
    describe,
    load,
    locate,
)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def test_the_modules_of_gpt2_and_llama(tmp_path: Path, save_llama: Any) -> None:
    small = BaseModel.of(gpt2())
    assert small.modules["transformer.h.1.attn.c_attn"] == (24, 8)  # Conv1D keeps (in, out)
    assert small.modules["lm_head"] == (32, 8)
    llama = BaseModel.of(save_llama(tmp_path))
    assert llama.modules["model.layers.0.self_attn.k_proj"] == (8, 16)  # grouped keys
    assert llama.modules["model.layers.1.mlp.down_proj"] == (16, 24)
    assert small.digest != llama.digest
    assert small.pin() == {"id": small.id, "revision": None, "digest": small.digest}


def test_the_digest_is_of_the_architecture(tmp_path: Path, save_llama: Any) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = save_llama(tmp_path / "one")
    digest = BaseModel.of(model).digest
    assert digest.startswith("sha256:")
    assert BaseModel.of(LlamaForCausalLM.from_pretrained(tmp_path / "one")).digest == digest
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert BaseModel.of(auto).digest == digest
    assert BaseModel.of(save_llama(tmp_path / "two", seed=1)).digest == digest  # other weights
    assert BaseModel.of(save_llama(tmp_path / "deep", layers=3)).digest != digest
    described = describe(tmp_path / "one", "name")
    assert described.digest == digest
    assert dict(described.modules) == dict(BaseModel.of(model).modules)
    assert described.id == "name"


def test_a_description_is_kept_and_a_broken_one_made_again(
    tmp_path: Path, save_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "m")
    cache = tmp_path / "cache"
    first = describe(tmp_path / "m", "m", cache=cache)
    (kept,) = cache.iterdir()
    said, text = kept.read_text().split("\n")
    assert json.loads(text)["digest"] == first.digest
    other = "0" if first.digest[-1] != "0" else "1"
    flipped = text.replace(first.digest, first.digest[:-1] + other)  # JSON still, and a digest
    damaged = ("", "[]", "{}", '{"modules": [], "digest": ""}', '{"modules": {"a": 1}}', "\0", text)
    for bad in (*damaged, f"{said}\n{flipped}", f"{said}\n", said):
        kept.write_text(bad)
        assert describe(tmp_path / "m", "m", cache=cache) == first
        assert kept.read_text() == f"{said}\n{text}"
    monkeypatch.setattr(BaseModel, "of", lambda _: pytest.fail("the cache was not used"))
    assert describe(tmp_path / "m", "m", cache=cache) == first


def test_the_revision_of_a_snapshot_is_known(tmp_path: Path, save_llama: Any) -> None:
    snapshot = tmp_path / "models--org--m" / "snapshots" / "abc123"
    save_llama(snapshot)
    assert describe(snapshot, "org/m").revision == "abc123"


def test_locate(tmp_path: Path, save_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert locate(str(tmp_path / "m")) == tmp_path / "m"
    assert locate("./m") == Path("m")
    assert locate(DEMO_BASE) == BUNDLE / "base"
    absent = (
        "",
        "org/absent",
        "a/b/c",
        "/absent",
        "~nobody-here/x",
        "..",
        "x" * 5000,
        "a b",
        "a\0",
    )
    for name in absent:
        assert locate(name) is None, name


def test_a_model_is_named_so_that_it_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_id("./m") == str(tmp_path / "m")
    assert base_id("org/name") == "org/name"
    assert base_id("org") == "org"
    assert base_id("./absent") == "./absent"
    assert base_id(str(BUNDLE / "base")) in (DEMO_BASE, str(BUNDLE / "base"))


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"model_type": "no-such-model"}',
        b'{"model_type": "vit"}',
        b'{"model_type": "llama", "hidden_size": "x"}',
        b'{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}',
    ],
)
def test_a_config_that_is_none_is_refused_without_running_it(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(RefusedError, match="not a causal language model"):
        describe(tmp_path, "m")
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no base model"):
        describe(tmp_path, "m")
    for name in (str(tmp_path), "./absent", "/absent", "~/absent", "a/b/c", ""):
        with pytest.raises(NotFoundError, match="no base model"):
            load(name)
    with pytest.raises(RemoteError, match=r"org/absent .* not on this machine"):
        load("org/absent")


def test_load_gives_model_and_tokenizer(
    tmp_path: Path, save_llama: Any, tiny_tokenizer: Any
) -> None:
    saved = save_llama(tmp_path / "m")
    with pytest.raises((NotFoundError, RefusedError)):  # no tokenizer yet
        load(str(tmp_path / "m"))
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    model, tokenizer = load(str(tmp_path / "m"))
    assert not model.training
    assert tokenizer("a b")["input_ids"] == tiny_tokenizer("a b")["input_ids"]
    assert torch.equal(model.lm_head.weight.cpu(), saved.lm_head.weight)
    weights = tmp_path / "m" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError, match="weights"):
        load(str(tmp_path / "m"))
    weights.unlink()
    torch.save(saved.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(RefusedError, match=r"in pytorch_model\.bin only, a pickle"):
        load(str(tmp_path / "m"))


BASE = BaseModel(
    "org/Model", "b" * 40, "sha256:" + "a" * 64, MappingProxyType({"x.q": (3, 5), "x.v": (3, 5)})
)


@pytest.mark.parametrize(
    ("shapes", "pin", "words"),
    [
        ({"y.q": (3, 5)}, {}, "e matches no module of org/Model: no y.q; the closest"),
        ({"zzz": (3, 5)}, {}, "e matches no module of org/Model: no zzz$"),
        (
            {"x.q": (3, 5), "x.k": (3, 5)},
            {},
            "matches only 1 of its 2 modules in org/Model: no x.k",
        ),
        ({"x.q": (5, 3)}, {}, r"x\.q has shape \(3, 5\) there, the expert has \(5, 3\)"),
        ({"x.q": (3, 5)}, {"digest": "sha256:" + "b" * 64}, "pinned to another base model"),
    ],
    ids=["none", "none-close", "some", "shape", "digest"],
)
def test_what_does_not_fit_is_refused(shapes: Any, pin: Any, words: str) -> None:
    with pytest.raises(BaseMismatchError, match=words) as caught:
        check_fit("e", shapes, {"id": "org/Other"} | pin, BASE)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("pin", "words"),
    [
        ({"id": "org/Other"}, "trained on org/Other; this model is org/Model"),
        ({"id": "org/Model", "revision": "c" * 40}, "trained on revision cccccccccccc"),
    ],
)
def test_what_may_not_fit_is_a_warning(pin: Any, words: str) -> None:
    with pytest.warns(BaseWarning, match=words):
        check_fit("e", {"x.q": (3, 5)}, pin, BASE)


@pytest.mark.parametrize(
    "pin",
    [
        {},
        {"id": "org/Model", "revision": "b" * 40, "digest": BASE.digest},
        {"id": "/models/model/"},  # a local copy
        {"id": None, "revision": None, "digest": None},
    ],
)
def test_what_fits_is_silent(pin: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit("e", {"x.q": (3, 5)}, pin, BASE)


def test_no_test_goes_online() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_bases_that_are_loaded_at_once_keep_their_heads(monkeypatch):
    """transformers disables tying while a model is loaded, by a method that it puts back: two loads
    that overlap put back the wrong one. Here the first load waits in the middle for a second."""
    import threading

    from transformers import AutoModelForCausalLM, PreTrainedModel

    from adaptlib.experts import base

    tie, inside = PreTrainedModel.tie_weights, threading.Event()
    real, overlaps, running = AutoModelForCausalLM.from_pretrained, [], []

    def slow(*args, **options):
        running.append(1)
        overlaps.append(len(running))
        inside.set()
        threading.Event().wait(0.2)
        try:
            return real(*args, **options)
        finally:
            running.pop()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    first = threading.Thread(target=base.load, args=(base.DEMO_BASE,))
    first.start()
    inside.wait()
    model, _ = base.load(base.DEMO_BASE)
    first.join()
    assert overlaps == [1, 1]
    assert PreTrainedModel.tie_weights is tie
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
