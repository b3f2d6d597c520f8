"""Clips for training and evaluation: decoding, windows and crops, batches, your own lists, four
public datasets; at the end what all commands share.

    python data.py --check DIR    what is in DIR, what of it is broken, how to train on it
    python data.py --write DIR    generated clips as videos, with a list `videos.csv`

Nothing here knows the method. Clips for training stay uint8 until `model.normalise`: workers hand
over a quarter of the bytes.
"""
import argparse
import atexit
import contextlib
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import zlib
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from tqdm import tqdm

from synthetic import Blobs, Shapes

# ---------------------------------------------------------------------------------------- decoding

# What is opened: demuxers, none of which follows other files, with the suffixes of their files.
VIDEO_FORMATS = {
    "mov": ".mp4 .m4v .mov .3gp .3g2", "matroska": ".mkv .webm", "avi": ".avi",
    "mpeg": ".mpg .mpeg .vob", "mpegts": ".ts .mts .m2ts", "ogg": ".ogv", "flv": ".flv .f4v",
    "asf": ".wmv .asf", "gif": ".gif", "h264": ".h264"}
VIDEOS = " ".join(VIDEO_FORMATS.values()).split()
IMAGE_FORMATS = "JPEG PNG BMP PPM TIFF WEBP".split()  # for others Pillow starts Ghostscript
IMAGES = ".jpg .jpeg .png .bmp .ppm .pgm .tif .tiff .webp".split()
MOST_PIXELS = 7680 * 4320  # of a frame: a small file can hold huge ones (images: Pillow's limit)

# Frames that were chosen, uint8 [T, H, W, 3], RGB; and of the whole file the number of its frames,
# and rate(), how many it shows a second.
Video = namedtuple("Video", "frames count rate")


class Unreadable(Exception):
    """A file that gives no clip, and the reason: a sentence, or the error that tells it."""

    def __init__(self, path, reason):
        self.path, self.reason = str(path), str(getattr(reason, "strerror", None) or reason)
        super().__init__(f"{self.path}: {self.reason}")


def read_video(path, choose):
    """Read frames of a video by number: `choose(count, rate)` is told its size and returns the
    numbers, ascending.

    Frame i is the i-th that decoding from the start shows, however long each lasts. Frames are
    turned and mirrored as players do it; pixels that are not square are not stretched. One pass
    without decoding lists the packets. Where their times can be believed, frames are found by
    time, after one seek to the last key frame before them; else by number.
    Raises Unreadable for a file that is missing, broken, or without the frames chosen.
    """
    import av  # only where a video is opened: all else runs without it
    found = {}
    try:
        with open_video(path) as (container, stream):
            packets = [(each.pts, each.dts, each.is_keyframe, each.is_discard, each.size)
                       for each in container.demux(stream) if each.size and not each.is_corrupt]
            if container.format.name == "gif" and stream.frames > len(packets):
                raise Unreadable(path, f"of its {stream.frames} frames only {len(packets)} can be "
                                       "told apart; save it again, as .mp4 for instance")
            times = shown_times(packets, stream)
            count = len(times)
            rate = functools.partial(frame_rate, packets, stream.time_base, stream.average_rate)
            if times:
                chosen = choose(count, rate)
                found = find_by_time(container, stream, packets, {times[i]: i for i in chosen})
        if not found or set(chosen) - set(found):
            status = os.stat(path)
            sums, keys = decode_all(path, status.st_size, status.st_mtime_ns)
            count = len(sums)
            if not count:
                raise Unreadable(path, "no frame of it can be decoded")
            chosen = choose(count, rate)
            found = find_by_number(path, sums, keys, chosen)
        missing = set(chosen) - set(found)
        if missing:
            raise Unreadable(path, f"frame {min(missing)} of {count} cannot be decoded")
        return Video(np.stack([found[i] for i in chosen]), count, rate)
    except (av.FFmpegError, ValueError) as error:
        raise Unreadable(path, error) from None


