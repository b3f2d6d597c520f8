"""How fast random windows are decoded, beside decord: a command, not a test. It wants `pip install decord`.

    python tests/decode_benchmark.py

Writes two h264 videos of 10 s, 340x256, 30 fps, with a key frame every 12 and every 250 frames, and reads random
windows of 16 frames, every 2nd one. Each clip opens its file, as in a loader's worker. One process, one thread each,
turn by turn; both must give the same pixels.
"""
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import av
import decord
import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402

FRAMES, HEIGHT, WIDTH = 300, 256, 340
CLIPS = 100


def scene(rng):
    """300 frames [H, W, 3] of a camera that pans over a smooth landscape while a patch moves across; a little noise."""
    def landscape(height, width, detail):
        noise = torch.from_numpy(rng.random((1, 3, height // detail, width // detail))).float()
        return F.interpolate(noise, (height, width), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1).numpy()

    ground = 0.6 * landscape(600, 1000, 40) + 0.4 * landscape(600, 1000, 8)
    patch = landscape(80, 60, 10)
    for i in range(FRAMES):
        top, left = 150 + int(100 * np.sin(i / 40)), 300 + int(250 * np.sin(i / 70))
        image = ground[top:top + HEIGHT, left:left + WIDTH].copy()
        y, x = int(80 + 70 * np.cos(i / 15)), int(120 + 110 * np.sin(i / 23))
        image[y:y + 80, x:x + 60] = patch
        yield (255 * image + rng.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


def write(path, gop):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=30, options={"g": str(gop)})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for image in scene(np.random.default_rng(0)):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        output.mux(stream.encode(None))


def ours(path, chosen):
    return data.read_video(path, lambda count, rate: chosen).frames


def theirs(path, chosen):
    return decord.VideoReader(str(path), num_threads=1).get_batch(chosen).asnumpy()


def main():
    with tempfile.TemporaryDirectory() as folder:
        for gop, goal in ((12, 1.0), (250, 1.2)):
            path = Path(folder) / f"gop{gop}.mp4"
            write(path, gop)
            seconds = {ours: [], theirs: []}
            for i in range(CLIPS):
                chosen = data.window(FRAMES, 16, 2, torch.Generator().manual_seed(i))
                frames = {}
                for read in (ours, theirs) if i % 2 else (theirs, ours):
                    started = time.perf_counter()
                    frames[read] = read(path, chosen)
                    seconds[read].append(time.perf_counter() - started)
                assert (frames[ours] == frames[theirs]).all()
            speed = {read: 1 / median(seconds[read]) for read in seconds}
            print(f"GOP {gop:3}, {path.stat().st_size / 1e3:.0f} kB: {speed[ours]:.1f} clips/s, decord "
                  f"{speed[theirs]:.1f}; ratio of the medians {speed[ours] / speed[theirs]:.2f} (goal {goal}), of the "
                  f"means {sum(seconds[theirs]) / sum(seconds[ours]):.2f}")


if __name__ == "__main__":
    main()
