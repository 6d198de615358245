"""Hostfiles: DeepSpeed's format, every fault by line; and which rank goes where."""

from pathlib import Path

import pytest

from haloformer.launcher.hosts import Host, HostsError, fill, ranks_of, read_hostfile


def test_a_hostfile_with_comments_and_blank_lines_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\n\nb.cluster slots=2  # rack 1\nroot@a-1   slots=16\n")
    assert read_hostfile(path) == (Host("b.cluster", 2), Host("root@a-1", 16))


def test_every_line_at_fault_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb\nc slots=0\na slots=1\n-oProxy=x slots=1\nd[1-9] slots=1\n")
    with pytest.raises(HostsError) as raised:
        read_hostfile(path)
    for fault in (
        "line 2: 'b' is not of the form 'name slots=N'",
        "line 3: c has slots=0",
        "line 4: a is there twice",
        "line 5: '-oProxy=x' is no host name",
        "line 6: 'd[1-9]' is no host name",
    ):
        assert fault in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_host_and_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# nobody\n")
    with pytest.raises(HostsError, match="no host in it"):
        read_hostfile(path)
    with pytest.raises(HostsError, match="missing: No such file"):
        read_hostfile(tmp_path / "missing")


def test_ranks_fill_the_hosts_in_order() -> None:
    hosts = (Host("a", 2), Host("b", 4), Host("c", 1))
    used = fill(hosts, 5)
    assert used == (Host("a", 2), Host("b", 3))
    assert ranks_of(used) == {"a": [0, 1], "b": [2, 3, 4]}
    with pytest.raises(HostsError, match=r"--ranks 8 is more than the 7 slots .* use --ranks 7"):
        fill(hosts, 8)
