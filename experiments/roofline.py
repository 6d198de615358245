"""Where a GPU's time would go in an encoder layer, by roofline: a model, no measurement.

Forward and backward of one Longformer layer in bf16. Each piece takes as long as its FLOPs at the
peak or its bytes at the bandwidth of the data sheet, whichever is longer, and no piece overlaps
another. Bytes are those of kernels that read every operand and write every result once; plain
torch is counted operator by operator.

    python experiments/roofline.py --device h100 --hidden 768 --window 512
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from haloformer.launcher.plan_devices import DEVICES

BF16, INT32, BOOL = 2, 4, 1


@dataclass(frozen=True)
class Piece:
    """FLOPs and bytes per token, forward and backward together."""

    name: str
    flops: float
    moved: float


def hashed_in_torch(width: int) -> float:
    """Bytes per token of dropping ``width`` features operator by operator, forward only.

    The sum of row and column; three times shift, mask and xor; two products; mask, comparison;
    scaling; choice.
    """
    shift_mask_xor = 2 * INT32 + 2 * INT32 + 3 * INT32
    per_feature = INT32 + 3 * shift_mask_xor + 2 * 2 * INT32 + 2 * INT32 + INT32 + BOOL
    return width * (per_feature + 2 * BF16 + BOOL + 2 * BF16)


def pieces(hidden: int, ffn: int, window: int, tokens: int) -> list[Piece]:
    """The layer: two norms, two dropouts of hidden states, one feed-forward, one attention."""
    weights = 4 * hidden**2 + 2 * hidden * ffn
    linear_io = (4 * 2 * hidden + 2 * (hidden + ffn)) * BF16
    keys = window + 1
    # Backward: five products where the forward has two; the blocked passes read K and V of a
    # window once per tile, which stays in the L2 cache.
    attention = 2 * keys * hidden * (2 + 5)
    norm = (2 * (2 + 2) + 2 * (3 + 2)) * hidden * BF16  # read both, write sum and result; back
    return [
        Piece("linears", 6 * weights, 3 * linear_io + 3 * weights * BF16 / tokens),
        Piece("attention", attention, (4 + 8) * hidden * BF16),
        Piece("residual, norm", 0, norm),
        Piece("GELU", 0, (2 + 3) * ffn * BF16),
        Piece("dropout, one kernel", 0, 2 * 2 * 2 * hidden * BF16),
        Piece("dropout in torch", 0, 2 * (hashed_in_torch(hidden) + (2 * BF16 + BOOL) * hidden)),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(DEVICES), default="h100")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="of one rank")
    options = parser.parse_args()
    device = DEVICES[options.device]
    rows = pieces(options.hidden, 4 * options.hidden, options.window, options.tokens)
    sizes = f"one layer of {options.hidden}, window {options.window}, bf16"
    print(f"{device.name}, {sizes}: a model, not measured")
    print(f"{'':22}{'MFLOP/token':>12}{'KiB/token':>11}{'ns/token':>10}  bound by")
    for row in rows:
        compute, memory = row.flops / device.bf16, row.moved / device.bandwidth
        bound = "products" if compute > memory else "memory"
        print(
            f"{row.name:22}{row.flops / 1e6:12.2f}{row.moved / 1024:11.1f}"
            f"{max(compute, memory) * 1e9:10.2f}  {bound}"
        )


if __name__ == "__main__":
    main()
