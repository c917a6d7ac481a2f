"""What an attached model keeps while it runs: whose tokens pass, and what was chosen for them.

A call with an empty cache begins new prompts; a call that brings a cache goes on with those before,
as each step of `generate` does. A choice for a whole sequence or prompt is made in the first and
kept in the others.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adaptlib.errors import RefusedError, UsageError
from adaptlib.routing.bank import Bank
from adaptlib.routing.router import Choice, Router
from adaptlib.routing.scoring import ScoringRouter
from adaptlib.routing.together import Together
from adaptlib.routing.trace import Trace

# What models call the cache that they go on with: `cache` since transformers 5.24, which takes the
# next two still and renames them inside `forward`, after `begin` saw them; and RWKV's `state`.
CACHES = ("cache", "past_key_values", "cache_params", "state")


@final
@dataclass(eq=False)
class Session:
    """The one thing in routing that changes: it lives from `attach` to `detach`."""

    router: Router
    banks: Mapping[str, Bank]
    groups: Mapping[str, Together]  # by its first module, those that see the same input
    tokenizer: Any = None
    traces: list[Trace] = field(default_factory=list)
    mask: Bool[Tensor, "sequence tok"] | None = None  # of the call that runs
    reading: Bool[Tensor, "sequence tok"] | None = None  # what counts as prompt, if not all of it
    fresh: bool = True  # whether it begins new prompts
    weights: Float[Tensor, "sequence expert"] | None = None  # scope "prompt"
    confidence: Float[Tensor, " sequence"] | None = None  # with a threshold
    kept: dict[str, Choice] = field(default_factory=dict)  # by module, of each sequence
    # by module: the input that the first of its group saw, its place there, and what was chosen for
    # the group and added to this module
    ahead: dict[str, tuple[Tensor, int, Choice, Tensor]] = field(default_factory=dict)
    seen: dict[str, Tensor] | None = None  # what `look` gave, while the base is probed

    @property
    def by_prompt(self) -> bool:
        """Whether it matters which sequence a token is of."""
        return self.router.scope != "token" or self.router.threshold is not None

    # -- before the model runs --------------------------------------------------------------------

    def begin(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """See who comes; for new prompts, ask the router what it chooses for a prompt."""
        if self.seen is not None:  # this is the probe
            return
        given = _given(model, args, named)
        inputs = given.get("input_ids")
        shape = (inputs if inputs is not None else given["inputs_embeds"]).shape[:2]
        self.fresh = not self._goes_on(given)
        self.mask = _mask(given.get("attention_mask"), shape, model)
        if not self.fresh:
            self._check_same(shape[0])
            return
        self._only_prompt()
        self.kept.clear()
        self.weights = self.confidence = None
        if self.router.scope != "prompt" and self.router.threshold is None:
            return
        seen = self._probe(model, given)
        texts = self._texts(inputs) if self.router.reads_text else None
        if self.router.scope == "prompt":
            self.weights = self.router.weigh(seen, texts)
        if self.router.threshold is not None:
            self.confidence = self.router.confidence(seen, texts)

    def _only_prompt(self) -> None:
        """Leave what is no prompt out of the mask, where that was said."""
        if self.reading is None:
            return
        assert self.mask is not None
        if self.reading.shape != self.mask.shape:
            raise UsageError(
                f"reading wants a mask of the sequences and tokens that come, "
                f"{tuple(self.mask.shape)}; got {tuple(self.reading.shape)}"
            )
        self.mask = self.mask & self.reading.to(self.mask.device)

    def _goes_on(self, given: Mapping[str, Any]) -> bool:
        """Whether a call brings a cache that holds tokens; the first of `generate` may be empty."""
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if cache is None:
            return False
        if hasattr(cache, "get_seq_length"):
            try:
                return bool(cache.get_seq_length() > 0)
            except ValueError:  # of state spaces alone, which have a state and no length
                return cache.has_previous_state()
        position = given.get("cache_position")  # what Mamba has instead before transformers 5.5
        if position is None:
            raise RefusedError(
                f"a cache that is a {type(cache).__name__} does not say whether it holds tokens, "
                f"so it is not known whether a prompt begins; scope {self.router.scope!r} and "
                "thresholds need that",
                hint='use scope="token" without a threshold',
            )
        return bool(position[0] > 0)

    def _probe(self, model: nn.Module, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the router sees in a pass of the base alone over the prompts."""
        if not self.router.probes:
            return {}
        left_out = (*CACHES, "labels", "use_cache", "cache_position")
        inputs = {key: value for key, value in given.items() if key not in left_out}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = self._without_cache(inputs["attention_mask"])
        self.seen = {}
        try:
            with torch.no_grad():
                model(**inputs, use_cache=False)
            return self.seen
        finally:
            self.seen = None

    def _without_cache(self, mask: Any) -> Any:
        """A mask that `generate` made for a static cache, (sequence, 1, tok, room), without the
        room that is still empty; others as they are."""
        assert self.mask is not None
        if isinstance(mask, Mapping):
            return {kind: self._without_cache(one) for kind, one in mask.items()}
        if isinstance(mask, Tensor) and mask.ndim == 4:
            return mask[..., : self.mask.shape[1]]
        return mask

    def _texts(self, ids: Int[Tensor, "sequence tok"] | None) -> list[str]:
        if ids is None:
            raise UsageError(
                f"router {self.router.name} reads the prompt's text; inputs_embeds have none",
                hint="give input_ids",
            )
        assert self.mask is not None
        rows = [row[real].tolist() for row, real in zip(ids, self.mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _check_same(self, sequences: int) -> None:
        before = {len(choice.index) for choice in self.kept.values()}
        before |= {len(part) for part in (self.weights, self.confidence) if part is not None}
        if before - {sequences}:
            raise UsageError(
                f"this call goes on with {sequences} sequences; experts were chosen for "
                f"{before.pop()}",
                hint="begin again without a cache",
            )

    # -- at each module ---------------------------------------------------------------------------

    def added(self, module: str, x: Float[Tensor, "*batch d_in"]) -> Tensor | None:
        """What the experts add to the output of `module`; None while the base is probed."""
        if self.seen is not None:
            if module in self.router.probes:
                self.seen[module] = self.router.look(module, *self._sequences(module, x))
            return None
        bank = self.banks.get(module)
        if bank is None:
            return None
        if self.router.scope == "token":
            added = self._of_tokens(module, bank, x)
            return added.reshape(*x.shape[:-1], added.shape[-1])
        split, mask = self._sequences(module, x)
        choice = self._of_sequences(module, split, mask)
        self._trace(module, choice, split.shape[1])
        added = bank.shared(split, choice)
        return added.reshape(*x.shape[:-1], added.shape[-1])

    def _of_tokens(self, module: str, bank: Bank, x: Tensor) -> Tensor:
        """By token. The first of a group of modules does the work of all of them; whether the
        others did see the same tensor is checked when their turn comes."""
        done = self.ahead.pop(module, None)
        if done is not None and done[0] is x:
            _, m, choice, added = done
            self._trace(module, choice, 1, m)
            return added
        flat = x.reshape(-1, x.shape[-1])
        group = self.groups.get(module)
        if group is None:
            choice = self._open(module, x, self.router.route(module, flat))
            self._trace(module, choice, 1)
            return bank(flat, choice)
        choice = self._open(module, x, self.router.route_all(group.modules, flat))
        self._trace(module, choice, 1, 0)
        first, *others = group(flat, choice)
        for m, added in enumerate(others, start=1):
            self.ahead[group.modules[m]] = (x, m, choice, added)
        return first

    def _open(self, module: str, x: Tensor, choice: Choice) -> Choice:
        """The choice, with weight 0 where no expert fits the prompt."""
        if self.confidence is None:
            return choice
        tok = self._sequences(module, x)[0].shape[1]
        return self._fitting(choice, tok)

    def _fitting(self, choice: Choice, tok: int) -> Choice:
        """The choice with weight 0 in rows of prompts below the threshold; `tok` rows a prompt."""
        if self.confidence is None:
            return choice
        assert self.router.threshold is not None
        fits = (self.confidence >= self.router.threshold).to(choice.weight).repeat_interleave(tok)
        return Choice(choice.index, choice.weight * fits.view(-1, *[1] * (choice.weight.ndim - 1)))

    def _of_sequences(
        self,
        module: str,
        x: Float[Tensor, "sequence tok d_in"],
        mask: Bool[Tensor, "sequence tok"],
    ) -> Choice:
        """One choice for each sequence, made for its prompt and kept."""
        choice = self.kept.get(module)
        if choice is None:
            if self.weights is not None:
                choice = self._of_weights(module, self.weights.to(x.device))
            else:
                assert isinstance(self.router, ScoringRouter)  # checked by attach
                choice = self.router.choose(module, self.router.pooled(module, x, mask))
            choice = self.kept[module] = self._fitting(choice, 1)
        return choice

    def _of_weights(self, module: str, weights: Float[Tensor, "sequence expert"]) -> Choice:
        """The prompts' experts at one module: those that lack it add nothing there."""
        here = torch.zeros(len(self.router.experts), device=weights.device)
        here[list(self.router.columns[module])] = 1
        most = max(1, int((weights > 0).sum(1).max()))
        top, index = weights.topk(most, dim=1)
        return Choice(index, (top * here[index]).float())

    def _sequences(
        self, module: str, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "sequence tok d_in"], Bool[Tensor, "sequence tok"]]:
        """The tokens by sequence, and which are real. A module that sees fewer of each sequence
        than the model, such as a head that is given the last one, sees real ones only."""
        assert self.mask is not None  # begin() has run
        sequences, tok = self.mask.shape
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) % sequences:
            raise RefusedError(
                f"{module} sees {len(flat)} tokens of {sequences} sequences, so it is not known "
                f"whose they are; scope {self.router.scope!r} and thresholds need that",
                hint='use scope="token" without a threshold',
            )
        split = flat.unflatten(0, (sequences, -1))
        mask = self.mask.to(x.device)
        if split.shape[1] != tok:
            mask = mask.new_ones(split.shape[:2])
        return split, mask

    def _trace(self, module: str, choice: Choice, tok: int, m: int | None = None) -> None:
        """Record the choice for `tok` tokens each; that of the m-th module of several."""
        if not self.traces:
            return
        parts = (part if m is None else part[:, m] for part in choice)
        kept = Choice(*(part.detach().repeat_interleave(tok, 0) for part in parts))
        for trace in self.traces:
            trace.choices[module].append(kept)


def _given(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, also those that `forward` takes as `**kwargs`."""
    signature = inspect.signature(model.forward)
    given = dict(signature.bind_partial(*args, **named).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _mask(given: Any, shape: Sequence[int], model: nn.Module) -> Bool[Tensor, "sequence tok"]:
    """Which of the tokens that enter are no padding: the end of a two-dimensional mask. One with
    a row a token, as `generate` makes for a static cache, is read at the prompt: of that, what no
    token sees is padding."""
    if isinstance(given, Mapping):  # by kind of layer
        given = next(iter(given.values()), None)
    if isinstance(given, Tensor) and given.ndim == 2:
        return given[:, given.shape[1] - shape[1] :] != 0
    if isinstance(given, Tensor) and given.ndim == 4 and shape[1] > 1:
        seen = given if given.dtype == torch.bool else given == 0
        return seen[..., : shape[1]].flatten(1, 2).any(1).expand(tuple(shape))
    device = next(model.parameters()).device
    return torch.ones(tuple(shape), dtype=torch.bool, device=device)
