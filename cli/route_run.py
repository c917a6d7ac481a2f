"""What a routing takes: a router that is fitted, a prompt in tokens, one pass and an answer."""

import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from . import out
from .suggest import closest, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from adaptlib.experts import Expert
    from adaptlib.routing import Router, Trace

AT_HAND = ("model", "tokenizer")  # what a `fit` may ask for and nobody gives


@final
@dataclass(frozen=True)
class Fitted:
    """A router with the words that asked for it, such as `named:sums`, and what to note on them.

    `again` fits one of the same options to other experts, to see what one of them did; it is None
    where that cannot be done, and gives None where the base alone would be left.
    """

    words: str
    router: "Router"
    notes: list[str]
    seconds: float
    again: "Callable[[Mapping[str, Expert]], Router | None] | None" = None


@final
@dataclass(frozen=True)
class Asked:
    """What one router did with a prompt. `shares` are above 0, largest first, and none where the
    base answers alone; `seconds` are those of the pass over the prompt."""

    fitted: Fitted
    trace: "Trace"
    shares: dict[str, float]
    logits: "Tensor"  # (vocabulary,), of the token that comes next
    seconds: float
    text: str | None = None
    confidence: float | None = None  # how well an expert fits, where the router has a threshold


def check(words: str, given: Mapping[str, Any]) -> None:
    """UsageError where there is no such router, or where it needs what is not given: known before
    anything is loaded."""
    from adaptlib.errors import UsageError
    from adaptlib.routing import ROUTERS

    name, _, which = words.partition(":")
    if name not in ROUTERS:
        meant = closest(name, ROUTERS) or "arrow"
        raise UsageError(unknown("router", name, ROUTERS), hint=f"--router {meant}")
    takes = inspect.signature(ROUTERS[name].fit).parameters
    if ("expert" in takes) != bool(which):
        raise UsageError(
            f"--router {words}: named takes the expert's name, others take none",
            hint="--router named:EXPERT",
        )
    learned = [key for key in takes if key in ("logits", "rows")]
    if learned:
        raise UsageError(
            f"router {name} is trained: it has {learned[0]} that were learned, so it is asked for "
            "by the name that it was kept under",
            hint=f"--router {name}:NAME, after adaptlib train-router {name} TASKS --name NAME",
        )
    empty = inspect.Parameter.empty
    needs = [key for key, option in takes.items() if option.default is empty]
    missing = [
        key for key in needs[1:] if key not in (*AT_HAND, "expert") and given.get(key) is None
    ]
    if missing:
        raise UsageError(
            f"router {name} needs {' and '.join(missing)}",
            hint=" ".join(f"{_option(key)} ..." for key in missing),
        )


def fit(
    words: str,
    experts: "Mapping[str, Expert]",
    given: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
) -> Fitted:
    """The router, fitted with those of the `given` options that it has, and notes on the others.

    Options are by the names of `fit`; None is not given. So a new router needs no line here. One
    that wants to see the model and its tokenizer gets them.
    """
    from adaptlib.routing import ROUTERS

    name, _, which = words.partition(":")
    takes = inspect.signature(ROUTERS[name].fit).parameters
    given = {key: value for key, value in given.items() if value is not None}
    notes = [
        f"router {name} has no {_option(key)}; it is not used" for key in given if key not in takes
    ]
    at_hand = dict(zip(AT_HAND, (model, tokenizer), strict=True))
    options = {key: value for key, value in (given | at_hand).items() if key in takes}
    if which:
        options["expert"] = which

    def again(others: "Mapping[str, Expert]") -> "Router | None":
        if not others or (which and which not in others):
            return None
        samples = options.get("samples")
        left = (
            {} if samples is None else {"samples": {k: samples[k] for k in others if k in samples}}
        )
        return ROUTERS[name].fit(others, **options | left)

    began = time.perf_counter()
    router = ROUTERS[name].fit(experts, **options)
    seconds = time.perf_counter() - began
    wanted = options.get("top_k")
    if wanted is not None and router.most < wanted:
        notes.append(f"--top-k {wanted} is more than there are; top-k is {router.most}")
    return Fitted(words, router, notes, seconds, again)


def kept(words: str, router: "Router", given: Mapping[str, Any], task: str | None = None) -> Fitted:
    """A router that was saved, with a note on each of the `given` options: it keeps its own. One
    that was learned for several tasks answers `task`."""
    from adaptlib.errors import UsageError
    from adaptlib.routing.per_task import TaskRouter

    if isinstance(router, TaskRouter):
        router = router.answering(task)
    elif task is not None:
        raise UsageError(f"{words} is not one that knows tasks by name", hint="leave out --task")
    notes = [
        f"{words} keeps its own {key.replace('_', '-')}; {_option(key)} is not used"
        for key, value in given.items()
        if value is not None
    ]
    return Fitted(words, router, notes, 0.0)


