"""Rows on a Ray cluster: Ray Data hands them to a pool of actors, each of which keeps its model loaded.

Actors return the content of video files, which the driver puts on its disk: nodes need no common folder, and there is
one writer, as on one machine. Ray Data holds rows back when finished ones that wait to be taken fill its object store.
"""

import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sparse_dit.pipelines.batch.identity import model_identity
from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker, first_line, leave_process


def run_ray(
    items: Sequence[Item], job: Job, device: str, workers: int, address: str | None = None
) -> Iterator[Outcome]:
    """Runs rows on a Ray cluster. An actor that dies is replaced, and its row is tried again, `job.retries` times.

    Args:
        items: the rows.
        job: what they share; its `threads` are the CPUs that an actor takes.
        device: `cuda`, of which an actor takes one, `cpu`, or `auto`: `cuda` where the cluster has some.
        workers: actors; 0 is as many as the cluster has room for now. Those without room wait until there is some.
        address: of the cluster; None is the one in RAY_ADDRESS, else one that is started on this machine for this run.

    Yields:
        The outcome of each row, as they end.

    Raises:
        ValueError: Ray is not installed, there is no cluster at the address, or with 0 workers no room on it.
        OSError: the cluster is lost.
    """
    ray = _connect(address)
    try:
        yield from _stream(ray, items, job, device, workers)
    except ray.exceptions.RayError as error:
        raise OSError(f"the Ray cluster failed: {first_line(error)}") from error
    finally:
        ray.shutdown()


class Tries:
    """Counts how often a row was begun, in an actor of its own that outlives those who begin it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def begin(self, row: str) -> int:
        """The number of this try of a row, from 1."""
        self.counts[row] += 1
        return self.counts[row]


class Actor:
    """A worker as Ray Data calls it: pickled items in, pickled outcomes out, one a call.

    The model is loaded on the first call, so that a model that cannot be loaded is an outcome and not an actor that Ray
    starts again and again.

    Args:
        job: what all rows share.
        device: where the model runs.
        begin: tells the number of this try of a row by its id. Ray itself tries a row whose actor died without end.
    """

    def __init__(self, job: Job, device: str, begin: Callable[[str], int]) -> None:
        self.job = job
        self.device = device
        self.begin = begin
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self.run(pickle.loads(item))) for item in batch["item"]]}

    def run(self, item: Item) -> Outcome:
        """The outcome of a row."""
        try:
            worker = self.worker = self.worker or self.load()
        except ValueError as error:
            return Outcome(item, "model", 1, str(error))
        tries = self.begin(item.id)
        if tries > self.job.retries + 1:
            return Outcome(item, "failed", tries - 1, "its worker died each time; Ray's logs tell why")
        outcome = worker.run(item)
        leave_process(outcome)
        return replace(outcome, attempts=outcome.attempts + tries - 1)

    def load(self) -> Worker:
        """The worker, with the model that the driver knows.

        Raises:
            ValueError: the node has another model, or none.
        """
        found = model_identity(self.job.model)
        if found != self.job.identity:
            raise ValueError(f"model: a node has {found}, not {self.job.identity}; valid: the same on every node")
        return Worker(self.job, self.device)


def _connect(address: str | None) -> Any:
    # Before Ray is imported, which reads it: neither usage statistics of a cluster that is started here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError(
            "engine: 'ray' is not installed; valid: pip install 'sparse-dit[ray]', or engine 'local'"
        ) from None
    there = address or os.environ.get("RAY_ADDRESS")
    # A cluster that runs already does not take settings of its start.
    settings: dict[str, Any] = {"address": there} if there else {"include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"address: {there!r} ({first_line(error)}); valid: the address of a Ray cluster, such as 'auto'"
        ) from error
    return ray


def _stream(ray: Any, items: Sequence[Item], job: Job, device: str, workers: int) -> Iterator[Outcome]:
    import torch
    from ray.data import ActorPoolStrategy, DataContext

    resources = ray.cluster_resources()
    if device == "auto":
        device = "cuda" if resources.get("GPU", 0) >= 1 else "cpu"
    cpus = job.threads or (1 if device == "cuda" else torch.get_num_threads())
    gpus = 1 if device == "cuda" else 0
    room = int(min(resources.get("CPU", 0) // cpus, resources.get("GPU", 0) if gpus else len(items)))
    if not workers and not room:
        raise ValueError(
            f"engine: the cluster has no room for a worker of {cpus} CPUs and {gpus} GPUs; valid: a larger one"
        )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Equal threads make equal sums, and so equal videos.
    job = replace(job, threads=cpus)
    tries = ray.remote(num_cpus=0, max_restarts=-1)(Tries).remote()
    # One row a block: that is what Ray Data gives an actor, passes on when done and runs again when the actor dies.
    rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
    outcomes = rows.map_batches(
        Actor,
        fn_constructor_args=(job, device, _Begin(tries)),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(workers or room, len(items)), max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    # Nothing fetched ahead: what is done is on the driver's disk as soon as it can be.
    for batch in outcomes.iter_batches(batch_size=None, prefetch_batches=0):
        for outcome in batch["outcome"]:
            yield pickle.loads(outcome)


class _Begin:
    """`Tries.begin` of an actor, called like a function."""

    def __init__(self, tries: Any) -> None:
        self.tries = tries

    def __call__(self, row: str) -> int:
        import ray

        return int(ray.get(self.tries.begin.remote(row)))
