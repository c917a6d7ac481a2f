"""Tiny experts, and files made byte by byte, for tests that import torch anyway."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptlib.experts import Expert, Library, LoRADelta, SparseDelta


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, a document or the exact text, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def lora(seed: int = 0, *, rank: int = 2, d_out: int = 3, d_in: int = 5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=generator).to(dtype)
    b = torch.randn(d_out, rank, generator=generator).to(dtype)
    return LoRADelta(a, b, 0.5 + seed % 3)


def sparse(seed: int = 0, *, n: int = 4, d_out: int = 3, d_in: int = 5, block: int = 1):
    generator = torch.Generator().manual_seed(seed)
    size = d_out * d_in // block**2
    index = torch.randperm(size, generator=generator)[:n].sort().values
    shape = (n,) if block == 1 else (n, block, block)
    return SparseDelta(index, torch.randn(shape, generator=generator), (d_out, d_in), block)


def make_expert(
    seed: int = 0, *, kind: str = "lora", base: str = "org/base", **card: Any
) -> Expert:
    make = lora if kind == "lora" else sparse
    deltas = {f"layers.{i}.proj": make(seed * 10 + i) for i in range(2)}
    return Expert(base, deltas, card)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool((a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)).all())
    )


def same_expert(a: Expert, b: Expert) -> bool:
    """Equal to the last bit, but for what a library adds to a card."""
    if a.deltas.keys() != b.deltas.keys() or (a.kind, a.base) != (b.kind, b.base):
        return False
    for x, y in zip(a.deltas.values(), b.deltas.values(), strict=True):
        if isinstance(x, LoRADelta) and isinstance(y, LoRADelta):
            fits = same_tensor(x.a, y.a) and same_tensor(x.b, y.b) and x.scale == y.scale
        else:
            assert isinstance(x, SparseDelta)
            assert isinstance(y, SparseDelta)
            fits = torch.equal(x.index.long(), y.index.long()) and same_tensor(x.values, y.values)
            fits = fits and (x.shape, x.block) == (y.shape, y.block)
        if not fits:
            return False
    return {k: v for k, v in a.card.items() if k != "base"} == {
        k: v for k, v in b.card.items() if k != "base"
    }


def state(library: Library) -> Mapping[str, Any]:
    """All that a refused command must leave as it was: refs, logs, objects."""
    names = {name.split(":")[0] for name in library.tags()}
    return {
        "tags": library.tags(),
        "logs": {name: library.log(name) for name in sorted(names)},
        "objects": sorted(map(str, library.store.objects())),
    }


def make_tokenizer() -> Any:
    """Words to numbers; what is not a word is `?`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["?", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="</s>", pad_token="</s>"
    )


def save_llama(directory: Path, *, hidden: int = 16, layers: int = 2, seed: int = 0) -> Any:
    """Write a tiny random Llama, and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model
