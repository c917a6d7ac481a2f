"""The part of docs/results-experts.md on all routers over the LoRA experts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from intervals import interval

TOP_K = 4
Row = Mapping[str, Any]
Found = tuple[float, float, float]  # a mean and its interval

TITLES = {
    "base": "base alone",
    "uniform": "uniform",
    "random": f"random, top {TOP_K}",
    "arrow": f"Arrow, top {TOP_K}",
    "arrow_top1": "Arrow, top 1",
    "arrow_sequence": f"Arrow, top {TOP_K}, scope sequence",
    "arrow_prompt": f"Arrow, top {TOP_K}, scope prompt",
    "arrow_prompt1": "Arrow, top 1, scope prompt",
    "spectr": f"SpectR, top {TOP_K}",
    "spectr_prompt1": "SpectR, top 1, scope prompt",
    "lag": "LAG, the best of 20",
    "logo": "LoGo, top 20",
    "cm": f"CM, top {TOP_K}",
    "cm_prompt1": "CM, top 1, scope prompt",
    "tp": "TP, top 1",
    "loraretriever": "LoraRetriever, top 3",
    "loraretriever_top1": "LoraRetriever, top 1",
    "lorauter": "LORAUTER, top 3",
    "lorauter_sharp": "LORAUTER, top 3, temperature .1",
    "tp_card": "TP, top 1, from cards",
    "loraretriever_card": "LoraRetriever, top 3, from cards",
    "loraretriever_top1_card": "LoraRetriever, top 1, from cards",
    "lorauter_card": "LORAUTER, top 3, from cards",
    "oracle": "oracle",
}
EACH = {
    "uniform": "unif.",
    "arrow": "Arrow",
    "arrow_prompt1": "Ar-P1",
    "spectr": "SpectR",
    "logo": "LoGo",
    "cm": "CM",
    "tp": "TP",
    "loraretriever_top1": "LR-1",
    "loraretriever": "LR-3",
    "lorauter": "LORAUTER",
    "oracle": "oracle",
}
ASKED = {
    "random": "random",
    "arrow": "Arrow",
    "arrow_prompt": "Arrow, scope prompt",
    "spectr": "SpectR",
    "spectr_prompt1": "SpectR, scope prompt",
    "lag": "LAG",
    "logo": "LoGo",
    "cm": "CM",
    "cm_prompt1": "CM, scope prompt",
    "tp": "TP",
    "loraretriever": "LoraRetriever, LORAUTER",
    "tp_card": "TP, from cards",
    "loraretriever_card": "LoraRetriever, LORAUTER, from cards",
    "tp_bare": "TP, from samples without an instruction",
    "loraretriever_bare": "LoraRetriever, LORAUTER, from the same",
}
FORMS = {"trained": "as trained", "other": "other words", "bare": "input only"}


def bits(said: str) -> np.ndarray:
    return np.array([int(bit) for bit in said])


def of(rows: Sequence[Row], label: str, part: str = "hits") -> Found:
    return interval([bits(row[part][label]) for row in rows])


def against(rows: Sequence[Row], left: str, right: str, part: str = "hits") -> Found:
    """The difference of two routers on the same rows."""
    return interval([bits(row[part][left]) - bits(row[part][right]) for row in rows])


def told(found: Found) -> str:
    return "above" if found[1] > 0 else "below" if found[2] < 0 else "not told apart from"


def text(found: Found, *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    value, low, high = (0.0 if abs(part) < 5e-4 else part for part in found)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


TEXTS = ("tp", "loraretriever_top1", "loraretriever", "lorauter")


def verdict_part(
    rows: Sequence[Row], unseen: Sequence[Row], thresholds: Mapping[str, Row]
) -> list[str]:
    """What the numbers below say, in plain words."""

    def versus(label: str, other: str, some: Sequence[Row] = rows, part: str = "hits") -> str:
        found = against(some, label, other, part)
        return f"**{told(found)}** {TITLES[other]}, {text(found, sign=True)}"

    def chosen(form: str) -> Found:
        parts = [row["first"][form] for row in rows]
        pairs = [(bits(p["loraretriever"]["own"]), bits(p["arrow_prompt"]["own"])) for p in parts]
        return interval([left - right for left, right in pairs])

    def both(label: str, first: str, second: str) -> str:
        return f"- {mean(label)} is {versus(label, first)},\n  and {versus(label, second)}"

    def mean(label: str) -> str:
        return f"{TITLES[label]} ({of(rows, label)[0]:.3f})"

    def own(label: str) -> str:
        return ", ".join(f"{first(rows, form, label)[0]:.2f}" for form in FORMS)

    def outside(label: str) -> str:
        return (
            f"- {TITLES[label]} is {versus(label, 'arrow', part='held')}, with the own expert left out,\n"
            f"  and {versus(label, 'arrow', unseen)}, on the unseen tasks"
        )

    gains = [against(rows, label, "arrow")[1] > 0 for label in TEXTS]
    holds = "holds" if all(gains) else "holds in part" if any(gains) else "does not hold"
    best = max(TEXTS, key=lambda label: of(rows, label)[0])
    share = of(rows, best)[0] / of(rows, "oracle")[0]
    sets = ((rows, "held"), (unseen, "hits"))
    far = [against(some, label, "arrow", part)[0] for some, part in sets for label in TEXTS]
    low, high = min(far), max(far)
    refused = "; ".join(
        f"{ASKED[label].split(',')[0]} {row['tasks']['refused']:.2f}, {row['text']['refused']:.2f}"
        for label, row in thresholds.items()
    )
    return [
        f"Reports put text retrieval above Arrow in distribution. **That {holds} here**:",
        "",
        *(both(label, "arrow", "arrow_prompt1") for label in TEXTS),
        f"- the best of them, {TITLES[best]}, has {share:.0%} of what the oracle ({of(rows, 'oracle')[0]:.3f}) has",
        f"- one expert or three: {mean('loraretriever')} is {versus('loraretriever', 'loraretriever_top1')}",
        both("loraretriever_top1_card", "arrow", "loraretriever_top1"),
        "",
        "What that rests on is **the words of the prompt**. A prompt as trained repeats an instruction that",
        "is in the samples and in the card's description, word for word. First choice right, as trained, with",
        f"the instruction in other words, with the input only (chance {1 / rows[0]['experts']:.2f}):",
        "",
        f"- LoraRetriever from samples {own('loraretriever')}; from samples of inputs only {own('loraretriever_bare')};",
        f"  from cards {own('loraretriever_card')}",
        f"- Arrow, scope prompt {own('arrow_prompt')}; LoraRetriever from samples is "
        f"**{told(chosen('other'))}** it in other words,",
        f"  {text(chosen('other'), sign=True)}, and **{told(chosen('bare'))}** it with the input only, "
        f"{text(chosen('bare'), sign=True)}",
        "",
        "Out of distribution exact match is near zero for every router, and text routers differ from Arrow",
        f"by {low:+.3f} to {high:+.3f}:",
        "",
        *(outside(label) for label in ("uniform", "arrow_prompt1", *TEXTS)),
        "",
        "Routers that read no text (CM knows each task by 20 prompts):",
        "",
        both("arrow", "random", "uniform"),
        *(
            f"- {mean(label)} is {versus(label, 'arrow')}"
            for label in ("arrow_sequence", "arrow_prompt", "arrow_prompt1", "spectr", "logo", "cm")
        ),
        both("arrow_prompt1", "random", "uniform"),
        both("cm_prompt1", "arrow_prompt1", "tp"),
        "",
        "Thresholds that keep 95% of the experts' valid prompts refuse, of the unseen tasks' prompts and of",
        f"plain text: {refused}.",
        "",
        "One seed, one base of 3.9 M parameters, one list of paraphrases, meant to share few words with what",
        "they paraphrase; top 1 with scope prompt was added for Arrow and SpectR after the other numbers were",
        "seen. Most of these tasks have labels of their own, which no other expert was trained to say: that is",
        "why exact match out of distribution is low.",
        "",
    ]


def means_part(rows: Sequence[Row]) -> list[str]:
    count = rows[0]["experts"]
    return [
        "### Routers over all LoRA experts at once",
        "",
        f"The {count} LoRA experts together; nobody says which task a prompt is from. Exact match, the mean",
        f"over {len(rows)} tasks, with 95% intervals (bootstrap over tasks and rows, as above); differences are",
        "paired. Oracle is the task's own expert alone. The scope is the token where none is named and",
        "the router allows it. TP, LoraRetriever, LORAUTER and CM know each task by 20 prompts of its",
        "train split; *from cards*: by the task's name and the description alone. Their texts are",
        "compared by hashed words and characters, not by a trained encoder as in the papers.",
        "",
        "| router | exact match | difference to Arrow |",
        "|---|---:|---:|",
        *(
            f"| {title} | {text(of(rows, label))} | "
            f"{'' if label == 'arrow' else text(against(rows, label, 'arrow'), sign=True)} |"
            for label, title in TITLES.items()
        ),
        "",
    ]


def each_part(rows: Sequence[Row]) -> list[str]:
    def line(name: str, pick: Callable[[str], float]) -> str:
        return f"| {name} | {' | '.join(f'{pick(label):.2f}' for label in EACH)} |"

    return [
        "### Each task",
        "",
        "LR-1 and LR-3: LoraRetriever with its best expert and with three; Ar-P1: Arrow with top 1 and",
        "scope prompt. The others are in `docs/results.json`, row by row.",
        "",
        f"| task | {' | '.join(EACH.values())} |",
        f"|---|{'---:|' * len(EACH)}",
        *(
            line(row["task"], lambda label, row=row: bits(row["hits"][label]).mean())
            for row in rows
        ),
        line("**mean**", lambda label: of(rows, label)[0]),
        "",
    ]


def choices_part(rows: Sequence[Row]) -> list[str]:
    def own(form: str, label: str) -> str:
        if label not in rows[0]["first"][form]:
            return ""
        return text(first(rows, form, label))

    counts = {form: len(rows[0]["first"][form]["arrow"]["own"]) for form in FORMS}
    lines = [
        "### Whom a prompt goes to",
        "",
        "The share of prompts whose first choice is the task's own expert: the one that fits best, or,",
        "where tokens choose, the one with the most routing weight over the prompt's tokens and modules.",
        f"Chance is {1 / rows[0]['experts']:.3f}. *As trained*: the task's instruction, the input, `Answer:`, as the samples",
        f"are ({counts['trained']} test prompts a task). *Other words*: the same with an instruction that says it",
        "otherwise and shares few words with it, written before anything was measured (`PARAPHRASES` in",
        f"`benchmarks/bundle_routers.py`; {counts['other']} prompts a task).",
        "*Input only*: no instruction and no `Answer:` (the same rows).",
        "",
        f"| router | {' | '.join(FORMS.values())} |",
        "|---|---:|---:|---:|",
        *(
            f"| {title} | {' | '.join(own(form, label) for form in FORMS)} |"
            for label, title in ASKED.items()
        ),
        "",
        "By task, as trained; *cluster*: Arrow's first choice is in the MBC cluster of the task's own.",
        "",
        "| task | Arrow | cluster | chance | Arrow's commonest choice | LoraRetriever |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        arrow, texts = (row["first"]["trained"][label] for label in ("arrow", "loraretriever"))
        lines.append(
            f"| {row['task']} | {bits(arrow['own']).mean():.2f} | {arrow['cluster']:.2f} | "
            f"{row['chance_cluster']:.2f} | {arrow['most']} | {bits(texts['own']).mean():.2f} |"
        )
    means = (
        first(rows, "trained", "arrow")[0],
        np.mean([row["first"]["trained"]["arrow"]["cluster"] for row in rows]),
        np.mean([row["chance_cluster"] for row in rows]),
    )
    shown = " | ".join(f"{value:.2f}" for value in means)
    last = first(rows, "trained", "loraretriever")[0]
    return [*lines, f"| **mean** | {shown} | | {last:.2f} |", ""]


def first(rows: Iterable[Row], form: str, label: str) -> Found:
    return interval([bits(row["first"][form][label]["own"]) for row in rows])


def outside_part(rows: Sequence[Row], unseen: Sequence[Row]) -> list[str]:
    """Where no expert is the right one."""
    labels = (
        "uniform",
        "arrow",
        "arrow_prompt1",
        "tp",
        "loraretriever_top1",
        "loraretriever",
        "lorauter",
    )
    lines = [
        "### Where no expert is the right one",
        "",
        "Exact match out of distribution, twice. *Own left out*: the same tasks and rows, each with the",
        f"{rows[0]['experts'] - 1} LoRA experts of the other tasks. *Unseen tasks*: the {len(unseen)} held-out tasks, which have no",
        f"expert, with all {rows[0]['experts']}.",
        "",
    ]
    for some, part, what in ((rows, "held", "own left out"), (unseen, "hits", "unseen tasks")):
        lines += [
            f"| router | {what} | difference to Arrow |",
            "|---|---:|---:|",
            f"| {TITLES['base']} | {text(of(some, 'base'))} | |",
        ]
        for label in labels:
            differs = against(some, label, "arrow", part)
            shown = "" if label == "arrow" else text(differs, sign=True)
            lines.append(f"| {TITLES[label]} | {text(of(some, label, part))} | {shown} |")
        lines.append("")
    lines += [
        "The unseen tasks; *chosen* is LoraRetriever's commonest first choice, *commonest* what always",
        "saying the commonest answer would score.",
        "",
        "| task | commonest | uniform | Arrow | Ar-P1 | LR-1 | LR-3 | chosen |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in unseen:
        shares = " | ".join(
            f"{bits(row['hits'][label]).mean():.2f}"
            for label in (
                "uniform",
                "arrow",
                "arrow_prompt1",
                "loraretriever_top1",
                "loraretriever",
            )
        )
        lines.append(
            f"| {row['task']} | {row['majority']:.2f} | {shares} | {row['most']['loraretriever']} |"
        )
    return [*lines, ""]


def thresholds_part(found: Mapping[str, Row]) -> list[str]:
    some = next(iter(found.values()))
    counts = some["prompts"]
    lines = [
        "### Thresholds",
        "",
        f"`calibrate` with keep .95 on {counts['valid']} prompts of the experts' valid splits. *Kept*: of {counts['test']} of their",
        f"test splits. *Refused*: of {counts['tasks']} prompts of the unseen tasks, and of {counts['text']} lines of encyclopedia and",
        "novels. *Separation* is the area under the ROC curve, test prompts against these (.5: none).",
        "*ms*: the median of one decision, a prompt at a time, and of the base's pass that it includes,",
        "if it looks at hidden states; one thread of **a machine that was busy with other work**.",
        "",
        "| router | kept | refused: tasks | separation | refused: text | separation | ms | base's pass |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, title in ASKED.items():
        if label in found:
            row = found[label]
            parts = " | ".join(
                f"{row[name]['refused']:.2f} | {row[name]['separation']:.3f}"
                for name in ("tasks", "text")
            )
            looks = label not in ("tp", "loraretriever")
            base = f"{row['ms_base']:.0f}" if looks else ""
            name = "LoraRetriever" if label == "loraretriever" else title
            lines.append(f"| {name} | {row['kept']:.2f} | {parts} | {row['ms']:.1f} | {base} |")
    return [*lines, ""]
