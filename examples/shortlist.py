"""Answer prompts from a library that is too large to load: a shortlist for each, a shelf for all.

python examples/shortlist.py
"""

import tempfile
from pathlib import Path

import adaptlib
from adaptlib.demo import DEMO_BASE, experts
from adaptlib.experts.base import load
from adaptlib.routing.shortlist import arrow
from adaptlib.training import prompt

QUESTIONS = (
    ("Is the first name female or male?", "Elizabeth"),
    ("Name the intent of the request.", "freeze my account please"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = adaptlib.Library.open(Path(folder) / "library", create=True)
        for name, expert in experts().items():
            library.add(expert, name)
        known = adaptlib.catalogue(library)  # the first time it reads all, then what was added
        shelf = adaptlib.Shelf(library, budget=8 * 1024**2)
        model, tokenizer = load(DEMO_BASE)
        for instruction, text in QUESTIONS:
            inputs = tokenizer(prompt(instruction, text), return_tensors="pt")
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            names = list(adaptlib.shortlist(known, model, inputs, size=4))
            router = arrow(known, names, top_k=1, scope="prompt")
            chosen = {name: shelf[name] for name in names}
            with adaptlib.attach(model, chosen, router) as routed:
                output = routed.generate(**inputs, max_new_tokens=8, do_sample=False)
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            print(f"{text}\n  of {', '.join(names)}\n  ->{answer!r}")
        print(f"{len(shelf.loaded)} of {len(library)} experts are loaded")


if __name__ == "__main__":
    main()
