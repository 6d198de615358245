"""Kernels compile to clean machine code for targets that need not be here.

The default tests compile a few kernels per target; ``-m extended`` compiles them all, as
``python -m haloformer.kernels.compile_check`` does.
"""

from dataclasses import replace

import pytest
import torch

from haloformer.kernels.compile_check import (
    KERNELS,
    NEGATIVE_CONTROL,
    Job,
    all_jobs,
    as_source,
    check,
    example_operands,
    kernel_and_arguments,
    main,
)
from haloformer.kernels.tiles import ARCHITECTURES, DTYPES, Tile, dot_precision, tiles_for
from haloformer.kernels.triton_fwd import forward_arguments, forward_kernel

# One of each kernel, every target, every dtype, both head dims.
QUICK = (
    *(Job(kernel, "sm_90", torch.bfloat16, 64) for kernel in KERNELS if kernel != "dropout"),
    Job("forward", "sm_80", torch.float16, 64),
    Job("key_grad", "sm_80", torch.float32, 128),
    Job("forward", "gfx942", torch.bfloat16, 128),
    Job("query_grad", "gfx942", torch.float32, 64),
)


@pytest.mark.parametrize("job", QUICK, ids=str)
def test_compiles_without_stack_and_with_tensor_cores(job):
    report = check(job)
    print(report)
    assert not report.faults
    assert report.registers > 0 and report.tensor_instructions > 0
    assert job.arch != "sm_90" or report.wgmma > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dropout_of_hidden_states_compiles(arch):
    report = check(Job("dropout", arch, torch.bfloat16, 64))
    print(report)
    assert not report.faults and report.tensor_instructions == 0


@pytest.mark.extended
@pytest.mark.parametrize("job", list(all_jobs()), ids=str)
def test_every_kernel_compiles_cleanly(job):
    assert not check(job).faults


def test_a_tile_that_spills_is_refused(capsys):
    assert main(["--control"]) == 1
    assert "FAIL" in capsys.readouterr().out
    faults = " ".join(check(NEGATIVE_CONTROL).faults)
    assert "bytes of stack" in faults and "local loads/stores" in faults


def test_a_product_without_tensor_cores_is_refused():
    job = Job("global_grad", "sm_80", torch.float32, 64, tile=Tile(32, 16, 8, 1))
    _, _, arguments = kernel_and_arguments(job)
    assert arguments["PRECISION"] == "tf32x3"
    assert "no tensor-core instruction" in check(job, {"PRECISION": "ieee"}).faults


def test_windows_lengths_and_offsets_do_not_recompile():
    x = example_operands(torch.bfloat16, 64, plain=False)
    heads = x.query.shape[2]
    rows, buffer = 17, 1 << 20
    other = replace(
        x,
        query=torch.empty(1, rows, heads, 64, dtype=torch.bfloat16, device="meta"),
        key=torch.empty(1, buffer, heads, 64, dtype=torch.bfloat16, device="meta"),
        value=torch.empty(1, buffer, heads, 64, dtype=torch.bfloat16, device="meta"),
        windows=((1,) * heads, (0,) * heads, (1, 3) * (heads // 2)),
        offset=1,
        low=1,
        high=16,
        rate=0.5,
        first_row=1,
    )

    def identity(operands):
        out, lse = torch.empty(0, dtype=torch.bfloat16, device="meta"), torch.empty(0)
        _, arguments = forward_arguments(operands, "sm_90", out, lse)
        return as_source(forward_kernel, arguments).hash()

    assert identity(x) == identity(other)
    assert identity(x) != identity(replace(x, key_mask=None))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_head_dim_has_tiles_that_a_tensor_core_takes(arch):
    for dtype in DTYPES:
        assert dot_precision(arch, dtype) in ("ieee", "tf32x3")
        for head_dim in range(1, 129):
            tiles = tiles_for(arch, head_dim, dtype)
            for tile in (tiles.forward, tiles.query_grad, tiles.key_grad, tiles.global_grad):
                assert min(tile.block_rows, tile.block_columns) >= 16
