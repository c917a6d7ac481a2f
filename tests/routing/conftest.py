"""Tiny random models and experts, and routing written out slowly: loops over tokens and experts
with dense matrices, sharing nothing with adaptlib.routing."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jaxtyping
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 64, 32, 64, 2, 4

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_inner=INNER,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**{k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"})
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA_LIKE)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA_LIKE)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            init_std=0.2,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_LLAMA_LIKE)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA_LIKE)),
}


@lru_cache
def build(architecture: str) -> tf.PreTrainedModel:
    torch.manual_seed(sorted(ARCHITECTURES).index(architecture))
    return ARCHITECTURES[architecture]().eval()


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each linear module but the head, read off the weights."""
    shapes = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("lm_head", "embed_out"):
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = tuple(module.weight.shape)
        elif isinstance(module, Conv1D):
            shapes[name] = tuple(module.weight.T.shape)
    return shapes


def lora(model, generator, *, rank, modules=None, scale=0.7) -> Expert:
    """A LoRA expert whose update is about as large as the model's own output."""
    shapes = linear_shapes(model)
    return Expert(
        model.config.model_type,
        {
            name: LoRADelta(
                torch.randn(rank, shapes[name][1], generator=generator) / shapes[name][1] ** 0.5,
                torch.randn(shapes[name][0], rank, generator=generator) / rank**0.5,
                scale,
            )
            for name in modules or shapes
        },
    )


def sparse(model, generator, *, block=1, keep=0.1, modules=None) -> Expert:
    shapes = linear_shapes(model)
    deltas = {}
    for name in modules or shapes:
        d_out, d_in = shapes[name]
        size = d_out * d_in // block**2
        n = max(1, int(size * (keep if block == 1 else 0.5)))
        index = torch.randperm(size, generator=generator)[:n].sort().values
        shape = (n,) if block == 1 else (n, block, block)
        values = torch.randn(shape, generator=generator) / (d_in * n * block**2 / size) ** 0.5
        deltas[name] = SparseDelta(index, values, (d_out, d_in), block)
    return Expert(model.config.model_type, deltas)


def mixed_zoo(model, seed=0) -> dict[str, Expert]:
    """Every kind, three ranks; one module has one expert only, one has none."""
    generator = torch.Generator().manual_seed(seed)
    names = list(linear_shapes(model))
    nobody, alone = names[1], names[2]
    some = [n for n in names if n not in (nobody, alone)]
    return {
        "wide": lora(model, generator, rank=5, modules=some),
        "alone": lora(model, generator, rank=2, modules=[*some[::2], alone]),
        "half": lora(model, generator, rank=3, modules=some[: len(some) // 2], scale=-1.3),
        "entries": sparse(model, generator, modules=some),
        "blocks": sparse(model, generator, block=16, modules=some[1::2]),
    }


def equal_zoo(model, seed=0) -> dict[str, Expert]:
    """LoRA of rank 3, at different modules and scales."""
    generator = torch.Generator().manual_seed(seed)
    names = list(linear_shapes(model))
    return {
        "all": lora(model, generator, rank=3),
        "even": lora(model, generator, rank=3, modules=names[::2], scale=0.4),
        "odd": lora(model, generator, rank=3, modules=names[1::2], scale=1.5),
        "tail": lora(model, generator, rank=3, modules=names[len(names) // 2 :]),
    }


def dense_prototype(dense: Tensor) -> Tensor:
    return torch.linalg.svd(dense.double(), full_matrices=False).Vh[0]


def slow_weights(
    here: Mapping[str, Any], x: Tensor, router: str, *, top_k: int, temperature: float, only: str
) -> dict[str, Tensor]:
    """Weights of one token `x` (d_in,) by expert name, from the definition."""
    if router == "uniform":
        return {name: torch.tensor(1 / len(here)) for name in here}
    if router == "named":
        return {only: torch.tensor(1.0)} if only in here else {}
    logits = {
        name: (x.double() @ prototype).abs() / temperature for name, (_, prototype) in here.items()
    }
    best = sorted(logits, key=lambda name: -logits[name].item())[:top_k]
    total = sum(logits[name].exp() for name in best)
    return {name: logits[name].exp() / total for name in best}


def slow_update(
    here: Mapping[str, Any], x: Tensor, weights: Mapping[str, Tensor], mix: str, d_out: int
) -> Tensor:
    if not weights:
        return torch.zeros(d_out, dtype=torch.float64)
    if mix == "outputs":
        return sum(w * (here[n][0].dense().double() @ x.double()) for n, w in weights.items())
    a = sum(w * here[n][0].a.double() for n, w in weights.items())
    b = sum(w * here[n][0].scale * here[n][0].b.double() for n, w in weights.items())
    return b @ (a @ x.double())


@contextmanager
def slow_model(
    model: nn.Module,
    experts: Mapping[str, Expert],
    *,
    router: str = "arrow",
    top_k: int = 4,
    temperature: float = 1.0,
    mix: str = "outputs",
    only: str = "",
) -> Iterator[nn.Module]:
    """The model with each adapted module's forward replaced by loops over tokens and experts."""
    patched = []
    for name, module in model.named_modules():
        here = {
            expert: (value.deltas[name], dense_prototype(value.deltas[name].dense()))
            for expert, value in experts.items()
            if name in value.deltas
        }
        if not here:
            continue

        def forward(x, here=here, module=module):
            y = type(module).forward(module, x)
            rows = []
            for token in x.reshape(-1, x.shape[-1]):
                weights = slow_weights(
                    here, token, router, top_k=top_k, temperature=temperature, only=only
                )
                rows.append(slow_update(here, token, weights, mix, y.shape[-1]))
            return y + torch.stack(rows).reshape(y.shape).to(y.dtype)

        module.forward = forward
        patched.append(module)
    try:
        yield model
    finally:
        for module in patched:
            del module.forward


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def untyped(monkeypatch) -> None:
    """As for users: signatures are not checked at run time, so the code's own checks speak."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(params=sorted(ARCHITECTURES))
def any_model(request) -> tf.PreTrainedModel:
    return build(request.param)


@pytest.fixture
def llama() -> tf.PreTrainedModel:
    return build("llama")


@pytest.fixture
def tiny() -> Callable[[str], tf.PreTrainedModel]:
    return build


@pytest.fixture
def mixed() -> Callable[..., dict[str, Expert]]:
    return mixed_zoo


@pytest.fixture
def equal() -> Callable[..., dict[str, Expert]]:
    return equal_zoo


@pytest.fixture
def make_lora() -> Callable[..., Expert]:
    return lora


@pytest.fixture
def make_sparse() -> Callable[..., Expert]:
    return sparse


@pytest.fixture
def slow() -> Callable[..., Any]:
    return slow_model


@pytest.fixture
def prompts() -> Callable[[str], dict[str, Tensor]]:
    """A batch of two, of 4 and 7 tokens, padded on the `left` or `right`."""

    def make(side: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(2, VOCAB, (2, 7), generator=generator)
        mask = torch.ones_like(ids)
        hole = slice(None, 3) if side == "left" else slice(4, None)
        mask[0, hole] = 0
        if side == "right":
            ids[0] = ids[0].roll(-3)
        return {"input_ids": ids * mask, "attention_mask": mask}

    return make
