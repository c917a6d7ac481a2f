"""lm-evaluation-harness on a routed model, so that any of its tasks can be run."""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaptlib.errors import AdaptlibError, NotFoundError, UsageError
from adaptlib.routing.attach import Routed
from adaptlib.training.tokens import pad_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTALL = "pip install 'adaptlib[harness]'"


def run(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: Path | None = None,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Run tasks of the harness by their names there; `model` is a transformers causal model, or one
    with experts attached. Of each task the first `limit` documents; `include` is a folder with task
    files of your own.

    Gives `{task, split, metric, value, n}` for each task and metric, as the harness calls them
    (`acc`, `acc_norm`, `exact_match,strict-match`). Its tasks come from the hub: they want a
    network, or a cache. AdaptlibError where the package is missing, NotFoundError with a near name
    for a task that it does not know.
    """
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AdaptlibError(f"lm-evaluation-harness is not there: {error}", hint=INSTALL) from None
    if not tasks:
        raise UsageError("no task of the harness was named", hint="--harness arc_easy")
    if include is not None and not include.is_dir():
        raise NotFoundError(f"there is no folder {include}", hint="--include, with .yaml files")
    with _quiet():
        manager = TaskManager(include_path=str(include) if include else None)
        for name in tasks:
            if name not in manager.all_tasks:
                close = difflib.get_close_matches(name, manager.all_tasks, n=1)
                raise NotFoundError(
                    f"lm-evaluation-harness has no task {name!r}",
                    hint=f"did you mean {close[0]}?" if close else "lm_eval ls tasks lists them",
                )
        run_tasks: Any = evaluator.simple_evaluate
        found = run_tasks(
            model=wrapped(model, tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    lines = []
    for task, values in found["results"].items():
        count = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if isinstance(value, int | float) and how and not metric.endswith("_stderr"):
                name = metric if how == "none" else key
                lines.append(
                    {"task": task, "split": "", "metric": name, "value": value, "n": count}
                )
    return lines


def wrapped(model: Any, tokenizer: "PreTrainedTokenizerBase", *, batch_size: int = 16) -> Any:
    """The model, with experts or without, as one of the harness's own (`lm_eval.api.model.LM`)."""
    from lm_eval.models import huggingface

    base: Any = huggingface.HFLM
    routed = model if isinstance(model, Routed) else None

    class Model(base):
        """HFLM, whose likelihoods are computed so that a router that chooses once for a prompt
        chooses from the context and does not see the answer that is scored."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            pairs = [(context, answer) for _, context, answer in requests]
            return likelihoods(
                routed or self.model,
                pairs,
                pad=pad_of(tokenizer),
                max_length=self.max_length,
                batch_size=override_bs or batch_size,
            )

    inner = routed.model if routed is not None else model
    return Model(pretrained=inner, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def likelihoods(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad: int,
    max_length: int,
    batch_size: int,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each answer after its context, in nats, and whether it is what greedy
    decoding would say. What is too long loses the start of its context."""
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    device = model.device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [[*pairs[i][0], *pairs[i][1]][-(max_length + 1) :] for i in chosen]
        width = max(len(row) for row in rows) - 1
        ids = torch.full((len(rows), width), pad)
        real = torch.zeros(len(rows), width, dtype=torch.long)
        prompt = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row) - 1] = torch.tensor(row[:-1])
            real[i, : len(row) - 1] = 1
            prompt[i, : max(1, len(row) - len(pairs[chosen[i]][1]))] = True
        reading = model.reading(prompt) if isinstance(model, Routed) else nullcontext()
        with torch.inference_mode(), reading:
            logits = model(
                input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False
            ).logits
        for i, row in enumerate(rows):
            count = min(len(pairs[chosen[i]][1]), len(row) - 1)
            answer = torch.tensor(row[len(row) - count :], device=logits.device)
            logp = logits[i, len(row) - 1 - count : len(row) - 1].float().log_softmax(-1)
            total = logp.gather(1, answer[:, None]).sum().item()
            found[chosen[i]] = (total, bool((logp.argmax(-1) == answer).all()))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells much on the way; what went wrong it raises."""
    names = ("lm_eval", "lm-eval", "datasets")
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in before:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
