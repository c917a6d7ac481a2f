"""For the tests of merges: a tiny model and batches, for those that learn from data."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adaptlib.merging import Data

VOCAB = 12


class _Proj(nn.Module):
    def __init__(self, d_out, d_in):
        super().__init__()
        self.proj = nn.Linear(d_in, d_out, bias=False)


class _Tiny(nn.Module):
    """A causal model, as far as merges are concerned, with a.proj (10, 14) and b.proj (14, 10)."""

    def __init__(self):
        super().__init__()
        self.device = torch.device("cpu")
        self.embed = nn.Embedding(VOCAB, 14)
        self.a, self.b = _Proj(10, 14), _Proj(14, 10)
        self.head = nn.Linear(14, VOCAB, bias=False)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        x = self.embed(input_ids)
        x = torch.cumsum(x, dim=1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.head(x + self.b.proj(torch.tanh(self.a.proj(x)))))


@pytest.fixture
def data_for():
    """The arguments with which a merge can be run on these experts: `data`, if it wants any, and
    then what keeps a test short."""

    def make(merge, experts):
        if merge.measure is None:
            return {}
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _Tiny()
        batches = {}
        for name in experts:
            ids = torch.randint(VOCAB, (2, 6), generator=generator)
            batches[name] = [
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            ]
        quick = {"budget": 6} if "budget" in merge.options else {}
        return {"data": Data(model, batches), **quick}

    return make
