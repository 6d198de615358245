"""Who is where in the mesh, for every layout, in one set of processes."""

import pytest

from haloformer.launcher.topology import Layout
from places import LAYOUTS


@pytest.fixture
def seen(walked):
    return walked[0]["places"]


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_every_rank_knows_its_place(index, seen):
    layout = LAYOUTS[index]

    def rank_of(data, context, tensor):
        return (data * layout.context + context) * layout.tensor + tensor

    for rank, (places, _) in enumerate(seen):
        place = places[index]
        data, context, tensor = place["ranks"]
        assert rank == rank_of(data, context, tensor)
        others = range(layout.data)
        assert place["data"] == [rank_of(d, context, tensor) for d in others]
        assert place["context"] == [rank_of(data, c, tensor) for c in range(layout.context)]
        shared = [rank_of(d, c, tensor) for d in others for c in range(layout.context)]
        assert place["data_context"] == shared
        line = [rank_of(data, context, t) for t in range(layout.tensor)]
        assert place["tensor"] == (line if layout.tensor > 1 else None)
        assert place["adapter_model"] == line
        assert place["adapter_data"] == shared and place["adapter_size"] == len(shared)
        assert place["adapter_rank"] == shared.index(rank)
        assert place["adapter_sequence"] == 1 and place["same"]
        assert place["timeout"] == "0:01:17"


def test_gathering_keeps_rank_order_and_sizes(seen):
    for _, texts in seen:
        assert texts == [(rank, rank * 100) for rank in range(4)]


def test_an_axis_has_at_least_one_rank():
    with pytest.raises(ValueError, match="context 0 is less than 1"):
        Layout(1, 0)
