"""Motion clips with known factors, computed when asked for: nothing to download, nothing on disk.

`Shapes` is the world that the default run learns from and is probed on, `Dives` a pocket-size
Diving-48, `Blobs` the paper's own benchmark. `python data.py --write DIR` makes video files.
"""
import itertools
from dataclasses import dataclass

import numpy as np
import torch

SIDE = 32  # of a world, in its own units; a clip of any size shows all of it, larger or smaller


def rectangle(x, y, width, height):
    return torch.maximum(x.abs() - width, y.abs() - height)


# Each shape's signed distance to its outline at (x, y), or a lower bound: negative inside. The
# unit is the shape's radius.
APPEARANCES = {
    "disc": lambda x, y: (x ** 2 + y ** 2).sqrt() - 0.9,
    "ring": lambda x, y: ((x ** 2 + y ** 2).sqrt() - 0.75).abs() - 0.25,
    "square": lambda x, y: rectangle(x, y, 0.8, 0.8),
    "diamond": lambda x, y: (x.abs() + y.abs() - 1.1) / 2 ** 0.5,
    "triangle": lambda x, y: torch.maximum(y - 0.7, (2 * x.abs() - y - 0.9) / 5 ** 0.5),
    "plus": lambda x, y: rectangle(x, y, 1, 0.35).minimum(rectangle(x, y, 0.35, 1)),
    "bar": lambda x, y: rectangle(x, y, 1, 0.5),
    "pillar": lambda x, y: rectangle(x, y, 0.5, 1),
}
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")


def point(angle):
    """The point of the unit circle at an angle, as a complex number."""
    return torch.polar(torch.ones_like(angle), angle)


@dataclass
class World:
    """What worlds share: item i of a seed is always the same clip, and items never run out.

    `classes` says how many classes each factor has: those of the motion, the appearance, and last
    all of the motion together. All but the last are drawn independently and uniformly. `few` names
    the factors that are probed with few labels (the first is the label of a clip in a file),
    `linear` those of a linear head with all labels. `nuisances`: other numbers that an item draws.
    """
    frames: int
    size: int  # height and width in pixels
    seed: int
    device: str = "cpu"  # where clips are rendered

    def __len__(self):
        return 2 ** 31

    def draw(self, items):
        """Of items [B]: their factors, {name: LongTensor [B]}, and nuisances [B, n] in 0..1."""
        counts = [*self.classes.values()][:-1]
        labels, nuisances = [], []
        for item in items:
            generator = np.random.default_rng([self.seed, int(item)])
            drawn = [generator.integers(count) for count in counts]
            labels.append([*drawn, np.ravel_multi_index(drawn[:-1], counts[:-1])])
            nuisances.append(generator.random(self.nuisances).tolist())
        return dict(zip(self.classes, torch.tensor(labels).T)), torch.tensor(nuisances)

    def factors(self, items):
        """The factors of items [B]: {name: LongTensor [B]}, on the CPU."""
        return self.draw(items)[0]

    def clips(self, items):
        """Items [B] -> uint8 [B, 3, frames, size, size], grey."""
        with torch.device(self.device):
            picture = self.render(*self.draw(items))  # (B, T, size, size)
        return picture.round().to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1, -1)

    def offsets(self, centre):
        """From centres x + iy [B, T] to pixels: x of each column [B, T, size], y of each row. The
        world is a torus: an offset is from the nearest of the centre's copies."""
        pixel = (torch.arange(self.size) + 0.5) * (SIDE / self.size)
        return [(pixel - each[..., None] + SIDE / 2).remainder(SIDE) - SIDE / 2
                for each in (centre.real, centre.imag)]

    def cover(self, distance):
        """The share of a pixel inside an outline that is `distance` world units away."""
        return (0.5 - distance * (self.size / SIDE)).clamp(0, 1)

    def video(self, item):
        """uint8 [3, frames, size, size] and the label of one item."""
        return self.clips([item])[0], int(self.factors([item])[self.few[0]])


