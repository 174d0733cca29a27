"""What a training step waits for: samples of chapters that are still being prepared."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from data.sampler import TrainBatches

LOOK_S = 0.2  # seconds between two looks for the next chapter
PATIENCE_S = 5.0  # of waiting without a word


class Standing(NamedTuple):
    """What a rank has of the samples that are waited for."""

    lacks: bool
    failures: list[str]
    complete: bool
    time_is_over: bool = False


Meet = Callable[[Standing], list[Standing]]  # of this rank -> of all


def alone(own: Standing) -> list[Standing]:
    """The `Meet` of a process that asks no other."""
    return [own]


class TrainingSamples(Dataset):
    """Sample number -> a window of training, endless. Here all samples are there from the start."""

    complete = True  # whether nothing is to come

    def lacking(self, samples: Sequence[int]) -> list["TrainingSamples"]:
        """Itself, or those of its parts, that do not have all of these samples yet."""
        return []

    def failure(self) -> str | None:
        """Why what it lacks will never come; None as long as it may."""
        return None

    def say_what_failed(self) -> None:
        """As soon as it has, though what is there may be enough for a long time."""

    def say(self, what: str) -> None:
        """How a wait goes, of the process that prepares what is waited for."""

    def release(self) -> None:
        """Let loader processes go that wait for samples: nobody wants them any more."""


def never() -> bool:
    """The `time_is_over` of a process that has all the time it needs."""
    return False


def wait_for(
    data: TrainingSamples,
    samples: Sequence[int],
    meet: Meet,
    time_is_over: Callable[[], bool] = never,
) -> bool:
    """Return once all ranks have these samples: whether all of them have the whole corpus.

    Raises:
        ChildProcessError: on every rank, if one will never have them.
        TimeoutError: on every rank, if the time is over by rank zero's clock.
    """
    began, told = time.monotonic(), list[TrainingSamples]()
    while True:
        lacking = data.lacking(samples)
        failures = [why for part in lacking if (why := part.failure())]
        ranks = meet(Standing(bool(lacking), failures, data.complete, time_is_over()))
        if not any(rank.lacks for rank in ranks):
            break
        if failed := [why for rank in ranks for why in rank.failures]:
            raise ChildProcessError(failed[0])
        if ranks[0].time_is_over:
            raise TimeoutError
        time.sleep(LOOK_S)
        if not told and time.monotonic() - began > PATIENCE_S:
            told = lacking
            for part in told:
                part.say("all seen: training waits for more")
    data.say_what_failed()
    for part in told:
        part.say(f"training goes on after {time.monotonic() - began:.0f} s")
    return all(rank.complete for rank in ranks)


class StepWait:
    """How a step waits for its samples, of all ranks.

    `meet`, `time_is_over` and `before_giving_up` are for who knows the other ranks and the clock.
    The first may raise, on all of them, to end the wait; the last is called on all of them before
    samples are given up.
    """

    def __init__(self) -> None:
        self.meet: Meet = alone
        self.time_is_over: Callable[[], bool] = never
        self.before_giving_up: Callable[[], None] = lambda: None
        self.timed_out = False
        self._over = False  # whether all ranks have the whole corpus

    def wait_for(self, data: TrainingSamples, samples: Sequence[int]) -> bool:
        """As `wait_for` says, which it does without once nothing is to come.

        Returns whether the samples are there: not if the time was over first (`timed_out`).
        """
        if self._over:
            return True
        try:
            self._over = wait_for(data, samples, self.meet, self.time_is_over)
        except TimeoutError:
            self.timed_out = True
            self.before_giving_up()
        except ChildProcessError:
            self.before_giving_up()
            raise
        return not self.timed_out


class StepLoader(DataLoader):
    """Batches of training. Before it fetches the first one of a step, it waits for all of them.

    They end where a wait ends because the time of the run is over.
    """

    def __init__(self, data: TrainingSamples, wait: StepWait, **options: Any) -> None:
        super().__init__(data, **options)
        self.wait = wait

    def __iter__(self) -> Any:
        return self._fetched(super().__iter__())

    def _fetched(self, batches: Iterator[Any]) -> Iterator[Any]:
        data, sampler = self.dataset, self.batch_sampler
        assert isinstance(data, TrainingSamples) and isinstance(sampler, TrainBatches)
        try:
            for step in range(sampler.start_step, sampler.num_steps):
                if not self.wait.wait_for(data, sampler.of_step(step)):
                    return
                for _ in range(sampler.accumulate):
                    yield next(batches)
        finally:
            data.release()
