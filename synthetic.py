"""Motion clips with known factors, computed when asked for: nothing to download, nothing on disk.

`Shapes` is what the default run learns from and is probed on; `Blobs` is the study's own synthetic benchmark.
`python synthetic.py --write DIR` writes either of them as video files with a list, `videos.csv`.
"""
import argparse
import functools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

DIRECTIONS = 8  # compass directions, counted from right (0) by way of down (2)
WORLD = 32  # the side of a shape clip's world; a clip of any size shows this world larger or smaller
SPEEDS = (4.0, 4.7, 5.3, 6.0)  # world units per frame
RADIUS = 10.0  # world units

# Each appearance: the distance to the outline at (x, y), or a lower bound of it, negative inside; the unit is RADIUS.
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


def compass(direction):
    """Unit vectors (x, y) of directions, [n] -> [n, 2]; y points down, as in an image."""
    angle = direction * (2 * torch.pi / DIRECTIONS)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


class Shapes:
    """Clips of one white shape that crosses a black frame at constant velocity and comes back on the other side.

    Direction (8), speed (4), appearance (8) and start are drawn independently. The start is uniform and the motion
    wraps around, so the position in any one frame is uniform whatever the direction: a single frame says nothing
    about the motion. Item i of a seed is always the same clip, and there are as many items as anyone will ask for.
    """

    def __init__(self, frames, size, seed, device="cpu"):
        self.frames, self.size, self.seed, self.device = frames, size, seed, device

    def __len__(self):
        return 2 ** 31

    def draw(self, items):
        """Factors of items [B] as LongTensors [B] by name, and the starting points [B, 2] in world units."""
        generators = [np.random.default_rng([self.seed, int(item)]) for item in items]
        rows = [(g.integers(DIRECTIONS), g.integers(len(SPEEDS)), g.integers(len(APPEARANCES)), *g.uniform(0, WORLD, 2))
                for g in generators]
        rows = torch.tensor(rows, dtype=torch.float32, device=self.device)  # (B, 5)
        names = ("direction", "speed", "appearance")
        return {name: rows[:, i].long() for i, name in enumerate(names)}, rows[:, 3:]

    def factors(self, items):
        """{"direction", "speed", "appearance"}: LongTensors [B]."""
        return self.draw(items)[0]

    def clips(self, items):
        """Items [B] -> uint8 [B, 3, frames, size, size]."""
        factors, start = self.draw(items)
        velocity = compass(factors["direction"]) * torch.tensor(SPEEDS, device=self.device)[factors["speed"], None]
        time = torch.arange(self.frames, device=self.device)
        centre = start[:, None] + velocity[:, None] * time[:, None]  # (B, T, 2)
        pixel = (torch.arange(self.size, device=self.device) + 0.5) * (WORLD / self.size)
        # Offset from the nearest of the centre's copies, since the world is a torus.
        offset = (pixel - centre[..., None] + WORLD / 2).remainder(WORLD) - WORLD / 2  # (B, T, 2, size)
        x, y = (offset / RADIUS).unbind(2)  # (B, T, size) each
        distance = torch.empty(*x.shape, self.size, device=self.device)  # (B, T, size, size): row, column
        for kind, outline in enumerate(APPEARANCES.values()):
            clips = factors["appearance"] == kind
            distance[clips] = outline(*torch.broadcast_tensors(x[clips, :, None, :], y[clips, :, :, None]))
        # A pixel that the outline crosses is grey by the share that lies inside.
        cover = (0.5 - distance * RADIUS * self.size / WORLD).clamp(0, 1)
        return (255 * cover).round().to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1, -1)

    def order(self, count, generator):
        """The items of a run of `count` clips: every clip is new."""
        return torch.arange(count)

    def video(self, item):
        """uint8 [3, frames, size, size] and the label (direction) of one item."""
        return self.clips([item])[0], int(self.factors([item])["direction"])


