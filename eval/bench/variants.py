"""The ways in which `bench models` runs one step of a model."""

from dataclasses import dataclass

from sparse_dit.layout import TokenLayout, text_blocks
from sparse_dit.recipe import Recipe, load_recipe

DENSITY = 0.2
STOCK = "stock"


@dataclass(frozen=True)
class Variant:
    """A recipe in which every self-attention call is sparse.

    Args:
        preset: name of the shipped recipe.
        precision: of the calls.
        density: computed tile area over full area, text included; 1 computes everything, through our kernel.
    """

    preset: str
    precision: str = "native"
    density: float = DENSITY

    def recipe(self, layout: TokenLayout) -> Recipe:
        """The preset with the density and without any dense step or layer.

        Args:
            layout: the tokens of a call. Text is computed on top of what `pooled` selects; its share is what is left.
        """
        recipe = load_recipe(self.preset)
        share = self.density
        if self.preset == "balanced":
            key_blocks = -(-layout.length // recipe.block_k)
            rows, columns = (
                marks.double().mean().item() for marks in text_blocks(layout, recipe.block_q, recipe.block_k)
            )
            share = max((self.density - rows) / (1.0 - rows) - columns, 1.0 / key_blocks)
        schedule = {"schedule.dense_steps": 0, "schedule.dense_above": 1.0, "schedule.dense_layers": []}
        return recipe.override({"selection.density": share, "precision": self.precision, **schedule})


VARIANTS = {
    "radial": Variant("radial"),
    "balanced": Variant("balanced"),
    "radial-int8_fp8": Variant("radial", "int8_fp8"),
    "balanced-int8_fp8": Variant("balanced", "int8_fp8"),
    "dense": Variant("radial", density=1.0),
    "radial-int8": Variant("radial", "int8"),
    "balanced-int8": Variant("balanced", "int8"),
}
"""By name, what matters most first."""
