"""The routers that bundle.py compares, the prompts it asks with, and whom each prompt goes to."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from report_routers import TOP_K

SAMPLES = 20  # prompts of each task's train split, for the routers that know tasks by their prompts
BATCH = 32
# Other words for each instruction, written before anything was measured with them.
PARAPHRASES = {
    "Name the intent of the request.": "What does the user want to have done?",
    "Is the product review sentence positive or negative?": "Say whether the buyer liked the item.",
    "Is this note from a product review a pro or a con?": "Does the remark praise or criticise what was bought?",
    "Classify the entity described (14 classes such as Company, Artist, Village).": "What kind of thing is the text about?",
    "Is the sentence subjective (opinion) or objective (plot)?": "Does the text judge, or does it tell what happens?",
    "Entailment, neutral or contradiction?": "Does the second statement follow from the first?",
    "capitalize": "Write the word with a large initial.",
    "capitalize first letter": "Give the initial of the word, in upper case.",
    "choose first of 5": "Which item opens the list?",
    "choose last of 5": "Which item ends the list?",
    "animal v object 5": "Find the living creature among the things.",
    "color v animal 5": "Find the hue among the beasts.",
    "verb v adjective 5": "Find the action among the qualities.",
    "Write the plural.": "What are several of these called?",
    "Is the first name female or male?": "Is a person called this a woman or a man?",
    "Which animal is larger?": "Name the bigger beast of the two.",
    "Rewrite the sentence in the passive voice.": "Let the object of the clause become its subject.",
    "Negate the sentence.": "Say the opposite of this.",
}
EMOTIONS = "ni_task875_emotion_classification"  # its instruction is long
OF_EMOTIONS = "Which feeling does the writer show?"


def paraphrase(task: Any) -> str:
    """The instruction of the task in other words."""
    return OF_EMOTIONS if task.name == EMOTIONS else PARAPHRASES[task.instruction]


def forms(task: Any, rows: Sequence[Any]) -> dict[str, list[str]]:
    """The prompts of these rows: as in training, in other words, and the input without anything."""
    from adaptlib.training import prompt

    return {
        "trained": [task.prompt(row) for row in rows],
        "other": [prompt(paraphrase(task), row.input) for row in rows],
        "bare": [row.input for row in rows],
    }


@dataclass(frozen=True)
class Bench:
    """What every measurement of a process needs, made once."""

    model: Any
    tokenizer: Any
    experts: dict[str, Any]
    loras: dict[str, Any]
    prompts: dict[str, list[str]]  # samples of each LoRA expert's task, as it was trained
    inputs: dict[str, list[str]]  # their inputs alone


@cache
def bench(folder: Path) -> Bench:
    import torch

    torch.set_num_threads(1)
    from adaptlib.demo import experts
    from adaptlib.experts.base import DEMO_BASE, load
    from adaptlib.training import read_task

    model, tokenizer = load(DEMO_BASE)
    held = experts()
    loras = {name: expert for name, expert in held.items() if expert.kind == "lora"}
    prompts, inputs = {}, {}
    for name, expert in loras.items():
        task = read_task(folder / f"{expert.card['task']}.jsonl")
        rows: Any = random.Random(0).sample(task.split("train"), SAMPLES)
        prompts[name] = [task.prompt(row) for row in rows]
        inputs[name] = [row.input for row in rows]
    return Bench(model, tokenizer, held, loras, prompts, inputs)


@cache
def routers(folder: Path) -> dict[str, Any]:
    """Every router over all LoRA experts, with its own defaults where the name says nothing."""
    from adaptlib import routing as r

    at = bench(folder)
    loras, known = at.loras, at.prompts
    hidden: Any = {"model": at.model, "tokenizer": at.tokenizer, "samples": known}
    return {
        "uniform": r.Uniform.fit(loras),
        "random": r.Random.fit(loras, top_k=TOP_K),
        "arrow": r.Arrow.fit(loras, top_k=TOP_K),
        "arrow_top1": r.Arrow.fit(loras, top_k=1),
        "arrow_sequence": r.Arrow.fit(loras, top_k=TOP_K, scope="sequence"),
        "arrow_prompt": r.Arrow.fit(loras, top_k=TOP_K, scope="prompt"),
        "arrow_prompt1": r.Arrow.fit(loras, top_k=1, scope="prompt"),
        "spectr": r.SpectR.fit(loras, top_k=TOP_K),
        "spectr_prompt1": r.SpectR.fit(loras, top_k=1, scope="prompt"),
        "lag": r.LAG.fit(loras),
        "logo": r.LoGo.fit(loras),
        "cm": r.CentroidMatching.fit(loras, count=SAMPLES, top_k=TOP_K, **hidden),
        "cm_prompt1": r.CentroidMatching.fit(
            loras, count=SAMPLES, top_k=1, scope="prompt", **hidden
        ),
        "tp": r.TaskPredictor.fit(loras, samples=known),
        "loraretriever": r.LoraRetriever.fit(loras, samples=known),
        "loraretriever_top1": r.LoraRetriever.fit(loras, samples=known, top_k=1),
        "lorauter": r.LORAUTER.fit(loras, samples=known),
        "lorauter_sharp": r.LORAUTER.fit(loras, samples=known, temperature=0.1),
        "tp_card": r.TaskPredictor.fit(loras),
        "loraretriever_card": r.LoraRetriever.fit(loras),
        "loraretriever_top1_card": r.LoraRetriever.fit(loras, top_k=1),
        "lorauter_card": r.LORAUTER.fit(loras),
        # only asked whom it would choose
        "tp_bare": r.TaskPredictor.fit(loras, samples=at.inputs),
        "loraretriever_bare": r.LoraRetriever.fit(loras, samples=at.inputs),
    }


ASKED = ("random", "arrow", "arrow_prompt", "spectr", "spectr_prompt1", "lag", "logo")
ASKED += ("cm", "cm_prompt1")
ASKED_TEXTS = ("tp", "loraretriever", "tp_card", "loraretriever_card", "tp_bare")
ASKED_TEXTS += ("loraretriever_bare",)
# on tasks without an expert
UNSEEN = ("uniform", "arrow", "arrow_prompt1", "tp", "loraretriever", "loraretriever_top1")
UNSEEN += ("lorauter",)


def without(folder: Path, own: str) -> dict[str, Callable[[], Any]]:
    """How to fit routers over the LoRA experts but one."""
    from adaptlib import routing as r

    at = bench(folder)
    loras = {name: expert for name, expert in at.loras.items() if name != own}
    known = at.prompts
    return {
        "uniform": lambda: r.Uniform.fit(loras),
        "arrow": lambda: r.Arrow.fit(loras, top_k=TOP_K),
        "arrow_prompt1": lambda: r.Arrow.fit(loras, top_k=1, scope="prompt"),
        "tp": lambda: r.TaskPredictor.fit(loras, samples=known),
        "loraretriever": lambda: r.LoraRetriever.fit(loras, samples=known),
        "loraretriever_top1": lambda: r.LoraRetriever.fit(loras, samples=known, top_k=1),
        "lorauter": lambda: r.LORAUTER.fit(loras, samples=known),
    }


def hits(on: Any, tokenizer: Any, task: Any, rows: int) -> str:
    """Which of the first test rows are answered exactly: a 1 or 0 for each."""
    from adaptlib.evaluation import exact_match
    from adaptlib.evaluation.score import same
    from adaptlib.training.tasks import output_of

    score = exact_match(on, tokenizer, task, limit=rows, batch_size=64)
    pairs = zip(score.predictions, task.split("test")[:rows], strict=True)
    return "".join(str(int(same(said, output_of(row)))) for said, row in pairs)


def routed_hits(at: Bench, experts: Mapping[str, Any], router: Any, task: Any, rows: int) -> str:
    from adaptlib.routing import attach

    with attach(at.model, experts, router, tokenizer=at.tokenizer) as routed:
        return hits(routed, at.tokenizer, task, rows)


def first_choices(
    model: Any, tokenizer: Any, texts: Sequence[str], experts: Mapping[str, Any], router: Any
) -> list[str]:
    """For each prompt the expert that fits best: of a router that chooses once for a prompt the
    one with the largest weight, of others the one with the most over its tokens and modules."""
    import torch

    from adaptlib.routing import attach
    from adaptlib.routing.attach import asking
    from adaptlib.routing.texts import TextEmbedding, TextRouter

    if isinstance(router, TextRouter):  # whose weights may be equal
        best = router.fits(TextEmbedding(router.idf).embed(list(texts))).argmax(1)
        return [router.experts[i] for i in best.tolist()]
    chosen = []
    for start in range(0, len(texts), BATCH):
        batch = _batch(tokenizer, texts[start : start + BATCH])
        with torch.inference_mode():
            if router.scope == "prompt":
                with asking(model, router) as session:
                    session.begin(model, (), batch)
                weights = session.weights
                assert weights is not None
            else:
                with attach(model, experts, router) as routed, routed.record() as trace:
                    routed(**batch, use_cache=False, logits_to_keep=1)
                weights = _weights(trace, batch["attention_mask"])
        chosen += [router.experts[i] for i in weights.argmax(1).tolist()]
    return chosen


def _batch(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    import torch

    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in ids]),
    }


def _weights(trace: Any, mask: Any) -> Any:
    """(sequence, expert): each expert's mean weight over a prompt's tokens and the modules."""
    import torch

    total = torch.zeros(len(mask), len(trace.experts))
    for ((index, weight),) in trace.choices.values():
        each = torch.zeros(len(index), len(trace.experts)).scatter(1, index, weight)
        each = each.unflatten(0, mask.shape) * mask[:, :, None]
        total += each.sum(1) / mask.sum(1, keepdim=True)
    return total / len(trace.choices)