def calibrated(fitted: Fitted, model: Any, tokenizer: Any, prompts: Sequence[str]) -> Fitted:
    """The same with the threshold that 95% of `prompts` reach."""
    from adaptlib.routing import calibrate

    done = calibrate(fitted.router, model, tokenizer, prompts)
    note = (
        f"{fitted.words}: {done.kept:.0%} of {out.count(len(prompts), 'prompt')} reach the "
        f"threshold {done.router.threshold:.4g}"
    )
    return replace(fitted, router=done.router, notes=[*fitted.notes, note])


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def encode(tokenizer: Any, text: str, base: Any) -> Any:
    from adaptlib.errors import UsageError

    ids = tokenizer(text, return_tensors="pt", verbose=False).to(base.device)
    ids = {key: ids[key] for key in ("input_ids", "attention_mask")}
    length = ids["input_ids"].shape[1]
    if not length:
        raise UsageError("the prompt is empty to this model: its tokenizer finds no token in it")
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if context and length >= context:
        raise UsageError(
            f"the prompt has {length} tokens; {base.config.model_type} takes {context - 1} and one "
            "to answer",
            hint=f"leave out at least {length - context + 1} tokens of it",
        )
    return ids


def warm(base: Any, ids: Any) -> None:
    """A pass that is not timed: the first of a process takes longer, whichever router it is."""
    import torch

    with torch.inference_mode():
        base(**ids)


def ask(
    base: Any,
    experts: "Mapping[str, Expert]",
    fitted: Fitted,
    tokenizer: Any,
    ids: Any,
    *,
    answer: int | None = None,
    stream: bool = False,
    seen: Callable[[Asked], None] | None = None,
) -> Asked:
    """One pass over the prompt and, of `answer` tokens at most, what the model says then. `seen` is
    called in between."""
    import torch

    from adaptlib.routing import attach

    with (
        torch.inference_mode(),
        attach(base, experts, fitted.router, tokenizer=tokenizer) as routed,
    ):
        began = time.perf_counter()
        with routed.record() as trace:
            logits = routed(**ids).logits[0, -1].float().cpu()
        seconds = time.perf_counter() - began
        shares = {name: weight for name, weight in trace.shares().items() if weight > 0}
        sure = None if routed.confidence is None else routed.confidence[0].item()
        asked = Asked(fitted, trace, shares, logits, seconds, confidence=sure)
        if seen is not None:
            seen(asked)
        if answer is None:
            return asked
        text = generate(routed, tokenizer, ids, answer, stream=stream)
    return replace(asked, text=text)


def generate(model: Any, tokenizer: Any, ids: Any, limit: int, *, stream: bool = False) -> str:
    """What a model, routed or not, says to a prompt."""
    from transformers import TextStreamer

    class Plain(TextStreamer):
        """Writes what a model says without what would steer the terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(out.plain(text), stream_end)

    length = ids["input_ids"].shape[1]
    config = getattr(model, "model", model).config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    limit = min(limit, context - length) if context else limit
    if stream:
        out.line()
        sys.stdout.flush()
    streamer = Plain(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **ids,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=streamer if stream else None,
    )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()


def without_top(
    base: Any,
    experts: "Mapping[str, Expert]",
    asked: Asked,
    tokenizer: Any,
    ids: Any,
    *,
    answer: int | None = None,
) -> dict[str, Any] | None:
    """What changes if the top expert is removed: `routing.explain.removed`, and under `next` and,
    with an `answer`, `text` what the model says then. None where there is no top expert, or where
    no router of this kind can be fitted to the others."""
    import torch

    from adaptlib.routing.explain import next_token, removed

    if not asked.shares or asked.fitted.again is None:
        return None
    top = next(iter(asked.shares))
    others = {name: expert for name, expert in experts.items() if name != top}
    router = asked.fitted.again(others)
    if router is None:
        with torch.inference_mode():
            shares, logits = {}, base(**ids).logits[0, -1].float().cpu()
            text = None if answer is None else generate(base, tokenizer, ids, answer)
    else:
        again = Fitted(asked.fitted.words, router, [], 0.0)
        then = ask(base, others, again, tokenizer, ids, answer=answer)
        shares, logits, text = then.shares, then.logits, then.text
    changed = removed(top, asked.shares, shares)
    changed["next"] = next_token(asked.logits, logits, tokenizer.decode)
    return changed if text is None else changed | {"text": text}
