"""The options of `route`."""

from pathlib import Path
from typing import Annotated

import typer

Prompt = Annotated[str, typer.Option(help="The input; - reads it from stdin.")]
Instruction = Annotated[
    str | None,
    typer.Option(help="Put the prompt into the form experts are trained on, with this task."),
]
RouterOption = Annotated[
    str | None,
    typer.Option(
        help="arrow, arrow_tuned, cm, lag, logo, loraretriever, lorauter, phatgoose, random, "
        "spectr, tp, uniform, named:EXPERT for one alone, or mhr:NAME, mope:NAME, poly:NAME, "
        "saved:NAME for one that is kept; arrow if not said.",
        show_default=False,
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="ROUTERS", help="Several routers side by side: a,b or repeated."),
]
TopK = Annotated[
    int | None, typer.Option(help="Experts a token, at each module; 4, or all if fewer.")
]
Temperature = Annotated[
    float | None, typer.Option(help="Of the softmax over the chosen; 1 if not said.")
]
Mix = Annotated[str, typer.Option(help="outputs (sum of updates) or factors (the paper's code).")]
Scope = Annotated[
    str | None,
    typer.Option(
        help="What gets a choice of its own: token, sequence or prompt; token if not said."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Let the base answer alone where no expert fits the prompt so well."),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Find the threshold that 95% of these prompts reach, one a line, of the experts' own.",
    ),
]
Samples = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Task files to know the experts' tasks by, one a task."),
]
Task = Annotated[
    str | None,
    typer.Option(metavar="TASK", help="Of a router that was learned by task: the one to answer."),
]
Save = Annotated[
    str | None, typer.Option(metavar="NAME", help="Keep the router, for --router saved:NAME.")
]
Experts = Annotated[
    list[str] | None,
    typer.Option(help="Only these: a,b or repeated, or cluster:NAME/LABEL of a saved clustering."),
]
Shortlist = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Load only the N experts that Arrow would give most weight: for thousands.",
    ),
]
OnlyBase = Annotated[
    str | None, typer.Option("--base", metavar="ID", help="Only experts of this base model.")
]
Model = Annotated[
    str | None, typer.Option(help="The base model, where it is not where the cards say.")
]
Generate = Annotated[bool, typer.Option("--generate", help="Answer, token by token.")]
MaxNewTokens = Annotated[int, typer.Option(help="At most this long an answer.")]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain", help="Show the choice by token and by layer, and without the top expert."
    ),
]
Plot = Annotated[Path | None, typer.Option(help="Draw the choice: .svg or .png.")]
Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Write a page to explore the choice in a browser."),
]