class Shapes(World):
    """One bright shape crosses a dark frame at constant velocity and comes back on the other side.
    The start is uniform, so the place in any one frame is uniform whatever the direction: a single
    frame says nothing about the motion."""
    classes = {
        "direction": 8, "speed": 4,
        "appearance": 8,
        "motion": 32,
    }
    few = ("direction", "motion", "appearance")
    linear = ("direction", "speed", "appearance")
    nuisances = 2  # the start

    RADIUS = 10.0
    SPEEDS = (4.0, 4.7, 5.3, 6.0)  # world units per frame

    def render(self, factors, start):
        speed = torch.tensor(self.SPEEDS)[factors["speed"]]
        velocity = speed * point(factors["direction"] * (2 * torch.pi / len(DIRECTIONS)))  # y down
        time = torch.arange(self.frames)
        start = SIDE * torch.complex(*start.T)
        centre = start[:, None] + velocity[:, None] * time  # (B, T)

        x, y = (offset / self.RADIUS for offset in self.offsets(centre))  # (B, T, size) each
        outlines = [*APPEARANCES.values()]
        kinds = factors["appearance"].tolist()
        distance = torch.stack([
            outlines[kind](across[:, None, :], down[:, :, None])  # (T, row, column)
            for kind, across, down in zip(kinds, x, y)
        ])
        return 255.0 * self.cover(distance * self.RADIUS)


def capsule(x, y, begin, end):
    """Distance [B, T, row, column] of pixels at x, y [B, T, size] from the line segment between
    `begin` and `end`, complex [B, T]. What lies inside a radius is a limb."""
    length = (end - begin).abs()[..., None]
    toward = (end - begin)[..., None] / length
    x, y = x - begin.real[..., None], y - begin.imag[..., None]
    along = (x * toward.real)[:, :, None] + (y * toward.imag)[..., None]
    across = (x * toward.imag)[:, :, None] - (y * toward.real)[..., None]
    beyond = along - along.clamp(min=0).minimum(length[..., None])
    return torch.hypot(beyond, across)


