"""Nothing of size N x N or N x window: the tensors that exist at once grow with N alone."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from haloformer.kernels import chunks
from haloformer.kernels.band import Band
from haloformer.kernels.spec import WindowSpec

LENGTHS = (4096, 8192, 16384)
WINDOW, HEADS, DIM = 64, 2, 4


class Allocations(TorchDispatchMode):
    """The largest storage any operation made, and the most bytes of such storages alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = WeakTensorKeyDictionary()
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(x.alias_info is not None for x in func._schema.returns):
            return result  # a view, or written into what was counted when it was made
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.alive[x] = x.untyped_storage().nbytes()
                self.largest = max(self.largest, self.alive[x])
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: threads that wait for each other would take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def allocations(attend, n, num_globals):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, rows, HEADS, DIM, generator=generator).requires_grad_()
        for rows in (n, n, n, *(2 * [num_globals] if num_globals else []))
    ]
    band = Band(WindowSpec.from_two_sided(WINDOW, HEADS, dilation=(1, 2)), 0, (0, n))
    far = tensors[3:] if num_globals else [None, None]
    with Allocations() as seen:
        out, _ = attend(*tensors[:3], *far, band)
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    return seen


@pytest.mark.parametrize("num_globals", [0, 3])
def test_memory_is_linear_in_the_sequence(num_globals):
    seen = [allocations(chunks.window_attention, n, num_globals) for n in LENGTHS]
    rows = [n * HEADS * DIM * 4 for n in LENGTHS]  # bytes of one [1, N, H, D]
    for found, row in zip(seen, rows, strict=True):
        # At N = 4096 one block of scores is the larger; N x window would be 16 rows' worth.
        assert found.largest <= max(row, rows[0] * 2), "a tensor larger than the inputs was made"
    steps = [b.peak - a.peak for a, b in pairwise(seen)]
    # Twice the rows, twice the growth: no N x N term. About 12 tensors of the inputs' size.
    assert steps[1] <= 2.05 * steps[0]
    assert steps[1] <= 14 * (rows[2] - rows[1])


def test_dense_attention_does_not_pass_for_linear():
    """The count sees an N x N tensor, so the test above can fail."""

    def dense(query, key, value, global_key, global_value, band):
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key)
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value), None

    assert allocations(dense, 512, 0).largest == 512 * 512 * HEADS * 4
