"""Pretrain the bundled base model: continue a small Llama on plain text, on two CPU cores.

    python -m adaptlib.demo.pretrain --data DATA --out DIR --minutes 45

`DATA` holds `text/*.txt.zst`, `tokenizer/tokenizer.json` and `lm/base4m/` (a Llama of 3.9 M
parameters to start from). The run is checkpointed: started again with the same `--out`, it goes on
where it was. The learning rate is set by the fraction of `--minutes` that has passed, so the
schedule always reaches zero when the time is up.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EOS, PAD = "<|endoftext|>", "<pad>"
WARMUP = 0.03  # fraction of the run
DECAY = 0.5  # fraction of the run, at its end, in which the learning rate falls to zero


def tokens(data: Path, cache: Path) -> np.ndarray:
    """All text under `data/text` as one array of token ids (uint16): documents of six paragraphs,
    each ended by eos."""
    if cache.exists():
        return np.load(cache, mmap_mode="r")
    import zstandard
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    parts = []
    for path in sorted((data / "text").glob("*.txt.zst")):
        with path.open("rb") as file:
            text = zstandard.ZstdDecompressor().stream_reader(file).read().decode("utf-8")
        paragraphs = [p for p in text.split("\n\n") if p.strip()]
        documents = ["\n\n".join(paragraphs[i : i + 6]) for i in range(0, len(paragraphs), 6)]
        for start in range(0, len(documents), 512):
            for encoding in tokenizer.encode_batch(documents[start : start + 512]):
                parts.append(np.asarray([*encoding.ids, eos], dtype=np.uint16))
    ids = np.concatenate(parts)
    np.save(cache, ids)
    return ids


def batches(ids: np.ndarray, rows: int, length: int, seed: int, skip: int) -> Iterator[Tensor]:
    """Endless random (rows, length + 1) windows of the text; `skip` batches are left out first."""
    starts = np.arange(0, len(ids) - length - 1, length)
    epoch = 0
    while True:
        order = np.random.default_rng(seed + epoch).permutation(starts)
        for i in range(0, len(order) - rows + 1, rows):
            if skip:
                skip -= 1
                continue
            windows = np.stack([ids[s : s + length + 1] for s in order[i : i + rows]])
            yield torch.from_numpy(windows.astype(np.int64))
        epoch += 1


def learning_rate(done: float) -> float:
    """Share of the peak learning rate when a fraction `done` of the run has passed."""
    return min(1.0, done / WARMUP, (1.0 - done) / DECAY) if done < 1 else 0.0


def validation_loss(model: torch.nn.Module, ids: np.ndarray, length: int) -> float:
    """Mean loss in nats per token over the first 64 windows of the held-back text."""
    losses = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, 64 * length, 16 * length):
            rows = [ids[s : s + length + 1] for s in range(start, start + 16 * length, length)]
            x = torch.from_numpy(np.stack(rows).astype(np.int64))
            losses.append(loss_of(model, x).item())
    return sum(losses) / len(losses)


def loss_of(model: torch.nn.Module, window: Tensor) -> Tensor:
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def restore(
    checkpoint: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load a checkpoint into `model` and `optimizers`; returns the step and the seconds spent."""
    tensors = load_file(checkpoint)
    prefix = "model."
    model.load_state_dict(
        {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    )
    for i, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, j, key = name.split(".", 3)
                saved["state"].setdefault(int(j), {})[key] = value
        optimizer.load_state_dict(saved)
    step, spent = tensors["progress"].tolist()
    return int(step), spent


def start(data: Path) -> tuple[Any, dict[str, int]]:
    """The model to go on from, with its end-of-sequence token made usable, and the special tokens.

    It was trained on text without eos, so it has only learned to avoid it: its embedding points
    away from every hidden state. It gets the embedding of the newline, which ends things in the
    text, plus a fixed random half-length, so that the two can be told apart.
    """
    import transformers
    from tokenizers import Tokenizer

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        data / "lm" / "base4m", dtype=torch.float32
    )
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    assert eos is not None, f"the tokenizer lacks {EOS}"
    assert pad is not None, f"the tokenizer lacks {PAD}"
    (newline,) = tokenizer.encode("\n").ids
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        direction = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
        length = 0.5 * table.norm(dim=1).median()
        table[eos] = table[newline] + length * direction / direction.norm()
    return model, {"eos_token_id": eos, "pad_token_id": pad}


def save_model(model: Any, special: dict[str, int], data: Path, directory: Path) -> None:
    """Write the model in bfloat16 with its tokenizer, as `from_pretrained` wants them."""
    for settings in (model.config, model.generation_config):
        for name, value in {"bos_token_id": None, **special}.items():
            setattr(settings, name, value)
    model.to(torch.bfloat16).save_pretrained(directory)
    shutil.copy(data / "tokenizer" / "tokenizer.json", directory / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": model.config.max_position_embeddings,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    ids = tokens(options.data, options.out / "tokens.npy")
    held_back, ids = ids[:40_000], ids[40_000:]
    model, special = start(options.data)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(hidden, lr=options.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    step, spent = 0, 0.0
    checkpoint = options.out / "checkpoint.safetensors"
    if checkpoint.exists():
        step, spent = restore(checkpoint, model, optimizers)

    def save() -> None:
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for i, optimizer in enumerate(optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{key}": value for key, value in state.items()}
        tensors = {name: value.clone() for name, value in tensors.items()}
        tensors["progress"] = torch.tensor([step, spent], dtype=torch.float64)
        save_file(tensors, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    log = (options.out / "log.jsonl").open("a", buffering=1)
    mean = math.nan
    last = time.monotonic()
    for window in batches(ids, options.rows, options.length, options.seed, skip=step):
        done = spent / (60 * options.minutes)
        if step % 500 == 0 or done >= 1:
            loss = validation_loss(model, held_back, options.length)
            tokens_seen = step * options.rows * options.length
            print(f"{step:6d}  {spent:6.0f} s  train {mean:.3f}  valid {loss:.3f}", flush=True)
            log.write(json.dumps({"step": step, "tokens": tokens_seen, "valid": loss}) + "\n")
            save()
            if done >= 1:
                break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * learning_rate(max(done, 1e-4))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now

    save_model(model, special, options.data, options.out / "model")


if __name__ == "__main__":
    main()
