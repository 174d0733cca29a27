"""How many facts can a compressed block answer for, and how many can it be found by?

    python -m benchmarks.probes.recall_capacity

A model of compression by sums: every fact, a key with its value, is a random code, and a block's
compressed value is the sum of those of its m facts. The asked fact is read out if its code fits the
sum better than those of the same key with other values. Likewise a compressed key is the sum of the
codes of m keys; the asked key is found if its block is among the `KEPT` best.

A trained φ is not bound to random codes, so this says where to look, not what will be measured.
Where blocks overlap (d = l/2) two of them hold a fact: count the numbers of both.
"""

import numpy as np

VALUES = FACTS = 64  # of the task
KEPT = 4  # free blocks of recall_scattered
SIZES, CROWDS = (16, 32, 64, 128, 256), (4, 8, 16, 32)


def answered(numbers: int, facts: int, trials: int, rng: np.random.Generator) -> float:
    """The share of facts that a compressed value of so many numbers answers."""
    right = 0
    for _ in range(trials):
        codes = rng.standard_normal((VALUES, numbers))  # of the asked key with each value
        others = rng.standard_normal((facts - 1, numbers)).sum(0)
        right += int(np.argmax(codes @ (codes[0] + others)) == 0)
    return right / trials


def found(numbers: int, facts: int, trials: int, rng: np.random.Generator) -> float:
    """The share of keys whose block is among the best by compressed keys of so many numbers."""
    right = 0
    for _ in range(trials):
        codes = rng.standard_normal((FACTS, numbers))
        scores = codes.reshape(-1, facts, numbers).sum(1) @ codes[0]
        right += int((scores > scores[0]).sum() < KEPT)
    return right / trials


def main(trials: int = 1500) -> None:
    rng = np.random.default_rng(0)
    print(f"of {VALUES} values, {KEPT} free blocks; answered / found")
    print("numbers " + "".join(f"{crowd:>9} facts" for crowd in CROWDS))
    for size in SIZES:
        shares = [(answered(size, m, trials, rng), found(size, m, trials, rng)) for m in CROWDS]
        print(f"{size:7} " + "".join(f"   {a:5.2f} / {f:4.2f}" for a, f in shares))


if __name__ == "__main__":
    main()
