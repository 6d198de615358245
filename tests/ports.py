"""Ports of servers that start seconds after their number is known, or never."""

import contextlib
import os
import socket
from collections.abc import Iterator
from random import SystemRandom


def port_of_our_own() -> int:
    """A free port that nobody takes before it is needed, seconds from now.

    Below those that the launcher draws from and Linux gives away; each process of pytest-xdist
    ("gw0", "gw1") has its share.
    """
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    for port in SystemRandom().sample(range(10_000 + share, 20_000, 16), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port below 20000")


@contextlib.contextmanager
def away() -> Iterator[str]:
    """The address of a server that does not answer; nobody else can take its port meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and nobody listens: connections are refused
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