@contextlib.contextmanager
def open_video(path):
    """The file as a PyAV container and its video stream. Raises Unreadable where it has none."""
    import av
    if not Path(path).is_file():  # a pipe would be waited for
        raise Unreadable(path, "No such file")
    limit = {"max_pixels": str(MOST_PIXELS)}
    options = {"format_whitelist": ",".join(VIDEO_FORMATS), **limit}
    try:
        # The prefix keeps it from taking a colon in a name for a protocol.
        container = av.open(f"file:{path}", metadata_errors="replace", options=options)
    except av.ArgumentError:
        raise Unreadable(path, "its format is none of those that are opened: "
                               f"{', '.join(VIDEO_FORMATS)}") from None
    with container:
        stream = container.streams.best("video")
        # A song's cover is a picture, and some video no decoder knows.
        if (stream is None or stream.disposition & av.stream.Disposition.attached_pic
                or stream.codec_context is None):
            raise Unreadable(path, "it holds no video")
        context = stream.codec_context
        if context.width * context.height > MOST_PIXELS:
            raise Unreadable(path, f"a frame has more than {MOST_PIXELS:,} pixels")
        context.options = limit  # where the size changes later
        context.thread_count = 1  # the loader's workers are what runs in parallel
        yield container, stream


def shown_times(packets, stream):
    """When each frame is shown, ascending; nothing where the container cannot be believed."""
    if not packets:
        return []
    times, decoded, is_key, is_cut, sizes = zip(*packets)
    decoded = [time for time in decoded if time is not None]
    if None in times or len(set(times)) < len(times) or decoded != sorted(decoded):
        return []  # missing, equal, or the clock starts again
    shown = sorted(time for time, cut in zip(times, is_cut) if not cut)
    if not is_key[0] or shown[:1] < [times[0]]:
        return []  # its first frames need others that are missing
    # Frames are stored out of order, yet these are times of decoding: AVI knows no others.
    if stream.codec_context.has_b_frames and list(times) == sorted(times):
        return []
    # A packet of a few bytes says that there is no frame: another packet holds two.
    if stream.codec_context.name == "mpeg4" and min(sizes) < 10:
        return []
    return shown


def frame_rate(packets, time_base, average):
    """Frames a second: by the usual distance of neighbours in time, so a pause does not count."""
    times = {packet[0] for packet in packets}
    if None in times or len(times) < 2:
        return float(average or 1)
    distances = np.diff(sorted(times))
    median = np.median(distances)
    # The mean of those near it, since times come in whole ticks: 67, 67, 66, ...
    usual = distances[abs(distances - median) <= median / 4].mean()
    return float(1 / (usual * time_base))


def find_by_time(container, stream, packets, numbers):
    """Frames chosen as {time: number}: {number: RGB picture}, fewer where the decoder disagrees
    with the container."""
    first = min(numbers)
    _, start = max((pts, dts) for pts, dts, is_key, *_ in packets if is_key and pts <= first)
    # All other formats are sought by time of decoding, and behind that lies another key frame.
    if start is None or container.format.name.startswith(("mov", "matroska")):
        start = first
    found = {numbers[frame.pts]: upright(frame)
             for frame in decode(container, stream, start, numbers)
             if frame and frame.pts in numbers}
    if stream.codec_context.has_b_frames and not shown_times(packets, stream):
        return {}  # as the decoder found out on the way
    return found


@functools.lru_cache(maxsize=None)
def decode_all(path, size, modified):
    """Decode a whole file: a checksum of each picture to the last good one (-1: damaged), and of
    key frames (number, time of decoding). It is remembered while size and time stay the same."""
    sums, keys = [], []
    with open_video(path) as opened:
        for frame in decode(*opened):
            if frame and frame.key_frame:
                keys.append((len(sums), frame.dts))
            sums.append(zlib.crc32(upright(frame).tobytes()) if frame else -1)
    while sums and sums[-1] == -1:
        sums.pop()
    return np.array(sums), keys


def find_by_number(path, sums, keys, chosen):
    """Frames counted from the last key frame before them, {number: RGB picture}. Where one of
    these is not the one that decoding from the start has shown, all are decoded from the start."""
    nearest = max((key for key in keys if key[0] <= chosen[0]), default=(0, None))
    for number, start in (nearest, (0, None)):
        with open_video(path) as opened:
            frames = itertools.islice(decode(*opened, start), chosen[-1] - number + 1)
            found = {i: upright(frame)
                     for i, frame in enumerate(frames, number) if frame and i in chosen}
        if all(i in found and zlib.crc32(found[i].tobytes()) == sums[i] for i in chosen):
            break
    return found


