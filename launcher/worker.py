"""The process of one rank; started by the DeepSpeed runner, never by hand."""

from __future__ import annotations

import gc
import sys


def main() -> int:
    """Import what a rank needs, and be one; returns the exit code."""
    # The libraries bring a million objects, and none of them ever goes: looking through them again
    # and again is a quarter of the time that a rank takes to start.
    gc.disable()
    from haloformer.launcher import rank_main

    gc.freeze()
    gc.enable()
    return rank_main.main()


if __name__ == "__main__":
    sys.exit(main())
