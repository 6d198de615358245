"""Model and optimizer state as flat slices, as ZeRO holds them: no gather to write or read.

The only file that reaches into DeepSpeed's optimizers; ``check_deepspeed`` guards the version.

Each parameter is flattened, and so are its fp32 master weight and its two Adam moments. A rank
holds a slice of each, wherever ZeRO put it, and torch's distributed checkpoint (DCP) stores
slices and finds the overlaps when another layout asks for others:

    weight (numel 10)     0 1 2 3 4 5 6 7 8 9
    written, 2 ranks      [ rank 0 ][ rank 1 ]
    read, 3 ranks         [r 0  ][r 1  ][r 2 ]

Tensor-parallel ranks hold parts of a parameter, and ``splits`` says where those are in the whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from haloformer.launcher.engine import Engine
from haloformer.launcher.runtime import check_deepspeed
from haloformer.launcher.snapshot import Fragment, Snapshot
from haloformer.launcher.splits import Picked, Saved, Share, group_blocks, share_of
from haloformer.launcher.topology import Topology

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)

# DCP builds a whole file in memory before it writes it.
_BYTES_PER_FILE = 1 << 30


def take_snapshot(engine: Engine, topology: Topology) -> Snapshot:
    """Copy this rank's slices to host memory, so that training may go on while they are written.

    Args:
        engine: From ``build_engine``, between two optimizer steps.
        topology: Its topology.

    Raises:
        ValueError: For an untested DeepSpeed.
    """
    _check(engine)
    _make_moments(engine)
    slices: dict[str, Fragment] = {}
    for kind, name, share, data, start in _slices(engine, topology):
        if engine.zero_optimization_stage() == 0:
            # Every rank holds everything: each writes its share.
            rank, ranks, numel = topology.data_context_rank, _ranks(topology), data.numel()
            start, stop = rank * numel // ranks, (rank + 1) * numel // ranks
            data = data[start:stop]
        data, start = share.place(data, start)
        # Tensor ranks that hold the same elements all offer them; DCP lets one write them.
        if data.numel():
            copy = data.detach().to("cpu", copy=True)
            slices[share.key(f"{kind}/{name}")] = Fragment(copy, start, share.numel)
    return Snapshot(slices, _spread_over_files(engine, topology))


def load_fragments(engine: Engine, topology: Topology, folder: Path, step: int) -> None:
    """Read the slices this layout needs, whatever layout wrote them. Collective over all ranks.

    Afterwards the engine stands right after optimizer step ``step``.

    Args:
        engine: Fresh from ``build_engine``.
        topology: Its topology.
        folder: All files of the checkpoint and no other safetensors file.
        step: Optimizer steps that were taken.

    Raises:
        ValueError: If the checkpoint is of another model, or an untested DeepSpeed.
    """
    _check(engine)
    _make_moments(engine)
    saved = _check_same_model(folder, _shares(engine.module, topology))
    plan = _ReadPlan()
    for kind, name, share, data, start in _slices(engine, topology):
        plan.add(f"{kind}/{name}", saved[f"{kind}/{name}"], share, data, start)
    dcp_load(plan.state, storage_reader=HuggingFaceStorageReader(str(folder)))
    plan.finish()
    _refresh_model_weights(engine)
    for flat in _flat_masters(engine):
        _torch_optimizer(engine).state[flat]["step"].fill_(step)
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def load_weights(model: nn.Module, folder: Path, topology: Topology | None = None) -> None:
    """Fill a plain model with the fp32 weights of a checkpoint; no rank talks to another.

    Args:
        model: The model that was trained, not wrapped by DeepSpeed.
        folder: All files of the checkpoint and no other safetensors file.
        topology: Says which part a tensor-parallel rank holds; None if the model is whole.

    Raises:
        ValueError: If the checkpoint is of another model.
    """
    shares = _shares(model, topology)
    saved = _check_same_model(folder, shares)
    plan, flats = _ReadPlan(), {}
    for name, parameter in _parameters(model):
        key = f"{WEIGHT}/{name}"
        flats[name] = torch.zeros(parameter.numel())  # rows that fill up a vocabulary stay zero
        plan.add(key, saved[key], shares[name], flats[name], 0)
    with warnings.catch_warnings():
        # DCP warns that it works in one process even where no_dist asks for it.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp_load(plan.state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    plan.finish()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(flats[name].view_as(parameter))


class _Slice(NamedTuple):
    """What this rank holds of one tensor: fp32 elements ``start`` and on of its flat share."""

    kind: str
    name: str
    share: Share
    data: Tensor
    start: int


class _ReadPlan:
    """Slices to read: straight into place, or through whole rows where columns differ."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self._picked: list[Picked] = []

    def add(self, key: str, saved: Saved, share: Share, data: Tensor, start: int) -> None:
        """Fill ``data``, elements ``start`` and on of this rank's share; padding stays zero."""
        data, start = share.place(data, start)
        if not data.numel():
            return
        blocks = saved.blocks(share.width)
        if share.columns in blocks:
            self.state[share.key(key)] = Fragment(data, start, share.numel)
            return
        picked = Picked.plan(data, start, share.columns, blocks)
        self._picked.append(picked)
        for block, part in picked.parts.items():
            stored = Share(share.rows, share.width, block)
            first = picked.rows.start * len(block)
            self.state[stored.key(key)] = Fragment(part, first, stored.numel)

    def finish(self) -> None:
        """After reading, copy what did not go straight into place."""
        for picked in self._picked:
            picked.fill()


