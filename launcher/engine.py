"""DeepSpeed's engine for a recipe: ZeRO, accumulation and clipping over data x context ranks.

The loss of the whole global batch is ``sum over tokens / number of tokens``. One rank holds a part
of the tokens of one micro-batch; DeepSpeed averages gradients over the data x context ranks and
adds them over the micro-batches, so ``rank_loss`` undoes the average and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from haloformer.configs.schema import OptimConfig, TrainConfig
from haloformer.launcher.runtime import check_deepspeed, deepspeed
from haloformer.launcher.topology import MpuAdapter, Topology

# Elements that DeepSpeed reduces or prefetches at once, and so the size of its extra buffers.
_BUCKET = 25_000_000

Engine = Any  # deepspeed.DeepSpeedEngine; the library ships no types


def accumulation_steps(config: TrainConfig, layout_data: int) -> int:
    """Micro-batches per optimizer step on one rank.

    Ours, not DeepSpeed's: its train_batch_size counts context ranks as samples.

    Raises:
        ValueError: If the global batch does not split evenly.
    """
    batch = config.batch
    share = batch.micro_batch * layout_data
    if batch.global_batch % share:
        raise ValueError(
            f"batch.global_batch {batch.global_batch} is not a multiple of batch.micro_batch "
            f"{batch.micro_batch} x {layout_data} data-parallel ranks = {share}; change one of them"
        )
    return batch.global_batch // share


def build_engine(model: nn.Module, config: TrainConfig, topology: Topology) -> Engine:
    """Wrap a model in a DeepSpeed engine.

    Every rank must pass the same weights: seed torch the same before the model is built.

    Args:
        model: On the CPU or on ``topology.device``; its parameters are moved, split and cast.
        config: Recipe; ``batch``, ``optim`` and ``parallel`` are read.
        topology: From ``build_topology``.

    Returns:
        A ``deepspeed.DeepSpeedEngine``: call it for the forward pass; then ``backward`` of this
        module, and ``engine.step()`` after every micro-batch (it acts after the last one).

    Raises:
        ValueError: For frozen parameters, a batch that does not split, or an untested DeepSpeed.
    """
    check_deepspeed()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"parameter {frozen[0]} is frozen (requires_grad False), and checkpoints would lose "
            "it; train it or make it a buffer that the model can recompute"
        )
    optimizer = AdamW(parameter_groups(model, config.optim), **_adam_options(config.optim))
    adapter = MpuAdapter(topology)
    if config.parallel.zero_stage == 0:
        _clip_before_step(model, optimizer, adapter, config.optim.clip_norm)
    settings = _deepspeed_config(config, topology, sum(p.numel() for p in model.parameters()))
    # DeepSpeed's bf16 optimizer prints the machine's memory ten times while it is made.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, mpu=adapter, config=settings, dist_init_required=False
        )
    return engine


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; biases and norms (one dimension) do not.

    ``rate_scale`` of a group is its learning rate over that of the encoder.
    """
    parts = [(list(model.parameters()), 1.0)]
    if optim.head_learning_rate is not None:
        encoder: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            (encoder if name.startswith("encoder.") else head).append(parameter)
        parts = [(encoder, 1.0), (head, optim.head_learning_rate / optim.learning_rate)]
    groups = [
        {"params": [p for p in part if wanted(p)], "weight_decay": decay, "rate_scale": scale}
        for part, scale in parts
        for wanted, decay in ((_is_matrix, optim.weight_decay), (_is_vector, 0.0))
    ]
    # DeepSpeed flattens each group and cannot flatten an empty one.
    return [group for group in groups if group["params"]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1


def _is_vector(parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1


def rank_loss(local_sum: Tensor, num_tokens: int, topology: Topology) -> Tensor:
    """The loss this rank differentiates.

    Args:
        local_sum: fp32 scalar, summed over the tokens this rank holds in this micro-batch.
        num_tokens: Tokens with a loss in the whole global batch: every rank, every micro-batch.
        topology: For the number of ranks that DeepSpeed averages over.
    """
    layout = topology.layout
    # A global batch with no masked token at all has sum 0: its loss is 0, not NaN.
    return local_sum * (layout.data * layout.context / max(num_tokens, 1))


def backward(engine: Engine, loss: Tensor) -> None:
    """Add the gradients of ``rank_loss``.

    ``num_tokens`` already spans the micro-batches, so DeepSpeed must not divide by their number.
    """
    engine.backward(loss, scale_wrt_gas=False)


def set_batch(engine: Engine, config: TrainConfig, topology: Topology) -> None:
    """Train on another global batch or micro-batch from the next step on.

    Args:
        engine: From ``build_engine``, between two optimizer steps.
        config: Recipe; its ``batch`` is read.
        topology: Of the engine.
    """
    steps = accumulation_steps(config, topology.layout.data)
    micro = config.batch.micro_batch
    engine.set_train_micro_batch_size(micro)
    engine.set_train_batch_size(micro * steps * engine.dp_world_size)
    # DeepSpeed steps the optimizer whenever this count is a multiple of the accumulation steps,
    # so it has to stand as if all steps so far had been of the new kind.
    engine.micro_steps = engine.global_steps * steps


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    """Set the rate of the coming step, the encoder's; a head's follows in proportion."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_scale"]


def grad_norm(engine: Engine) -> float:
    """Norm of the whole gradient at the last optimizer step, before clipping.

    Infinite if the gradient was not finite; ZeRO-3 then leaves the weights as they were.
    """
    norm = engine.get_global_grad_norm()
    assert norm is not None, "grad_norm is known after the first optimizer step"
    value = float(norm)
    return value if math.isfinite(value) else math.inf


def _adam_options(optim: OptimConfig) -> dict[str, Any]:
    # One pass over the memory instead of ten, on CPUs too.
    return {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps, "fused": True}


def _deepspeed_config(
    config: TrainConfig, topology: Topology, num_parameters: int
) -> dict[str, Any]:
    parallel, model = config.parallel, config.model
    bucket = min(_BUCKET, num_parameters + num_parameters % 2)  # DeepSpeed wants it even
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config, topology.layout.data),
        "zero_allow_untested_optimizer": True,
        # DeepSpeed does not tell the norm at ZeRO-0: _clip_before_step clips there.
        "gradient_clipping": config.optim.clip_norm if parallel.zero_stage else 0.0,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # Keep vectors (biases, norms) whole on every rank, and split the matrices.
            "stage3_param_persistence_threshold": model.longest_vector,
        },
    }
    if parallel.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # Sums over micro-batches and over ranks lose small gradients in bf16.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def _clip_before_step(
    model: nn.Module, optimizer: Optimizer, adapter: MpuAdapter, max_norm: float
) -> None:
    """Clip and note the norm at ZeRO-0, where DeepSpeed would clip without telling the norm."""

    def clip(stepped: Optimizer, *_: Any) -> None:
        norm = deepspeed.runtime.utils.clip_grad_norm_(
            list(model.parameters()), max_norm, mpu=adapter
        )
        # The engine copies this attribute from its optimizer after each step, as for ZeRO 1-3.
        setattr(stepped, "_global_grad_norm", torch.as_tensor(norm))  # noqa: B010

    optimizer.register_step_pre_hook(clip)
