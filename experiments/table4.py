"""Table 4's order on enwiki6: increasing windows beat fixed ones, which beat decreasing ones.

    python experiments/table4.py --seeds 1 2 3

Four layers, windows (both sides counted: a character sees half to its left) of the same sum, 480:

    decreasing  256 128  64  32          increasing         32  64 128 256
    fixed       120 120 120 120          increasing, dilated the same, 2 of 4 heads of the upper two
                                                            layers at every 2nd and 3rd key

The paper's figures are bits per character on text8 after 150K steps of a model fifty times as
large: 1.24, 1.23, 1.21, and 1.20 with dilation.
"""

from __future__ import annotations

from pathlib import Path

from arms import Arm, Outcome, held_out, parse_arguments, report, run_arms
from enwiki6 import prepare_bytes

RISING = "model.attention_window=[32, 64, 128, 256]"
ARMS = (
    Arm("decreasing", "table4", ("model.attention_window=[256, 128, 64, 32]",)),
    Arm("fixed", "table4"),
    Arm("increasing", "table4", (RISING,)),
    Arm("dilated", "table4", (RISING, "model.dilation=[1, 1, 2, 3]")),
)


def main() -> None:
    arguments = parse_arguments(__doc__)
    prepare_bytes()
    outcomes = run_arms("table4", ARMS, arguments.seeds, arguments.jobs, score)
    report("table4", outcomes, "held-out bits per character")


def score(folder: Path, arm: Arm, seed: int) -> Outcome:
    """The held-out loss at the last step."""
    curve = held_out(folder, "eval_bits_per_char")
    return Outcome(arm.name, seed, curve[-1][1], curve[1:])


if __name__ == "__main__":
    main()
