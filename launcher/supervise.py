"""Keep a run going: after a rank or a host is lost, train on with what is left.

attempt 1   a: ranks 0 1   b: ranks 2 3     data 2 x context 2
                              b is cut off
attempt 2   a: ranks 0 1                    data 1 x context 2, from the newest checkpoint
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from haloformer.configs.load import ConfigError, check_world
from haloformer.configs.schema import TrainConfig
from haloformer.launcher.attempt import Ending, StopSignals, run_attempt
from haloformer.launcher.catalog import Catalog
from haloformer.launcher.cluster import Answers, Cluster
from haloformer.launcher.counting import counted
from haloformer.launcher.hosts import Host, fill, num_slots
from haloformer.launcher.known_runs import KnownRun
from haloformer.launcher.launch import LaunchError
from haloformer.launcher.run_dir import Plan, RunDir
from haloformer.launcher.watch import Fault

TRIES = 3


class MeshSizes(NamedTuple):
    """Sizes of the axes that ranks are laid out on."""

    data: int
    context: int
    tensor: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data * self.context * self.tensor


@dataclass(frozen=True)
class Job:
    """A run that is to be trained to its end.

    Attributes:
        known: The run.
        cluster: Where it runs.
        run_dir: Its folder.
        plan: Of the next attempt.
        config: The recipe as it was given; an attempt may have other parallel sizes.
        used: Hosts of the next attempt, each with the ranks it gets.
        pause: Seconds between two questions when there is no answer.
    """

    known: KnownRun
    cluster: Cluster
    run_dir: RunDir
    plan: Plan
    config: TrainConfig
    used: tuple[Host, ...]
    pause: float = 10.0

    def attempt(self, signals: StopSignals) -> Ending:
        """Start the ranks of the plan, once.

        Raises:
            LaunchError: If the first host does not answer, or its port is taken.
        """
        return run_attempt(self.cluster, self.run_dir, self.plan, self.used, signals)

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint whose files are whole, None if there is none."""
        newest = Catalog(self.known.artifacts(), self.known.run_id).newest_valid()
        return None if newest is None else newest.step


def choose_layout(config: TrainConfig, slots: int) -> MeshSizes:
    """The largest layout that a recipe allows on so many slots.

    The recipe's context and tensor sizes are kept while they fit: they were chosen for memory.
    When there are too few slots even for one sequence they give way to divisors of theirs, those
    that use the most slots; among equals the larger tensor size, then the larger context size.
    The batch stays as it is, so the data size always divides it.

    Raises:
        ConfigError: If not even one rank can run the recipe.
    """
    parallel = config.parallel
    kept = _widest(config, slots, parallel.context, parallel.tensor)
    if kept is not None:
        return kept
    layouts = [
        _widest(config, slots, context, tensor)
        for context in _divisors(parallel.context)
        for tensor in _divisors(parallel.tensor)
    ]
    possible = [layout for layout in layouts if layout is not None]
    if not possible:
        raise ConfigError(
            f"{config.name}: no layout of at most {slots} ranks divides batch.global_batch "
            f"{config.batch.global_batch} with batch.micro_batch {config.batch.micro_batch}"
        )
    return max(possible, key=lambda layout: (layout.world_size, layout.tensor, layout.context))


def supervise(job: Job, signals: StopSignals, say: Callable[[str], None]) -> Ending:
    """Attempt a run until it is finished or stopped as asked, or nothing moves any more.

    Args:
        job: With the plan of the first attempt.
        signals: Open.
        say: For a line on what died, what was dropped and how it goes on.

    Returns:
        How the last attempt ended; with a fault when it was given up.
    """
    tries, best = 0, job.plan.resume_step
    while True:
        ending = _attempt(job, signals)
        finished = ending.state is not None and ending.state[0] == "finished"
        if signals.count > 0 or ending.code == 2 or (ending.code == 0 and finished):
            return ending
        if ending.fault is not None:
            say(ending.fault.text)
        else:
            # Somebody told a rank to stop, not us: its host is being taken away.
            say("a rank was told to stop, and not by this launcher")
        step = _patiently(job, signals, say)
        tries = tries + 1 if step is None or (best is not None and step <= best) else 0
        if step is not None:  # a damaged newest one is no new mark: it would be reached again
            best = step if best is None else max(best, step)
        if tries >= TRIES:
            return _given_up(ending, step)
        answers = _hosts(job, signals, say)
        if signals.count > 0:
            return ending
        if not answers.hosts:
            return replace(ending, code=1, fault=Fault("no host answers any more"))
        layout = choose_layout(job.config, num_slots(answers.hosts))
        job = _next(job, answers.hosts, layout, step)
        say(
            f"going on {'from the start' if step is None else f'from step {step}'} with "
            f"{counted(layout.world_size, 'rank')} (data {layout.data}, context {layout.context}, "
            f"tensor {layout.tensor}); {TRIES - tries} tries without a newer checkpoint left"
        )


def _attempt(job: Job, signals: StopSignals) -> Ending:
    try:
        return job.attempt(signals)
    except LaunchError as error:  # that host answered a moment ago
        return Ending(1, None, Fault(str(error)))


def _hosts(job: Job, signals: StopSignals, say: Callable[[str], None]) -> Answers:
    """The hosts that answer now, which may be more than a moment ago.

    When none does, the fault may be this machine's own link: it is given a while.
    """
    for _ in range(TRIES):
        answers = job.cluster.answering()
        for host, fault in answers.faults.items():
            say(f"dropped {host}: it {fault}")
        if answers.hosts or signals.count > 0:
            break
        time.sleep(job.pause)
    return answers


def _next(job: Job, hosts: Sequence[Host], layout: MeshSizes, step: int | None) -> Job:
    """The same run, from a checkpoint, on these hosts."""
    sizes = {"context": layout.context, "tensor": layout.tensor}
    parallel = job.config.parallel.model_copy(update=sizes)
    config = job.config.model_copy(update={"parallel": parallel})
    plan = replace(
        job.plan,
        config=config.model_dump(mode="json"),
        world_size=layout.world_size,
        resume_step=step,
    )
    return replace(job, plan=plan, used=fill(hosts, layout.world_size))


def _patiently(job: Job, signals: StopSignals, say: Callable[[str], None]) -> int | None:
    """The newest checkpoint, also when the store of artifacts was on the host that was lost."""
    while True:
        try:
            return job.newest_step()
        except (MlflowException, OSError) as error:
            if signals.count > 0:
                return None
            said = " ".join(str(error).split())[:200]
            say(f"the store of artifacts does not answer ({said}); asking again")
            time.sleep(job.pause)


def _given_up(ending: Ending, step: int | None) -> Ending:
    newest = "none is committed" if step is None else f"the newest is of step {step}"
    why = "stopped by somebody else" if ending.fault is None else ending.fault.text
    text = f"{TRIES} tries in a row without a newer checkpoint ({newest}); the last: {why}"
    return replace(ending, code=1, fault=Fault(text))


def _widest(config: TrainConfig, slots: int, context: int, tensor: int) -> MeshSizes | None:
    """The most data ranks that these sizes allow, None if not even one."""
    sizes = {"context": context, "tensor": tensor}
    parallel = config.parallel.model_copy(update=sizes)
    tried = config.model_copy(update={"parallel": parallel})
    for data in range(slots // (context * tensor), 0, -1):
        try:
            check_world(tried, data * context * tensor)
        except ConfigError:
            continue
        return MeshSizes(data, context, tensor)
    return None


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
