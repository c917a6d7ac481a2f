"""adaptlib route: which experts answer this input, and why."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import out
from . import route_options as flags
from .options import JsonOption, LibraryOption, QuietOption, words
from .selection import one_base, select
from .suggest import check_choice

if TYPE_CHECKING:
    from adaptlib.experts import Expert

    from .route_run import Asked, Fitted

EXAMPLES = (
    'adaptlib route --prompt "When does my card expire?"',
    'echo "2 + 2" | adaptlib route --prompt - --explain',
    'adaptlib route --prompt "2 + 2" --router named:sums --generate',
    'adaptlib route --prompt "2 + 2" --compare arrow,uniform,named:sums --generate',
    'adaptlib route --prompt "2 + 2" --html why.html',
    'adaptlib route --prompt "2 + 2" --scope prompt --save mine',
    'adaptlib route --prompt "2 + 2" --shortlist 32',
    'adaptlib route --prompt "2 + 2" --experts cluster:tasks/0',
    'adaptlib route --prompt "2 + 2" --router mhr:skills --task sums',
)


def route(
    prompt: flags.Prompt,
    instruction: flags.Instruction = None,
    router: flags.RouterOption = None,
    compare: flags.Compare = None,
    top_k: flags.TopK = None,
    temperature: flags.Temperature = None,
    mix: flags.Mix = "outputs",
    scope: flags.Scope = None,
    threshold: flags.Threshold = None,
    calibrate: flags.Calibrate = None,
    samples: flags.Samples = None,
    task: flags.Task = None,
    experts: flags.Experts = None,
    shortlist: flags.Shortlist = None,
    only_base: flags.OnlyBase = None,
    model: flags.Model = None,
    generate: flags.Generate = False,
    max_new_tokens: flags.MaxNewTokens = 64,
    save: flags.Save = None,
    explain: flags.Explain = False,
    plot: flags.Plot = None,
    html: flags.Html = None,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose experts for an input, per token and module, without training (Arrow).

    Of several routers (--compare), the first is the one that is explained, drawn and written.
    """
    from adaptlib.errors import UsageError
    from adaptlib.experts import Library

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty", hint='adaptlib route --prompt "some text"')
    counts = {"--top-k": top_k, "--max-new-tokens": max_new_tokens, "--shortlist": shortlist}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{option} is 1 or more; got {count}", hint=f"{option} 4")
    if temperature is not None and not temperature > 0:
        raise UsageError(
            f"--temperature is more than 0; got {temperature:g}", hint="--temperature 1"
        )
    check_choice("--mix", mix, ("outputs", "factors"))
    check_choice("--scope", scope, ("token", "sequence", "prompt"))
    if threshold is not None and calibrate is not None:
        raise UsageError("--calibrate finds the threshold", hint="leave out --threshold")
    _check_files(plot, html)
    routers = _routers(router, compare)
    # The options that routers have, by the names of their `fit`.
    options = {"top_k": top_k, "temperature": temperature, "scope": scope, "threshold": threshold}
    given = {**options, "mix": mix}
    opened = Library.open(library)
    if save is not None:
        from adaptlib.experts.records import check_record_name

        check_record_name("routers", save)

    from . import route_pool as given_by
    from .route_run import calibrated, check, encode, fit, kept

    held = given_by.saved(opened, routers, words(experts), shortlist)
    if task is not None and held is None:
        raise UsageError(
            "--task is for routers that were learned by task",
            hint="--router mhr:NAME, as adaptlib train-router mhr keeps it",
        )
    if held is None:
        chosen = select(opened, given_by.pool(opened, routers, words(experts)), only_base)
        for one in routers:
            check(one, given | {"samples": samples})
    else:
        chosen = held[2]
    base_id, revision = one_base(opened, chosen)
    known = given_by.prompts(calibrate) if calibrate is not None else []

    from adaptlib.experts import base as bases

    base, tokenizer = bases.load(model or base_id, revision=None if model else revision)
    if instruction is not None:
        from adaptlib.training import prompt as in_form

        text = in_form(instruction, text)
    ids = encode(tokenizer, text, base)
    found: dict[str, float] = {}
    if shortlist is not None:
        found = given_by.shortlisted(opened, chosen, base, ids, shortlist, top_k, temperature)
        named = [one.partition(":")[2] for one in routers if ":" in one]
        chosen = list(dict.fromkeys([*named, *found]))
    loaded = dict(held[1]) if held else {name: opened[name] for name in chosen}
    if samples is not None:
        given["samples"] = given_by.samples(samples, loaded)
    if held is None:
        fitted = [fit(one, loaded, given, base, tokenizer) for one in routers]
    else:
        fitted = [kept(routers[0], held[0], options, task)]
    if known:
        fitted = [calibrated(one, base, tokenizer, known) for one in fitted]
    if save is not None:
        from adaptlib.routing import save_router

        save_router(opened, save, fitted[0].router)
        out.note(f"Saved  (adaptlib route --router saved:{save})")
    notes = list(dict.fromkeys(note for one in fitted for note in one.notes))
    if not json:
        for note in notes:
            out.note(f"Note: {note}")
    fields = _ask(
        (base, tokenizer, ids),
        loaded,
        fitted,
        prompt=text,
        compared=bool(compare),
        answer=max_new_tokens if generate else None,
        explain=explain,
        plot=plot,
        html=html,
        silent=json,
        quiet=quiet,
    )
    if found:
        fields["shortlist"] = [{"name": n, "weight": weight} for n, weight in found.items()]
    if json:
        out.document("route", **fields | {"notes": notes})


