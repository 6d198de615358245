"""Models started from a folder on real ranks: held-out loss, then a few steps."""

from haloformer.configs.load import parse_config
from rank_steps import Rank

STEPS = 3


def walk(rank, world, recipe, layouts):
    """{(data, context, tensor, ZeRO stage): (what was said, held-out loss, [(loss, norm)])}."""
    return {layout: start(recipe, *layout) for layout in layouts}


def start(recipe, data, context, tensor, stage):
    parallel = {"context": context, "tensor": tensor, "zero_stage": stage}
    mine = Rank(parse_config({**recipe, "parallel": parallel}, "recipe"), data)
    held_out, _ = mine.evaluate()
    history = [mine.train_step(step, 1e-3)[:2] for step in range(STEPS)]
    mine.close()
    return mine.said, held_out, history
