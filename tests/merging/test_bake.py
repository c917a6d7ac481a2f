"""A whole model with an expert in its weights answers as the model with the expert attached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import adaptlib
from adaptlib.errors import AdaptlibError, BaseMismatchError, ConflictError, RefusedError
from adaptlib.experts import Expert
from adaptlib.merging.bake import bake, write_model
from tests.tiny import lora, make_tokenizer, save_llama, sparse

SIZES: dict[str, Any] = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **SIZES,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    ),
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def build(which: str) -> Any:
    torch.manual_seed(0)
    return MODELS[which]().eval()


def expert_for(model: Any, *, kind: str = "lora", only: str = "") -> Expert:
    """An expert for every linear module but the head, large enough to be seen."""
    found: dict[str, Any] = {}
    for i, (name, (d_out, d_in)) in enumerate(adaptlib.experts.BaseModel.of(model).modules.items()):
        if (only and only not in name) or (not only and name == "lm_head"):
            continue
        make = lora if kind == "lora" else sparse
        found[name] = make(i, d_out=d_out, d_in=d_in)
    return Expert("org/base", found)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def routed(model: Any, expert: Expert) -> torch.Tensor:
    experts = {"one": expert}
    with adaptlib.attach(model, experts, adaptlib.Named.fit(experts, expert="one")) as on:
        return logits(on)


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize("which", MODELS)
def test_the_model_answers_as_with_the_expert_attached(
    tmp_path: Path, which: str, kind: str
) -> None:
    model = build(which)
    expert = expert_for(model, kind=kind)
    wanted, plain = routed(model, expert), logits(model)
    write_model(model, make_tokenizer(), expert, tmp_path / "out", name="mine")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.float32
    assert torch.allclose(logits(loaded), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"]) == 2
    assert "# mine\n\nThe weights of org/base" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_sum_is_rounded_once_to_the_models_dtype() -> None:
    model = build("llama").to(torch.bfloat16)
    expert = expert_for(model)
    name, delta = next(iter(expert.deltas.items()))
    before = model.get_submodule(name).weight.detach().clone()
    bake(model, expert)
    after = model.get_submodule(name).weight
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, (before.float() + delta.dense()).to(torch.bfloat16))


def test_files_in_another_dtype(tmp_path: Path) -> None:
    model = build("llama")
    write_model(model, make_tokenizer(), expert_for(model), tmp_path / "out", dtype=torch.bfloat16)
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def stranger(model: Any) -> Expert:
    return Expert("org/base", {"model.layers.9.mlp.up_proj": lora()})


def misshapen(model: Any) -> Expert:
    good = expert_for(model)
    return Expert("org/base", dict(good.deltas) | {"model.layers.1.mlp.up_proj": lora()})


def pinned(model: Any) -> Expert:
    pin = {"id": "org/base", "digest": "sha256:" + "0" * 64, "revision": None}
    return Expert("org/base", expert_for(model).deltas, {"base": pin})


def head(model: Any) -> Expert:
    return expert_for(model, only="lm_head")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (stranger, BaseMismatchError, "matches no module"),
        (misshapen, BaseMismatchError, "does not fit"),
        (pinned, BaseMismatchError, "pinned to another base model"),
        (head, RefusedError, "whose weight is that of model.embed_tokens.weight too"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, make: Callable[[Any], Expert], error: type[AdaptlibError], message: str
) -> None:
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        write_model(model, make_tokenizer(), make(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_head_of_its_own_is_adapted(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "base")
    expert = head(model)
    wanted = routed(model, expert)
    write_model(model, make_tokenizer(), expert, tmp_path / "out")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(loaded), wanted, atol=1e-5, rtol=1e-5)


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("llama"), make_tokenizer()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        write_model(model, tokenizer, expert_for(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(AdaptlibError, match=r"MB free"):
        write_model(model, tokenizer, expert_for(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    model = build("llama")
    (tmp_path / "file").write_text("mine")
    for where in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConflictError, match="is there and not empty"):
            write_model(model, make_tokenizer(), expert_for(model), where)
    (tmp_path / "empty").mkdir()
    write_model(model, make_tokenizer(), expert_for(model), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
