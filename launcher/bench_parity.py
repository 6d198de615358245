"""What must hold before ``haloformer bench attention`` times anything."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from haloformer.kernels import reference
from haloformer.kernels.band import Band
from haloformer.kernels.dispatch import WindowAttention
from haloformer.kernels.spec import WindowSpec
from haloformer.launcher.bench_peers import Shape, dense, ours

_LIMIT = 2e-5  # float32, relative to the largest true value; sums of a few hundred terms


class ParityError(Exception):
    """The op computes something else; nothing was timed."""


@dataclass(frozen=True)
class ParityCheck:
    """One comparison: the largest relative error of output and gradients, or why there is none."""

    name: str
    error: float | None
    note: str = ""


def check_parity(attend: WindowAttention, shape: Shape) -> list[ParityCheck]:
    """Hold the op to float64 loops on few rows, and to dense attention on the shape itself.

    Args:
        attend: The op that will be timed.
        shape: The largest shape that will be timed; dense attention uses two of its heads.

    Raises:
        ParityError: If an error is above the limit.
    """
    checks = [
        ParityCheck(name, _error_of_band(attend, band, num_globals))
        for name, band, num_globals in _small_bands()
    ]
    checks.append(_against_dense(attend, replace(shape, num_heads=min(2, shape.num_heads))))
    for check in checks:
        # Written so that NaN fails.
        if check.error is not None and not check.error <= _LIMIT:
            raise ParityError(f"{check.name}: error {check.error:.2g} is above {_LIMIT:g}")
    return checks


def _small_bands() -> list[tuple[str, Band, int]]:
    n = 41
    mask = torch.arange(n)[None] % 7 != 3
    segments = (torch.arange(n)[None] >= 17).long()
    plain = Band(WindowSpec.from_two_sided(10, 2), 0, (0, n))
    mixed = WindowSpec((5, 3), (5, 0), (1, 2))
    return [
        ("float64 loops, window 10", plain, 0),
        ("float64 loops, causal and dilated heads", replace(plain, spec=mixed), 0),
        ("float64 loops, globals and masked keys", replace(plain, key_mask=mask), 3),
        (
            "float64 loops, segments",
            replace(plain, query_segments=segments, key_segments=segments),
            0,
        ),
    ]


def _error_of_band(attend: WindowAttention, band: Band, num_globals: int) -> float:
    shape = Shape(band.valid[1], 10, band.spec.num_heads, 16, num_globals=num_globals)
    tensors = shape.tensors()
    exact = [x.detach().double().requires_grad_() for x in tensors]
    return _worst(
        _gradients(attend, tensors, band), _gradients(reference.window_attention, exact, band)
    )


def _gradients(attend: WindowAttention, tensors: list[Tensor], band: Band) -> list[Tensor]:
    query, key, value, *far = tensors
    global_key, global_value = far if far else (None, None)
    out = attend(query, key, value, global_key, global_value, band)[0]
    weight = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)]


def _against_dense(attend: WindowAttention, shape: Shape) -> ParityCheck:
    name = f"dense attention, N={shape.n}, {shape.num_heads} heads"
    needed = 4 * 4 * shape.n**2 * (shape.num_heads + 1)
    free = psutil.virtual_memory().available
    if needed > free:
        return ParityCheck(
            name, None, f"skipped: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        )
    found = []
    for contender in (ours(shape, attend), dense(shape, attend)):
        out = contender.forward()
        weight = torch.linspace(-1.0, 1.0, out.numel()).view(out.shape)
        gradients = torch.autograd.grad(out, contender.inputs, weight)
        found.append([out.detach(), *gradients])
    return ParityCheck(name, _worst(*found))


def _worst(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest error over output and gradients, each relative to its largest true value."""
    errors = [
        float((x.double() - y.double()).abs().max() / y.double().abs().max())
        for x, y in zip(found, truth, strict=True)
    ]
    return max(errors, key=lambda e: torch.inf if e != e else e)
