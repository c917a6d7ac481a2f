"""Ask the bundled experts from Python: cluster them, route a few prompts, read ΔW by hand.

python examples/route.py
"""

import adaptlib
from adaptlib.demo import DEMO_BASE, experts
from adaptlib.experts.base import load
from adaptlib.training import prompt

QUESTIONS = (
    ("Name the intent of the request.", "please turn the heating down before we go to bed"),
    (
        "Is the sentence subjective (opinion) or objective (plot)?",
        "a dull, lifeless mess of a film",
    ),
)


def main() -> None:
    library = {name: expert for name, expert in experts().items() if expert.kind == "lora"}
    for label, names in adaptlib.mbc(library, k=8).items():
        print(f"cluster {label}: {', '.join(names)}")

    model, tokenizer = load(DEMO_BASE)
    router = adaptlib.Arrow.fit(library, top_k=4)
    with adaptlib.attach(model, library, router) as routed:
        for instruction, text in QUESTIONS:
            inputs = tokenizer(prompt(instruction, text), return_tensors="pt")
            with routed.record() as trace:
                output = routed.generate(
                    inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=8,
                    do_sample=False,
                )
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            shares = list(trace.shares().items())[:3]
            print(f"\n{text}\n  ->{answer!r}")
            print("  " + ", ".join(f"{name} {share:.0%}" for name, share in shares))

    name, expert = next(iter(library.items()))
    module, delta = next(iter(expert.deltas.items()))
    print(f"\n{name}: |ΔW| at {module} is {delta.norm():.3f} of shape {delta.shape}")


if __name__ == "__main__":
    main()
