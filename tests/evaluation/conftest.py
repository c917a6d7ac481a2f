"""A tiny model, its tokenizer, and tasks in their words."""

import pytest
import torch

from adaptlib.experts.expert import Expert
from adaptlib.training.tasks import Row, Task, Text
from tests import tiny

WORDS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def words_tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture
def words_model(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("model")).eval()


def task(name, seed=0, *, rows=14, labels=True):
    random = torch.Generator().manual_seed(seed)
    made = []
    for i in range(rows):
        length = int(torch.randint(1, 6, (), generator=random))
        letters = [WORDS[int(torch.randint(26, (), generator=random))] for _ in range(length)]
        output = "ab"[i % 2] if labels else " ".join(reversed(letters))
        made.append(Row(" ".join(letters), output))
    return Task(name, "s t", {"train": tuple(made[:4]) * 6, "test": tuple(made)}, category="c")


@pytest.fixture
def tasks():
    return [task("one", 1), task("two", 2), task("free", 3, labels=False)]


@pytest.fixture
def texts():
    return Task("texts", "", {"test": (Text("a b c d e"), Text("f g"))})


@pytest.fixture
def zoo(words_model):
    found = {}
    for i, name in enumerate(("one", "two", "other")):
        deltas = {}
        for j, (module, layer) in enumerate(words_model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and module != "lm_head":
                d_out, d_in = layer.weight.shape
                deltas[module] = tiny.lora(10 * i + j, rank=2, d_out=d_out, d_in=d_in)
        card = {"task": name if name != "other" else "elsewhere", "metrics": {"valid_loss": 1.0}}
        found[name] = Expert("tiny", deltas, card)
    return found
