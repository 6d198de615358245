"""Parity of the Triton kernels against dense float64 on the card, before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from haloformer.kernels import fused
from haloformer.kernels.band import Band
from haloformer.kernels.dropout import AttentionDropout, keep_mask
from haloformer.kernels.spec import WindowSpec


@dataclass(frozen=True)
class Case:
    """One parity case; everything on unless said otherwise."""

    n: int
    left: tuple[int, ...]
    right: tuple[int, ...]
    dilation: tuple[int, ...]
    head_dim: int
    num_globals: int = 0
    halo: int = 0
    rate: float = 0.0
    masked: bool = False
    segments: bool = False

    def band(self, device: str) -> Band:
        m = self.n + 2 * self.halo
        generator = torch.Generator().manual_seed(1)

        def flags(rows: int) -> Tensor:
            return (torch.rand(2, rows, generator=generator) < 0.8).to(device)

        dropout = segments = None
        if self.rate:
            far = torch.randint(0, 9000, (2, self.num_globals), generator=generator).to(device)
            ids = torch.tensor([3, 2**40], device=device)
            dropout = AttentionDropout(self.rate, 0xDEADBEEF, ids, 77, far)
        if self.segments:
            segments = (torch.rand(2, m, generator=generator) < 0.01).cumsum(1).to(device)
        return Band(
            WindowSpec(self.left, self.right, self.dilation),
            self.halo,
            (self.halo // 2, m),
            key_mask=flags(m) if self.masked else None,
            query_segments=None if segments is None else segments[:, self.halo : m - self.halo],
            key_segments=segments,
            global_mask=flags(self.num_globals) if self.masked and self.num_globals else None,
            dropout=dropout,
        )

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Query, key, value, global key, global value, and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        m, g = self.n + 2 * self.halo, self.num_globals
        shapes = [(2, rows, len(self.left), self.head_dim) for rows in (self.n, m, m, g, g, self.n)]
        return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


# Cases with the same features, head dim and dtype share their compiled kernels: compiling is most
# of the time that parity takes.
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = Case(700, (64, 64), (64, 64), (1, 1), 64)
FULL = replace(PLAIN, num_globals=17, halo=70, rate=0.2, masked=True, segments=True)
CASES = (
    (PLAIN, ALL_DTYPES),
    (replace(PLAIN, n=1000, left=(200, 40), right=(0, 40), dilation=(1, 4)), ALL_DTYPES),
    (FULL, ALL_DTYPES),
    (replace(FULL, n=333, num_globals=64, right=(0, 9), dilation=(3, 1)), ALL_DTYPES),
    (replace(FULL, head_dim=128, dilation=(1, 2)), (torch.float32, torch.bfloat16)),
    (replace(FULL, head_dim=80, n=129), (torch.bfloat16,)),
)
SMALL_CASES = (
    (Case(60, (9, 5), (9, 0), (1, 2), 16, 3, halo=8, rate=0.2, masked=True), ALL_DTYPES),
    (Case(40, (9,), (9,), (1,), 24, segments=True), ALL_DTYPES),
)


def dense(inputs: list[Tensor], band: Band) -> Tensor:
    """The attention with whole score matrices, in the dtype of the inputs."""
    query, key, value, global_key, global_value = inputs
    n, m, g = query.shape[1], key.shape[1], global_key.shape[1]
    device = query.device
    distance = torch.arange(m, device=device) - torch.arange(n, device=device)[:, None]
    distance = distance - band.offset
    heads = zip(band.spec.left, band.spec.right, band.spec.dilation, strict=True)
    seen = torch.stack(
        [(distance >= -x * d) & (distance <= y * d) & (distance % d == 0) for x, y, d in heads]
    )
    position = torch.arange(m, device=device)
    real = ((position >= band.valid[0]) & (position < band.valid[1])).expand(query.shape[0], m)
    real = real if band.key_mask is None else real & band.key_mask
    seen = seen[None] & real[:, None, None, :]
    if band.key_segments is not None:
        same = band.query_segments[:, :, None] == band.key_segments[:, None, :]
        seen = seen & same[:, None]
    far = torch.ones(query.shape[0], seen.shape[1], n, g, dtype=torch.bool, device=device)
    if band.global_mask is not None:
        far = far & band.global_mask[:, None, None, :]
    seen = torch.cat([far, seen], -1)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, torch.cat([global_key, key], 1))
    scores = (scores * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weights = torch.softmax(scores, -1).masked_fill(~seen, 0.0)
    if band.dropout is not None:
        dropout = band.dropout
        columns = (dropout.first_row - band.offset + position).expand(query.shape[0], m)
        columns = torch.cat([dropout.global_columns, columns], 1)[:, None, None, :]
        rows = dropout.first_row + torch.arange(n, device=device)[:, None]
        bases = dropout.bases(query.shape[2])[:, :, None, None]
        keep = keep_mask(bases, rows, columns, dropout.rate)
        weights = torch.where(keep, weights / (1.0 - dropout.rate), 0.0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, torch.cat([global_value, value], 1))


def with_gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients of all inputs, zeros where there is no dependence."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(inputs)
    grads = torch.autograd.grad(out, inputs, grad.to(out.dtype), materialize_grads=True,
                                allow_unused=True)  # fmt: skip
    return [out.detach(), *grads]


def check_case(case: Case, dtype: torch.dtype, device: str) -> dict[str, object]:
    """Errors of the kernels and of the dense maths in the same dtype, against float64."""
    *inputs, grad = case.tensors(dtype, device)
    band = case.band(device)
    truth = with_gradients(lambda x: dense(x, band), [x.double() for x in inputs], grad)
    found = with_gradients(lambda x: fused.window_attention(*x, band)[0], inputs, grad)
    again = with_gradients(lambda x: fused.window_attention(*x, band)[0], inputs, grad)
    plain = with_gradients(lambda x: dense(x, band), inputs, grad)
    names = ("out", "d_query", "d_key", "d_value", "d_global_key", "d_global_value")
    ok = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    errors = {"deterministic": ok}
    for name, x, y, z in zip(names, found, truth, plain, strict=True):
        if not y.numel():
            continue
        scale = float(y.abs().max().clamp(min=1.0))
        error = float((x.double() - y).abs().nan_to_num(nan=torch.inf).max()) / scale
        base = float((z.double() - y).abs().max()) / scale
        # Wider for gradients, which cancel (see check_against_loops in interpreted_triton.py).
        single = dtype == torch.float32
        factor, roundings = (2, 8 if single else 1) if name == "out" else (3, 32 if single else 4)
        errors[name] = (error, base)
        ok = ok and error <= factor * base + roundings * torch.finfo(dtype).eps
    return {"case": str(case), "dtype": str(dtype), "errors": errors, "ok": ok}


def check_parity(device: str) -> list[dict[str, object]]:
    """All cases in all dtypes; one line each."""
    # The dense fp32 baseline must not use tf32 itself.
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for case, dtypes in CASES if device == "cuda" else SMALL_CASES:
        for dtype in dtypes:
            result = check_case(case, dtype, device)
            out = result["errors"]["out"]
            print(
                f"parity {'ok  ' if result['ok'] else 'FAIL'} {dtype} out {out[0]:.1e}"
                f" (dense {out[1]:.1e}) {case}",
                flush=True,
            )
            if not result["ok"]:
                print(f"    {result['errors']}")
            results.append(result)
    return results
