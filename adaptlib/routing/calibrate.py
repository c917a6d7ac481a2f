"""A threshold that is measured: below it no expert fits, and the base answers alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptlib.errors import UsageError
from adaptlib.routing.attach import asking
from adaptlib.routing.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Calibration:
    """`router` has its threshold. `kept` is the share of the experts' prompts at or above it, and
    `refused` that of the foreign prompts below it; `separation` is the chance that a prompt of the
    experts is ranked above a foreign one (the area under the ROC curve, .5 for no difference).
    Both are None where no foreign prompts were given."""

    router: Router
    kept: float
    refused: float | None
    separation: float | None


def calibrate(
    router: Router,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    foreign: Sequence[str] = (),
    keep: float = 0.95,
    batch_size: int = 16,
) -> Calibration:
    """Set the router's threshold so that it keeps the share `keep` of `prompts`, which are prompts
    that its experts should answer and were not trained on. `foreign` prompts, which none should
    answer, do not move it; they tell what it is worth.

    UsageError for no prompts, or for a router that has no measure of confidence.
    """
    if not prompts:
        raise UsageError("a threshold wants prompts that the experts should answer; got none")
    if not 0 < keep <= 1:
        raise UsageError(f"keep is a share above 0, up to 1; got {keep}")
    own = confidences(router, model, tokenizer, prompts, batch_size=batch_size)
    ranked = own.sort().values
    threshold = ranked[int(round((1 - keep) * len(ranked), 6))].item()
    done = replace(router, threshold=threshold)
    kept = (own >= threshold).float().mean().item()
    if not foreign:
        return Calibration(done, kept, None, None)
    other = confidences(router, model, tokenizer, foreign, batch_size=batch_size)
    above = (own[:, None] > other).float() + 0.5 * (own[:, None] == other).float()
    refused = (other < threshold).float().mean().item()
    return Calibration(done, kept, refused, above.mean().item())


def confidences(
    router: Router,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
) -> Float[Tensor, " prompt"]:
    """How well the router's best expert fits each prompt, by one pass of the base over each."""
    asked = replace(router, threshold=0.0)
    found: list[Tensor] = []
    device = next(model.parameters()).device
    with asking(model, asked, tokenizer=tokenizer) as session:
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
            if empty := [text for text, row in zip(texts, ids, strict=True) if not row]:
                raise UsageError(f"the tokenizer finds no token in {empty[0]!r:.60}")
            width = max(map(len, ids))
            pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
            batch = {
                "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
                "attention_mask": torch.tensor(
                    [[1] * len(row) + [0] * (width - len(row)) for row in ids]
                ),
            }
            session.begin(model, (), {key: value.to(device) for key, value in batch.items()})
            assert session.confidence is not None
            found.append(session.confidence.detach().cpu())
    return torch.cat(found)
