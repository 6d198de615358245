"""Where the elements that a tensor-parallel rank holds are in the whole parameter.

A checkpoint stores whole parameters, flat and without the rows that only fill up a vocabulary, so
that any number of tensor ranks can read it:

    weight [4, 6] on 2 tensor ranks:   by output          by input
                                       0 0 0 0 0 0        0 0 0 1 1 1
                                       0 0 0 0 0 0        0 0 0 1 1 1
                                       1 1 1 1 1 1        0 0 0 1 1 1
                                       1 1 1 1 1 1        0 0 0 1 1 1

By output (and by vocabulary) a rank's elements are a run of the flat whole, and are stored as such.
By input they are a block of columns. Cut into runs of the whole it would be one per row, thousands
for one matrix; so the block is a flat tensor of its own that says its columns, ``name[:,0:3]``, and
a rank that needs other columns reads the rows it needs of every block and picks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haloformer.launcher.topology import Topology

_BLOCK = re.compile(r"^(?P<name>.*)\[:,(?P<start>\d+):(?P<stop>\d+)\]$")


@dataclass(frozen=True)
class Share:
    """The part of a whole parameter, seen as a matrix, that one tensor rank holds.

    Attributes:
        rows: Of the whole, without vocabulary padding; a vector has as many as elements.
        width: Columns of the whole.
        columns: Columns of this rank.
        first_row: The whole's row that is this rank's first.
        tensor_ranks: Ranks the columns are split over; 1 if they are not.
    """

    rows: int
    width: int
    columns: range
    first_row: int = 0
    tensor_ranks: int = 1

    @property
    def numel(self) -> int:
        """Elements of all rows of this rank's columns: the size of the tensor that is stored."""
        return self.rows * len(self.columns)

    def key(self, name: str) -> str:
        """Name under which this rank's columns are stored."""
        return block_key(name, self.columns, self.width)

    def keys(self, name: str) -> list[str]:
        """The names that all tensor ranks use."""
        part = len(self.columns)
        blocks = [range(i * part, (i + 1) * part) for i in range(self.tensor_ranks)]
        return [block_key(name, block, self.width) for block in blocks]

    def place(self, data: Tensor, start: int) -> tuple[Tensor, int]:
        """A run of this rank's flat parameter as a run of the stored tensor, without padding.

        Args:
            data: [n] elements ``start`` and on of the flat parameter on this rank.
            start: Where they begin there.

        Returns:
            The elements that are no padding, and where they begin in the stored tensor.
        """
        first = min(start + self.first_row * len(self.columns), self.numel)
        return data[: self.numel - first], first


def share_of(parameter: nn.Parameter, topology: Topology | None) -> Share:
    """What this rank holds of a parameter; without a topology it is the whole."""
    marks: Any = parameter
    # Under ZeRO-3 a parameter is an empty placeholder between uses, and ds_shape its real shape.
    shape = torch.Size(getattr(marks, "ds_shape", parameter.shape))
    rows = shape[0] if shape else 1
    width = shape.numel() // rows
    whole = Share(rows, width, range(width))
    if topology is None or not getattr(marks, "tensor_model_parallel", False):
        return whole
    rank, ranks = topology.tensor_rank, topology.layout.tensor
    if marks.partition_dim == 0:
        real_rows = getattr(marks, "unpadded_rows", rows * ranks)
        return Share(real_rows, width, range(width), first_row=rank * rows)
    assert marks.partition_dim == 1 and len(shape) == 2
    columns = range(rank * width, (rank + 1) * width)
    return Share(rows, width * ranks, columns, tensor_ranks=ranks)


def block_key(name: str, columns: range, width: int) -> str:
    """Name of a stored block of columns; all columns go by the plain name."""
    return name if columns == range(width) else f"{name}[:,{columns.start}:{columns.stop}]"


@dataclass(frozen=True)
class Saved:
    """The stored blocks of one parameter: elements by columns, None for all columns."""

    numels: dict[range | None, int]

    def fault(self, share: Share | None) -> str | None:
        """Why these blocks are not the parameter that is wanted (None: nothing is)."""
        saved, wanted = sum(self.numels.values()), share.rows * share.width if share else "none"
        if share is None or saved != wanted:
            return f"{saved if self.numels else 'nothing'} elements saved, {wanted} wanted"
        reached = 0
        for block in self.blocks(share.width):
            fits = self.numels.get(block, self.numels.get(None)) == share.rows * len(block)
            if block.start != reached or not block or not fits:
                return f"the saved columns {block.start}:{block.stop} do not continue {reached}"
            reached = block.stop
        return None

    def blocks(self, width: int) -> list[range]:
        """Columns of each block, in order."""
        found = [range(width) if block is None else block for block in self.numels]
        return sorted(found, key=lambda block: block.start)


def group_blocks(numels: dict[str, int]) -> dict[str, Saved]:
    """Stored tensor names and sizes, by the parameter they are of."""
    grouped: dict[str, dict[range | None, int]] = {}
    for key, numel in numels.items():
        match = _BLOCK.match(key)
        name, block = key, None
        if match:
            name, block = match["name"], range(int(match["start"]), int(match["stop"]))
        grouped.setdefault(name, {})[block] = numel
    return {name: Saved(blocks) for name, blocks in grouped.items()}


@dataclass(frozen=True)
class Picked:
    """A run of one rank's columns, put together from rows of blocks with other columns.

    wanted columns 0:2 of a row   x x . .     stored blocks   0:1  x    1:4  x . .
    """

    data: Tensor
    skip: int  # elements of the first row that come before the run
    columns: range
    rows: range
    parts: dict[range, Tensor]  # block -> its rows, flat

    @classmethod
    def plan(cls, data: Tensor, start: int, columns: range, blocks: list[range]) -> Picked:
        """What to read to fill ``data``, elements ``start`` and on of the wanted columns."""
        width = len(columns)
        rows = range(start // width, -(-(start + data.numel()) // width))
        needed = [b for b in blocks if b.start < columns.stop and b.stop > columns.start]
        parts = {b: torch.empty(len(rows) * len(b), dtype=data.dtype) for b in needed}
        return cls(data, start - rows.start * width, columns, rows, parts)

    def fill(self) -> None:
        """Copy what was read into place."""
        picked = torch.empty(len(self.rows), len(self.columns), dtype=self.data.dtype)
        for block, part in self.parts.items():
            first = max(block.start, self.columns.start)
            stop = min(block.stop, self.columns.stop)
            columns = part.view(len(self.rows), len(block))
            picked[:, first - self.columns.start : stop - self.columns.start] = columns[
                :, first - block.start : stop - block.start
            ]
        self.data.copy_(picked.view(-1)[self.skip : self.skip + self.data.numel()])
