"""Real servers on loopback: files over HTTP with ranges, an S3 of moto's, MLflow's own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from ports import port_of_our_own

_UP_S = 300.0
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class FileServer:
    """Serves a folder, takes files, notes every request, and fails as it is told.

    Attributes:
        requests: (method, name, range or None), in order.
        faults: What the next requests get instead of an answer: a status, or ``drop`` (half of
            the bytes, then the connection is cut).
    """

    def __init__(self, folder: Path, takes_ranges: bool = True) -> None:
        self.folder, self.takes_ranges = folder, takes_ranges
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: deque[int | str] = deque()
        self._closed = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._closed = True
        self._thread.join()

    def ranges_of(self, suffix: str) -> list[tuple[str, str]]:
        """Names and ranges asked of files with this ending."""
        return [(name, part) for _, name, part in self.requests if name.endswith(suffix) and part]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def do_PUT(self) -> None:
                server.requests.append((self.command, self.path, None))
                content = self.rfile.read(int(self.headers["Content-Length"]))
                fault = server.faults.popleft() if server.faults else None
                if fault == "drop":
                    self.close_connection = True
                    return
                if fault is None:
                    path = server.folder / self.path.lstrip("/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                self.send_response(200 if fault is None else int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def answer(self, with_body: bool) -> None:
                if server._closed:  # a connection that was kept open
                    self.close_connection = True
                    return
                asked = self.headers["Range"]
                server.requests.append((self.command, self.path, asked))
                fault = server.faults.popleft() if server.faults else None
                path = server.folder / self.path.lstrip("/")
                status = fault if isinstance(fault, int) else 200 if path.is_file() else 404
                content = path.read_bytes() if status == 200 else b""
                match = _RANGE.fullmatch(asked or "") if server.takes_ranges else None
                size = len(content)
                if match and status == 200:
                    first, last = int(match[1]), min(int(match[2]), size - 1)
                    status = 206 if first < size else 416
                    content = content[first : last + 1]
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                self.end_headers()
                if fault == "drop":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif with_body:
                    self.wfile.write(content)

        return Handler


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """An S3 with one bucket; gives its address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, region_name=S3_KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=S3_KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=S3_KEYS["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        client.create_bucket(Bucket=bucket)
        client.close()
        yield url
    finally:
        server.stop()


class TrackingServer:
    """`mlflow server --serve-artifacts`, which can be stopped and started again.

    Args:
        folder: For its database and its output.
        s3_url: The S3 that it keeps artifacts in; None keeps them in the folder.
        bucket: The bucket.
    """

    def __init__(self, folder: Path, s3_url: str | None = None, bucket: str = "") -> None:
        self.folder, self._s3_url = folder, s3_url
        self._artifacts = f"{folder}/served" if s3_url is None else f"s3://{bucket}/artifacts"
        self._port = port_of_our_own()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = self.folder / "server.log"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"),
            *("--port", str(self._port), "--backend-store-uri", f"sqlite:///{self.folder}/db"),
            *("--serve-artifacts", "--artifacts-destination", self._artifacts),
        ]
        # Its queues of jobs, which a trainer has no use for, are five more processes.
        no_jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **S3_KEYS, **no_jobs}
        if self._s3_url is not None:
            environment["MLFLOW_S3_ENDPOINT_URL"] = self._s3_url
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + _UP_S
        while True:
            # A line of the log, so that nobody guesses how long it takes.
            if "Application startup complete" in log.read_text(errors="replace"):
                return
            up = self._process.poll() is None and time.monotonic() < deadline
            assert up, log.read_text(errors="replace")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)

    def stop(self) -> None:
        """End it and its workers at once, in the middle of whatever they do."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
