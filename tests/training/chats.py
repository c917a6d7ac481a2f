"""Conversations and tokenizers for them, and one that merges bytes and adds special tokens."""

import copy
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adaptlib.training.encode import IGNORED, Example
from adaptlib.training.tasks import Chat, Message

# As most models have it, but that a turn ends with eos.
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A turn has no end but the next one's beginning.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Says less of an answer once it is not the last, as models do that think first.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'assistant' %}<think/>{% endif %}{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def merging() -> PreTrainedTokenizerFast:
    """A BPE of bytes with some merges, that begins with <s> and ends with </s> unless told not."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "Say the first word of the input. Input: Answer: the answer is that it is longer"
    inner.train_from_iterator([words, *(f"{word} {word}s" for word in words.split())], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def chat(*contents: str) -> Chat:
    """User and assistant in turn, the assistant last."""
    roles = ("assistant", "user")
    count = len(contents)
    return Chat(tuple(Message(roles[(count - 1 - i) % 2], c) for i, c in enumerate(contents)))


def check(example: Example, max_length: int) -> None:
    """What every example is."""
    assert 2 <= len(example.ids) <= max_length
    assert len(example.targets) == len(example.ids)
    assert example.targets[0] == IGNORED
    assert any(target != IGNORED for target in example.targets)
    assert all(t in (i, IGNORED) for i, t in zip(example.ids, example.targets, strict=True))