def _check(engine: Engine) -> None:
    check_deepspeed()
    state = engine.module.state_dict()
    # megatron-core's layers have an extra state that is None: nothing to save.
    held = {name for name, value in state.items() if value is not None}
    persistent = held - {name for name, _ in _parameters(engine.module, False)}
    if persistent:
        raise ValueError(
            f"{min(persistent)} is a persistent buffer, and checkpoints hold parameters only; "
            "register it with persistent=False and recompute it"
        )


def _parameters(module: nn.Module, once: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters; a tied one once, or under each of its names."""
    return module.named_parameters(remove_duplicate=once)


def _shares(module: nn.Module, topology: Topology | None) -> dict[str, Share]:
    """This rank's part of every parameter of a model."""
    return {name: share_of(parameter, topology) for name, parameter in _parameters(module)}


def _check_same_model(folder: Path, shares: dict[str, Share]) -> dict[str, Saved]:
    """What is stored of each tensor, if it is all of this model and nothing else."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    saved = group_blocks(
        {
            key: stored.size.numel()
            for key, stored in metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
    )
    wanted = {f"{kind}/{name}": share for kind in KINDS for name, share in shares.items()}
    found = {
        name: saved.get(name, Saved({})).fault(wanted.get(name))
        for name in sorted(saved.keys() | wanted.keys())
    }
    faults = [f"{name}: {fault}" for name, fault in found.items() if fault is not None]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(
            f"the checkpoint is of another model ({faults[0]}{more}); use the recipe it was "
            "trained with"
        )
    return saved


def _ranks(topology: Topology) -> int:
    return topology.data_context_group.size()


def _spread_over_files(engine: Engine, topology: Topology) -> dict[str, int]:
    """Tensor name -> number of the file that each rank puts its slice into, from 1 up.

    Rank 0's counts for all of them, so it has the names that other tensor ranks use, too.
    """
    mapping: dict[str, int] = {}
    written = 0
    for name, share in _shares(engine.module, topology).items():
        for kind in KINDS:
            mapping |= dict.fromkeys(share.keys(f"{kind}/{name}"), 1 + written // _BYTES_PER_FILE)
            written += share.numel * 4 // _ranks(topology)
    return mapping


def _slices(engine: Engine, topology: Topology) -> Iterator[_Slice]:
    """Everything that ZeRO put on this rank."""
    stage = engine.zero_optimization_stage()
    for name, parameter in _parameters(engine.module):
        if stage == 0:
            views = _slice_stage_0(engine, parameter)
        elif stage == 3:
            views = _slice_stage_3(engine, topology, parameter)
        else:
            views = _slice_stage_1_2(parameter)
        share = share_of(parameter, topology)
        for kind, (data, start) in views.items():
            yield _Slice(kind, name, share, data, start)


def _slice_stage_0(engine: Engine, parameter: nn.Parameter) -> dict[str, tuple[Tensor, int]]:
    state = _torch_optimizer(engine).state[parameter]
    tensors = {WEIGHT: parameter.detach(), **{kind: state[kind] for kind in MOMENTS}}
    return {kind: (t.view(-1), 0) for kind, t in tensors.items()}


def _slice_stage_1_2(parameter: nn.Parameter) -> dict[str, tuple[Tensor, int]]:
    # The flat group of all parameters is cut into equal parts, so most ranks own no element of
    # this parameter; their mapping is None.
    mapping = cast(Any, parameter)._hp_mapping
    if mapping is None:
        return {}
    start = mapping.lp_fragment_address.start
    views = {WEIGHT: mapping.hp_fragment.detach()}
    views |= {kind: mapping.get_optim_state_fragment(kind) for kind in MOMENTS}
    return {kind: (view, start) for kind, view in views.items()}


def _slice_stage_3(
    engine: Engine, topology: Topology, parameter: nn.Parameter
) -> dict[str, tuple[Tensor, int]]:
    # Every parameter is cut into equal parts, the last ones padded:
    #   numel 10 on 4 ranks -> 3 elements each; rank 3 holds element 9 and two of padding.
    zero, partitioned = engine.optimizer, cast(Any, parameter)
    numel, part = partitioned.ds_numel, partitioned.partition_numel()
    start = min(topology.data_context_rank * part, numel)
    length = min(part, numel - start)
    views = {WEIGHT: zero.get_local_fp32_param(parameter).detach()}
    views |= {kind: zero.get_local_fp32_param(parameter, kind) for kind in MOMENTS}
    return {kind: (view[:length], start) for kind, view in views.items()}


def _torch_optimizer(engine: Engine) -> Any:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _flat_masters(engine: Engine) -> list[Tensor]:
    """The tensors that torch's AdamW steps: its state is keyed by them."""
    groups = _torch_optimizer(engine).param_groups
    stage = engine.zero_optimization_stage()
    if stage == 3:
        # Between steps ZeRO-3 leaves the groups of the torch optimizer empty.
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in groups for tensor in group["params"]]


def _make_moments(engine: Engine) -> None:
    """Give AdamW the state that its first step would make, zeros, where it is not there yet."""
    optimizer = _torch_optimizer(engine)
    for flat in _flat_masters(engine):
        state = optimizer.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {kind: torch.zeros_like(flat) for kind in MOMENTS}
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed links all groups once, after the first group's first step, when the others
        # have no moments to link: link again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _refresh_model_weights(engine: Engine) -> None:
    """Bring the model's own weights (bf16, or a second fp32 copy) up to the masters."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        # As at the end of a step: every rank its slices, then whole copies of the small ones.
        zero._partition_all_parameters()
        for index, _ in enumerate(zero.fp32_partitioned_groups_flat):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
