"""The planner's bytes and memory are those of real training steps on real ranks."""

from collections import Counter

import pytest

from dist import run_ranks
from haloformer.launcher.plan_memory import memory
from haloformer.launcher.plan_traffic import traffic
from plan_ranks import walk
from plan_recipes import VOCAB, numbers, recipe

# (recipe, whether its memory is weighed)
PAIRS = {
    "mlm": (recipe(context=2, size=32, seq=512), True),
    "mlm_bf16_zero1": (recipe(context=2, precision="bf16"), False),
    "mlm_bf16_zero2_accumulated": (
        recipe(context=2, zero=2, precision="bf16", batch=2, recompute="full"),
        False,
    ),
    "mlm_zero0_wide_window": (recipe(context=2, zero=0, attention_window=[16, 400]), False),
    "mlm_zero3_data": (recipe(zero=3, batch=4), False),
    "mlm_tensor_selective": (recipe(tensor=2, recompute="selective"), False),
    "led": (recipe("led", context=2, size=32, seq=512), True),
    "led_bf16_full": (recipe("led", context=2, precision="bf16", recompute="full"), False),
    "led_tensor": (recipe("led", tensor=2), False),
    "char": (recipe("char", context=2, size=32, seq=512), True),
    "char_tensor_full": (
        recipe("char", tensor=2, recompute="full", hidden_dropout=0.0, attention_window=[16, 32]),
        False,
    ),
}
ALONE = {
    f"{kind}_{recompute}": (recipe(kind, size=32, seq=512, recompute=recompute), True)
    for kind, recompute in (("mlm", "none"), ("mlm", "full"), ("led", "full"), ("char", "full"))
}
# DeepSpeed sums a norm and a flag besides, which are not forecast.
SCALARS = 32


@pytest.fixture(scope="module")
def counted():
    """{case: what each rank counted}."""
    seen = {}
    for world, cases in ((2, PAIRS), (1, ALONE)):
        work = [(raw, VOCAB, weigh) for raw, weigh in cases.values()]
        ranks = run_ranks(world, walk, work, timeout=300.0)
        seen |= {name: [rank[i] for rank in ranks] for i, name in enumerate(cases)}
    return seen


def forecast_bytes(raw, rank, world):
    model, rows, split, accumulation = numbers(raw, world)
    place = (rank // split.tensor % split.context, rank % split.tensor)
    sizes = Counter()
    for flow in traffic(model, rows, split, accumulation, *place):
        sizes[f"{flow.group}/{flow.operation}"] += flow.size
    return sizes


@pytest.mark.parametrize("name", PAIRS)
def test_bytes_of_every_message_are_forecast(name, counted):
    raw = PAIRS[name][0]
    _, _, split, _ = numbers(raw, 2)
    for rank, seen in enumerate(counted[name]):
        forecast = forecast_bytes(raw, rank, 2)
        found = Counter()
        for key, size in seen["bytes"].items():
            if split.zero_ranks > 1 or not key.startswith("zero/"):
                found[key.replace("_into_tensor", "").replace("_tensor", "")] += size
        assert found.keys() >= forecast.keys()
        for key, size in found.items():
            scalars = SCALARS if key in ("zero/all_reduce", "tensor/all_reduce") else 0
            assert 0 <= size - forecast[key] <= scalars, key


@pytest.mark.parametrize("name", [n for n, (_, weigh) in (PAIRS | ALONE).items() if weigh])
def test_memory_is_forecast_within_15_percent(name, counted):
    raw = (PAIRS | ALONE)[name][0]
    forecast = memory(*numbers(raw, len(counted[name]))).peak.total
    for seen in counted[name]:
        assert forecast == pytest.approx(seen["peak"]["most"], rel=0.15)
