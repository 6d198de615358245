"""How the tests are shared out where several processes run them (`pytest -n 2`, `make test`)."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each process whole files, for their fixtures train; and what shares one, together."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        group = "walked" if "walked" in fixtures else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
