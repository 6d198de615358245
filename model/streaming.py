"""A char LM over a stream in overlapping windows, with what a window before has computed kept.

``streaming_plan`` says which rows of which layer that spares; this does the rest. The result is
that of ``losses_of_whole_windows``, which computes every window from its start, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from haloformer.kernels.band import Band
from haloformer.kernels.dispatch import choose_backend
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.char_lm import CharLayer, CharLm, rotate
from haloformer.model.layers import vocab_logits
from haloformer.model.streaming_plan import StreamingPlan, Turn, Windows
from haloformer.model.targets import IGNORED_LABEL
from haloformer.model.vocab_loss import token_loss


class StreamRows(NamedTuple):
    """Some rows of the stream.

    Attributes:
        ids: [n] int64.
        labels: [n] int64, the token after each, -100 where nothing is predicted.
        segments: [n] int64, tokens see only their own; None = one segment.
    """

    ids: Tensor
    labels: Tensor
    segments: Tensor | None


# Gives the rows first .. stop-1 of the stream.
Read = Callable[[int, int], StreamRows]


class Kept:
    """Rows [1, n, ...] of a stream: appended, overwritten, and forgotten from the front."""

    def __init__(self) -> None:
        self.first = self.end = 0
        self._base = 0  # row of the stream in slot 0
        self._data: Tensor | None = None

    def put(self, rows: range, values: Tensor) -> None:
        """Store values [1, len(rows), ...]; the rows touch those that are kept."""
        if not rows:
            return
        if self._data is None or self.first == self.end:
            self.first = self.end = rows.start
        assert self.first <= rows.start <= self.end, "rows would be missing in between"
        if self._data is None or rows.stop - self._base > self._data.shape[1]:
            self._make_room(rows.stop, values)
        assert self._data is not None
        self._data[:, rows.start - self._base : rows.stop - self._base] = values
        self.end = max(self.end, rows.stop)

    def get(self, rows: range) -> Tensor:
        """A view of kept rows, [1, len(rows), ...]."""
        assert self._data is not None and self.first <= rows.start and rows.stop <= self.end
        return self._data[:, rows.start - self._base : rows.stop - self._base]

    def forget(self, before: int) -> None:
        """Rows before this one are not asked for any more."""
        self.first = min(max(self.first, before), self.end)

    def _make_room(self, stop: int, like: Tensor) -> None:
        # Twice what is needed, so that a row is moved about once in its life.
        room = like.new_empty(1, 2 * (stop - self.first), *like.shape[2:])
        if self._data is not None:
            room[:, : self.end - self.first] = self.get(range(self.first, self.end))
        self._data, self._base = room, self.first


class Scored(NamedTuple):
    """What a turn found.

    Attributes:
        loss_sum: Nats over the targets, summed in float64.
        num_targets: How many.
    """

    loss_sum: float
    num_targets: int


class StreamingCharLm:
    """Scores stretches of windows; layers keep keys, values and states from turn to turn.

    Args:
        model: In eval mode; may be split over tensor ranks, which then make the same calls.
        plan: What to compute when.
        read: Gives rows of the stream.
    """

    def __init__(self, model: CharLm, plan: StreamingPlan, read: Read) -> None:
        self._model, self._plan, self._read = model, plan, read
        self._layers = [layer for layer in model.layers if isinstance(layer, CharLayer)]
        self._device = model.bias.device

    @torch.no_grad()
    def score(self, stretch: range) -> Iterator[Scored]:
        """Score the rows of some windows that follow each other, turn by turn.

        Args:
            stretch: Numbers of the windows.
        """
        num_layers = len(self._layers)
        self._keys = [Kept() for _ in range(num_layers)]
        self._values = [Kept() for _ in range(num_layers)]
        self._states = [Kept() for _ in range(num_layers)]  # what each layer is given
        self._segments = Kept()
        for turn in self._plan.turns(stretch):
            self._refresh(turn)
            yield self._extend(turn)
            self._forget(turn.end)

    def _refresh(self, turn: Turn) -> None:
        """Compute the dirty rows again, now that the window starts at another row."""
        if not any(turn.dirty):
            return
        rows, states = range(0), self._layers[0].ffn_norm.weight.new_empty(1, 0, 0)
        for number in range(len(self._layers) - 1):  # nothing is dirty after the last layer
            self._put_keys(number, rows, states)
            rows = turn.dirty[number + 1]
            if not rows:
                continue
            states = self._apply(number, rows, self._states[number].get(rows), turn)
            # Of the next layer's states the older ones are needed for keys only.
            following = self._states[number + 1]
            kept = range(max(rows.start, following.first), rows.stop)
            following.put(kept, states[:, kept.start - rows.start :])
        self._put_keys(len(self._layers) - 1, rows, states)

    def _extend(self, turn: Turn) -> Scored:
        """Compute the new rows, and the losses of those that are scored."""
        rows = turn.new_rows(0)
        given = self._read(rows.start, rows.stop)
        if given.segments is not None:
            self._segments.put(rows, given.segments.to(self._device)[None])
        hidden: Tensor = self._model.embedding(given.ids.to(self._device)[None])
        for number in range(len(self._layers)):
            self._put_keys(number, rows, hidden)
            if not self._plan.computes_once:
                self._states[number].put(rows, hidden)
            wanted = turn.new_rows(number + 1)
            hidden = hidden[:, wanted.start - rows.start :]
            rows = wanted
            hidden = self._apply(number, rows, hidden, turn) if rows else hidden
        return self._losses(hidden[0], given.labels[len(given.labels) - len(rows) :])

    def _put_keys(self, number: int, rows: range, states: Tensor) -> None:
        """Keys and values of a layer from the states [1, n, E] that it is given."""
        if not rows:
            return
        attention = self._layers[number].attention
        normed = self._layers[number].attention_norm(states)
        key, value = (
            linear(normed).view(1, len(rows), attention.spec.num_heads, attention.head_dim)
            for linear in (attention.key, attention.value)
        )
        self._keys[number].put(rows, rotate(key, rows.start))
        self._values[number].put(rows, value)

    def _apply(
        self, number: int, rows: range, states: Float[Tensor, "b n e"], turn: Turn
    ) -> Float[Tensor, "b n e"]:
        """States [1, n, E] of some rows after a layer; the keys they see are in place."""
        layer, attention = self._layers[number], self._layers[number].attention
        query = attention.query(layer.attention_norm(states))
        query = query.view(1, len(rows), attention.spec.num_heads, attention.head_dim)
        first = rows.start - self._plan.reaches[number]
        seen = range(max(first, turn.start), rows.stop)
        key, value = self._keys[number].get(seen), self._values[number].get(seen)
        isolated = self._segments.end > 0
        band = Band(
            attention.spec,
            offset=rows.start - seen.start,
            valid=(0, len(seen)),
            query_segments=self._segments.get(rows) if isolated else None,
            key_segments=self._segments.get(seen) if isolated else None,
        )
        attend = choose_backend("auto", query, key, band)
        attended, _ = attend(rotate(query, rows.start), key, value, None, None, band)
        states = states + attention.output(attended.flatten(2))
        fed: Tensor = layer.ffn_out(functional.gelu(layer.ffn_in(layer.ffn_norm(states))))
        return states + fed

    def _losses(self, hidden: Float[Tensor, "n e"], labels: Tensor) -> Scored:
        model, labels = self._model, labels.to(self._device)
        targets = labels != IGNORED_LABEL
        weight = model.embedding.get_parameter("weight")
        logits = vocab_logits(model.norm(hidden[targets]), weight, model.bias, model.tensor_group)
        losses = token_loss(logits, labels[targets], model.vocab_size, model.tensor_group)
        return Scored(losses.double().sum().item(), int(targets.sum()))

    def _forget(self, end: int) -> None:
        num_layers = len(self._layers)
        for number in range(num_layers):
            before = end - self._plan.kept_keys(number + 1)
            self._keys[number].forget(before)
            self._values[number].forget(before)
            self._states[number].forget(end - self._plan.kept_states(number))
        depth = max(self._plan.kept_keys(layer) for layer in range(1, num_layers + 1))
        self._segments.forget(end - depth)


@torch.no_grad()
def losses_of_whole_windows(model: CharLm, windows: Windows, read: Read) -> list[Scored]:
    """The definition: every window computed from its start, positions counted from there.

    Args:
        model: In eval mode, whole.
        windows: Over the stream.
        read: Gives rows of the stream.

    Returns:
        What each window's scored rows have.
    """
    found = []
    for window in range(windows.count):
        start, end = windows.start(window), windows.end(window)
        rows = read(start, end)
        ids, labels = rows.ids[None], rows.labels[None].clone()
        labels[:, : windows.first_scored(window) - start] = IGNORED_LABEL
        nothing = ids.new_zeros(1, 0)
        shard = SequenceShard(
            group=None,
            rank=0,
            world_size=1,
            length=end - start,
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            segment_ids=None if rows.segments is None else rows.segments[None],
            global_positions=nothing,
            global_mask=nothing.bool(),
            sample_ids=ids.new_zeros(1),
        )
        loss_sum = model(ids, labels, shard).loss_sum.item()
        found.append(Scored(loss_sum, int((labels != IGNORED_LABEL).sum())))
    return found
