"""Rows on a Ray cluster: Ray Data hands them to a pool of actors, each of which keeps its model loaded.

Actors return the content of video files, which the driver puts on its disk: nodes need no common folder, and there is
one writer, as on one machine. Ray Data starts no further rows while finished ones wait to be taken.
"""

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_dit.pipelines.batch.identity import model_identity
from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker, leave_process


def run_ray(
    items: Sequence[Item], job: Job, device: str, workers: int, address: str | None = None
) -> Iterator[Outcome]:
    """Runs rows on a Ray cluster.

    Args:
        items: the rows.
        job: what they share; its `threads` are the CPUs that an actor takes.
        device: `cuda`, of which an actor takes one, `cpu`, or `auto`: `cuda` where the cluster has some.
        workers: actors at most; 0 is as many as the cluster has room for now. Fewer run where there is less room.
        address: of the cluster; None is the one in RAY_ADDRESS, else one that is started on this machine for this run.

    Yields:
        The outcome of each row, as they end. A row whose actors died `job.retries` + 1 times comes last.

    Raises:
        ValueError: Ray is not installed, there is no cluster at the address, or with 0 workers no room on it.
    """
    ray = _connect(address)
    try:
        yield from _stream(ray, items, job, device, workers)
    finally:
        ray.shutdown()


class Actor:
    """A worker as Ray Data calls it: pickled items in, pickled outcomes out, one a call.

    The model is loaded on the first call, so that a model that cannot be loaded is an outcome and not an actor that Ray
    starts again and again.
    """

    def __init__(self, job: Job, device: str) -> None:
        self.job = job
        self.device = device
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self.run(pickle.loads(item))) for item in batch["item"]]}

    def run(self, item: Item) -> Outcome:
        """The outcome of a row."""
        if self.worker is None:
            try:
                found = model_identity(self.job.model)
                if found != self.job.identity:
                    raise ValueError(
                        f"model: a node has {found}, not {self.job.identity}; valid: the same on every node"
                    )
                self.worker = Worker(self.job, self.device)
            except ValueError as error:
                return Outcome(item, "model", 1, str(error))
        outcome = self.worker.run(item)
        leave_process(outcome)
        return outcome


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
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"address: {there!r} ({why}); valid: the address of a Ray cluster, such as 'auto'") from error
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
    most = min(workers or room, len(items))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    # A row that kills its actors must not take the others with it; it is missed at the end.
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    # One row a block: that is what Ray Data gives an actor, passes on when done and runs again when the actor dies.
    rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
    outcomes = rows.map_batches(
        Actor,
        fn_constructor_args=(job, device),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=most, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=gpus,
        ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": job.retries},
    )
    missing = {item.id: item for item in items}
    for row in outcomes.iter_rows():
        outcome: Outcome = pickle.loads(row["outcome"])
        del missing[outcome.item.id]
        yield outcome
    for item in missing.values():
        yield Outcome(item, "failed", job.retries + 1, "its worker died each time; Ray's logs tell why")