def _ask(
    model: tuple[Any, Any, Any],
    experts: "Mapping[str, Expert]",
    fitted: "Sequence[Fitted]",
    *,
    prompt: str,
    compared: bool,
    answer: int | None,
    explain: bool,
    plot: Path | None,
    html: Path | None,
    silent: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Ask every router, say and write what is wanted of it, and give what JSON says."""
    from . import route_view as view
    from .route_run import ask, warm, without_top

    base, tokenizer, ids = model
    details: dict[str, Any] = {}

    def see(first: "Asked") -> None:
        """What is known of the first router before it answers."""
        if not silent and not compared:
            view.print_shares(first, quiet=quiet)
        if explain or plot is not None or html is not None:
            details.update(view.details(first.trace, tokenizer, ids))
        if explain and not silent:
            from .explain import print_explanation

            print_explanation(details)

    if compared:
        warm(base, ids)
    stream = not silent and not compared
    asked = [
        ask(base, experts, one, tokenizer, ids, answer=answer, stream=stream, seen=see_it)
        for one, see_it in zip(fitted, [see] + [None] * (len(fitted) - 1), strict=True)
    ]
    if explain or html is not None:
        details["without"] = without_top(base, experts, asked[0], tokenizer, ids, answer=answer)
    if explain and not silent:
        from .explain import print_without

        print_without(details["without"], asked[0].text)
    fields = view.fields(asked, compared=compared)
    if compared and not silent:
        view.print_comparison(fields["compare"], quiet=quiet)
    if plot is not None:
        from adaptlib.routing.plot import plot_routing

        plot_routing(plot, details["tokens"], details["layers"])
        out.note(f"Drew {plot}")
    if html is not None:
        from .route_report import write

        write(html, {"prompt": prompt, **fields, **details}, asked[0].trace, experts)
        out.note(f"Wrote {html}")
    return fields | details if explain else fields


def _check_files(plot: Path | None, html: Path | None) -> None:
    if plot is not None:
        from adaptlib.paths import check_path

        check_path(plot)
    if html is not None:
        from adaptlib.routing.report import check_report

        check_report(html)


def _routers(router: str | None, compare: list[str] | None) -> list[str]:
    """The words for each router, the first of them the one that is asked."""
    from adaptlib.errors import UsageError

    several = words(compare)
    if compare is not None and not several:
        raise UsageError("--compare names no router", hint="--compare arrow,uniform")
    if router is not None:
        several = [router, *several]
    return [one for i, one in enumerate(several) if one not in several[:i]] or ["arrow"]
