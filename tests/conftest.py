"""What all tests share: how two processes (``make test``) share them, and no server of anyone."""

import os

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# They look at the same layouts, which are trained once per process (``walked``).
WALKED = ("catalog", "engine", "fragments", "topology")


def pytest_configure(config: pytest.Config) -> None:
    """Tests name the stores they use; one that the developer works with is none of theirs."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


class WholeFiles(LoadFileScheduling):
    """A file goes to one process, for its fixtures train; files that share one go together."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "walked" if file in {f"tests/launcher/test_{name}.py" for name in WALKED} else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> WholeFiles:
    return WholeFiles(config, log)
