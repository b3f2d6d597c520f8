"""Motion clips with known factors, computed when asked for: nothing to download, nothing on disk.

`Shapes` is what the default run learns from and is probed on; `Blobs` is the study's own synthetic benchmark.
`python data.py --write DIR` writes either of them as video files.
"""
from typing import NamedTuple

import numpy as np
import torch

DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
SIDE = 32  # of a world; a clip of any size shows all of it, larger or smaller


class World(NamedTuple):
    """What moves, and before what: units are world units, brightness is 0 to 255."""
    radius: float = 10.0
    speeds: tuple = (4.0, 4.7, 5.3, 6.0)  # per frame
    shape: float = 255.0
    ground: float = 0.0


WORLDS = {"default": World(), "slow": World(6.0, (2.0, 2.7, 3.3, 4.0)),
          "faint": World(13.0, (5.0, 6.0, 7.0, 8.0), 150.0, 100.0)}

# Each appearance: the distance to the outline at (x, y) or a lower bound, negative inside; the unit is the radius.
APPEARANCES = {
    "disc": lambda x, y: (x ** 2 + y ** 2).sqrt() - 0.9,
    "ring": lambda x, y: ((x ** 2 + y ** 2).sqrt() - 0.75).abs() - 0.25,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.8,
    "diamond": lambda x, y: (x.abs() + y.abs() - 1.1) / 2 ** 0.5,
    "triangle": lambda x, y: torch.maximum(y - 0.7, (2 * x.abs() - y - 0.9) / 5 ** 0.5),
    "plus": lambda x, y: torch.minimum(torch.maximum(x.abs() - 1, y.abs() - 0.35),
                                       torch.maximum(x.abs() - 0.35, y.abs() - 1)),
    "bar": lambda x, y: torch.maximum(x.abs() - 1, y.abs() - 0.5),
    "pillar": lambda x, y: torch.maximum(x.abs() - 0.5, y.abs() - 1),
}

# What a probe may be asked for, and how many classes that has. Motion is direction and speed together: the fine-grained
# task, since its classes differ in nothing else.
FACTORS = {"direction": 8, "speed": 4, "appearance": 8, "motion": 32}


class Shapes:
    """Clips of one bright shape that crosses a dark frame at constant velocity and comes back on the other side.

    Direction (8), speed (4), appearance (8) and start are drawn independently. The start is uniform and the motion
    wraps around, so the position in any one frame is uniform whatever the direction: a single frame says nothing
    about the motion. Item i of a seed is always the same clip, and there are as many items as anyone will ask for.
    """

    def __init__(self, frames, size, seed, device="cpu", world="default"):
        self.frames, self.size, self.seed, self.device, self.world = frames, size, seed, device, WORLDS[world]

    def __len__(self):
        return 2 ** 31

    def draw(self, items):
        """Factors of items [B] as LongTensors [B] by name, and the starting points [B, 2] in world units."""
        generators = [np.random.default_rng([self.seed, int(item)]) for item in items]
        counts = len(DIRECTIONS), len(self.world.speeds), len(APPEARANCES)
        rows = [(*(g.integers(count) for count in counts), *g.uniform(0, SIDE, 2)) for g in generators]
        rows = torch.tensor(rows, dtype=torch.float32, device=self.device)  # (B, 5)
        direction, speed, appearance = rows[:, :3].long().unbind(1)
        return {"direction": direction, "speed": speed, "appearance": appearance,
                "motion": direction * len(self.world.speeds) + speed}, rows[:, 3:]

    def factors(self, items):
        """The `FACTORS` of items: LongTensors [B] by name, on the CPU."""
        return {name: labels.cpu() for name, labels in self.draw(items)[0].items()}

    def clips(self, items):
        """Items [B] -> uint8 [B, 3, frames, size, size]."""
        factors, start = self.draw(items)
        angle = factors["direction"] * (2 * torch.pi / len(DIRECTIONS))
        velocity = torch.stack((angle.cos(), angle.sin()), dim=-1)  # (B, 2), y points down, as in an image
        velocity = velocity * torch.tensor(self.world.speeds, device=self.device)[factors["speed"], None]
        time = torch.arange(self.frames, device=self.device)
        centre = start[:, None] + velocity[:, None] * time[:, None]  # (B, T, 2)
        pixel = (torch.arange(self.size, device=self.device) + 0.5) * (SIDE / self.size)
        # Offset from the nearest of the centre's copies, since the world is a torus.
        offset = (pixel - centre[..., None] + SIDE / 2).remainder(SIDE) - SIDE / 2  # (B, T, 2, size)
        x, y = (offset / self.world.radius).unbind(2)  # (B, T, size) each
        distance = torch.empty(*x.shape, self.size, device=self.device)  # (B, T, size, size): row, column
        for kind, outline in enumerate(APPEARANCES.values()):
            clips = factors["appearance"] == kind
            distance[clips] = outline(*torch.broadcast_tensors(x[clips, :, None, :], y[clips, :, :, None]))
        # A pixel that the outline crosses is grey by the share that lies inside.
        cover = (0.5 - distance * self.world.radius * self.size / SIDE).clamp(0, 1)
        picture = self.world.ground + (self.world.shape - self.world.ground) * cover
        return picture.round().to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1, -1)

    def video(self, item):
        """uint8 [3, frames, size, size] and the label (direction) of one item."""
        return self.clips([item])[0], int(self.factors([item])["direction"])


class Blobs:
    """The study's generated clips: a disc on a noisy background that moves to the border and stops there.

    160x160 pixels, 32 frames at 8 per second. Clip i of the benchmark has seed 42 + i and moves in direction i mod 8.
    The clips that the study trains on have seed i and move anyhow, so training clip 42 + i has the background, noise,
    disc and start of evaluation clip i. Equal to the study's to the bit, before they are compressed.
    """
    SIZE, FRAMES, FPS = 160, 32, 8
    MOVES = ((0, -4), (3, -3), (4, 0), (3, 3), (0, 4), (-3, 3), (-4, 0), (-3, -3))  # pixels a frame, y down

    def __init__(self, first=42, directions=True):
        self.first, self.directions = first, directions  # seed of clip 0; False: training clips

    def video(self, item):
        """uint8 [3, 32, 160, 160] and the label, the place of its move in MOVES, or None."""
        draw = np.random.default_rng(self.first + int(item))
        background = draw.integers(0, 80, 3, dtype=np.uint8)
        noise = draw.integers(0, 30, (self.FRAMES, self.SIZE, self.SIZE, 1))
        colour = draw.integers(120, 256, 3, dtype=np.uint8)
        radius = draw.integers(10, 40)
        start = draw.integers(radius, self.SIZE - radius), draw.integers(radius, self.SIZE - radius)  # x, y
        label = int(item) % len(self.MOVES) if self.directions else None
        move = self.MOVES[label] if self.directions else (draw.integers(-4, 5), draw.integers(-4, 5))
        x, y = ((begin + step * np.arange(self.FRAMES)).clip(radius, self.SIZE - 1 - radius)[:, None]
                for begin, step in zip(start, move))  # (T, 1) each
        pixel = np.arange(self.SIZE)
        disc = ((pixel - x) ** 2)[:, None, :] + ((pixel - y) ** 2)[:, :, None] <= radius ** 2  # (T, row, column)
        frames = np.where(disc[..., None], colour, (background + noise).astype(np.uint8))  # (T, 160, 160, 3)
        return torch.from_numpy(frames).permute(3, 0, 1, 2), label
