"""Captions of the procedural videos: a small grammar, and which of its sentences are held out of training."""

import random
import zlib
from dataclasses import dataclass

COLORS = {
    "red": (0.90, 0.15, 0.12),
    "yellow": (0.92, 0.82, 0.10),
    "green": (0.15, 0.75, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.90),
    "magenta": (0.85, 0.15, 0.80),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
TEXTURES = ("plain", "striped", "checkered", "dotted")
SIZES = ("small", "large")
BACKGROUNDS = (
    "a dark wall",
    "a bright wall",
    "a gray gradient",
    "a cloudy sky",
    "a brick wall",
    "a grassy field",
    "a gravel road",
)
PHOTOS = ("an astronaut", "a cat", "a cup of coffee", "a rocket", "a photographer", "some coins", "the moon")

#: Unit vectors (x to the right, y down) of the four directions of motion.
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
MOVES = tuple(f"moving {direction}" for direction in DIRECTIONS)
TURNS = ("rotating clockwise", "rotating counterclockwise")
SCALINGS = ("growing", "shrinking")
PANS = tuple(f"pans {direction}" for direction in DIRECTIONS)
ZOOMS = ("zooms in", "zooms out")

_HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Scene:
    """One sentence of the grammar.

    A scene either shows an object (`shape` set) that moves over a gray background, or a photograph (`photo` set) over
    which the camera moves. `motion` is one of MOVES, TURNS, SCALINGS for objects, of PANS, ZOOMS for photographs.
    """

    motion: str
    color: str = ""
    texture: str = ""
    shape: str = ""
    size: str = ""
    background: str = ""
    photo: str = ""

    @property
    def caption(self) -> str:
        """The sentence that the model is prompted with."""
        if self.photo:
            return f"the camera {self.motion} over a photo of {self.photo}"
        return f"a {self.size} {self.texture} {self.color} {self.shape} {self.motion} over {self.background}"

    @property
    def direction(self) -> str | None:
        """The direction the caption names, or None."""
        last = self.motion.split()[-1]
        return last if last in DIRECTIONS else None

    @property
    def held_out(self) -> bool:
        """True for one caption in eight, by a checksum of the caption alone: training never draws these."""
        return zlib.crc32(self.caption.encode()) % _HELD_OUT_ONE_IN == 0


def draw_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Draw a scene from the training sentences, or from the held-out ones."""
    while True:
        scene = _draw_photo(rng) if rng.random() < 0.15 else _draw_object(rng)
        if scene.held_out == held_out:
            return scene


def _draw_photo(rng: random.Random) -> Scene:
    return Scene(motion=rng.choice(PANS * 2 + ZOOMS), photo=rng.choice(PHOTOS))


def _draw_object(rng: random.Random) -> Scene:
    motion = rng.choice(MOVES * 3 + TURNS + SCALINGS)
    # A plain circle that turns looks like one that stands still.
    textures = TEXTURES[1:3] if motion in TURNS else TEXTURES
    return Scene(
        motion=motion,
        color=rng.choice(tuple(COLORS)),
        texture=rng.choice(textures),
        shape=rng.choice(SHAPES),
        size=rng.choice(SIZES),
        background=rng.choice(BACKGROUNDS),
    )


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` different scenes that training never saw, the same ones for the same seed.

    Raises:
        ValueError: `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = random.Random(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[draw_scene(rng, held_out=True)] = None
    return list(scenes)


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Captions of `held_out_scenes`."""
    return [scene.caption for scene in held_out_scenes(count, seed)]


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    phrases = [*COLORS, *SHAPES, *TEXTURES, *SIZES, *BACKGROUNDS, *PHOTOS, *MOVES, *TURNS, *SCALINGS, *PANS, *ZOOMS]
    return sorted({word for phrase in [*phrases, "the camera a photo of over"] for word in phrase.split()})
