"""How much memory it takes to measure a long pair of clips on a CPU; appends a row.

    python -m sparse_dit.eval.memory_trial --frames 121 --height 720 --width 1280 --out eval/results/memory.jsonl

The clips are noise, and the same noise with more on top: metrics do not look at what they show. Peak is the largest
resident set of this process, Python, torch and both clips included.
"""

import argparse
import math
import resource
import time
from pathlib import Path

import numpy as np
import torch

from sparse_dit.eval import metrics, results
from sparse_dit.pipelines.generate import Frames

DEVIATION = 0.05


def clips(frames: int, height: int, width: int) -> tuple[Frames, Frames]:
    """Two clips [F, H, W, 3], of which one has normal noise on top; values stay within 0..1."""
    random = np.random.default_rng(0)
    reference = np.empty((frames, height, width, 3), np.float32)
    noisy = np.empty_like(reference)
    for number in range(frames):
        reference[number] = 0.25 + 0.5 * random.random((height, width, 3), dtype=np.float32)
        noise = random.standard_normal((height, width, 3), dtype=np.float32) * np.float32(DEVIATION)
        noisy[number] = np.clip(reference[number] + noise, 0, 1)
    return noisy, reference


def peak_bytes() -> int:
    """The largest resident set so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("frames", 121), ("height", 720), ("width", 1280)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to append to")
    options = parser.parse_args()
    results.load_rows(options.out)
    noisy, reference = clips(options.frames, options.height, options.width)
    before, start = peak_bytes(), time.perf_counter()
    measured = metrics.measure(noisy, reference)
    row = {
        "trial": "memory",
        "frames": options.frames,
        "height": options.height,
        "width": options.width,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
        "clips_bytes": noisy.nbytes + reference.nbytes,
        "seconds": time.perf_counter() - start,
        "psnr": measured["psnr"],
        "psnr_of_the_noise": -20 * math.log10(DEVIATION),
        "ssim": measured["ssim"],
        "device": results.device_of("cpu", torch.float64),
    }
    results.append_row(options.out, {**row, **results.provenance()})
    print(results.to_json(row, indent=2))


if __name__ == "__main__":
    main()
