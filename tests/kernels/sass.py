"""Reads the machine code of a kernel for sm_90: does it use uniform registers that nothing has written?

ptxas 12.8 made such code of the portable attention kernel at head sizes 88 and 96: the shared-memory descriptor of a
matrix product at the ragged end was computed from a register of the main loop. Results were wrong there and nowhere
else, which only a GPU shows, or this.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
REGISTERS = frozenset(range(64))
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P[0-9T]+)\s+)?([A-Za-z0-9_.]+)\s*([^;]*);")
# Instructions that write a uniform register besides those whose names start with U.
_WRITERS = {"R2UR", "S2UR", "CS2UR", "VOTEU", "LDCU", "REDUX"}


class Instruction(NamedTuple):
    """One instruction, `args` as printed."""

    address: str
    predicate: str | None
    name: str
    args: str

    def written_and_read(self) -> tuple[set[int], set[int]]:
        """Numbers of uniform registers. Matrix products take 64 bits for A where it is in memory, and 64 bits for B."""
        head = self.name.split(".")[0]
        wide = 2 if ".64" in self.name or ".WIDE" in self.name else 1
        written: set[int] = set()
        read: set[int] = set()
        for place, found in enumerate(re.finditer(r"\bUR(\d+)\b", self.args)):
            number, before = int(found[1]), self.args[: found.start()]
            if place == 0 and (head.startswith("U") or head in _WRITERS) and re.fullmatch(r"(UP\d, )?", before):
                written.update(range(number, number + wide))
            elif before.endswith("gdesc["):
                a_in_registers = re.match(r"R\d+, R\d+, gdesc", self.args)
                read.update(range(number + (2 if a_in_registers else 0), number + 4))
            else:
                pair = before.endswith("desc[") or (head.startswith("U") and ".64" in self.name)
                read.update(range(number, number + (2 if pair else 1)))
        return written, read


def unwritten_reads(cubin: bytes) -> list[str]:
    """Instructions that some path through the kernel reaches before a uniform register they read is written."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return list(_unwritten(text))


def _unwritten(text: str) -> Iterator[str]:
    blocks, labels = _blocks(text)
    known = [REGISTERS if number else frozenset[int]() for number in range(len(blocks))]  # written on every path here
    waiting = [0]
    while waiting:
        number = waiting.pop()
        written = known[number].union(*(instruction.written_and_read()[0] for instruction in blocks[number]))
        for after in _after(number, blocks, labels):
            if not known[after] <= written:
                known[after] &= written
                waiting.append(after)
    for block, written in zip(blocks, known, strict=True):
        have = set(written)
        for instruction in block:
            writes, reads = instruction.written_and_read()
            if reads - have:
                yield f"{instruction.address}: {instruction.name} {instruction.args}"
            have |= writes


def _blocks(text: str) -> tuple[list[list[Instruction]], dict[str, int]]:
    blocks: list[list[Instruction]] = [[]]
    labels = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif found := _LINE.search(line):
            blocks[-1].append(Instruction(found[1], found[2], found[3], found[4].strip()))
            if found[3].split(".")[0] in ("BRA", "EXIT"):
                blocks.append([])
    return blocks, labels


def _after(number: int, blocks: list[list[Instruction]], labels: dict[str, int]) -> list[int]:
    following = [number + 1] if number + 1 < len(blocks) else []
    if not blocks[number]:
        return following
    last = blocks[number][-1]
    target = re.search(r"\.L_x_\d+", last.args) if last.name.split(".")[0] == "BRA" else None
    if target is None and last.name != "EXIT":
        return following
    conditional = last.predicate is not None or re.match(r"!?U?P\d", last.args)
    return ([labels[target[0]]] if target else []) + (following if conditional else [])
