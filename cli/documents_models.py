"""What `--json` prints where a model runs: routing, training and scoring.

Seconds are of this machine, entropies in bits, memory and disk in bytes. Shares, weights and
agreements are from 0 to 1.
"""

from typing import Any

from msgspec import UNSET, UnsetType

from .document import Count, Digest, Document, Part

# -- routing ----------------------------------------------------------------------------------


class Weight(Part):
    """An expert and its share of the routing weight."""

    name: str
    weight: float


class RouterBeside(Part):
    """One of several routers; `overlap` is the weight that it gives to the first one's experts."""

    router: str
    top_k: Count
    experts: list[Weight]
    overlap: float
    entropy: float
    seconds: float
    fit_seconds: float
    text: str | UnsetType = UNSET


class Token(Part):
    """One token, its expert with the most weight over all layers, and that of each layer."""

    token: str
    expert: str | None
    weight: float
    entropy: float
    experts: list[Weight]
    layers: list[str | None]


class Layer(Part):
    """One layer, by its number, or a module outside all layers by its name."""

    layer: int | str
    experts: list[Weight]
    entropy: float
    agreement: float | None
    with_whole: float | None


class Entropy(Part):
    """Of all shares, of a token's, and of one choice at a module; null where nothing was seen."""

    whole: float
    token: float | None
    choice: float | None


class Gain(Part):
    """An expert's share before and after another one is left out."""

    name: str
    before: float
    after: float


class Likely(Part):
    """The most likely next token; null where its probability is no number."""

    token: str
    probability: float | None


class Next(Part):
    """The next token with and without an expert; `kl` in bits."""

    before: Likely
    after: Likely
    kl: float | None


class Without(Part):
    """What changes without the expert that has the most weight."""

    expert: str
    share: float
    shares: list[Gain]
    next: Next
    text: str | UnsetType = UNSET


class Route(Document, tag="adaptlib.route/1"):
    """Who answers a prompt. Sorted by weight, and the weights sum to 1, unless the base model
    answers alone. `text` with --generate, `compare` with --compare, `confidence` with a threshold,
    `shortlist` with --shortlist, and from `tokens` to `without` with --explain."""

    router: str
    top_k: Count
    mix: str
    scope: str
    experts: list[Weight]
    notes: list[str]
    threshold: float | UnsetType | None = UNSET
    confidence: float | UnsetType = UNSET
    text: str | UnsetType = UNSET
    compare: list[RouterBeside] | UnsetType = UNSET
    shortlist: list[Weight] | UnsetType = UNSET
    tokens: list[Token] | UnsetType = UNSET
    layers: list[Layer] | UnsetType = UNSET
    agreement: float | UnsetType | None = UNSET
    entropy: Entropy | UnsetType = UNSET
    without: Without | UnsetType | None = UNSET


# -- training ---------------------------------------------------------------------------------


class Train(Document, tag="adaptlib.train/1"):
    """An expert that was trained; name, digest and bytes are null where it was not kept, seconds
    where it was there already."""

    name: str | None
    digest: Digest | None
    new: bool
    kind: str
    base: str
    task: str
    params: Count
    bytes: Count | None
    steps: Count | None
    seconds: float | None
    metrics: dict[str, Any]
    notes: list[str]


class Rows(Part):
    """Rows of each split."""

    train: Count
    valid: Count
    test: Count


class Tokens(Part):
    """Tokens of a row, of an epoch and of the whole run."""

    median: Count
    p95: Count
    max: Count
    epoch: Count
    total: Count


class Piece(Part):
    """Text as the model sees it, and whether it learns to answer it."""

    text: str
    answer: bool


class Example(Part):
    """A training row in pieces."""

    parts: list[Piece]


class TrainPlan(Document, tag="adaptlib.train-plan/1"):
    """What `train --dry-run` would train, and what that takes."""

    task: str
    kind: str
    base: str
    key: str
    rows: Rows
    cut: Count
    dropped: Count
    max_length: Count
    tokens: Tokens
    epochs: Count
    steps: Count
    modules: Count
    trainable: Count
    share: float
    memory: Count
    disk: Count
    tokens_per_second: float | None
    seconds: float | None
    examples: list[Example]


class Trained(Part):
    """An expert of many; `new` is false where it was there already."""

    name: str
    digest: Digest | None
    metrics: dict[str, Any]
    new: bool


class Failed(Part):
    """A task whose training failed, and why."""

    name: str
    error: str
    hint: str | None


class TrainLibrary(Document, tag="adaptlib.train-library/1"):
    """The experts of many tasks; exit code 1 where any failed."""

    base: str
    seconds: float
    trained: list[Trained]
    failed: list[Failed]
    notes: list[str]


