"""How busy this host is, sampled beside training: CPU, memory, disk, network, GPUs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

INTERVAL_S = 10.0


class SystemSampler:
    """Samples in a thread until it is stopped.

    MLflow's own sampler ends for good when the server does not answer once, so only what it
    measures with is used, under the names that its page of system metrics knows.

    Args:
        tell: Called with the number of the interval and the metrics.
        started_ms: When the run began, so that one that goes on counts on.
        interval_s: Seconds between samples.
    """

    def __init__(
        self,
        tell: Callable[[int, dict[str, float]], None],
        started_ms: int,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._tell, self._started_ms, self._interval_s = tell, started_ms, interval_s
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no library, or no GPU
            self._monitors.append(GPUMonitor())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        self._sample()  # the first one only starts the counters
        while not self._stopped.wait(self._interval_s):
            number = int((time.time() * 1000 - self._started_ms) / (1000 * self._interval_s))
            self._tell(number, self._sample())

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        return {f"system/{key}": float(value) for key, value in values.items()}
