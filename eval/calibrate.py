"""Runs a pipeline on a few prompts, looks at its attention calls, and makes a profile of what a search finds.

Every call stays whole, so that what is seen is the model as it is. What a step's calls showed is put into a file of its
own as soon as the step is over: an interrupted calibration goes on there, and another density settles anew from the
same files without a run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from tqdm import tqdm

from sparse_dit.calibration import SEARCHES, Search, Seen
from sparse_dit.eval import results
from sparse_dit.eval.pair import asking, plan_arguments
from sparse_dit.eval.sweep import read_prompts
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.generate import Request, generate
from sparse_dit.pipelines.patch import explain, sparse
from sparse_dit.pipelines.tiny_wan.grammar import draw_scene
from sparse_dit.profiles import Model, Profile, load_tensors, save_tensors
from sparse_dit.recipe import Recipe
from sparse_dit.selection import Call, Chosen, Dynamic, Every
from sparse_dit.selection.profile import profile_density

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DRAWN = "drawn:"


@dataclass(frozen=True)
class Sampling:
    """What of a run is looked at.

    Args:
        bins: so many bins of steps, of the same length but for rounding; `None` is what the method's source does.
        samples: steps of each bin that are looked at, evenly spaced.
        block_q, block_k: tokens of a block of the profile.

    Raises:
        ValueError: a number below 1.
    """

    bins: int | None = None
    samples: int = 1
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        for name in ("bins", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; valid: a whole number from 1")

    def cut(self, search: Search, steps: int) -> tuple[int, ...]:
        """First steps of the bins of a run of so many steps."""
        if self.bins is None:
            return search.bins(steps)
        return tuple(sorted({number * steps // self.bins for number in range(self.bins)}))

    def places(self, bins: Sequence[int], steps: int) -> dict[int, int]:
        """The steps that are looked at, and the bin of each."""
        places: dict[int, int] = {}
        for number, (first, end) in enumerate(pairwise([*bins, max(steps, bins[-1] + 1)])):
            count = min(self.samples, end - first)
            places |= {first + (2 * place + 1) * (end - first) // (2 * count): number for place in range(count)}
        return places


def calibrate(
    pipe: DiffusionPipeline,
    search: Search,
    prompts: Sequence[str],
    request: Request,
    out: Path,
    *,
    model: str = "",
    sampling: Sampling | None = None,
) -> Profile:
    """Makes a profile and writes it.

    Prompt number i has the request's seed + i. One step's findings are in memory at a time, nothing of size S x S.

    Args:
        pipe: a pipeline that is not sparse at the moment, not compiled.
        search: what is looked for.
        prompts: what to generate.
        request: seed, steps and size; its prompt is not used.
        out: the profile; what calls showed is kept beside it, in a folder with the suffix `.parts`.
        model: the pipeline's name in the profile.
        sampling: what of a run is looked at.

    Raises:
        ValueError: a request that the pipeline does not take, or a layer none of whose calls could be seen.
    """
    sampling = sampling or Sampling()
    whole = Recipe(name="calibrate", selection=Every(), block_q=sampling.block_q, block_k=sampling.block_k)
    plan = explain(pipe, whole, **plan_arguments(pipe, replace(request, prompt="")))
    asked = asking(pipe, replace(request, prompt=""))
    bins = sampling.cut(search, asked["steps"])
    looking = {name: value for name, value in _settings(search).items() if name not in search.settling}
    sought = {"model": model, "asked": asked, "method": _name_of(search), "looking": looking, "prompts": list(prompts)}
    places, blocks = sampling.places(bins, asked["steps"]), (whole.block_q, whole.block_k)
    before: Any = None
    for number in range(search.passes):
        digest = results.identity(number=number, blocks=list(blocks), **sought)
        parts = _Parts(out.with_suffix(".parts"), digest, places, len(prompts))
        for index, prompt in enumerate(tqdm(prompts, desc=f"pass {number + 1} of {search.passes}", unit="prompt")):
            if missing := {step for step in places if not parts.path(index, step).exists()}:
                look = _Look(search, number, before, parts, index, missing, plan.layers)
                with sparse(pipe, replace(whole, selection=look)):
                    generate(pipe, replace(request, prompt=prompt, seed=request.seed + index))
                look.finish()
        if number + 1 < search.passes:
            before = search.between(parts, plan.layers)
    layout, heads = parts.origin()
    found = search.settle(parts, before, layout, blocks, plan.layers, len(bins))
    about = {
        "model": model,
        "asked": asked,
        "prompts": list(prompts),
        "settings": _settings(search),
        "device": results.device_of(pipe.device, pipe.transformer.dtype),
        **results.provenance(),
    }
    of = Model(plan.model, plan.layers, heads)
    profile = Profile(_name_of(search), of, layout, *blocks, asked["steps"], bins, **vars(found), about=about)
    profile = replace(profile, about={"density": profile_density(profile, layout), **about})
    profile.save(out)
    return profile


def calibration_prompts(source: str) -> list[str]:
    """Prompts from `drawn:N`, captions of the kind that tiny-wan was trained on, or as `read_prompts`.

    Those that results are shown on should not be among them.

    Raises:
        ValueError: as `read_prompts`.
    """
    count = source.removeprefix(DRAWN)
    if not source.startswith(DRAWN) or not count.isdecimal() or int(count) < 1:
        try:
            return read_prompts(source)
        except ValueError as error:
            raise ValueError(f"{error}, or {DRAWN}N") from None
    rng = random.Random(0)
    return [draw_scene(rng).caption for _ in range(int(count))]


class _Look(Dynamic):
    """Looks at calls, and leaves them whole."""

    def __init__(
        self,
        search: Search,
        number: int,
        before: Any,
        parts: _Parts,
        prompt: int,
        missing: set[int],
        layers: int,
    ) -> None:
        self.search, self.number, self.before = search, number, before
        self.parts, self.prompt, self.missing, self.layers = parts, prompt, missing, layers
        self._step: int | None = None
        self._sums: dict[int, dict[str, torch.Tensor]] = {}
        self._counts: dict[int, int] = {}
        self._origin: dict[str, Any] = {}

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Chosen:
        """See `Dynamic.choose`: all blocks."""
        if call.step != self._step:
            self.finish()
            self._step = call.step
        blocks = _all_blocks(call, q.device)
        if call.step in self.missing:
            out, lse = block_sparse_attention(q, k, v, blocks, scale=call.scale)
            sizes = call.block_q, call.block_k
            seen = Seen(q, k, v, out, lse, call.layout, call.layer, *sizes, call.scale)
            self._add(call.layer, self.search.look(seen, self.number, self.before))
            self._origin = {"layout": asdict(call.layout), "heads": q.shape[1]}
        return Chosen(blocks, None)

    def _add(self, layer: int, found: Mapping[str, torch.Tensor]) -> None:
        sums = self._sums.setdefault(layer, {})
        for name, tensor in found.items():
            sums[name] = sums[name] + tensor.cpu() if name in sums else tensor.cpu()
        self._counts[layer] = self._counts.get(layer, 0) + 1

    def finish(self) -> None:
        """Put down what the step that is over showed.

        Raises:
            ValueError: some layers were not seen.
        """
        if self._step in self.missing:
            if sorted(self._sums) != list(range(self.layers)):
                raise ValueError(
                    f"calibrate: calls of {len(self._sums)} of {self.layers} layers could be seen in step "
                    f"{self._step}; valid: a model whose self-attention layers can all be sparse"
                )
            stacked = {
                name: torch.stack([self._sums[layer][name] / self._counts[layer] for layer in range(self.layers)])
                for name in self._sums[0]
            }
            save_tensors(self.parts.path(self.prompt, self._step), stacked, self._origin)
            self.missing.discard(self._step)
        self._step, self._sums, self._counts = None, {}, {}

    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> float:
        """See `Dynamic.expected_density`."""
        return 1.0


class _Parts:
    """The files of a pass, one a prompt and step; `calibration.Findings`.

    Args:
        folder: where they are.
        digest: of what was asked: others' files are not looked at.
        places: the bin of each step that is looked at.
        prompts: how many.
    """

    def __init__(self, folder: Path, digest: str, places: Mapping[int, int], prompts: int) -> None:
        self.folder, self.digest, self.places, self.prompts = folder, digest, places, prompts

    def path(self, prompt: int, step: int) -> Path:
        """The file of a step of a prompt's run."""
        return self.folder / f"{self.digest}-prompt-{prompt}-step-{step}.safetensors"

    def origin(self) -> tuple[TokenLayout, int]:
        """The layout and the heads of the calls."""
        header, _ = load_tensors(self.path(0, min(self.places)))
        layout = header["layout"]
        return TokenLayout(tuple(layout["grid"]), layout["text_before"], layout["text_after"]), header["heads"]

    def mean(self, name: str, layer: int, number: int | None = None) -> torch.Tensor:
        """See `Findings.mean`."""
        steps = [step for step, found in self.places.items() if number in (None, found)]
        total = torch.zeros(())
        for path in (self.path(prompt, step) for prompt in range(self.prompts) for step in steps):
            with safe_open(path, framework="pt") as file:
                total = total + file.get_slice(name)[layer].float()
        return total / (len(steps) * self.prompts)


def _all_blocks(call: Call, device: torch.device) -> BlockList:
    mask = torch.ones(1, 1, call.q_blocks, call.k_blocks, dtype=torch.bool, device=device)
    return mask_to_lists(mask, call.block_q, call.block_k, capacity=call.k_blocks)


def _name_of(search: Search) -> str:
    return next(name for name, cls in SEARCHES.items() if cls is type(search))


def _settings(search: Search) -> dict[str, Any]:
    """Its settings in plain values, as they stand in the file."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(cast(Any, search)))))
