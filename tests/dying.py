"""Ranks that die by SIGKILL in the middle of a checkpoint; the code under test has no hook."""

import os
import signal
import threading

from haloformer.launcher.commit import Committer

# Where a commit can be cut short -> which rank can die there; None is any.
PHASES = {
    "file_half_written": None,
    "before_hash": None,
    "after_upload": None,
    "before_manifest": 0,
    "manifest_half_written": 0,
    "before_prune": 0,
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_later(delay):
    """Die in so many seconds, wherever this process is by then; who ends before gets away."""
    bomb = threading.Timer(delay, die)
    bomb.daemon = True
    bomb.start()


class DyingCommitter(Committer):
    """Kills its process at ``phase`` of the first commit at ``step`` or later."""

    phase = None
    step = 0
    delay = 0.0  # for what is cut short somewhere in the middle

    def _is_now(self, phase, step):
        return phase == self.phase and step >= self.step

    def _write(self, snapshot, step, folder):
        super()._write(snapshot, step, folder)
        if self._is_now("file_half_written", step):
            file = next(iter(folder.glob(f"shard-{self._topology.rank + 1:05d}-*")))
            os.truncate(file, file.stat().st_size // 2)
            die()

    def _publish(self, step, attempt, folder):
        if self._is_now("before_hash", step):
            die()
        if self._is_now("in_upload", step):
            die_later(self.delay)
        entries = super()._publish(step, attempt, folder)
        if self._is_now("after_upload", step):
            die()
        return entries

    def _write_last(self, manifest):
        self._committed = manifest.step
        super()._write_last(manifest)

    def _write_manifest(self, name, text):
        if self._is_now("before_manifest", self._committed):
            die()
        if self._is_now("manifest_half_written", self._committed):
            local = self._catalog.artifacts.local_path(name)
            if local is not None:
                local.write_text(text[: len(text) // 2])
                die()
            die_later(self.delay)
        super()._write_manifest(name, text)

    def _prune(self, newest):
        if self._is_now("before_prune", newest.step):
            die()
        super()._prune(newest)
