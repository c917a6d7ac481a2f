"""Merge bundled experts from Python: a few methods on one group, at one size, side by side.

python examples/merge.py
"""

import adaptlib
from adaptlib.demo import experts
from adaptlib.experts.arithmetic import combine

NAMES = ("clinc-banking", "clinc-home", "clinc-utility")
METHODS = ("linear", "ties", "knots", "tsv")


def main() -> None:
    bundled = experts()
    group = {name: bundled[name] for name in NAMES}

    print("method   rank  lost by the rank   cosine with each expert")
    for method in METHODS:
        merged = adaptlib.MERGES[method](group, rank=8)
        lost = merged.card["merge"]["error"]
        cosines = "  ".join(f"{cosine(merged, expert):+.2f}" for expert in group.values())
        print(f"{method:<8} {merged.rank:>4}  {lost:>16.1%}   {cosines}")

    # Left alone, the mean is exact: the same as the sum over modules by hand.
    mean = adaptlib.MERGES["linear"](group)
    by_hand = combine(group, dict.fromkeys(group, 1 / len(group)))
    worst = max(
        (mean.deltas[module].dense() - delta.dense()).abs().max().item()
        for module, delta in by_hand.items()
    )
    print(f"\nthe mean of {len(group)} has rank {mean.rank}; off by at most {worst:.1e}")


def cosine(one: adaptlib.Expert, other: adaptlib.Expert) -> float:
    """Of all updates together."""
    inner = sum(one.deltas[module].inner(other.deltas[module]) for module in one.deltas)
    norms = [sum(d.inner(d) for d in expert.deltas.values()) ** 0.5 for expert in (one, other)]
    return inner / (norms[0] * norms[1])


if __name__ == "__main__":
    main()
