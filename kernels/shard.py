"""What the ranks know about a sequence, and which part of it is here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from haloformer.kernels.ranks import Ranks


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """One rank's rows of a batch of sequences, and what is known of the whole sequences.

    ::

        N=6, world size 2        rank 0 | rank 1
        position                 0 1 2  | 3 4 5
        attention_mask           1 1 1  | 1 1 .     global_positions [0, 3, 0]
        is_global                g . .  | g . .     global_mask      [1, 1, .]

    The metadata is of whole sequences and the same on all ranks: the collator knows it, so no
    rank has to ask another.

    Attributes:
        group: Process group of the ranks that hold the sequence; None for one rank alone.
        rank: This rank's number in the group; it owns rows [rank * n, (rank + 1) * n).
        world_size: Ranks in the group.
        length: Rows N of the whole sequence, a multiple of the world size.
        attention_mask: [B, N] bool, True = a real token.
        segment_ids: [B, N] integers, tokens see only their own segment; None = one document.
        global_positions: [B, G] int64 positions of the global tokens, in any order; G is the same
            on all ranks and may be 0.
        global_mask: [B, G] bool, False = an unused slot.
        sample_ids: [B] int64, the place of each example in the global batch (for dropout).

    Raises:
        ValueError: If shapes or dtypes disagree, the world size does not divide the length, or a
            global position is outside the sequence, on padding, or given twice. Positions are
            looked at on a CPU only, because a GPU would have to be waited for: make a shard on
            the CPU and take it over by :meth:`to`.
    """

    group: ProcessGroup | None
    rank: int
    world_size: int
    length: int
    attention_mask: Tensor
    segment_ids: Tensor | None
    global_positions: Tensor
    global_mask: Tensor
    sample_ids: Tensor

    def __post_init__(self) -> None:
        _ = self.ranks  # checks rank and world size
        if self.length < 1 or self.length % self.world_size:
            raise ValueError(
                f"sequence length {self.length} is not a multiple of the {self.world_size} ranks "
                "that share it; pad it"
            )
        num_batch, num_globals = self.attention_mask.shape[0], self.global_positions.shape[-1]
        for name, x, shape in (
            ("attention_mask", self.attention_mask, (num_batch, self.length)),
            ("segment_ids", self.segment_ids, (num_batch, self.length)),
            ("global_positions", self.global_positions, (num_batch, num_globals)),
            ("global_mask", self.global_mask, (num_batch, num_globals)),
            ("sample_ids", self.sample_ids, (num_batch,)),
        ):
            if x is not None and tuple(x.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
        for name, x in (("attention_mask", self.attention_mask), ("global_mask", self.global_mask)):
            if x.dtype != torch.bool:
                raise ValueError(f"{name} is {x.dtype}; masks are bool, True = real")
        if self.num_globals and self.global_positions.device.type == "cpu":
            self._check_positions()

    def to(self, device: torch.device) -> SequenceShard:
        """The same on a device."""
        segments = self.segment_ids
        return replace(
            self,
            attention_mask=self.attention_mask.to(device),
            segment_ids=None if segments is None else segments.to(device),
            global_positions=self.global_positions.to(device),
            global_mask=self.global_mask.to(device),
            sample_ids=self.sample_ids.to(device),
        )

    def _check_positions(self) -> None:
        used = self.global_positions[self.global_mask]
        if ((used < 0) | (used >= self.length)).any():
            worst = int(used.max()) if int(used.min()) >= 0 else int(used.min())
            raise ValueError(f"global position {worst} is outside a sequence of {self.length} rows")
        if int(self.is_global.sum()) != used.numel():
            raise ValueError("a global position is given twice in one example; give each once")
        if (self.is_global & ~self.attention_mask).any():
            example, position = (self.is_global & ~self.attention_mask).nonzero()[0].tolist()
            raise ValueError(
                f"global position {position} of example {example} is padding; "
                "clear its slot in global_mask"
            )

    @property
    def ranks(self) -> Ranks:
        """The group as the collectives take it."""
        return Ranks(self.group, self.rank, self.world_size)

    @property
    def num_rows(self) -> int:
        """Rows n of this rank, the same on all ranks."""
        return self.length // self.world_size

    @property
    def first_row(self) -> int:
        """Position of this rank's first row in the whole sequence."""
        return self.rank * self.num_rows

    @property
    def num_globals(self) -> int:
        """Slots G for global tokens."""
        return self.global_positions.shape[1]

    def local(self, x: Tensor) -> Tensor:
        """This rank's rows [B, n] of whole-sequence metadata [B, N]."""
        return x[:, self.first_row : self.first_row + self.num_rows]

    def with_halo(self, x: Tensor, left: int, right: int) -> Tensor:
        """Metadata [B, left + n + right] around this rank's rows; zeros beyond the ends."""
        first, end = self.first_row - left, self.first_row + self.num_rows + right
        inside = x[:, max(first, 0) : min(end, self.length)]
        padding = (max(-first, 0), max(end - self.length, 0))
        return torch.nn.functional.pad(inside, padding)

    @cached_property
    def is_global(self) -> Tensor:
        """[B, N] bool: the global tokens."""
        # Unused slots point at an extra column, so that they mark nothing.
        slots = self.global_positions.where(self.global_mask, self.length)
        marks = self.global_mask.new_zeros(slots.shape[0], self.length + 1)
        return marks.scatter_(1, slots, True)[:, : self.length]

    @cached_property
    def owned(self) -> Tensor:
        """[B, G] bool: the global tokens that stand in this rank's rows."""
        here = self.global_positions - self.first_row
        return self.global_mask & (here >= 0) & (here < self.num_rows)

    @cached_property
    def owned_rows(self) -> Tensor:
        """[B, G] int64: local row of each global token, 0 where it is not owned."""
        return (self.global_positions - self.first_row).where(self.owned, 0)

    @cached_property
    def global_segments(self) -> Tensor | None:
        """[B, G] segments of the global tokens, or None without segments."""
        if self.segment_ids is None:
            return None
        return self.segment_ids.gather(1, self.global_positions.where(self.global_mask, 0))

    @cached_property
    def overwritten(self) -> Tensor:
        """[B, n] bool: local rows that the band does not answer, global tokens and padding."""
        return self.local(self.is_global | ~self.attention_mask)
