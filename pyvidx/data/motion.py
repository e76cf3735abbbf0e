"""A small world that needs time to be understood: clips of shapes, with captions whose pairs differ only in time.

A scene is a kind of event, one or two objects, a ground and a direction of time. Played backwards it is its opposite:
"moves right" and "moves left" are the same frames in the other order, "red before blue" and "blue before red" too. An
encoder that averages its frames therefore gives both the same vector and can only guess between their captions.

    scene = random_scenes(1, seed=3)[0]
    frames = render(scene, 8, 32)                     # uint8 [8, 32, 32, 3]
    caption(scene), caption(opposite(scene))          # "the red circle moves left", "the red circle moves right"
"""

import dataclasses
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 245),
    "yellow": (245, 225, 50),
    "purple": (160, 60, 200),
    "orange": (250, 140, 20),
    "white": (245, 245, 245),
    "cyan": (50, 215, 225),
}
GROUNDS = {"black": (16, 16, 20), "gray": (112, 112, 112), "brown": (92, 62, 38), "navy": (16, 24, 84)}
SHAPES = ("circle", "square", "ring", "cross", "triangle", "arrow")
POINTED = ("triangle", "arrow")  # those whose turning shows

# kind -> caption forward in time and backward; {a} and {b} are objects.
EVENTS = {
    "horizontal": ("the {a} moves right", "the {a} moves left"),
    "vertical": ("the {a} moves down", "the {a} moves up"),
    "turn": ("the {a} turns clockwise", "the {a} turns counterclockwise"),
    "size": ("the {a} grows", "the {a} shrinks"),
    "presence": ("the {a} appears", "the {a} disappears"),
    "order": ("the {a} comes before the {b}", "the {b} comes before the {a}"),
    "swap": ("the {a} swaps to the right of the {b}", "the {a} swaps to the left of the {b}"),
    "follow": ("the {a} follows the {b}", "the {b} follows the {a}"),
}
KINDS = tuple(EVENTS)
PAIRED = ("order", "swap", "follow")  # kinds with two objects

Object = tuple[str, str]  # color, shape
OBJECTS: tuple[Object, ...] = tuple((c, s) for c in COLORS for s in SHAPES)


