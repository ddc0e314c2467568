"""Holds `sparse-dit demo` against many visitors at once, on tiny-wan, and appends what was found as a row.

    python -m sparse_dit.eval.demo_trial --visitors 20 --rounds 3 --out eval/results/demo-visitors.jsonl

A server in a process of its own takes rounds of visitors, each of whom asks for a prompt, seed and density of its own
at the same moment as the others. What each is given is compared, file by file, with what this process makes alone. One
visitor more than the line has places must be sent away with a line, and be served when there is room. When all have
left, their files must be gone and the server's memory must be at the level it had before they came.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from sparse_dit.eval import pair, results
from sparse_dit.eval.demo_client import Shown, Visitor
from sparse_dit.pipelines.generate import TINY_WAN, Request, load_pipeline, write_video
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.recipe import Recipe, load_recipe

SMALL = Request("", height=48, width=48, num_frames=9, steps=2)
RECIPE = "tiny-radial"  # the page's first one
CLIPS = ("dense", "sparse")
FPS = 16
PATIENCE = 60.0  # seconds for a server to come up, and for files to go


@dataclass(frozen=True)
class Asking:
    """What one visitor asks for, unlike any other.

    Attributes:
        request: prompt, seed, size and steps.
        density: of the recipe's selection.
    """

    request: Request
    density: float

    @property
    def fields(self) -> dict[str, Any]:
        """The page's fields. Every fourth visitor looks inside."""
        request = self.request
        return {
            "prompt": request.prompt, "seed": request.seed, "steps": request.steps, "width": request.width,
            "height": request.height, "frames": request.num_frames, "density": self.density, "dense_steps": 0,
            "inside": request.seed % 4 == 0,
        }  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        """The page's first recipe as the fields change it."""
        return load_recipe(RECIPE).override({"selection.density": self.density, "schedule.dense_steps": 0})


def askings(visitors: int, size: Request = SMALL) -> list[Asking]:
    """So many askings, no two alike in prompt, seed or density."""
    return [
        Asking(replace(size, prompt=prompt, seed=number), round(0.2 + 0.01 * number, 2))
        for number, prompt in enumerate(held_out_prompts(visitors))
    ]


def alone(pipe: Any, asked: Sequence[Asking], folder: Path) -> list[dict[str, str]]:
    """What each asking gives when nobody else asks: SHA-256 of the dense and the sparse video."""
    found = []
    for asking in asked:
        [comparison] = pair.compare(pipe, asking.request, [asking.recipe], warm_up=False)
        digests = {}
        for name in CLIPS:
            file = folder / f"alone-{name}.mp4"
            write_video(getattr(comparison, name), file, FPS)
            digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append(digests)
    return found


@dataclass
class Round:
    """What many visitors at once were told and given, in the order of their askings.

    Attributes:
        told: the line under each one's button after it was pressed.
        wait: seconds until that line stood there.
        sent_away: the line that one visitor more got.
        records: each one's result.json.
        digests: SHA-256 of each one's videos.
        galleries: runs that each one's page shows.
        seconds: from the first press to the last result.
    """

    told: list[str]
    wait: list[float]
    sent_away: str
    records: list[results.Row]
    digests: list[dict[str, str]]
    galleries: list[int]
    seconds: float


def hold_round(url: str, asked: Sequence[Asking]) -> Round:
    """Lets a visitor for each asking come, press Generate at once, wait, take the files home, and leave.

    The server's line must have as many places as there are askings. When it is full, one more visitor tries; when it is
    empty again, that visitor is served as the last asking is.

    Raises:
        RuntimeError: a run failed, or the one more was not served afterwards.
    """
    together = threading.Barrier(len(asked))

    def press(visitor: Visitor, asking: Asking) -> tuple[str, float]:
        together.wait(PATIENCE)
        start = time.perf_counter()
        return visitor.ask(**asking.fields), time.perf_counter() - start

    with ThreadPoolExecutor(len(asked)) as crowd:
        visitors = list(crowd.map(Visitor, [url] * len(asked)))
        start = time.perf_counter()
        pressed = list(crowd.map(press, visitors, asked))
        late = Visitor(url)
        sent_away = late.ask(**asked[-1].fields)
        shown = list(crowd.map(Visitor.wait, visitors))
        seconds = time.perf_counter() - start
        taken = [_take(visitor, one) for visitor, one in zip(visitors, shown, strict=True)]
        late.ask(**asked[-1].fields)
        again = _take(late, late.wait())
    if again[1] != taken[-1][1]:
        raise RuntimeError("the visitor who came back was given something else")
    for visitor in (*visitors, late):
        visitor.leave()
    return Round(
        told=[line for line, _ in pressed],
        wait=[wait for _, wait in pressed],
        sent_away=sent_away,
        records=[record for record, _ in taken],
        digests=[digests for _, digests in taken],
        galleries=[len(one.gallery) for one in shown],
        seconds=seconds,
    )


def _take(visitor: Visitor, shown: Shown) -> tuple[results.Row, dict[str, str]]:
    if not shown.files:
        raise RuntimeError(f"the page has no files to take home: {shown.status!r}")
    record: results.Row = json.loads(visitor.take(shown.files["result.json"]))
    clips = {name: visitor.take(shown.files[f"{name}.mp4"]) for name in CLIPS}
    return record, {name: hashlib.sha256(clip).hexdigest() for name, clip in clips.items()}