def decode(container, stream, start=None, wanted=()):
    """Frames in the order in which they are shown: from the start, or from where a seek to the
    time `start` leads. A damaged frame is None, and so are all others up to the next key frame.

    The first is a key frame, or that of a file which begins with one by its container's word (not
    all decoders mark key frames, and a file cut by copying does not show its first). Where only
    frames of some times are wanted, others may be left out, and it ends after the last.
    """
    import av
    context, awaited = stream.codec_context, set(wanted)
    if start is not None:
        with contextlib.suppress(av.FFmpegError):
            container.seek(start, stream=stream)
    context.open(strict=False)  # some decoders would keep to the first skip_frame that they see
    begun, whole = False, None
    for packet in container.demux(stream):
        if not packet.size and packet.dts is not None:
            continue  # an empty packet repeats the frame before
        if whole is None:
            whole = packet.is_keyframe and (start is None or packet.is_discard)
        # A frame that nobody wants, and that no other refers to, need not be decoded.
        context.skip_frame = "NONREF" if wanted and packet.pts not in wanted else "DEFAULT"
        awaited.discard(packet.pts)
        ends = wanted and not awaited
        try:
            frames = context.decode(packet)
            if ends:
                frames += context.decode(None)  # those that the decoder still holds back
        except av.FFmpegError:
            frames = [None]
        for frame in frames:
            whole = frame is not None and not frame.is_corrupt and (whole or frame.key_frame)
            begun = begun or whole
            if begun:
                yield frame if whole else None
        if ends:
            return


def upright(frame):
    """A decoded frame as uint8 [H, W, 3], RGB, mirrored and turned by quarters as its display
    matrix says."""
    from av.sidedata.sidedata import SideDataContainer
    picture = frame.to_ndarray(format="rgb24", threads=1)
    # `frame.side_data` would refer to the frame that keeps it: such frames fill the memory.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] / 65536  # x' = ax + cy, y' = bx + dy
        if a * d < b * c:
            picture, a, b = picture[:, ::-1], -a, -b
        picture = np.rot90(picture, -round(math.atan2(b, a) / (math.pi / 2)))
    return picture


def is_image(path):
    return Path(path).suffix.lower() in IMAGES


def read_image(path):
    """Read an image: uint8 [H, W, 3], RGB. Raises Unreadable for a file that is missing or broken.

    Grey becomes three equal channels, CMYK and palettes are converted, transparency is dropped, of
    16 bits the upper eight stay, of an animation the first picture; EXIF orientation is left alone,
    as everywhere with ImageNet.
    """
    try:
        if not Path(path).is_file():
            raise Unreadable(path, "No such file")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.mode.startswith("I"):  # Pillow would clip to the lower eight bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(path, error) from None


# ------------------------------------------------------------------------------- windows and crops

AREA, RATIO = (0.3, 1.0), (0.75, 1.35)  # of a training crop: share of the picture, width / height


