"""adaptlib route: which experts answer this input, and why."""

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption, words
from .selection import one_base, select

if TYPE_CHECKING:
    from adaptlib.experts import Expert

EXAMPLES = (
    'adaptlib route --prompt "When does my card expire?"',
    'echo "2 + 2" | adaptlib route --prompt - --explain',
    'adaptlib route --prompt "2 + 2" --router named:sums --generate',
)


def route(
    prompt: Annotated[str, typer.Option(help="The input; - reads it from stdin.")],
    instruction: Annotated[
        str | None,
        typer.Option(help="Put the prompt into the form experts are trained on, with this task."),
    ] = None,
    router: Annotated[
        str, typer.Option(help="arrow, uniform, or named:EXPERT for one alone.")
    ] = "arrow",
    top_k: Annotated[
        int | None, typer.Option(help="Experts a token, at each module; 4, or all if fewer.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the softmax over the chosen; 1 if not said.")
    ] = None,
    mix: Annotated[
        str, typer.Option(help="outputs (sum of updates) or factors (the paper's code).")
    ] = "outputs",
    experts: Annotated[
        list[str] | None, typer.Option(help="Only these, by name: a,b or repeated.")
    ] = None,
    only_base: Annotated[
        str | None, typer.Option("--base", metavar="ID", help="Only experts of this base model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, where it is not where the cards say.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Answer, token by token.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most this long an answer.")] = 64,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the choice by token and by layer.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the choice: .svg or .png.")] = None,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose experts for an input, per token and module, without training (Arrow)."""
    from adaptlib.errors import UsageError
    from adaptlib.experts import Library
    from adaptlib.paths import check_path

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty", hint='adaptlib route --prompt "some text"')
    for option, count in (("--top-k", top_k), ("--max-new-tokens", max_new_tokens)):
        if count is not None and count < 1:
            raise UsageError(f"{option} is 1 or more; got {count}", hint=f"{option} 4")
    if plot is not None:
        check_path(plot)
    if mix not in ("outputs", "factors"):
        raise UsageError(f"--mix is outputs or factors; got {mix!r}", hint="--mix outputs")
    opened = Library.open(library)
    which = router.partition(":")[2]
    chosen = select(opened, [which] if which else words(experts), only_base)
    base_id, revision = one_base(opened, chosen)
    loaded = {name: opened[name] for name in chosen}
    given = {"top_k": top_k, "temperature": temperature, "mix": mix}
    fitted, notes = _fit(router, loaded, given)
    if top_k is not None and not notes and fitted.most < top_k:
        notes.append(f"--top-k {top_k} is more than there are; top-k is {fitted.most}")
    if not json:
        for text_ in notes:
            out.note(f"Note: {text_}")

    import torch

    from adaptlib.experts import base as bases
    from adaptlib.routing import attach

    base, tokenizer = bases.load(model or base_id, revision=None if model else revision)
    if instruction is not None:
        from adaptlib.training import prompt as asked

        text = asked(instruction, text)
    ids = _encode(tokenizer, text, base)
    with torch.inference_mode(), attach(base, loaded, fitted) as routed:
        with routed.record() as trace:
            routed(**ids)
        shares = {name: weight for name, weight in trace.shares().items() if weight > 0}
        if not json:
            _print_shares(shares, fitted.name, fitted.most, quiet=quiet)
        details = _details(trace, tokenizer, ids) if explain or plot else None
        if explain and not json and details:
            from .explain import print_explanation

            print_explanation(details)
        if plot is not None and details:
            from adaptlib.routing.plot import plot_routing

            plot_routing(plot, details["tokens"], details["layers"])
            out.note(f"Drew {plot}")
        answer = None
        if generate:
            answer = _generate(routed, tokenizer, ids, max_new_tokens, stream=not json)
    if json:
        fields: dict[str, Any] = {
            "router": fitted.name,
            "top_k": fitted.most,
            "mix": fitted.mix,
            "experts": [{"name": name, "weight": weight} for name, weight in shares.items()],
            "notes": notes,
        }
        if answer is not None:
            fields["text"] = answer
        if explain and details:
            fields |= {"layers": details["layers"], "tokens": details["tokens"]}
        out.document("route", **fields)


def _fit(router: str, experts: "dict[str, Expert]", given: dict[str, Any]) -> tuple[Any, list[str]]:
    """The router, fitted with those of the `given` options that it has, and notes on the others.

    Options are by the names of `fit`; None is not given. So a new router needs no line here.
    """
    from adaptlib.errors import UsageError
    from adaptlib.routing import ROUTERS

    name, _, which = router.partition(":")
    if name not in ROUTERS:
        raise UsageError(
            f"no router {name!r}; there are: {', '.join(ROUTERS)}", hint="--router arrow"
        )
    takes = inspect.signature(ROUTERS[name].fit).parameters
    if ("expert" in takes) != bool(which):
        raise UsageError(
            f"--router {router}: named takes the expert's name, others take none",
            hint=f"--router named:{next(iter(experts))}",
        )
    given = {key: value for key, value in given.items() if value is not None}
    notes = [
        f"router {name} has no --{key.replace('_', '-')}; it is not used"
        for key in given
        if key not in takes
    ]
    options = {key: value for key, value in given.items() if key in takes}
    if which:
        options["expert"] = which
    return ROUTERS[name].fit(experts, **options), notes


def _encode(tokenizer: Any, text: str, base: Any) -> Any:
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


def _print_shares(shares: dict[str, float], router: str, top_k: int, *, quiet: bool) -> None:
    if quiet:
        for name in shares:
            out.line(name)
        return
    shown = dict(list(shares.items())[:10])
    width = min(40, max(len(name) for name in shown))
    top = max(shown.values())
    out.line(f"{router}, top {top_k}: each expert's share of the routing weight")
    for name, weight in shown.items():
        bar = out.bar(weight / top if top else 0.0, 80 - width - 12)
        out.line(f"  {out.cut(name, width):<{width}}  {weight:6.1%}  {bar}")
    if rest := len(shares) - len(shown):
        left = sum(list(shares.values())[10:])
        out.line(f"  {f'{rest} others':<{width}}  {left:6.1%}")


def _details(trace: Any, tokenizer: Any, ids: Any) -> dict[str, Any]:
    """By token and by layer, who was chosen, as plain data."""
    pieces = _pieces(tokenizer, ids["input_ids"][0].tolist())
    by_token, names = trace.tokens(), list(trace.experts)
    by_layer: dict[int | str, list[tuple[float, ...]]] = {}
    for module, weights in trace.layers().items():
        number = re.search(r"(?:^|\.)(\d+)\.", module)
        by_layer.setdefault(int(number[1]) if number else module, []).append(weights)
    tokens = []
    for piece, weights in zip(pieces, by_token.tolist(), strict=True):
        best = max(range(len(names)), key=weights.__getitem__)
        tokens.append({"token": piece, "expert": names[best], "weight": weights[best]})
    layers = []
    for layer, rows in by_layer.items():
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        chosen = [
            {"name": name, "weight": weight}
            for name, weight in zip(names, means, strict=True)
            if weight > 0
        ]
        chosen.sort(key=lambda entry: -entry["weight"])
        layers.append({"layer": layer, "experts": chosen})
    return {"tokens": tokens, "layers": layers}


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; a character of several tokens stands at the last of them."""
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        whole = not text.endswith("\ufffd") or end == len(ids)
        pieces.append(text if whole else "")
        start = end if whole else start
    return pieces


def _generate(routed: Any, tokenizer: Any, ids: Any, limit: int, *, stream: bool) -> str:
    from transformers import TextStreamer

    class Plain(TextStreamer):
        """Writes what a model says without what would steer the terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(out.plain(text), stream_end)

    length = ids["input_ids"].shape[1]
    context = getattr(routed.model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(limit, context - length) if context else limit
    if stream:
        out.line()
        sys.stdout.flush()
    streamer = Plain(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = routed.generate(
        **ids,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=streamer if stream else None,
    )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