def judge(held: Round, asked: Sequence[Asking], reference: Sequence[Mapping[str, str]]) -> results.Row:
    """Whose results the visitors were given.

    Returns:
        Visitors whose result.json names their own prompt, seed and recipe; videos equal to those made alone; videos
        that are another visitor's; visitors whose gallery shows their one run; and whether the line counted everybody.
    """
    own = [
        (record["prompt"], record["seed"], record["recipe"])
        == (asking.request.prompt, asking.request.seed, asking.recipe.to_dict())
        for record, asking in zip(held.records, asked, strict=True)
    ]
    equal = foreign = 0
    for number, (given, made) in enumerate(zip(held.digests, reference, strict=True)):
        others = [other for place, other in enumerate(reference) if place != number]
        equal += sum(given[name] == made[name] for name in CLIPS)
        foreign += sum(given[name] in {other[name] for other in others} for name in CLIPS)
    lines = ["Starting.", *(f"In line: {ahead} ahead of you." for ahead in range(1, len(asked)))]
    return {
        "own_records": sum(own),
        "equal_videos": equal,
        "foreign_videos": foreign,
        "own_galleries": sum(count == 1 for count in held.galleries),
        "line_in_order": sorted(held.told) == sorted(lines),
        "sent_away": held.sent_away,
        "seconds": held.seconds,
        "told_after_seconds": max(held.wait),
    }


class Server:
    """`sparse-dit demo` in a process of its own, whose temporary files all lie below one folder.

    Args:
        folder: an empty one.
        places: of its line.

    Raises:
        RuntimeError: it does not come up.
    """

    def __init__(self, folder: Path, places: int) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "sparse_dit.app", "demo", "--port", "0", "--places", str(places)]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http" not in line:
            self.process.kill()
            raise RuntimeError(f"the server did not come up: {line!r}")
        self.url = line.split()[2].rstrip("/") + "/"
        self.peak = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def files(self) -> int:
        """Temporary files there are now."""
        return sum(path.is_file() for path in self.folder.rglob("*"))

    def memory(self) -> float:
        """MiB that the process holds for itself, swapped out or not: pages of files, such as libraries, come and go."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))) / 2**10

    @contextmanager
    def watched(self) -> Iterator[list[float]]:
        """Reads the memory ten times a second inside the block; a list of one, the highest."""
        peak, ended = [self.memory()], threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                peak[0] = max(peak[0], self.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield peak
        finally:
            ended.set()
            watcher.join()

    def settled(self, seconds: float = 5.0) -> results.Row:
        """Files and memory after all visitors have left, some seconds later than the last file went."""
        until = time.monotonic() + PATIENCE
        while self.files() and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(seconds)
        return {"after_mib": self.memory(), "files_left": self.files()}


def visitors_trial(folder: Path, visitors: int, rounds: int) -> results.Row:
    """One visitor alone, after whom the server has everything loaded, then rounds of so many at once.

    The level of the memory is what the server holds after that one visitor. It may come back to it but for
    `tolerance_mib`: one run at a time works in its memory, and the C allocator may keep as much as a run works with, in
    pieces that it does not give back. What visitors leave behind would add up instead, from round to round.
    """
    torch.set_num_threads(1)
    asked = askings(visitors)
    reference = alone(load_pipeline(TINY_WAN), asked, folder)
    below = folder / "server"
    below.mkdir()
    found, memory = [], []
    with Server(below, visitors) as server:
        with server.watched() as peak:
            one = Visitor(server.url)
            one.ask(**asked[0].fields)
            _take(one, one.wait())
            one.leave()
        level = server.settled()
        for _ in range(rounds):
            with server.watched() as highest:
                held = hold_round(server.url, asked)
            memory.append({"peak_mib": highest[0], **server.settled()})
            found.append(judge(held, asked, reference))
    tolerance = max(peak[0] - level["after_mib"], 0.0)
    return {
        "visitors": visitors,
        "rounds": [{**one, **held} for one, held in zip(found, memory, strict=True)],
        "videos_alone": len({digests[name] for digests in reference for name in CLIPS}),
        "level_mib": level["after_mib"],
        "tolerance_mib": tolerance,
        "memory_came_back": memory[-1]["after_mib"] <= level["after_mib"] + tolerance,
        "exit": server.process.returncode,
        "files_left_at_exit": server.files(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20, help="at once")
    parser.add_argument("--rounds", type=int, default=3, help="of so many visitors")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to append to")
    chosen = parser.parse_args()
    results.load_rows(chosen.out)
    with tempfile.TemporaryDirectory() as folder:
        row = {"trial": "visitors", **visitors_trial(Path(folder), chosen.visitors, chosen.rounds)}
    row |= {"size": [SMALL.num_frames, SMALL.height, SMALL.width], "steps": SMALL.steps}
    row |= {"device": results.device_of("cpu", torch.float32) | {"threads": 1}, **results.provenance()}
    results.append_row(chosen.out, row)
    print(results.to_json(row, indent=2))


if __name__ == "__main__":
    main()
