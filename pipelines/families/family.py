"""What a row of the table says of a model family, and how a forward is read by it."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.families.sources import Arguments, Grid, GridSource, Span
from sparse_dit.samples import Sample


@dataclass(frozen=True)
class Noise:
    """The noise level in the family's own units.

    Args:
        argument: name of the forward's argument that holds the timestep.
        pure: its value at pure noise.
        clean: its value without noise. What lies between is a straight line.
        sigmoid_if: configuration entry; where it is set, the argument is ln(sigma) / 4 instead (EDM, Karras et al.
            2022) and the level sigma / (sigma + 1).
    """

    argument: str = "timestep"
    pure: float = 1000.0
    clean: float = 0.0
    sigmoid_if: str = ""

    def level(self, timestep: torch.Tensor, config: Arguments) -> torch.Tensor:
        """Noise level in [0, 1], 1 is pure noise, of a timestep of any shape."""
        if self.sigmoid_if and config.get(self.sigmoid_if):
            return (4.0 * timestep.float()).sigmoid()
        return (timestep.float() - self.clean) / (self.pure - self.clean)


@dataclass(frozen=True)
class DenseWhen:
    """A way of calling the model that sparse attention must leave alone.

    Args:
        argument: name of the forward's argument whose being given means it.
        reason: what `summary` counts the calls under.
        unseen: whether the calls are made by code that is not rebound, so that they must be counted in advance.
    """

    argument: str
    reason: str
    unseen: bool = False


class Reading(NamedTuple):
    """What a forward's arguments tell.

    Attributes:
        samples: where the tokens of each sample stand; a single entry when all are alike.
        refusal: why all calls of the forward must stay dense, or `None`.
        unseen: whether those calls are made by code that is not rebound.
    """

    samples: tuple[Sample, ...]
    refusal: str | None = None
    unseen: bool = False


def _matcher(pattern: str) -> re.Pattern[str]:
    """Of a pattern of `Family.layers`: the block number is group 1, the last part of the path group 2."""
    stem, _, leaf = pattern.rpartition(".")
    return re.compile(re.escape(stem).replace(r"\*", r"(\d+)") + rf"\.({leaf})")


@dataclass(frozen=True)
class Family:
    """How to read one family of transformers.

    Args:
        transformer: name of the class.
        models: the models that people know it by.
        layers: patterns of the module paths of the self-attention layers, in execution order; `*` is the block number,
            and `a|b` at the end are several layers of one block.
        grid: where the grid comes from.
        spans: the other tokens in the self-attention, in the order of the sequence.
        noise: the noise level.
        padded: whether a mask that reaches a call tells nothing but the padding of the spans; it is cut off with that.
        uniform: name of an argument; when all of it is nonzero, a mask that reaches a call changes nothing and is
            removed.
        apart: whether the processors call attention once a sample, without the sample's padding.
        shared: names of arguments whose tokens several processes share by themselves, apart from those of the grid and
            of all other spans, under diffusers' plan of context parallelism (`_cp_plan`); `None` where there are spans
            and no plan.
        alone: patterns of those layers that see the grid without the spans.
        dense_when: calls to leave alone.
        remark: what else stays dense, for `explain` and the table.
    """

    transformer: str
    models: str
    layers: tuple[str, ...]
    grid: GridSource
    spans: tuple[Span, ...] = ()
    noise: Noise = Noise()
    padded: bool = False
    uniform: str = ""
    apart: bool = False
    shared: tuple[str, ...] | None = None
    alone: tuple[str, ...] = ()
    dense_when: tuple[DenseWhen, ...] = ()
    remark: str = ""

    @property
    def reads(self) -> bool:
        """Whether a forward's shapes alone do not tell everything; its hook then stays outside of compiled graphs."""
        told_by_values = self.grid.reads or any(span.reads for span in self.spans)
        several = self.padded or self.apart or bool(self.alone)
        return told_by_values or several or bool(self.uniform) or bool(self.dense_when)

    @property
    def removes_masks(self) -> bool:
        """Whether there are masks that can be removed exactly."""
        return self.padded or bool(self.uniform)

    def attentions(self, transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The self-attention layers of a transformer by module path, in execution order.

        Raises:
            ValueError: there is none.
        """
        # A compiled block is wrapped in a module of its own; that does not change which layer it is.
        modules = {path.replace("_orig_mod.", ""): module for path, module in transformer.named_modules()}
        found: dict[str, torch.nn.Module] = {}
        for pattern in self.layers:
            leaves = pattern.rpartition(".")[2].split("|")
            hits = [(path, hit) for path in modules if (hit := _matcher(pattern).fullmatch(path))]
            hits.sort(key=lambda entry: (int(entry[1][1]), leaves.index(entry[1][2])))
            found |= {path: modules[path] for path, _ in hits}
        if not found:
            raise ValueError(f"pipe: {self.transformer} without layers; valid: one with {', '.join(self.layers)}")
        return found

    def sees_grid_alone(self, path: str) -> bool:
        """Whether the layer with this module path sees the grid without the spans."""
        return any(_matcher(pattern).fullmatch(path) for pattern in self.alone)

    def stretches(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...] | None:
        """Tokens of each stretch of the sequence that several processes share by itself, paddings included.

        Args:
            arguments: the arguments of the forward, by name.
            config: the transformer's configuration.
            grid: of the forward.
        """
        if self.spans and self.shared is None:
            return None
        common = math.prod(grid)
        sides: dict[str, list[int]] = {"before": [], "after": []}
        for span in self.spans:
            width = span.width(arguments, config, grid)
            if getattr(span, "argument", None) not in (self.shared or ()):
                common += width
            else:
                sides[span.side].append(width)
        return (*sides["before"], common, *sides["after"])

    def layout(self, arguments: Arguments, config: Arguments) -> tuple[int, int, int, int, int]:
        """(T, H, W, tokens before, tokens after) of a forward, when its shapes tell everything (`reads` is false)."""
        grid = self.grid.read(arguments, config)
        sides = {"before": 0, "after": 0}
        for span in self.spans:
            sides[span.side] += span.tokens(arguments, config, grid)[0]
        return *grid, sides["before"], sides["after"]

    def read(self, arguments: Arguments, config: Arguments) -> Reading:
        """Everything that a forward's arguments tell; reads values of tensors, so it waits for the GPU."""
        grid = self.grid.read(arguments, config)
        counted = [(span, span.tokens(arguments, config, grid)) for span in self.spans]
        samples = []
        for index in range(max((len(counts) for _, counts in counted), default=1)):
            before = after = gap = 0
            for span, counts in counted:
                count = counts[index if len(counts) > 1 else 0]
                if span.side == "before":
                    before, gap = before + count, gap + max(span.gap(arguments) - count, 0)
                else:
                    after += count
            samples.append(Sample(TokenLayout(grid, before, after), gap))
        if not self.apart and len(set(samples)) == 1:
            samples = samples[:1]
        return self._refused(Reading(tuple(samples)), arguments)

    def _refused(self, reading: Reading, arguments: Arguments) -> Reading:
        for dense in self.dense_when:
            if arguments.get(dense.argument) is not None:
                return reading._replace(refusal=dense.reason, unseen=dense.unseen)
        for span in self.spans:
            if reason := span.refusal(arguments):
                return reading._replace(refusal=reason)
        weights = arguments.get(self.uniform) if self.uniform else None
        if weights is not None and not bool((weights != 0).all()):
            return reading._replace(refusal="mask")
        return reading

    def usual_layout(self, grid: Grid, config: Arguments, text_tokens: int | None = None) -> TokenLayout:
        """The tokens that a pipeline passes by default on a grid; `text_tokens` replaces those of the first span."""
        sides = {"before": 0, "after": 0}
        for span in self.spans:
            replaced = span is self.spans[0] and text_tokens is not None
            sides[span.side] += (text_tokens or 0) if replaced else span.expected(config, grid)
        return TokenLayout(grid, sides["before"], sides["after"])
