"""The tuned Arrow: its scores against loops, and what a few prompts teach it."""

import pytest
import torch

from adaptlib.errors import UsageError
from adaptlib.routing import Arrow, TunedArrow, attach
from adaptlib.routing.attach import asking
from tests import tiny as made

TEXTS = {
    "wide": ["a b c d", "b c d e", "a c b d"],
    "alone": ["f g h", "g h i j", "h f i"],
    "half": ["k l m n o", "l m", "m n k"],
    "entries": ["p q r s", "q r s t u", "r p q"],
    "blocks": ["v w x", "w x y z", "x v z"],
}


@pytest.fixture
def experts(llama, mixed):
    return mixed(llama)


def inputs(model, tokenizer, module, text):
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda m, a: seen.append(a[0][0])
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([tokenizer(text).input_ids]))
    handle.remove()
    return seen[0].double()


def test_scores_of_plain_text_are_centred_and_standardised(llama, experts) -> None:
    tokenizer, texts = made.make_tokenizer(), [t for some in TEXTS.values() for t in some]
    router = TunedArrow.fit(experts, model=llama, tokenizer=tokenizer, texts=texts)
    plain = Arrow.fit(experts)
    for module in list(router.columns)[:3]:
        xs = [inputs(llama, tokenizer, module, text) for text in texts]
        centre = torch.cat(xs).mean(0)
        rows = plain.prototypes[module].double()
        found = torch.stack(
            [torch.stack([((x - centre) @ v).abs().mean() for v in rows]) for x in xs]
        )
        wanted = (found - found.mean(0)) / found.std(0, correction=0)
        got = torch.stack([router.scores(module, x.float()).mean(0) for x in xs])
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_few_prompts_teach_it_whose_they_are(llama, experts) -> None:
    tokenizer = made.make_tokenizer()
    options = {"model": llama, "tokenizer": tokenizer}
    learned = TunedArrow.fit(experts, samples=TEXTS, **options)
    plain = Arrow.fit(experts, top_k=1, scope="prompt")
    hits = {"tuned": 0, "plain": 0}
    for name, router in (("tuned", learned), ("plain", plain)):
        with asking(llama, router) as session:
            for owner, texts in TEXTS.items():
                for text in texts:
                    ids = torch.tensor([tokenizer(text).input_ids])
                    session.begin(llama, (), {"input_ids": ids})
                    hits[name] += router.experts[int(session.weights.argmax())] == owner
    assert hits["tuned"] >= 14
    assert hits["tuned"] > hits["plain"]
    again = TunedArrow.fit(experts, samples=TEXTS, **options)
    assert all(torch.equal(learned.scale[m], again.scale[m]) for m in learned.scale)
    with attach(llama, experts, learned, tokenizer=tokenizer) as routed:
        assert routed(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_what_it_wants(llama, experts) -> None:
    options = {"model": llama, "tokenizer": made.make_tokenizer()}
    with pytest.raises(UsageError, match="prompts of every expert's task, or plain texts"):
        TunedArrow.fit(experts, **options)
    with pytest.raises(UsageError, match="alone has none"):
        TunedArrow.fit(experts, samples={"wide": ["a b"]}, **options)