class Planned(Part):
    """One expert to train, of one task or several."""

    name: str
    task: str
    tasks: list[str]
    key: str
    done: bool
    rows: Count
    cut: Count
    dropped: Count
    tokens: Count
    steps: Count
    trainable: Count
    memory: Count
    seconds: float | None


class TrainLibraryPlan(Document, tag="adaptlib.train-library-plan/1"):
    """What `train-library --dry-run` would train."""

    base: str
    workers: Count
    tokens_per_second: float | None
    experts: list[Planned]


class Kept(Part):
    """An expert that was kept with a router."""

    name: str
    digest: Digest
    new: bool


class TrainRouter(Document, tag="adaptlib.train-router/1"):
    """A router that was learned, with its experts; of gates, the experts alone and no name."""

    router: str
    name: str | None
    experts: list[Kept]
    digest: Digest | UnsetType = UNSET
    steps: Count | UnsetType = UNSET
    metrics: dict[str, Any] | UnsetType = UNSET


# -- scoring ----------------------------------------------------------------------------------


class Score(Part):
    """A router's score on a task; the interval is 95%. Tasks of lm-evaluation-harness have none."""

    router: str
    task: str
    split: str
    metric: str
    value: float
    n: Count
    low: float | UnsetType = UNSET
    high: float | UnsetType = UNSET
    category: str | UnsetType | None = UNSET
    cut: Count | UnsetType = UNSET


class RouterScore(Part):
    """A router's mean over the tasks, next to the oracle's, and how it routes."""

    router: str
    metric: str
    tasks: Count
    value: float
    low: float
    high: float
    oracle_share: float | None
    regret: float | None
    agreement: float | None
    entropy: float | None
    used: float | None
    seconds: float | None
    cost: float | None


class Comparison(Part):
    """Router a less b, paired by row; rows in which a is better, equal and worse."""

    a: str
    b: str
    metric: str
    tasks: Count
    difference: float
    low: float
    high: float
    p: float
    better: Count
    equal: Count
    worse: Count


class Confusion(Part):
    """How many prompts of an expert's own task went to which expert; null is the base alone."""

    own: str
    expert: str | None
    n: Count


class Quality(Part):
    """How a router routes."""

    agreement: float | None
    entropy: float
    token_entropy: float
    used: float
    above: Count
    varied: float
    cost: float
    seconds: float | None
    base_seconds: float | None
    confusion: list[Confusion]
    shares: dict[str, float]


class Eval(Document, tag="adaptlib.eval/1"):
    """Scores by router and task, means by router, comparisons, and how each routes; `oracle` names
    each task's own expert. Tasks of lm-evaluation-harness have results and notes alone."""

    results: list[Score]
    notes: list[str]
    routers: list[RouterScore] | UnsetType = UNSET
    comparisons: list[Comparison] | UnsetType = UNSET
    quality: dict[str, Quality] | UnsetType = UNSET
    oracle: dict[str, str | None] | UnsetType = UNSET


class Method(Part):
    """A method of the papers, over seeds; each group of tasks with its interval and seeds, null
    where it was not asked about them."""

    method: str
    seeds: Count
    agreement: float | None
    entropy: float | None
    token_entropy: float | None
    used: float | None
    above: float | None
    varied: float | None
    cost: float | None
    seconds: float
    held_in: float | UnsetType | None = UNSET
    held_in_interval: tuple[float, float] | UnsetType | None = UNSET
    held_in_seeds: list[float] | UnsetType | None = UNSET
    held_out: float | UnsetType | None = UNSET
    held_out_interval: tuple[float, float] | UnsetType | None = UNSET
    held_out_seeds: list[float] | UnsetType | None = UNSET
    few_shot: float | UnsetType | None = UNSET
    few_shot_interval: tuple[float, float] | UnsetType | None = UNSET
    few_shot_seeds: list[float] | UnsetType | None = UNSET


class Claim(Part):
    """What a paper found, and whether it holds here."""

    claim: str
    tasks: Count
    first: str
    second: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    holds: str


class Collapse(Part):
    """How varied a mixture's routing is, and whether it has collapsed."""

    entropy: float | None
    used: float | None
    varied: float | None
    collapsed: bool


class Training(Part):
    """The steps and seconds that a method was trained for."""

    steps: Count | None
    seconds: float | None


class Bench(Document, tag="adaptlib.bench/1"):
    """The methods of the papers side by side, by method, claim and task."""

    methods: list[Method]
    few_shot: list[Method]
    claims: list[Claim]
    collapse: dict[str, Collapse]
    training: dict[str, Training]
    tasks: dict[str, dict[str, float]]