class Dives(World):
    """A jointed figure flies through the frame and turns: 48 dives that differ in motion alone.

    A pocket-size Diving-48 (Li et al., 2018). A dive is its sense of rotation, its half turns (1 to
    4, spread over the clip), its position (straight, pike or tuck) and whether the figure twists
    once about its long axis. Place, drift, size, orientation and side are uniform, so a single
    frame says nothing about sense, turns or twist. The textured ground drifts like a moving camera.
    """
    classes = {
        "sense": 2, "turns": 4, "position": 3, "twist": 2,
        "appearance": 8,
        "dive": 48,
    }
    few = ("dive", "appearance")
    linear = ("turns", "sense", "dive", "appearance")
    nuisances = 11

    FOLDS = (0.0, 0.0), (2.2, 0.0), (2.2, 2.3)  # straight, pike, tuck: hip and knee, radians
    # Brightness of legs, torso and ground in each appearance; the head is always the same.
    SUITS = tuple(itertools.product((150.0, 250.0), (150.0, 250.0), (20.0, 60.0)))
    WAVES = (1, 2), (3, 1), (2, 3)  # of the ground: how many across, how many down

    def render(self, factors, nuisances):
        orientation, side, size = nuisances[:, 8:].T[..., None]  # (B, 1) each
        pairs = nuisances[:, :8].reshape(-1, 4, 2) - 0.5
        place, drift, corner, camera = torch.view_as_complex(pairs).T[..., None]
        time = torch.arange(self.frames)
        flown = time / max(1, self.frames - 1)  # share of the flight (T)

        # Points of the plane are complex numbers x + iy; those of the figure start at its hip.
        half_turns = (2 * factors["sense"] - 1) * (factors["turns"] + 1)
        angle = torch.pi * (2 * orientation + half_turns[:, None] * flown)  # y points down
        scale = 1.05 + 0.15 * size
        up = scale * point(angle)  # (B, T)
        side = 2 * torch.pi * (side + factors["twist"][:, None] * flown)
        front = 1j * up * side.cos()  # shorter as the figure turns towards us or away

        # The position is entered in the first quarter of the flight and left in the last.
        folded = (2 - (4 * flown - 2).abs()).clamp(0, 1)
        folds = torch.tensor(self.FOLDS)[factors["position"]]
        thigh, bend = folds.T[..., None] * folded  # (B, T)
        shin = thigh - bend
        knee = 5 * (front * thigh.sin() - up * thigh.cos())
        foot = knee + 5 * (front * shin.sin() - up * shin.cos())
        head = 8 * up + 1.5 * front

        suits = torch.tensor(self.SUITS)[factors["appearance"]]
        legs, torso, ground = suits.T[..., None, None, None]  # (B, 1, 1, 1)
        parts = [  # from, to, radius, brightness
            (0 * up, knee, 2.0, legs),
            (knee, foot, 1.8, legs),
            (0 * up, 6 * up, 1.2 + 2 * side.sin().abs(), torso),
            (head, head + 0.1 * up, 1.8, torch.full_like(legs, 200.0)),
        ]

        # The ground: waves that meet at the edges of the world. The camera moves it by up to 1.5
        # units a frame.
        corner = SIDE * corner + 2.1 * camera * time
        x, y = (2 * torch.pi / SIDE * offset for offset in self.offsets(corner))  # (B, T, size)
        picture = ground + 4 * sum(
            (across * x).sin()[:, :, None] * (down * y).cos()[..., None]
            for across, down in self.WAVES
        )

        hip = SIDE * (0.5 + 0.5j) + 5 * place + 8 * drift * (flown - 0.5)
        x, y = self.offsets(hip)
        for begin, end, radius, brightness in parts:
            distance = capsule(x, y, begin, end) - (scale * radius)[..., None, None]
            picture = picture.lerp(brightness, self.cover(distance))
        return picture


@dataclass
class Blobs:
    """The paper's generated clips: a disc on a noisy background moves to the border and stops.

    Clip i of the benchmark has seed 42 + i and moves in direction i mod 8. The clips that the paper
    trains on have seed i and move anyhow, so training clip 42 + i has the background, noise, disc
    and start of evaluation clip i. Equal to the paper's to the bit, before they are compressed.
    """
    SIZE = 160
    FRAMES = 32
    FPS = 8
    MOVES = (  # pixels a frame, y down
        (0, -4), (3, -3), (4, 0), (3, 3),
        (0, 4), (-3, 3), (-4, 0), (-3, -3),
    )

    first: int = 42  # seed of clip 0
    directions: bool = True  # False: training clips

    def video(self, item):
        """uint8 [3, 32, 160, 160] and the label, the place of its move in MOVES, or None."""
        draw = np.random.default_rng(self.first + int(item))
        background = draw.integers(0, 80, 3, dtype=np.uint8)
        noise = draw.integers(0, 30, (self.FRAMES, self.SIZE, self.SIZE, 1))
        colour = draw.integers(120, 256, 3, dtype=np.uint8)
        radius = draw.integers(10, 40)
        start = draw.integers(radius, self.SIZE - radius, 2)
        if self.directions:
            label = int(item) % len(self.MOVES)
            move = self.MOVES[label]
        else:
            label = None
            move = draw.integers(-4, 5, 2)

        time = np.arange(self.FRAMES)[:, None]
        centre = (start + time * move).clip(radius, self.SIZE - 1 - radius)  # (T, 2)
        across, down = (np.arange(self.SIZE) - centre.T[..., None]) ** 2  # (T, 160) each
        disc = across[:, None, :] + down[:, :, None] <= radius ** 2  # (T, row, column)
        frames = np.where(disc[..., None], colour, (background + noise).astype(np.uint8))
        return torch.from_numpy(frames).permute(3, 0, 1, 2), label


WORLDS = {"default": Shapes, "dives": Dives}
