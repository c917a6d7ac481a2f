"""PEFT's Arrow with the same prototypes gives the same logits; its own prototypes are worse."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from safetensors.torch import load_file, save_file

from adaptlib import Arrow, Expert, LoRADelta, attach

pytestmark = pytest.mark.filterwarnings(  # PEFT's own, in how it calls transformers
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)
TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 4, 6


@pytest.fixture
def saved(llama, tmp_path):
    """Four random adapters written by PEFT, and read here from their tensors' names."""
    paths, experts = [], {}
    for i in range(4):
        torch.manual_seed(100 + i)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False
        )
        path = tmp_path / f"e{i}"
        peft.get_peft_model(copy.deepcopy(llama), config).save_pretrained(path)
        tensors = load_file(path / "adapter_model.safetensors")
        ends = ".lora_A.weight", ".lora_B.weight"
        modules = [k.removesuffix(ends[0]) for k in tensors if k.endswith(ends[0])]
        for module in modules:  # updates as large as the model's own outputs
            tensors[module + ends[1]] *= 3
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        experts[f"e{i}"] = Expert(
            "llama",
            {
                module.removeprefix("base_model.model."): LoRADelta(
                    tensors[module + ends[0]], tensors[module + ends[1]], ALPHA / RANK
                )
                for module in modules
            },
        )
        paths.append(str(path))
    return paths, experts


def arrow_layers(model):
    return {
        name.removeprefix("base_model.model.").rpartition(".lora_arrow.")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, ArrowLoraLinearLayer)
    }


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (4, 1.0)])
@torch.no_grad()
def test_same_prototypes_same_logits(llama, saved, prompts, top_k, temperature):
    paths, experts = saved
    batch = prompts("left")
    config = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=1)
    model = peft.tuners.lora.create_arrow_model(copy.deepcopy(llama), paths, config).eval()
    model(**batch)  # builds its prototypes
    layers = arrow_layers(model)
    router = Arrow.fit(experts, top_k=top_k, temperature=temperature)
    assert layers.keys() == router.prototypes.keys()
    for name, layer in layers.items():
        assert layer.prototypes.shape == router.prototypes[name].shape
        layer.prototypes.copy_(router.prototypes[name])
    wanted = model(**batch).logits
    base = llama(**batch).logits
    with attach(llama, experts, router) as routed:
        got = routed(**batch).logits
    mask = batch["attention_mask"].bool()
    error = (got - wanted)[mask].abs().max().item()
    print(f"max abs error {error:.1e}")
    assert (wanted - base).abs().max() > 0.1
    assert error < 1e-4


def test_prototypes_against_the_dense_svd():
    """On flat spectra 15 power iterations from a random start do not reach the top direction."""
    torch.manual_seed(0)
    config = peft.ArrowConfig()
    config.task_adapter_names = []
    layer = ArrowLoraLinearLayer(512, config)
    ours, theirs = [], []
    for _ in range(12):
        delta = LoRADelta(torch.randn(16, 512), torch.randn(512, 16))
        wanted = torch.linalg.svd(delta.dense().double(), full_matrices=False).Vh[0]
        ours.append(abs(wanted @ delta.top_direction().double()).item())
        power = layer.top_right_singular_vec_from_BA(delta.a, delta.b).double()
        theirs.append(abs(wanted @ power).item())
    median = sorted(theirs)[len(theirs) // 2]
    print(f"PEFT median |cos| {median:.3f}, worst {min(theirs):.3f}; ours, worst {min(ours):.9f}")
    assert min(ours) > 1 - 1e-6
    assert median < 0.99 < min(ours)
