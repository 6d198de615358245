"""Files behind ``http(s)://`` and ``s3://``, by range, through fsspec; faults are tried again."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.retry import RetryPolicy

Result = TypeVar("Result")

_CONNECT_S, _READ_S = 10, 30
_TOO_MANY, _BAD_RANGE = 429, 416
# One request of a longer stream; a lost one costs so much.
_STREAMED_BYTES = 8 << 20


class RemoteError(DataError):
    """A server did not give what it was asked for, however often; nothing is said about the data.

    So it is no ``CorruptSampleError``: a network that is down is no reason to skip documents.
    """


def split_address(address: str | Path) -> SplitResult | Path:
    """Tell an URL from a path; ``file:`` is a path.

    Raises:
        DataError: If the URL is of a kind that is not read, or carries more than a place.
    """
    if isinstance(address, Path):
        return address
    parts = urlsplit(address)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if "://" not in address:
        return Path(address)
    if parts.scheme not in ("http", "https", "s3"):
        raise DataError(
            f"no data is read by {parts.scheme}://",
            file=address,
            remedy="use a path, file:, http://, https:// or s3://",
        )
    if parts.query or parts.fragment or "@" in parts.netloc or not parts.netloc:
        # Names of files are appended, and addresses are logged: so no ?token= and no user:secret@.
        raise DataError(
            "an address of data is scheme://host/folder or s3://bucket/folder, nothing more",
            file=urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")),
            remedy="put credentials into ~/.netrc (http) or ~/.aws/credentials (s3)",
        )
    return parts


class RemoteFiles:
    """The files of one remote folder.

    Args:
        parts: Its address, from ``split_address``.
        policy: How often a request is tried.

    Raises:
        DataError: If the library for this kind of address is not installed.
    """

    def __init__(self, parts: SplitResult, policy: RetryPolicy) -> None:
        self.address = parts.geturl().rstrip("/")
        self._is_s3 = parts.scheme == "s3"
        self._policy = policy
        self._process = 0
        self._system: Any = None
        needed = "s3fs" if self._is_s3 else "aiohttp"
        try:
            importlib.import_module("fsspec")
            importlib.import_module(needed)
        except ImportError as fault:
            raise DataError(
                f"{parts.scheme}:// needs the package {needed}",
                file=self.address,
                remedy="pip install 'haloformer[remote]'",
            ) from fault
        self._faults = _faults(self._is_s3)

    def read(self, name: str) -> bytes:
        """A whole, small file.

        Raises:
            FileNotFoundError: If there is none.
            RemoteError: If the server does not give it.
        """
        content: bytes = self._ask(name, lambda system, path: system.cat_file(path))
        return content

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start .. stop-1, fewer where the file ends before.

        Raises:
            FileNotFoundError: If there is no such file.
            RemoteError: If the server does not give them, or gives the whole file instead.
        """
        content: bytes = self._ask(
            name, lambda system, path: system.cat_file(path, start=start, end=stop), b""
        )
        if len(content) > stop - start:
            raise RemoteError(
                f"{stop - start} bytes were asked for and {len(content)} came: the server ignores "
                "Range requests, so every read would fetch the whole file",
                file=f"{self.address}/{name}",
                remedy="serve the data with nginx, Apache or S3, or copy it to a local folder",
            )
        return content

    def stream(self, name: str, size: int) -> Any:
        """The first ``size`` bytes of a file, piece by piece: an iterator of bytes."""
        for start in range(0, size, _STREAMED_BYTES):
            yield self.read_range(name, start, min(start + _STREAMED_BYTES, size))

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: If there is none.
            RemoteError: If the server does not say.
        """
        size = self._ask(name, lambda system, path: system.info(path))["size"]
        if not isinstance(size, int):
            raise RemoteError(
                "the server does not say how long the file is",
                file=f"{self.address}/{name}",
                remedy="serve the data with nginx, Apache or S3, or copy it to a local folder",
            )
        return size

    def _ask(
        self, name: str, question: Callable[[Any, str], Result], past_end: Result | None = None
    ) -> Result:
        path = f"{self.address}/{name}"
        try:
            return self._policy.call(
                lambda: question(self._connected(), path), self._faults, self._passes
            )
        except FileNotFoundError as fault:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from fault
        except self._faults as fault:
            status = _status(fault)
            if status == _BAD_RANGE and past_end is not None:
                return past_end
            told = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
            if not self._passes(fault):
                raise RemoteError(
                    f"refused ({told})",
                    file=path,
                    remedy="check the address, and credentials in ~/.netrc or ~/.aws/credentials",
                ) from fault
            raise RemoteError(
                f"no answer after {self._policy.attempts} attempts ({told})",
                file=path,
                remedy="see whether the server is up and reachable from this host, then resume",
            ) from fault

    def _connected(self) -> Any:
        """The file system of this process: its event loop does not survive a fork."""
        if self._process != os.getpid():
            self._system = _open_s3() if self._is_s3 else _open_http()
            self._process = os.getpid()
        return self._system

    def _passes(self, fault: Exception) -> bool:
        status = _status(fault)
        if status is not None:
            return status == _TOO_MANY or status >= 500
        if isinstance(fault, OSError | TimeoutError):
            final = (errno.EINVAL, errno.EPERM, errno.ENOSYS)
            return not (
                isinstance(fault, FileNotFoundError | PermissionError) or fault.errno in final
            )
        if self._is_s3:
            from botocore import exceptions

            # The rest of botocore's own are about the request: no credentials, no region.
            return isinstance(fault, exceptions.HTTPClientError | exceptions.ConnectionError)
        import aiohttp

        return not isinstance(fault, aiohttp.InvalidURL)


def _open_http() -> Any:
    import aiohttp
    import fsspec

    limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
    return fsspec.filesystem(
        "http",
        skip_instance_cache=True,
        use_listings_cache=False,
        # A packed answer has other offsets. trust_env: proxies, and credentials in ~/.netrc.
        headers={"Accept-Encoding": "identity"},
        client_kwargs={"timeout": limits, "trust_env": True},
    )


def _open_s3() -> Any:
    import fsspec

    system = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
            "retries": {"max_attempts": 0},  # we do, and say how often
        },
    )
    system.retries = 1
    return system


def _faults(is_s3: bool) -> tuple[type[Exception], ...]:
    if is_s3:
        from botocore.exceptions import BotoCoreError

        return (OSError, BotoCoreError)
    import aiohttp

    return (OSError, aiohttp.ClientError)


def _status(fault: Exception) -> int | None:
    """The HTTP status behind a fault, None where there was no answer."""
    status = getattr(fault, "status", None)  # aiohttp's
    if isinstance(status, int):
        return status
    response = getattr(fault.__cause__, "response", None)  # botocore's, which s3fs wraps
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None
