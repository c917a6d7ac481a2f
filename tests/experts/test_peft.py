"""What PEFT writes is read as PEFT means it, and what we write is loaded by PEFT."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adaptlib.errors import RefusedError
from adaptlib.experts.base import BaseModel
from adaptlib.experts.codec import pack, unpack
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.peft import read_peft, read_peft_packed, write_peft
from adaptlib.experts.sparse import SparseDelta

pytestmark = pytest.mark.filterwarnings(  # both are of PEFT 0.21 with newer libraries beneath it
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)

Q, K, UP = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
)
TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    """A fresh copy of a tiny model by name; saved too, as PEFT looks for its config."""
    llama = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    gpt2 = GPT2Config(vocab_size=48, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    models: dict[str, PreTrainedModel] = {}
    for name, make in (
        ("llama", lambda: LlamaForCausalLM(llama)),
        ("gpt2", lambda: GPT2LMHeadModel(gpt2)),
    ):
        torch.manual_seed(0)
        model = make().eval()
        directory = tmp_path_factory.mktemp(name)
        model.config.save_pretrained(directory)
        model.name_or_path = str(directory)
        models[name] = model
    return lambda name: copy.deepcopy(models[name])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def with_expert(model: PreTrainedModel, expert: Expert) -> PreTrainedModel:
    """The slow, obvious way: ΔW added to each weight."""
    for name, delta in expert.deltas.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        module.weight.data += delta.dense()
    return model


def targets(names: list[str], **others: object) -> LoraConfig:
    return LoraConfig(
        target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM", **others
    )


LLAMA = ["q_proj", "k_proj", "up_proj", "down_proj"]
CASES = {
    "plain": ("llama", torch.float32, targets(LLAMA, r=4, lora_alpha=7)),
    "rslora": ("llama", torch.float32, targets(LLAMA, r=3, lora_alpha=5, use_rslora=True)),
    "patterns": (
        "llama",
        torch.float32,
        targets(
            LLAMA,
            r=4,
            lora_alpha=8,
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 5, "model.layers.0.mlp.up_proj": 6},
            alpha_pattern={"^model.layers.0.self_attn.k_proj": 3, "layers.1.self_attn.k_proj": 0.7},
        ),
    ),
    "patterns of rslora": (
        "llama",
        torch.float32,
        targets(
            LLAMA, r=4, use_rslora=True, rank_pattern={"k_proj": 3}, alpha_pattern={"q_proj": 9}
        ),
    ),
    "regular expression": ("llama", torch.float32, targets(r".*\.(q|v)_proj", r=2)),
    "gpt2": ("gpt2", torch.float32, targets(["c_attn", "c_proj"], r=4, fan_in_fan_out=True)),
    "bfloat16": ("llama", torch.bfloat16, targets(LLAMA, r=4)),
    "float16": ("llama", torch.float16, targets(LLAMA, r=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_lora_is_read_as_peft_means_it_and_written_back_as_it_was(case, bases, tmp_path):
    base, dtype, config = CASES[case]
    torch.manual_seed(1)
    model = get_peft_model(
        bases(base).to(dtype), copy.deepcopy(config), autocast_adapter_dtype=False
    )
    model.save_pretrained(tmp_path / "theirs")

    expert = read_peft(tmp_path / "theirs")

    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    assert list(expert.deltas) == sorted(layers)
    for name, layer in layers.items():
        want = layer.get_delta_weight("default")
        got = expert.deltas[name].dense()
        # PEFT rounds the product to the dtype of the factors
        torch.testing.assert_close(
            got.to(dtype), want.T if layer.fan_in_fan_out else want, atol=1e-6, rtol=0
        )
    assert expert.card["base"] == {
        "id": model.get_base_model().name_or_path,
        "revision": None,
        "digest": None,
    }
    assert "migrated" not in expert.card["peft"]

    assert write_peft(expert, tmp_path / "ours") == []

    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = PeftModel.from_pretrained(
        bases(base).to(dtype), tmp_path / "ours", autocast_adapter_dtype=False
    )
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)


def same_files(theirs: Path, ours: Path) -> None:
    """The same tensors bit for bit, and the same config."""
    before, after = (load_file(d / "adapter_model.safetensors") for d in (theirs, ours))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (theirs, ours)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shira_is_read_as_peft_means_it_and_written_back_as_it_was(dtype, bases, tmp_path):
    config = ShiraConfig(
        r=3, target_modules=["q_proj", "k_proj", "up_proj"], random_seed=7, init_weights=False
    )
    model = get_peft_model(bases("llama").to(dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "theirs")

    expert = read_peft(tmp_path / "theirs")

    assert expert.kind == "sparse"
    for name, delta in expert.deltas.items():
        want = model.get_base_model().get_submodule(name).get_delta_weight("default").to_dense()
        torch.testing.assert_close(delta.dense().to(want.dtype), want, atol=0, rtol=0)
    write_peft(expert, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = PeftModel.from_pretrained(
        bases("llama").to(dtype), tmp_path / "ours", autocast_adapter_dtype=False
    )
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)


def test_shira_shapes_come_from_the_base_where_the_file_does_not_prove_them(bases, tmp_path):
    base = bases("llama")

    def corner_unused(layer: nn.Linear, r: int, **_: object) -> Tensor:
        mask = torch.zeros_like(layer.weight)
        mask.view(-1)[: r * sum(mask.shape)] = 1.0
        return mask

    config = ShiraConfig(r=1, target_modules=["k_proj"], init_weights=False, mask_type="random")
    config.mask_fn = corner_unused
    model = get_peft_model(base, config)
    model.peft_config["default"].mask_fn = None  # a function is no part of what is saved
    model.save_pretrained(tmp_path)

    expert = read_peft(tmp_path)
    assert expert.deltas[K].shape == (16, 32)
    want = model.get_base_model().get_submodule(K).get_delta_weight("default").to_dense()
    torch.testing.assert_close(expert.deltas[K].dense(), want, atol=0, rtol=0)

    shapes = BaseModel.of(bases("llama")).modules
    assert read_peft(tmp_path, base="org/elsewhere", shapes=shapes).deltas[K].shape == (16, 32)
    with pytest.raises(RefusedError, match=r"shape of .*k_proj is not in the file") as e:
        read_peft(tmp_path, base="org/elsewhere")
    assert "--base" in (e.value.hint or "")


def mixed_lora(dtype: torch.dtype = torch.float32) -> Expert:
    torch.manual_seed(2)

    def lora(d_out: int, d_in: int, rank: int, scale: float) -> LoRADelta:
        a, b = torch.randn(rank, d_in) / 6, torch.randn(d_out, rank) / 6
        return LoRADelta(a.to(dtype), b.to(dtype), scale)

    return Expert(
        "org/base",
        {
            Q: lora(32, 32, 4, 2.0),
            K: lora(16, 32, 3, 0.7 / 3),
            UP: lora(64, 32, 4, 1 / 3),
            "model.layers.1.mlp.down_proj": lora(32, 64, 1, -1.5),
            "lm_head": lora(48, 32, 4, 2.0),
        },
        {"base": {"id": "org/base", "revision": "main", "digest": None}},
    )


def sparse(block: int) -> Expert:
    torch.manual_seed(3)
    deltas = {}
    for name, shape, n in ((Q, (32, 32), 2), (K, (16, 32), 1), (UP, (64, 32), 3)):
        size = shape[0] * shape[1] // block**2
        index = torch.randperm(size)[: n if block > 1 else n * 37].sort().values
        tail = (block, block) if block > 1 else ()
        deltas[name] = SparseDelta(index, torch.randn(len(index), *tail) / 5, shape, block)
    return Expert("org/base", deltas)


@pytest.mark.parametrize(
    "expert",
    [mixed_lora(), mixed_lora(torch.bfloat16), sparse(1), sparse(16)],
    ids=["mixed ranks", "bfloat16", "entries", "blocks"],
)
def test_peft_loads_an_expert_that_was_made_here(expert, bases, tmp_path):
    notes = write_peft(expert, tmp_path)

    config = PeftConfig.from_pretrained(str(tmp_path))
    assert config.base_model_name_or_path == "org/base"
    assert (config.inference_mode, config.task_type) == (True, "CAUSAL_LM")
    loaded = PeftModel.from_pretrained(bases("llama"), tmp_path)
    torch.testing.assert_close(
        logits(loaded), logits(with_expert(bases("llama"), expert)), atol=1e-6, rtol=0
    )
    assert bool(notes) == (expert.kind == "sparse")

    again = read_peft(tmp_path)  # without the base model, which is nowhere
    assert again.base == "org/base"
    for name, delta in expert.deltas.items():
        assert torch.equal(again.deltas[name].dense(), delta.dense())
        if isinstance(delta, LoRADelta):
            assert again.deltas[name].scale == delta.scale
    if expert.kind == "lora" or next(iter(expert.deltas.values())).block == 1:
        # no padding is left, so it is the same expert
        assert pack(again).manifest("x").tensors == pack(expert).manifest("x").tensors


def test_an_expert_of_zeros_and_one_that_fills_its_modules_go_through_shira(bases, tmp_path):
    full = torch.arange(16 * 32)[: 10 * 48]
    expert = Expert(
        "org/base",
        {
            K: SparseDelta(full, torch.randn(480), (16, 32)),
            Q: SparseDelta(full[:0], torch.randn(0), (32, 32)),
        },
    )
    write_peft(expert, tmp_path)
    loaded = PeftModel.from_pretrained(bases("llama"), tmp_path)
    torch.testing.assert_close(
        logits(loaded), logits(with_expert(bases("llama"), expert)), atol=1e-6, rtol=0
    )


def test_shira_cannot_hold_every_sparse_expert(tmp_path):
    values = torch.ones(16 * 32)
    dense = SparseDelta(torch.arange(16 * 32), values, (16, 32))
    with pytest.raises(
        RefusedError, match=r"k_proj \(16, 32\) keeps 512 and needs r 11; .*r 10 at"
    ):
        write_peft(Expert("b", {K: dense}), tmp_path / "x")
    with pytest.raises(RefusedError, match=r"nn\.Linear only"):
        write_peft(sparse(1), tmp_path / "x", fan_in_fan_out=True)
    assert not (tmp_path / "x").exists()


def test_a_changed_import_gets_a_config_of_its_own(bases, tmp_path):
    model = get_peft_model(bases("gpt2"), targets(["c_attn", "c_proj"], r=4, fan_in_fan_out=True))
    model.save_pretrained(tmp_path / "theirs")
    expert = read_peft(tmp_path / "theirs")
    name, delta = next(iter(expert.deltas.items()))
    assert isinstance(delta, LoRADelta)

    pruned = Expert(expert.base, {name: delta}, expert.card)
    write_peft(pruned, tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["fan_in_fan_out"]) == ([name], True)

    scaled = Expert(
        expert.base, dict(expert.deltas) | {name: LoRADelta(delta.a, delta.b, 9.0)}, expert.card
    )
    write_peft(scaled, tmp_path / "scaled")
    loaded = PeftModel.from_pretrained(bases("gpt2"), tmp_path / "scaled")
    assert loaded.get_base_model().get_submodule(name).scaling == {"default": 9.0}

    moved = Expert("org/moved", expert.deltas, expert.card)
    write_peft(moved, tmp_path / "moved", fan_in_fan_out=True)
    before, after = (
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "moved")
    )
    assert after == before | {"base_model_name_or_path": "org/moved"}


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 7, 8, 12, 16, 64])
@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 2**0.5, -2.5, 1e-7, 0.0])
def test_scales_survive_to_the_last_bits(rank, scale, tmp_path):
    expert = Expert("b", {"m": LoRADelta(torch.ones(rank, 4), torch.ones(4, rank), scale)})
    notes = write_peft(expert, tmp_path)
    got = read_peft(tmp_path).deltas["m"]
    assert isinstance(got, LoRADelta)
    assert got.scale == pytest.approx(scale, rel=2.3e-16, abs=0)  # one unit in the last place
    assert (got.scale == scale) == (notes == [])
    if rank & (rank - 1) == 0:
        assert got.scale == scale


def test_every_scale_that_peft_can_have_is_written_exactly(tmp_path):
    deltas = {
        f"m{alpha}x{rank}": LoRADelta(torch.ones(rank, 4), torch.ones(4, rank), alpha / rank)
        for rank in range(1, 40)
        for alpha in (0.1, 1, 7, 16, 32.5, 1e-3)
    }
    deltas = {name.replace(".", "_"): delta for name, delta in deltas.items()}
    assert write_peft(Expert("b", deltas), tmp_path) == []
    again = read_peft(tmp_path).deltas
    assert {n: d.scale for n, d in again.items()} == {n: d.scale for n, d in deltas.items()}


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 2, "proj": 9},
        {"proj": 9, ".*_proj": 5},
        {"0.self_attn.q_proj": 3},
        {"^self_attn.q_proj": 3, r"layers\.(0|1)\.self_attn\.[qk]_proj": 4},
        {"layers.0|k_proj": 6, "model.layers.0.self_attn.q_proj": 7},
        {"q_proj$": 2, "(?:k|v)_proj": 3},
    ],
)
def test_patterns_match_as_in_peft(patterns):
    from adaptlib.experts.peft_config import LoRAConfig, scales

    modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 10) for p in "qkv"]
    config = LoRAConfig(r=1, lora_alpha=1, rank_pattern=patterns)
    want = {m: patterns.get(get_pattern_key(list(patterns), m), 1) for m in modules}
    assert {m: rank for m, (rank, _) in scales("x", config, dict.fromkeys(modules)).items()} == want


def test_the_real_adapter_is_read_and_written_back(tmp_path):
    data = os.environ.get("ADAPTLIB_DATA")
    if not data:
        pytest.skip("ADAPTLIB_DATA is not set: the folder that holds peft/gpt2-tigrinya-lora")
    theirs = Path(data) / "peft" / "gpt2-tigrinya-lora"
    expert = read_peft(theirs)
    assert (expert.base, expert.kind, expert.rank, len(expert.deltas)) == ("gpt2", "lora", 8, 36)
    attention = expert.deltas["transformer.h.0.attn.c_attn"]
    assert (attention.shape, getattr(attention, "scale", None)) == ((2304, 768), 4.0)
    write_peft(expert, tmp_path)
    same_files(theirs, tmp_path)


def test_reading_and_writing_need_no_torch(tmp_path):
    write_peft(sparse(16), tmp_path / "sparse")
    write_peft(mixed_lora(), tmp_path / "lora")
    code = (
        "import sys; from pathlib import Path\n"
        "from adaptlib.experts.peft import read_peft_packed, write_peft\n"
        f"here = Path({str(tmp_path)!r})\n"
        "for kind in ('sparse', 'lora'):\n"
        "    write_peft(read_peft_packed(here / kind), here / f'{kind} again')\n"
        "assert not {'torch', 'transformers', 'peft', 'safetensors'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    same_files(tmp_path / "lora", tmp_path / "lora again")
    packed = read_peft_packed(tmp_path / "sparse again")
    for name, delta in sparse(16).deltas.items():
        assert torch.equal(unpack(packed).deltas[name].dense(), delta.dense())