class Blobs:
    """The study's synthetic benchmark: a bright disc on noise that runs to the border and stays there.

    160x160 pixels, 32 frames at 8 per second, about 4 pixels a frame, 8 directions in turn.
    Disc size, brightness and noise are not on record; here: radius 12, value 230, uniform noise below 64 that is
    fresh in every frame.
    """
    SIZE, FRAMES, FPS, RADIUS = 160, 32, 8, 12

    def __init__(self, seed):
        self.seed = seed

    def label(self, item):
        return item % DIRECTIONS

    def video(self, item):
        """uint8 [3, 32, 160, 160] and the label (direction) of one item."""
        generator = np.random.default_rng([self.seed, int(item)])
        shape = (3, self.FRAMES, self.SIZE, self.SIZE)
        # Bytes without their lowest two bits: an eighth of the time that drawing numbers below 64 would take.
        noise = torch.from_numpy(np.frombuffer(generator.bytes(math.prod(shape)), np.uint8) >> 2).view(shape)
        speed = generator.uniform(3.5, 4.5)
        start = torch.from_numpy(generator.uniform(self.RADIUS, self.SIZE - self.RADIUS, 2))
        time = torch.arange(self.FRAMES)
        centre = start + speed * compass(torch.tensor(self.label(item))) * time[:, None]  # (T, 2)
        centre = centre.clamp(self.RADIUS, self.SIZE - self.RADIUS)
        pixel = torch.arange(self.SIZE) + 0.5
        x, y = pixel - centre[:, :1], pixel - centre[:, 1:]  # (T, size) each
        disc = x[:, None, :] ** 2 + y[:, :, None] ** 2 < self.RADIUS ** 2  # (T, size, size)
        return noise.masked_fill(disc, 230), self.label(item)


def write_video(path, clip, fps, codec="libx264"):
    """Write uint8 [3, T, H, W] as a video file; the ending of `path` names the container."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = clip.shape[2:]
        stream.pix_fmt = "yuv420p"
        for frame in clip.permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_dataset(folder, source, count, fps):
    """Write items 0 to count-1 of a source as mp4 files, and `videos.csv` with a line "path label" for each."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder")
    unfinished, lines = folder.with_name(f"{folder.name}.unfinished"), []
    shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was stopped
    unfinished.mkdir(parents=True)
    for item in tqdm(range(count), desc=f"writing to {folder}", unit="clip"):
        clip, label = source.video(item)
        write_video(unfinished / f"{item:06d}.mp4", clip, fps)
        lines.append(f"{item:06d}.mp4 {label}\n")
    (unfinished / "videos.csv").write_text("".join(lines))
    unfinished.replace(folder)


# ------------------------------------------------------------------------------------- files, and what commands share


def write_file(path, content):
    """Write bytes under a temporary name, then rename: a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1).encode())


def read_json(path):
    """What a JSON file of `write_json` holds; an empty dict where there is none, or it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return {}


def command(program, smaller, stopped="stopped"):
    """Decorator of a command's main function: what its user can put right is said in one sentence, no traceback.

    Exit status: what the function returns, else 0; 1 after such a sentence, 130 after Ctrl-C, 2 from argparse.
    smaller: the flags that decide how much memory it takes.
    """
    def decorate(main):
        @functools.wraps(main)
        def run(arguments=None):
            status = 1
            try:
                return main(arguments) or 0
            except KeyboardInterrupt:
                status, sentence = 130, stopped
            except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
                # An error in a loader's worker comes with the worker's traceback; its last line is what happened.
                message = str(error).strip()
                sentence = message.splitlines()[-1].removeprefix("ValueError: ")
                if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
                    sentence = f"there is too little memory; give a smaller {smaller}"
                elif "DataLoader worker" in message:
                    sentence = ("a loader process was killed, most likely for lack of memory; give fewer --workers, or "
                                "more shared memory (in Docker: --shm-size)")
                elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    sentence = f"torch cannot compile here ({message.splitlines()[0]}); --no-compile does without"
                elif isinstance(error, RuntimeError):
                    raise
            print(f"{program}: {sentence}", file=sys.stderr)
            return status
        return run
    return decorate


def number(least, most=math.inf, kind=int):
    """The type of a flag: a number from least to most."""
    def convert(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return kind(text)
    return convert


@command("synthetic.py", smaller="--size or --frames")
def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write synthetic clips as video files, with a list of them, videos.csv.",
                                     allow_abbrev=False)
    parser.add_argument("--write", metavar="DIR", required=True, help="a new or empty folder")
    parser.add_argument("--kind", choices=("shapes", "blobs"), default="shapes")
    parser.add_argument("--count", type=number(1), default=64, help="number of clips")
    parser.add_argument("--seed", type=number(0), default=0)
    parser.add_argument("--frames", type=number(1), default=16, help="frames of a shape clip")
    parser.add_argument("--size", type=number(1), default=64, help="side of a shape clip in pixels, even")
    flags = parser.parse_args(arguments)
    if flags.kind == "shapes" and flags.size % 2:
        parser.error(f"--size is {flags.size}, but the video format needs an even number of pixels")
    source = Shapes(flags.frames, flags.size, flags.seed) if flags.kind == "shapes" else Blobs(flags.seed)
    write_dataset(flags.write, source, flags.count, 8)


if __name__ == "__main__":
    sys.exit(main())
