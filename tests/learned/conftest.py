"""The models, the tokenizer and the threads of the tests of training."""

from tests.training.conftest import gpt2, llama, model, one_thread, tokenizer

__all__ = ["gpt2", "llama", "model", "one_thread", "tokenizer"]