def spread(start, length, count):
    """floor(linspace(start, start + length, count)) as a list, in whole numbers: nothing rounds."""
    return [start + i * length // max(count - 1, 1) for i in range(count)]


def window(n, frames, step, generator):
    """Frame numbers of a random window of L = frames * step frames in a video of n frames, which
    starts at 0 to n - L - 1.

    A video no longer than L gives floor(linspace(0, n, n // step)), the last repeated.
    """
    length = frames * step
    if n > length:
        start = torch.randint(n - length, (), generator=generator).item()
        return [min(i, start + length - 1) for i in spread(start, length, frames)]
    numbers = [min(i, n - 1) for i in spread(0, n, n // step)]
    return numbers + [n - 1] * (frames - len(numbers))


def fps_step(rate, fps):
    """The frame step ceil(rate) // fps, at least 1. Rates are measured, so rounded to a tenth:
    15.0016 is 15."""
    return max(1, int(np.ceil(round(rate, 1))) // fps)


def evaluation_window(n, frames):
    """Frame numbers spread evenly over a video of n frames; a short one repeats its last frame."""
    return spread(0, n - 1, frames) if n >= frames else list(range(n)) + [n - 1] * (frames - n)


class Clips:
    """Clips of video and image files; an image stands still for all of a clip.

    labels: whole numbers from 0, one for each path, or None. step: frames of the video from one
    frame of a clip to the next; fps, if not 0, sets it by each video's rate.
    """

    def __init__(self, paths, labels, frames, crop, step=1, fps=0, name="videos"):
        self.paths, self.labels, self.name = [str(path) for path in paths], labels, name
        self.frames, self.crop, self.step, self.fps = frames, crop, step, fps

    def __len__(self):
        return len(self.paths)

    def read(self, item, choose):
        """The frames chosen of one file, of an image the only one: uint8 [T or 1, 3, H, W].
        Raises Unreadable."""
        path = self.paths[item]
        frames = read_image(path)[None] if is_image(path) else read_video(path, choose).frames
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def clip(self, item, generator):
        """A random window, crop and flip: uint8 [3, T, crop, crop]."""
        def choose(count, rate):
            step = fps_step(rate(), self.fps) if self.fps else self.step
            return window(count, self.frames, step, generator)

        from torchvision.transforms import RandomResizedCrop  # takes a second
        pictures = self.read(item, choose)
        seed = torch.randint(2 ** 62, (), generator=generator).item()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(pictures, AREA, RATIO)
            flipped = torch.rand(()) < 0.5
        pictures = pictures[..., top:top + height, left:left + width]
        # Not antialiased, as in the paper's code.
        pictures = interpolate(pictures.float(), (self.crop, self.crop), mode="bilinear")
        pictures = pictures.round().to(torch.uint8)
        if flipped:
            pictures = pictures.flip(-1)
        return self.finish(pictures)

    def evaluation_clip(self, item):
        """Frames from all of a video, its short side resized to the crop, its centre: float32
        [3, T, crop, crop], 0 to 255. Pixels of videos stay unrounded, as in the paper's code."""
        pictures = self.read(item, lambda count, rate: evaluation_window(count, self.frames))
        sides = pictures.shape[-2:]
        size = [self.crop * side // min(sides) for side in sides]
        if is_image(self.paths[item]):  # as usual with ImageNet
            pictures = interpolate(pictures, size, mode="bicubic", antialias=True).float()
        else:
            pictures = interpolate(pictures.float(), size, mode="bilinear")
        top, left = [(side - self.crop) // 2 for side in size]
        return self.finish(pictures[..., top:top + self.crop, left:left + self.crop])

    def finish(self, pictures):
        """[T or 1, 3, crop, crop] -> [3, T, crop, crop]."""
        return pictures.transpose(0, 1).expand(-1, self.frames, -1, -1).contiguous()


CLEAN_BLOBS = 10_042  # evaluation clips from this seed on share nothing with a training clip


class BlobClips(Clips):
    """The paper's generated clips, `synthetic.Blobs`; for evaluation their first frames as they
    are, uint8, 160x160."""

    def __init__(self, frames, crop, step=1, fps=0, items=range(10_000), first=0, directions=False):
        labels = [item % len(Blobs.MOVES) for item in items]
        super().__init__(items, labels, frames, crop, step, fps, "blobs")
        self.blobs = Blobs(first, directions)

    def read(self, item, choose):
        video, _ = self.blobs.video(self.paths[item])
        return video.transpose(0, 1)[list(choose(Blobs.FRAMES, lambda: Blobs.FPS))]

    def evaluation_clip(self, item):
        return self.finish(self.read(item, lambda count, rate: range(self.frames)))


def read_all(items, source):
    """Clips of these items as evaluation sees them, or for each that cannot be read the sentence
    that says why."""
    clips = []
    for item in items:
        try:
            clips.append(source.evaluation_clip(item))
        except Unreadable as error:
            clips.append(str(error))
    return clips


# ----------------------------------------------------------------------------------------- batches

MAX_UNREADABLE = 100  # in a row
MAX_BROKEN = 0.05  # the share of unreadable files with which a run may go on
ORDER, CLIP, MASK, SIZE = range(4)  # what random numbers are for: no two uses share a generator


def generator_for(*numbers):
    """A generator that depends on these whole numbers (from 0) and their order. torch keeps the
    low 32 bits of a seed: one pair of different numbers in four billion draws the same."""
    seed, = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))


class Batches:
    """One item per training step, a function of seed and step alone, so that a resumed run goes on
    as it would have.

    batches[step] -> a rank's micro-batches, a list: uint8 clips [micro_batch, 3, T, H, W] and
    their masks, make_masks(clips, positions, sizes). The generator of positions is seeded by
    (seed, step, number of the micro-batch in the step), that of sizes by (seed, step). Clips are
    drawn with replacement: first the source, by weight, then any of its items; `Shapes` makes new
    ones. For a file that cannot be read another of its source is taken, and a line in the file
    unreadable.txt says so. Raises ValueError where batch, micro-batch and ranks do not fit.
    """

    def __init__(self, sources, weights, config, make_masks, rank=0, ranks=1):
        self.sources, self.config, self.make_masks = sources, config, make_masks
        self.size = config.micro_batch
        each, rest = divmod(config.batch, self.size * ranks)  # micro-batches of a rank
        if rest:
            raise ValueError(f"a batch of {config.batch} is not a multiple of {ranks} ranks x a "
                             f"micro-batch of {self.size}; change --batch or --micro-batch")
        self.mine = range(rank * each, (rank + 1) * each)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.lengths = torch.tensor([len(source) for source in sources])
        self.unreadable = Path(config.out, "unreadable.txt")

    def __len__(self):
        return self.config.steps

    def __getitem__(self, step):
        seed, batch = self.config.seed, self.config.batch
        draw = generator_for(seed, ORDER, step, 0)
        sources = torch.multinomial(self.weights, batch, replacement=True, generator=draw)
        shares = torch.rand(batch, dtype=torch.float64, generator=draw)
        items = (shares * self.lengths[sources]).long().tolist()

        micro_batches = []
        for j in self.mine:
            places = range(j * self.size, (j + 1) * self.size)
            if hasattr(self.sources[0], "clips"):
                clips = self.sources[0].clips([step * batch + place for place in places])
            else:
                clips = torch.stack([self.clip(step, place, sources[place], items[place])
                                     for place in places])
            # The released code draws the same positions on every GPU (lab report, departure 11).
            positions = generator_for(seed, MASK, step, 0 if self.config.as_released else j)
            masks = self.make_masks(clips, positions, generator_for(seed, SIZE, step, 0))
            micro_batches.append((clips, masks))
        return micro_batches

    def clip(self, step, place, source, item):
        """For this place in the batch of a step a clip of an item, or of the first other one that
        can be read."""
        source, generator = self.sources[source], generator_for(self.config.seed, CLIP, step, place)
        for _ in range(MAX_UNREADABLE):
            try:
                return source.clip(item, generator)
            except Unreadable as error:
                # In any worker of any rank: whole lines at the end of a file do not mix.
                with open(self.unreadable, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(f"{step}\t{source.name}\t{error.path}\t{error.reason}\n")
                item, last = torch.randint(len(source), (), generator=generator).item(), error
        raise ValueError(f"{MAX_UNREADABLE} files of {source.name} in a row cannot be read, "
                         f"the last is {last}")


def loader(batches, start=0, workers=0, device=torch.device("cpu")):
    """The batches from step `start` on, prepared by so many processes (their torch runs one thread
    each)."""
    # With a generator of its own, the loader leaves the global one alone: a resumed run must not
    # find it moved.
    return load(batches, workers, sampler=range(start, len(batches)),
                pin_memory=device.type == "cuda", generator=torch.Generator())


def load(items, workers, **how):
    """What torch's DataLoader makes of items in so many worker processes, one by one; no worker
    outlives an error."""
    try:
        yield from DataLoader(items, batch_size=None, num_workers=workers,
                              worker_init_fn=start_worker, **how)
    except Exception:
        end_workers()
        raise


def start_worker(_):
    """A loader's worker leaves Ctrl-C and SIGTERM to the run, which saves and then ends it; and it
    keeps no lock."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    for handle in HELD:
        os.close(handle)


@atexit.register
def end_workers():
    """Kill what is left of the loaders' workers: they ignore the signal by which Python would end
    them."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            with contextlib.suppress(RuntimeError):  # torch's, of a worker that was killed
                worker.kill()
                worker.join()


# --------------------------------------------------------------------------- lists of your own

LINE = re.compile(r'"?([^"]+?\.\w+)"?(?:[\s,]+"?(\d+)"?)?')
HIDDEN = (".", "__MACOSX")  # of what macOS and others leave behind: `.DS_Store`, `._clip.mp4`
Split = namedtuple("Split", "paths labels")  # labels: whole numbers from 0, or None for all


def files_below(folder):
    """All files below a folder, in order; links to folders are followed, what is hidden is left
    out."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links may go round in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        found += [Path(place, name) for name in names if not name.startswith(HIDDEN)]
    return sorted(found)


def own_videos(path):
    """The videos of a list file, or all videos below a folder, as a Split.

    A line of a list is `path` or `path label`, separated by a comma, a tab or spaces. The label is
    a whole number; the path ends in a suffix like .mp4, may hold spaces and commas, may stand in
    double quotes, and is relative to the list's folder. In a folder that holds its videos in two
    or more sub-folders, and nowhere else, each of these is a class, numbered in their order.
    Raises FileNotFoundError where there is nothing, ValueError for a wrong line.
    """
    path = Path(path)
    if path.is_dir():
        paths = [file for file in files_below(path) if file.suffix.lower() in VIDEOS]
        if not paths:
            raise FileNotFoundError(f"there is no video ({', '.join(VIDEOS)}) in or below {path}")
        classes = sorted({file.parent for file in paths})
        if len(classes) < 2 or any(folder.parent != path for folder in classes):
            return Split(paths, None)
        return Split(paths, [classes.index(file.parent) for file in paths])
    pairs = []
    for line in text_lines(path):
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"a line of {path} is not `path` or `path label`: {line}")
        pairs.append((path.parent / match[1], match[2] and int(match[2])))
    paths, labels = make_split(pairs)
    if not any(map(os.path.exists, paths)):
        raise FileNotFoundError(f"{path} lists no video that exists; its first: {paths[:1]}")
    without = labels.count(None)
    if 0 < without < len(labels):
        raise ValueError(f"{path} gives {without} of its {len(labels)} videos no label; give all a "
                         "label, or none")
    return Split(paths, None if without else labels)


def make_split(pairs):
    return Split([path for path, _ in pairs], [label for _, label in pairs])


def text_lines(path):
    """The lines of a text file that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def hold_out(split):
    """Labelled videos in two, (to train on, to test on): of each class every third, in the order
    of the list, is held out."""
    seen, parts = Counter(), ([], [])
    for path, label in zip(*split):
        seen[label] += 1
        parts[seen[label] % 3 == 0].append((path, label))
    return tuple(map(make_split, parts))


# ------------------------------------------------ the four datasets, as their publishers ship them

Files = namedtuple("Files", "train test")  # two Splits


def first_there(folder, *names):
    """The path of the first of these names that exists in a folder. Raises FileNotFoundError."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]} is missing; README.md, 'The paper's datasets', "
                            "says what belongs to each and who offers it")


def read_split(path, parse):
    """A publisher's list: parse(line of text, or item of JSON) -> (path, label), as a Split."""
    pairs, entries = [], text_lines(path)
    try:
        if path.suffix == ".json":
            entries = json.loads("".join(entries))
        for entry in entries:
            pairs.append(parse(entry))
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"entry {len(pairs) + 1} of {path} is not as its publisher writes it: "
                         f"{error!r}") from None
    if not pairs:
        raise ValueError(f"{path} lists nothing")
    return make_split(pairs)


def ucf101(root):
    videos = first_there(root, "UCF-101")
    train, test = (first_there(root / "ucfTrainTestlist", f"{name}.txt")
                   for name in ("trainlist01", "testlist01"))
    label = {}

    def parse(line):  # "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"; test lines lack the number
        name, *number = line.split()
        folder = name.split("/")[0]
        if number:
            label[folder] = int(number[0]) - 1
        return videos / name, label[folder]
    return Files(read_split(train, parse), read_split(test, parse))


def ssv2(root):
    videos = first_there(root, "20bn-something-something-v2")
    index, train, test = (first_there(root, f"{name}.json", f"labels/{name}.json")
                          for name in ("labels", "train", "validation"))
    label = read_json(index)

    def parse(entry):  # its template is a class name with brackets: "Pushing [something]"
        name = entry["template"].replace("[", "").replace("]", "")
        return videos / f"{entry['id']}.webm", int(label[name])
    return Files(read_split(train, parse), read_split(test, parse))


def imagenet100(root):
    splits, classes = [], []
    for folder in (first_there(root, "train"), first_there(root, "val", "validation")):
        paths = [path for path in files_below(folder) if is_image(path)]
        names = [path.relative_to(folder).parts[0] for path in paths]
        classes.append(sorted(set(names)))
        splits.append(Split(paths, [classes[-1].index(name) for name in names]))
    if not classes[0] or classes[0] != classes[1]:
        raise ValueError(f"train and val of {root} should hold images of the same classes")
    return Files(*splits)


def diving48(root):
    videos = first_there(root, "rgb")
    train, test = (first_there(root, f"Diving48_V2_{name}.json") for name in ("train", "test"))

    def parse(entry):
        return videos / f"{entry['vid_name']}.mp4", range(48).index(entry["label"])
    return Files(read_split(train, parse), read_split(test, parse))


# read: folder -> Files. train, test: how many clips were published.
PublicDataset = namedtuple("PublicDataset", "title read train test")
DATASETS = {
    "ucf101": PublicDataset("UCF-101, split 1", ucf101, 9_537, 3_783),
    "ssv2": PublicDataset("Something-Something V2", ssv2, 168_913, 24_777),
    "imagenet100": PublicDataset("ImageNet-100", imagenet100, 126_689, 5_000),
    "diving48": PublicDataset("Diving-48 V2", diving48, 15_027, 1_970),
}
# The paper's mixed regime: how often each is drawn.
MIXED = {"ucf101": 0.2, "ssv2": 0.6, "imagenet100": 0.2}


def open_dataset(name, root, split, *how):
    """The "train" or "test" split of one of the DATASETS as a source. how: frames, crop, step and
    fps of `Clips`."""
    return Clips(*getattr(DATASETS[name].read(Path(root)), split), *how, name=name)


# ------------------------------------------------------------------------------ what commands share

HELD = []  # locks, which a loader's worker must not inherit


def write_file(path, content):
    """Write bytes under a temporary name, then rename: a reader sees the old file or the new one,
    never a half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name a user knows
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1).encode())


def read_json(path):
    """The dict that a JSON file holds, an empty one where there is no file. Raises ValueError for a
    damaged file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (RecursionError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged; put the whole file back, or delete it") from None


@contextlib.contextmanager
def locked(path):
    """Hold a folder or file for this process alone; the kernel lets go when the process ends,
    however that is."""
    handle = os.open(path, os.O_RDONLY)
    HELD.append(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work on {path}; wait until it ends, or stop "
                             "it") from None
        yield
    finally:
        HELD.remove(handle)
        os.close(handle)


def command(program, smaller, stopped="stopped"):
    """Decorator of a command's main function: what its user can put right is said in one sentence;
    a bug of ours keeps its traceback.

    Exit status: what the function returns, else 0; 1 after such a sentence, 130 after Ctrl-C, 2
    from argparse. smaller: the flags that decide how much memory it takes.
    """
    def decorate(main):
        def run(arguments=None):
            try:
                return main(arguments) or 0
            except KeyboardInterrupt:
                status, sentence = 130, stopped
            except (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError) as error:
                status, sentence = 1, explain(error, smaller)
                if sentence is None:
                    raise
            print(f"{program}: {sentence}", file=sys.stderr)
            return status
        return run
    return decorate


def explain(error, smaller):
    """The sentence that an error is for a user, None where it is a bug."""
    message = str(error).strip() or type(error).__name__
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if out_of_memory or "can't allocate memory" in message:
        return f"there is too little memory; give a smaller {smaller}"
    if message.startswith("DataLoader worker (pid"):
        return ("a loader process was killed, most likely for lack of memory; give fewer "
                "--workers, or more shared memory (in Docker: --shm-size)")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch cannot compile here ({message.splitlines()[0]}); --no-compile does without"
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    # An error in a loader's worker comes with the worker's traceback; its last line is the error.
    return message.splitlines()[-1].removeprefix("ValueError: ")


def number(least):
    """The type of a flag: a whole number from `least` on."""
    def convert(text):
        if not least <= int(text) < 10 ** 9:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {10 ** 9 - 1}")
        return int(text)
    convert.__name__ = "int"  # argparse says "invalid int value"
    return convert


# --------------------------------------------------------------------------- python data.py --check


def inspect_file(path):
    """Reads a file as evaluation does: height, width, number of frames, and of a video its rate; or
    the reason why it cannot."""
    try:
        if is_image(path):
            return *read_image(path).shape[:2], 1
        video = read_video(path, lambda count, rate: evaluation_window(count, 16))
        return *video.frames.shape[1:3], video.count, video.rate()
    except Unreadable as error:
        return str(error)


def inspect(title, paths, workers):
    """Read every file and print what there is to say: the median number of frames, 0 where a run on
    these files would stop."""
    results = [*tqdm(load(paths, workers, collate_fn=inspect_file), desc=title, total=len(paths),
                     unit="file", leave=False, disable=None)]
    reasons = [each for each in results if isinstance(each, str)]
    facts = [*zip(*(each for each in results if not isinstance(each, str)))]
    for what, values in zip(("height", "width", "frames", "frames per second"), facts):
        print(f"    {what}: {min(values):.4g} to {max(values):.4g}")
    print(f"    unreadable: {len(reasons):,}", *reasons[:5], sep="\n      ")
    if len(reasons) > MAX_BROKEN * len(paths):
        print(f"    More than {MAX_BROKEN:.0%} cannot be read: a run would stop.")
        return 0
    return np.median(facts[2])


def check(root, workers):
    """Print what lies in a folder, whole or broken, and the command that trains on it.

    Raises OSError where there is nothing to train on, ValueError where it makes no sense.
    """
    root, usable, missing = Path(root), {}, []
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one that holds the datasets, or "
                                "your own videos")
    for name, dataset in DATASETS.items():
        try:
            files = dataset.read(root)
        except FileNotFoundError as error:
            missing.append(f"{dataset.title}: not here. {error}")
            continue
        for split in ("test", "train"):
            paths = getattr(files, split).paths
            published = getattr(dataset, split)
            print(f"{dataset.title}, {split}: {len(paths):,} of {published:,} published clips")
            usable[name] = inspect(f"{name} {split}", paths, workers)  # of train, last
    if usable:
        print(*missing, sep="\n")
    place = shlex.quote(str(root))
    for preset, names in (("mixed", MIXED), ("ucf101", ["ucf101"])):
        if all(map(usable.get, names)):
            print(f"Train with: python train.py --preset {preset} --root {place}")
            return
    paths, labels = own_videos(root)
    others = len(files_below(root)) - len(paths)
    print(f"Videos below {root}, of every split: {len(paths):,}; other files: {others:,}")
    if labels and not usable:
        print(f"    {max(labels) + 1} classes, the sub-folders")
    count = inspect("videos", paths, workers)
    if not count:
        raise ValueError(f"too many of the videos in {root} cannot be read")
    # Evaluation spreads a clip over all of a video: at this step so does training.
    for device, preset, frames in (("CPU", "", 8), ("GPU", "--preset mixed ", 16)):
        print(f"Train on a {device} with: python train.py {preset}--data {place} "
              f"--frame-step {max(1, round(count / frames))}")


# --------------------------------------------------------------------------- python data.py --write


def write_video(path, clip, fps):
    """Write uint8 [3, T, H, W] as a video file; the ending of `path` names the container."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, pix_fmt="yuv420p")
        stream.height, stream.width = clip.shape[2:]
        for frame in clip.permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_dataset(folder, source, count, fps):
    """Write items 0 to count-1 of a source as mp4 files, and `videos.csv`, a line "path label" for
    each."""
    folder, lines = Path(folder), []
    if os.path.lexists(folder):
        raise ValueError(f"{folder} is there already; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when whole, removed when not.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent,
                                     ignore_cleanup_errors=True) as unfinished:
        for item in tqdm(range(count), desc=f"writing to {folder}", unit="clip", disable=None):
            clip, label = source.video(item)
            write_video(Path(unfinished, f"{item:06d}.mp4"), clip, fps)
            lines.append(f"{item:06d}.mp4 {label}\n")
        Path(unfinished, "videos.csv").write_text("".join(lines))
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, folder)


@command("data.py", smaller="number of --workers")
def main(arguments=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Check the datasets or videos "
                                     "in a folder, or write generated clips as videos.")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--check", metavar="DIR", help="holds the datasets, or your own videos")
    job.add_argument("--write", metavar="DIR", help="a new folder for generated clips")
    parser.add_argument("--workers", type=number(1), default=min(8, os.cpu_count()),
                        help="processes that read")
    parser.add_argument("--count", type=number(1), default=64, help="number of clips")
    flags = parser.parse_args(arguments)
    if flags.check:
        check(flags.check, flags.workers)
    else:
        write_dataset(flags.write, Shapes(16, 64, 0), flags.count, 8)


if __name__ == "__main__":
    sys.exit(main())
