"""What benchmarks/routing.py puts beside each other: the base, one LoRA, adaptlib and PEFT's Arrow.

Weights and experts are random. The routing of random experts is close to uniform, which is the worst
case for what touches only the experts that some token chose.
"""

import copy
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adaptlib
from adaptlib.experts import Expert, LoRADelta
from adaptlib.routing.arrow import Arrow

BASE = "random/llama"


@dataclass(frozen=True)
class Setting:
    """The base, and the experts on all seven projections of each layer."""

    width: int = 512
    inner: int = 1376
    layers: int = 6
    heads: int = 8
    vocab: int = 4096
    rank: int = 8
    top_k: int = 4
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def model(self) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=8192,
        )
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(self.dtype)
            with torch.device(self.device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.config._name_or_path = BASE
        return model.requires_grad_(False).eval()

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each module that experts adapt."""
        square, up = (self.width, self.width), (self.inner, self.width)
        here = {f"self_attn.{name}_proj": square for name in "qkvo"}
        here |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": (self.width, self.inner)}
        return {f"model.layers.{i}.{m}": s for i in range(self.layers) for m, s in here.items()}

    @property
    def expert_bytes(self) -> int:
        sides = sum(sum(shape) for shape in self.modules.values())
        return self.rank * sides * self.dtype.itemsize

    @property
    def prototype_bytes(self) -> int:
        """Of one expert; prototypes are float32."""
        return 4 * sum(d_in for _, d_in in self.modules.values())

    def delta(self, generator: torch.Generator, d_out: int, d_in: int) -> LoRADelta:
        """Of a tenth of the input's length, about."""

        def normal(*shape: int) -> Tensor:
            empty = torch.empty(shape, dtype=self.dtype, device=self.device)
            return empty.normal_(generator=generator)

        scale = 0.1 / (self.rank * d_in) ** 0.5
        return LoRADelta(normal(self.rank, d_in), normal(d_out, self.rank), scale)

    def expert(self, seed: int) -> Expert:
        generator = torch.Generator(self.device).manual_seed(seed)
        return Expert(BASE, {m: self.delta(generator, *shape) for m, shape in self.modules.items()})

    def experts(self, count: int) -> dict[str, Expert]:
        return {f"e{i}": self.expert(i) for i in range(count)}

    def ids(self, tok: int, rows: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(tok)
        return torch.randint(self.vocab, (rows, tok), generator=generator).to(self.device)


@dataclass(frozen=True)
class Side:
    """`model` is called like the base. `attach` is how many seconds it took to put on."""

    name: str
    model: Any
    experts: int = 0
    attach: float = 0.0


def twin(model: Any) -> Any:
    """A copy with modules of its own and the same weights, so that they are there once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def merged(setting: Setting, expert: Expert) -> Side:
    """One expert added into weights of its own."""
    model = setting.model()
    for module, delta in expert.deltas.items():
        model.get_submodule(module).weight.add_(delta.dense().to(setting.dtype))
    return Side("one LoRA, merged into W", model, 1)


def fused(base: Any, experts: Mapping[str, Expert], router: Arrow, name: str = "") -> Side:
    started = time.perf_counter()
    routed = adaptlib.attach(twin(base), experts, router)
    spent = time.perf_counter() - started
    return Side(name or f"adaptlib, {len(experts):,} experts", routed, len(experts), spent)


def first(router: Arrow, count: int) -> Arrow:
    """The router of the first `count` experts, all of which have all modules."""
    return replace(
        router,
        experts=router.experts[:count],
        fitted=router.fitted[:count],
        columns={module: tuple(range(count)) for module in router.columns},
        prototypes={module: rows[:count].clone() for module, rows in router.prototypes.items()},
        top_k=min(router.top_k, count),
    )


def write_adapters(experts: Mapping[str, Expert], directory: Path) -> list[str]:
    """The experts as PEFT's own directories."""
    for name, expert in experts.items():
        adaptlib.write_peft(expert, directory / name)
    return [str(directory / name) for name in experts]


def peft_lora(base: Any, path: str) -> Side:
    from peft import PeftModel

    return Side("one LoRA beside W (PEFT)", PeftModel.from_pretrained(twin(base), path).eval(), 1)


def peft_arrow(base: Any, paths: list[str], top_k: int) -> Side:
    """Attached, and called once: PEFT makes its prototypes in the first forward."""
    from peft import ArrowConfig
    from peft.tuners.lora import create_arrow_model

    started = time.perf_counter()
    config = ArrowConfig(top_k=min(top_k, len(paths)), router_temperature=1.0, rng_seed=1)
    model = create_arrow_model(twin(base), paths, config).eval()
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device))
    spent = time.perf_counter() - started
    return Side(f"PEFT Arrow, {len(paths)} experts", model, len(paths), spent)


# -- timing ----------------------------------------------------------------------------------------


class Prefill:
    """One pass over a prompt, filling a cache."""

    def __init__(self, side: Side, ids: Tensor) -> None:
        self.model, self.ids = side.model, ids

    def ready(self) -> None:
        pass

    def run(self) -> None:
        self.model(input_ids=self.ids, use_cache=True)


class Decode:
    """One token after a prompt, each time after the same."""

    def __init__(self, side: Side, prompt: Tensor) -> None:
        self.model, self.context = side.model, prompt.shape[1]
        out = side.model(input_ids=prompt, use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"  # before transformers 5.24
        self.cache, self.going_on = out[name], {name: out[name]}
        self.token = prompt[:, :1]

    def ready(self) -> None:
        if extra := self.cache.get_seq_length() - self.context:
            self.cache.crop(-extra)

    def run(self) -> None:
        self.model(input_ids=self.token, use_cache=True, **self.going_on)


def in_turn(
    calls: Mapping[str, Any], rounds: int, warm: int = 2, sync: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds, after `warm` rounds that do not count. Calls
    take turns within a round, so that a busy moment hits all of them, in another order each round,
    so that none always comes after the one that leaves the caches emptiest."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    gc.collect()
    for turn in range(warm + rounds):
        shuffled.shuffle(order)
        for name in order:
            call = calls[name]
            call.ready()
            sync()
            started = time.perf_counter()
            call.run()
            sync()
            if turn >= warm:
                times[name].append(time.perf_counter() - started)
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def ratio(times: list[float], other: list[float]) -> float:
    """The median over rounds of this round's ratio."""
    return statistics.median(a / b for a, b in zip(times, other, strict=True))
