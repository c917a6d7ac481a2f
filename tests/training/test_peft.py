"""PEFT agrees: on the logits of what was trained here, and on the steps that trained it."""

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adaptlib import write_peft
from adaptlib.training import TrainOptions, train
from adaptlib.training.encode import batches, encode_task
from adaptlib.training.lora import LoRATrainee
from adaptlib.training.modules import applied, target_modules
from adaptlib.training.run import answer_loss, schedule

pytestmark = pytest.mark.filterwarnings(  # both are of PEFT 0.21 with newer libraries beneath it
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)

OPTIONS = TrainOptions(epochs=2, batch_size=8, rank=4, lr=2e-2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", OPTIONS),
        ("lora", dataclasses.replace(OPTIONS, rslora=True, target=("q_proj", "down_proj"))),
        ("sparse", OPTIONS),
    ],
    ids=["lora", "rslora", "sparse"],
)
def test_peft_gives_the_same_logits(tmp_path, small, tokenizer, task, kind, options) -> None:
    expert = train(small, tokenizer, task, kind=kind, options=options)
    write_peft(expert, tmp_path / "adapter")
    ids = torch.randint(2, 258, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = small(ids).logits
        with applied(small, expert):
            wanted = small(ids).logits
        got = PeftModel.from_pretrained(small, tmp_path / "adapter").eval()(ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_takes_the_same_steps(small, tokenizer, task, rslora) -> None:
    options = dataclasses.replace(OPTIONS, epochs=1, best_epoch=False, rslora=rslora)
    expert = train(small, tokenizer, task, options=options)

    modules = target_modules(small, "all-linear")
    start = LoRATrainee(modules, options)
    names = sorted({name.rpartition(".")[2] for name in modules})
    config: Any = LoraConfig(r=4, lora_alpha=16, target_modules=names, use_rslora=rslora)
    adapted = get_peft_model(small, config).train()
    inside = dict(adapted.base_model.model.named_modules())
    for name in modules:
        inside[name].lora_A["default"].weight.data.copy_(start.a[name])
        assert not inside[name].lora_B["default"].weight.any()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    examples = list(encode_task(tokenizer, task, "train", max_length=256).examples)
    order = list(batches(examples, size=8, pad=1, seed=0))
    for step, batch in enumerate(order):
        optimizer.param_groups[0]["lr"] = options.lr * schedule(step / len(order), options)
        optimizer.zero_grad()
        answer_loss(small, batch).backward()  # PEFT has put its layers into it
        torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        optimizer.step()

    for name, delta in expert.deltas.items():
        layer = inside[name]
        assert delta.scale == pytest.approx(layer.scaling["default"])
        torch.testing.assert_close(delta.a, layer.lora_A["default"].weight.data, rtol=0, atol=1e-5)
        torch.testing.assert_close(delta.b, layer.lora_B["default"].weight.data, rtol=0, atol=1e-5)