# Every color and every shape occurs in both parts; no color with the same shape does.
HELD_OUT = tuple(o for i, o in enumerate(OBJECTS) if (i // len(SHAPES) + i % len(SHAPES)) % 4 == 0)
SEEN = tuple(o for o in OBJECTS if o not in HELD_OUT)


@dataclass(frozen=True)
class Scene:
    """What happens in a clip.

    Attributes:
        kind: of KINDS.
        objects: (color, shape) of one object, or of two for the kinds in PAIRED.
        ground: of GROUNDS.
        forward: the direction of time.
        seed: of places, sizes and speeds.
    """

    kind: str
    objects: tuple[Object, ...]
    ground: str
    forward: bool
    seed: int

    def __post_init__(self):
        known = self.kind in EVENTS and self.ground in GROUNDS and all(o in OBJECTS for o in self.objects)
        if not known or len(self.objects) != (2 if self.kind in PAIRED else 1):
            raise ValueError(
                f"Scene: kind must be one of {KINDS} with objects (color, shape), two for {PAIRED}, and a ground of "
                f"{tuple(GROUNDS)}, got {self.kind!r}, {self.objects}, {self.ground!r}"
            )
        if self.kind == "turn" and self.objects[0][1] not in POINTED:
            raise ValueError(f"Scene: turning shows with {' and '.join(POINTED)} only, got {self.objects[0][1]}")


def random_scenes(n: int, seed: int, objects: Sequence[Object] = SEEN, kinds: Sequence[str] = KINDS) -> list[Scene]:
    """n scenes of these objects, the same for the same arguments."""
    rng = random.Random(seed)
    return [_random_scene(rng, objects, kinds) for _ in range(n)]


def _random_scene(rng: random.Random, objects: Sequence[Object], kinds: Sequence[str]) -> Scene:
    kind = rng.choice(kinds)
    pool = [o for o in objects if o[1] in POINTED] if kind == "turn" else objects
    chosen = tuple(rng.sample(pool, 2 if kind in PAIRED else 1))
    return Scene(kind, chosen, rng.choice(tuple(GROUNDS)), rng.random() < 0.5, rng.randrange(1 << 31))


def opposite(scene: Scene) -> Scene:
    """The same clip played backwards."""
    return dataclasses.replace(scene, forward=not scene.forward)


def caption(scene: Scene) -> str:
    """What happens, which only the order of the frames tells from the opposite."""
    names = {name: " ".join(o) for name, o in zip("ab", scene.objects)}
    return EVENTS[scene.kind][not scene.forward].format(**names)


def appearance(scene: Scene) -> str:
    """What is to be seen, in whatever order; the same for the opposite."""
    names = [f"{'an' if color == 'orange' else 'a'} {color} {shape}" for color, shape in scene.objects]
    return " and ".join(names) + f" on a {scene.ground} ground"


def vocabulary() -> list[str]:
    """All words of all captions."""
    events = " ".join(forward + " " + backward for forward, backward in EVENTS.values())
    words = [*events.replace("{a}", "").replace("{b}", "").split(), "a", "an", "and", "on", "ground"]
    return sorted({*words, *COLORS, *SHAPES, *GROUNDS})


def render(scene: Scene, frames: int, size: int | tuple[int, int]) -> Tensor:
    """The clip at `frames` equally spaced moments.

    Args:
        scene: what happens.
        frames: T, at least 1.
        size: H = W, or (H, W), in pixels; the scene lies in the square in the middle.

    Returns:
        uint8 [T, H, W, 3]; opposite(scene) gives the same frames in the other order, bit for bit.

    Raises:
        ValueError: frames or size is below 1.
    """
    if frames < 1:
        raise ValueError(f"render: frames must be at least 1, got {frames}")
    return render_at(scene, (torch.arange(frames) + 0.5) / frames, size)


def render_at(scene: Scene, moments: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The clip at chosen moments [T] in [0, 1], 0 = its start -> uint8 [T, H, W, 3]."""
    H, W = (size, size) if isinstance(size, int) else size
    if min(H, W) < 1:
        raise ValueError(f"render: size must be at least 1, got {size}")
    # A clip played backwards is rendered forward and turned around: equal to the bit, not only in exact arithmetic.
    u = moments.double() if scene.forward else (1 - moments.double()).flip(0)
    unit = 1 / min(H, W)
    y = ((torch.arange(H) + 0.5 - H / 2) * unit + 0.5).view(1, H, 1)
    x = ((torch.arange(W) + 0.5 - W / 2) * unit + 0.5).view(1, 1, W)
    picture = torch.tensor(GROUNDS[scene.ground], dtype=torch.float32).expand(len(u), H, W, 3)
    for (color, shape), pose in zip(scene.objects, _poses(scene, u)):
        cx, cy, radius, angle, alpha = (v.float().view(-1, 1, 1) for v in pose)
        dx, dy = (x - cx) / radius, (y - cy) / radius
        s, c = angle.sin(), angle.cos()
        distance = _distance(shape, c * dx + s * dy, c * dy - s * dx) * radius
        cover = (0.5 - distance / unit).clamp(0, 1) * alpha  # a soft edge one pixel wide
        picture = picture + cover[..., None] * (torch.tensor(COLORS[color], dtype=torch.float32) - picture)
    picture = picture.round().to(torch.uint8)
    return picture if scene.forward else picture.flip(0)


def write_clip(
    path: str | os.PathLike[str], scene: Scene, *, frames: int = 33, size: int = 128, fps: float = 16.0
) -> None:
    """The clip as a file, H.264 for .mp4."""
    from pyvidx.video import write

    write(path, render(scene, frames, size), fps, options={"crf": "12"})


def _poses(scene: Scene, u: Tensor) -> list[tuple[Tensor, ...]]:
    """Per object its center x and y, radius, angle (clockwise) and opacity at the moments u [T] of the forward clip."""
    rng = random.Random(scene.seed)

    def between(low: float, high: float) -> Tensor:
        return torch.full_like(u, low + (high - low) * rng.random())

    def along(start: float, end: float) -> Tensor:
        """From one place to another, both a little off, at an even speed."""
        a, b = between(start - 0.05, start + 0.05), between(end - 0.05, end + 0.05)
        return a + (b - a) * u

    zero, one = torch.zeros_like(u), torch.ones_like(u)
    if scene.kind == "horizontal":
        return [(along(0.25, 0.75), between(0.3, 0.7), between(0.15, 0.21), zero, one)]
    if scene.kind == "vertical":
        return [(between(0.3, 0.7), along(0.25, 0.75), between(0.15, 0.21), zero, one)]
    if scene.kind == "turn":
        angle = along(-1.0, 1.0) * math.pi / 2.6
        return [(between(0.4, 0.6), between(0.4, 0.6), between(0.24, 0.32), angle, one)]
    if scene.kind == "size":
        return [(between(0.4, 0.6), between(0.4, 0.6), along(0.11, 0.32), zero, one)]
    if scene.kind == "presence":
        return [(between(0.35, 0.65), between(0.35, 0.65), between(0.17, 0.25), zero, u)]
    if scene.kind == "order":
        first = (u < 0.5).to(u.dtype)
        place = [(between(0.35, 0.65), between(0.35, 0.65), between(0.17, 0.25), zero) for _ in range(2)]
        return [(*place[0], first), (*place[1], 1 - first)]
    if scene.kind == "swap":
        above = 1 if rng.random() < 0.5 else -1
        heights = between(0.28, 0.34), between(0.66, 0.72)
        return [
            (along(0.25, 0.75), heights[above == -1], between(0.14, 0.18), zero, one),
            (along(0.75, 0.25), heights[above == 1], between(0.14, 0.18), zero, one),
        ]
    # follow: both on one line, the second ahead
    across, sideways, sign = between(0.35, 0.65), rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
    middle, gap = (along(0.36, 0.64) - 0.5) * sign + 0.5, between(0.17, 0.2) * sign
    poses = []
    for at in (middle - gap, middle + gap):
        x, y = (at, across) if sideways else (across, at)
        poses.append((x, y, between(0.13, 0.15), zero, one))
    return poses


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the edge of a shape of radius 1, negative inside; y points down, tips are at -1."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - 0.95
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75).abs() - 0.25
    if shape == "square":
        return torch.maximum(ax, ay) - 0.8
    if shape == "cross":
        return torch.minimum(torch.maximum(ax - 0.32, ay - 1), torch.maximum(ay - 0.32, ax - 1))
    if shape == "triangle":
        return torch.maximum(y - 0.75, (1.75 * ax - 0.8 * (y + 1)) / math.hypot(1.75, 0.8))
    head = torch.maximum(y, (ax - 0.85 * (y + 1)) / math.hypot(1, 0.85))
    return torch.minimum(head, torch.maximum(ax - 0.25, (y - 0.45).abs() - 0.55))
