"""`sparse-dit tune`: what it does."""

from pathlib import Path

from sparse_dit.app.setup import Setup
from sparse_dit.pipelines.generate import TINY_WAN, Request

NOTHING, NOT_CERTAIN = 1, 3


def tune(
    request: Request,
    setup: Setup,
    floor: str = "psnr=28",
    prompts: str = "drawn:16",
    space: str = "",
    seconds: float = 0.0,
    runs: int = 0,
    out: str = "outputs/tuned.yaml",
) -> int:
    """Find the fastest recipe above a floor of quality, with few runs; started again, it goes on where it stopped.

    Args:
        request: seed of the first prompt (the next ones count up), steps and size.
        setup: which model.
        floor: the least mean over prompts, FIELD=VALUE with a field of psnr, psnr_min, ssim, ssim_min.
        prompts: drawn:N, captions of the kind tiny-wan was trained on, held-out:N, or a text file, one prompt a line.
        space: which recipes: presets, tiny-wan, or a YAML file (docs/evaluation.md); by default as the model needs it.
        seconds: no run starts later; 0 is no limit.
        runs: sparse runs at most, those of earlier starts included; 0 is no limit.
        out: the preset, a YAML file; beside it come rows, costs and the evidence.

    Returns:
        0 with an answer that was judged on all prompts, 1 where no recipe of the space is faster than dense attention
        and above the floor, 3 where a limit came before the answer was certain.
    """
    from sparse_dit.eval.calibrate import calibration_prompts
    from sparse_dit.eval.pair import asking
    from sparse_dit.eval.space import load_space
    from sparse_dit.eval.tune import Limits, Tuner, lines, read_floor, write
    from sparse_dit.eval.tune import evidence as evidence_of

    file, least, chosen = Path(out), read_floor(floor), calibration_prompts(prompts)
    space = space or (TINY_WAN if setup.model == TINY_WAN else "presets")
    if file.suffix not in (".yaml", ".yml"):
        raise ValueError(f"out: {out!r}; valid: a name ending in .yaml")
    for name, value in (("seconds", seconds), ("runs", runs)):
        if not value >= 0:
            raise ValueError(f"{name}: {value}; valid: 0 or more")
    load_space(space, steps=1)  # a bad one is told before the model is loaded
    file.parent.mkdir(parents=True, exist_ok=True)
    pipe = setup.load()
    tuner = Tuner(pipe, setup.model, request, file, tell=lambda line: print(line, flush=True))
    candidates = load_space(space, asking(pipe, request)["steps"])
    tuned = tuner.tune(candidates, chosen, least, Limits(seconds or None, runs or None))
    files = write(tuner, tuned, chosen, least)
    if not tuned.stopped:
        tuner.references.remove()
    if tuned.answer is None:
        why = f"nothing with {least} was found before {tuned.stopped}" if tuned.stopped else _nothing(tuned.costs)
        print(f"{why}; {tuned.runs} sparse runs")
    else:
        print("\n".join(lines(evidence_of(tuner, tuned, chosen, least))))
    print(f"wrote {', '.join(map(str, files))}")
    if tuned.answer is None:
        return NOT_CERTAIN if tuned.stopped else NOTHING
    return 0 if tuned.answer.certain else NOT_CERTAIN


def _nothing(costs: object) -> str:
    if not costs:
        return "dense attention is as fast as every recipe of the space"
    return "no recipe that is faster than dense attention is above the floor"
