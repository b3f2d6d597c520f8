"""Motion clips with known factors, computed when asked for: nothing to download, nothing on disk.

`Shapes` is what the default run learns from and is probed on; `Blobs` is the study's own synthetic benchmark.
`python synthetic.py --write DIR` writes either of them as video files with a list, `videos.csv`.
"""
import argparse
import contextlib
import fcntl
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

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


def write_video(path, clip, fps, codec="libx264"):
    """Write uint8 [3, T, H, W] as a video file; the ending of `path` names the container."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, pix_fmt="yuv420p")
        stream.height, stream.width = clip.shape[2:]
        for frame in clip.permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_dataset(folder, source, count, fps):
    """Write items 0 to count-1 of a source as mp4 files, and `videos.csv` with a line "path label" for each."""
    folder, lines = Path(folder), []
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken or folder.is_symlink() or os.path.ismount(folder):
        raise ValueError(f"{folder} is not a new or empty folder; choose another")
    place = folder.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    # Renamed when whole, removed when not.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=place, ignore_cleanup_errors=True) as unfinished:
        for item in tqdm(range(count), desc=f"writing to {folder}", unit="clip", disable=None):
            clip, label = source.video(item)
            write_video(Path(unfinished, f"{item:06d}.mp4"), clip, fps)
            lines.append(f"{item:06d}.mp4 {label}\n")
        Path(unfinished, "videos.csv").write_text("".join(lines))
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, folder)


# ------------------------------------------------------------------------------------- files, and what commands share

HELD = []  # locks, which a loader's worker must not inherit


def write_file(path, content):
    """Write bytes under a temporary name, then rename: a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name that a user knows
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1).encode())


def read_json(path):
    """The dict that a JSON file holds, an empty one where there is no file. Raises ValueError for a damaged file."""
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path} is damaged; put the whole file back, or delete it")


@contextlib.contextmanager
def locked(path):
    """Hold a folder or file for this process alone; the kernel lets go when the process ends, however that is."""
    handle = os.open(path, os.O_RDONLY)
    HELD.append(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work on {path}; wait until it ends, or stop it") from None
        yield
    finally:
        HELD.remove(handle)
        os.close(handle)


def command(program, smaller, stopped="stopped"):
    """Decorator of a command's main function: what its user can put right is said in one sentence, no traceback.

    Exit status: what the function returns, else 0; 1 after such a sentence, 130 after Ctrl-C, 2 from argparse.
    smaller: the flags that decide how much memory it takes.
    """
    def decorate(main):
        def run(arguments=None):
            try:
                return main(arguments) or 0
            except KeyboardInterrupt:
                status, sentence = 130, stopped
            except (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError) as error:
                status, message = 1, str(error).strip() or type(error).__name__
                # An error in a loader's worker comes with the worker's traceback; its last line is what happened.
                sentence = message.splitlines()[-1].removeprefix("ValueError: ")
                if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in message:
                    sentence = f"there is too little memory; give a smaller {smaller}"
                elif message.startswith("DataLoader worker (pid"):
                    sentence = ("a loader process was killed, most likely for lack of memory; give fewer --workers, or "
                                "more shared memory (in Docker: --shm-size)")
                elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    sentence = f"torch cannot compile here ({message.splitlines()[0]}); --no-compile does without"
                elif isinstance(error, RuntimeError):
                    raise
                elif isinstance(error, OSError) and error.filename:
                    sentence = f"{error.filename}: {error.strerror}"
            print(f"{program}: {sentence}", file=sys.stderr)
            return status
        return run
    return decorate


def number(least, most=10 ** 9, kind=int):
    """The type of a flag: a number from least to most."""
    def convert(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return kind(text)
    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


@command("synthetic.py", smaller="--size or --frames")
def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write synthetic clips as video files.", allow_abbrev=False)
    parser.add_argument("--write", metavar="DIR", required=True, help="a new or empty folder")
    parser.add_argument("--kind", choices=("shapes", "blobs"), default="shapes")
    parser.add_argument("--count", type=number(1), default=64, help="number of clips")
    parser.add_argument("--seed", type=number(0), default=0)
    parser.add_argument("--frames", type=number(1), default=16, help="frames of a shape clip")
    parser.add_argument("--size", type=number(1), default=64, help="side of a shape clip in pixels, even")
    flags = parser.parse_args(arguments)
    if flags.kind == "shapes" and flags.size % 2:
        parser.error(f"--size is {flags.size}, but the video format needs an even number of pixels")
    source = Shapes(flags.frames, flags.size, flags.seed) if flags.kind == "shapes" else Blobs(42 + flags.seed)
    write_dataset(flags.write, source, flags.count, 8)


if __name__ == "__main__":
    sys.exit(main())
