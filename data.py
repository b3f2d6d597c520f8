"""Clips for training and evaluation: decoding, windows and crops, batches, your own lists, four
public datasets; at the end what all commands share.

    python data.py --check DIR    what is in DIR (or a list), what is broken, how to train on it
    python data.py --write DIR    generated clips as videos, with a list `videos.csv`

Nothing here knows the method. Clips for training stay uint8 until `model.normalise`: workers hand
over a quarter of the bytes.
"""
import argparse
import atexit
import contextlib
import fcntl
import functools
import glob
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from synthetic import Blobs, Shapes

# ---------------------------------------------------------------------------------------- decoding

# What is opened: demuxers, none of which follows other files, with the suffixes of their files.
VIDEO_FORMATS = {
    "mov": ".mp4 .m4v .mov .3gp .3g2", "matroska": ".mkv .webm", "avi": ".avi",
    "mpeg": ".mpg .mpeg .vob", "mpegts": ".ts .mts .m2ts", "ogg": ".ogv", "flv": ".flv .f4v",
    "asf": ".wmv .asf", "h264": ".h264"}
VIDEOS = " ".join(VIDEO_FORMATS.values()).split()
IMAGE_FORMATS = "JPEG PNG BMP PPM TIFF WEBP".split()  # for others Pillow starts Ghostscript
IMAGES = ".jpg .jpeg .png .bmp .ppm .pgm .tif .tiff .webp".split()

# Frames that were chosen, uint8 [T, H, W, 3], RGB; of the file how many it has, and a second shows.
Video = namedtuple("Video", "frames count rate")


class Unreadable(Exception):
    """A file that gives no clip, and the reason: a sentence, or the error that tells it."""

    def __init__(self, path, reason):
        self.path, self.reason = str(path), str(getattr(reason, "strerror", None) or reason)
        super().__init__(f"{self.path}: {self.reason}")


def read_video(path, choose):
    """Frames of a video by number: `choose(count, rate)` returns the numbers, ascending. An image
    is its only frame. Raises Unreadable for a file that is missing, broken, or without them.

    Frame i is the i-th that decoding from the start shows, however long each lasts; turned and
    mirrored as players do it, while pixels that are not square are not stretched. Decoding begins
    at the last key frame before the first chosen frame where the times of packets can be believed,
    else at the start.
    """
    if is_image(path):
        return Video(read_image(path)[None], 1, 0)
    with open_video(path) as (stream, packets):
        times, rate, found = shown_times(stream, packets), frame_rate(stream, packets), {}
        count = len(times)
        if times:
            chosen = choose(count, rate)
            found = find_by_time(stream, packets, {times[i]: i for i in chosen})
        if not found or set(chosen) - set(found):
            count = count_frames(path, os.path.getmtime(path))
            if not count:
                raise ValueError("no frame of it can be decoded")
            chosen = choose(count, rate)
            frames = zip(range(chosen[-1] + 1), decode(stream, packets))
            found = {i: upright(frame) for i, frame in frames if frame and i in chosen}
        try:
            return Video(np.stack([found[i] for i in chosen]), count, rate)
        except KeyError as error:
            raise ValueError(f"frame {error} of {count} cannot be decoded")


@contextlib.contextmanager
def open_video(path):
    """The video stream of a file (PyAV's) and its packets; what goes wrong becomes Unreadable."""
    import av  # only where a video is opened: all else runs without it
    options = {"format_whitelist": ",".join(VIDEO_FORMATS)}
    try:
        # The prefix keeps it from taking a colon in a name for a protocol.
        with av.open(f"file:{path}", metadata_errors="replace", options=options) as container:
            stream = container.streams.best("video")
            # A song's cover is a picture, and some video no decoder knows.
            cover = av.stream.Disposition.attached_pic
            if stream is None or stream.disposition & cover or stream.codec_context is None:
                raise ValueError("it holds no video")
            stream.codec_context.thread_count = 1  # the loader's workers are what runs in parallel
            # An empty packet repeats the frame before.
            packets = [packet for packet in container.demux(stream) if packet.size]
            if not packets:
                raise ValueError("it holds no frames")
            yield stream, packets
    except av.ArgumentError:
        raise Unreadable(path, f"its format is none that is opened: {', '.join(VIDEO_FORMATS)}")
    except (av.FFmpegError, ValueError) as error:
        raise Unreadable(path, error)


def shown_times(stream, packets):
    """When each frame is shown, ascending; nothing where the container cannot be believed."""
    context, times = stream.codec_context, [packet.pts for packet in packets]
    decoded = [packet.dts for packet in packets if packet.dts is not None]
    if len({*times} - {None}) < len(times) or decoded != sorted(decoded):
        return []  # missing, equal, or the clock starts again
    shown = sorted(packet.pts for packet in packets if not packet.is_discard)
    if not packets[0].is_keyframe or shown[:1] < times[:1]:
        return []  # its first frames need others that are missing
    # Frames are stored out of order, yet these are times of decoding: AVI knows no others. Or a
    # packet of a few bytes says that there is no frame: another packet holds two.
    if (context.has_b_frames and times == sorted(times)
            or context.name == "mpeg4" and min(packet.size for packet in packets) < 10):
        return []
    return shown


def frame_rate(stream, packets):
    """Frames a second: by the usual distance of neighbours in time, so a pause does not count."""
    times = {packet.pts for packet in packets}
    if None in times or len(times) < 2:
        return float(stream.average_rate or 1)
    distances = np.diff(sorted(times))
    median = np.median(distances)  # and the mean of those near it: ticks are whole, 67, 67, 66
    usual = distances[abs(distances - median) <= median / 4].mean()
    return float(1 / (usual * stream.time_base))


def find_by_time(stream, packets, numbers):
    """Frames chosen as {time: number}: {number: RGB picture}, fewer where the decoder disagrees."""
    start = max(i for i, packet in enumerate(packets)
                if packet.is_keyframe and packet.pts <= min(numbers))
    end = max(i for i, packet in enumerate(packets, 1) if packet.pts in numbers)
    frames = decode(stream, packets, start, end, numbers)
    found = {numbers[frame.pts]: upright(frame)
             for frame in frames if frame and frame.pts in numbers}
    # On its way the decoder may find out that these were not the times.
    return found if shown_times(stream, packets) else {}


@functools.lru_cache(maxsize=None)
def count_frames(path, modified):
    """How many frames decoding a file from the start shows, to the last good one. It is remembered
    until the file changes."""
    with open_video(path) as opened:
        return max((i for i, frame in enumerate(decode(*opened), 1) if frame), default=0)


def decode(stream, packets, start=0, end=None, wanted=()):
    """Frames of packets[start:end] in the order in which they are shown, None for a damaged one and
    all others up to the next key frame. Where only some times are wanted, others may be left out.

    The first is a key frame, or that of a file which begins with one by its container's word: not
    all decoders mark key frames, and a file cut by copying does not show its first.
    """
    import av
    context = stream.codec_context
    context.open(strict=False)  # some decoders would keep to the first skip_frame that they see
    context.flush_buffers()
    whole, begun = not start and packets[0].is_keyframe, False
    for packet in *packets[start:end], None:  # at last what the decoder still holds back
        if packet:
            # A frame that nobody wants, and that no other refers to, need not be decoded.
            context.skip_frame = "NONREF" if wanted and packet.pts not in wanted else "DEFAULT"
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            frames = [None]
        for frame in frames:
            whole = frame is not None and not frame.is_corrupt and (whole or frame.key_frame)
            begun = begun or whole
            if begun:
                yield frame if whole else None


def upright(frame):
    """A frame as uint8 [H, W, 3], RGB, mirrored and turned by quarters as its matrix says."""
    from av.sidedata.sidedata import SideDataContainer
    picture = frame.to_ndarray(format="rgb24", threads=1)
    # `frame.side_data` would refer to the frame that keeps it: such frames fill the memory.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = struct.unpack("9i", matrix)  # x' = ax + cy, y' = bx + dy
        if a * d < b * c:
            picture, a, b = picture[:, ::-1], -a, -b
        picture = np.rot90(picture, -round(math.atan2(b, a) * 2 / math.pi))
    return picture


def is_image(path):
    return Path(path).suffix.lower() in IMAGES


def read_image(path):
    """Read an image: uint8 [H, W, 3], RGB; of an animation the first picture, without transparency,
    EXIF orientation left alone, as everywhere with ImageNet. Raises Unreadable."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.mode.startswith("I"):  # of 16 bits the upper eight; Pillow would clip to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's are of every kind
        raise Unreadable(path, error)


# ------------------------------------------------------------------------------- windows and crops


def spread(start, length, count):
    """floor(linspace(start, start + length, count)) as a list, in whole numbers: nothing rounds."""
    return [start + i * length // max(count - 1, 1) for i in range(count)]


def window(n, frames, step, generator):
    """Frame numbers of a random window of L = frames * step in n frames, from 0 to n - L - 1 on. A
    video no longer than L gives floor(linspace(0, n, n // step)), the last repeated."""
    length, last, numbers = frames * step, n - 1, spread(0, n, n // step)
    if n > length:
        start = torch.randint(n - length, (), generator=generator).item()
        numbers, last = spread(start, length, frames), start + length - 1
    numbers += [last] * (frames - len(numbers))
    return [min(i, last) for i in numbers]


def evaluation_window(n, frames):
    """Frame numbers spread evenly over a video of n frames; a short one repeats its last frame."""
    return [min(i, n - 1) for i in spread(0, max(n, frames) - 1, frames)]


class Clips:
    """Clips of video and image files; an image stands still. labels: whole numbers from 0, one for
    each path, or None. step: frames of the video from one frame of a clip to the next; fps, if not
    0, makes it ceil(the video's rate) // fps."""

    def __init__(self, paths, labels, frames, crop, step=1, fps=0, name="videos"):
        self.paths, self.labels, self.name = [*map(str, paths)], labels, name
        self.frames, self.crop, self.step, self.fps = frames, crop, step, fps

    few = linear = ("class",)  # as of a `World`

    def factors(self, items):
        return {"class": torch.tensor(self.labels)[items]}

    def __len__(self):
        return len(self.paths)

    def read(self, item, choose):
        """The frames chosen of one file: uint8 [T or 1, 3, H, W]. Raises Unreadable."""
        return torch.from_numpy(read_video(self.paths[item], choose).frames).permute(0, 3, 1, 2)

    def clip(self, item, generator):
        """A random window, crop and flip: uint8 [3, T, crop, crop]."""
        def choose(count, rate):
            # Rates are measured: 15.0016 is 15.
            step = max(1, math.ceil(round(rate, 1)) // self.fps) if self.fps else self.step
            return window(count, self.frames, step, generator)

        from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop  # takes a second
        pictures = self.read(item, choose)
        seed = torch.randint(2 ** 62, (), generator=generator).item()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            # Share of the picture, width / height; not antialiased, as in the paper's code.
            crop = RandomResizedCrop(self.crop, (0.3, 1.0), (0.75, 1.35), antialias=False)
            return self.finish(RandomHorizontalFlip()(crop(pictures)))

    def evaluation_clip(self, item):
        """Frames from all of a video, its short side resized to the crop, its centre: float32
        [3, T, crop, crop], 0 to 255. Pixels of videos stay unrounded, as in the paper's code."""
        from torchvision.transforms.functional import resize
        pictures = self.read(item, lambda count, rate: evaluation_window(count, self.frames))
        if is_image(self.paths[item]):  # as usual with ImageNet
            pictures = resize(pictures, self.crop, Image.BICUBIC).float()
        else:
            pictures = resize(pictures.float(), self.crop, antialias=False)
        top, left = [(side - self.crop) // 2 for side in pictures.shape[-2:]]
        return self.finish(pictures[..., top:top + self.crop, left:left + self.crop])

    def finish(self, pictures):
        """[T or 1, 3, crop, crop] -> [3, T, crop, crop]."""
        return pictures.transpose(0, 1).expand(-1, self.frames, -1, -1)


CLEAN_BLOBS = 10_042  # evaluation clips from this seed on share nothing with a training clip


class BlobClips(Clips):
    """The paper's `Blobs`; for evaluation their first frames as they are, uint8, 160x160."""

    def __init__(self, *how, items=range(10_000), first=0, directions=False):
        super().__init__(items, [item % len(Blobs.MOVES) for item in items], *how, name="blobs")
        self.blobs = Blobs(first, directions)

    def read(self, item, choose):
        video, _ = self.blobs.video(self.paths[item])
        return video.transpose(0, 1)[choose(Blobs.FRAMES, Blobs.FPS)]

    def evaluation_clip(self, item):
        return self.blobs.video(self.paths[item])[0][:, :self.frames]


def read_all(items, source):
    """Clips as evaluation sees them; for one that cannot be read the sentence that says why."""
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
    as it would have. batches[step] -> a rank's micro-batches, a list: uint8 clips [micro_batch, 3,
    T, H, W] and their masks, make_masks(clips, positions, sizes). The generator of positions is
    seeded by (seed, step, number of the micro-batch in the step), that of sizes by (seed, step).

    Clips are drawn with replacement: first the source, by weight, then any of its items; a world
    makes new ones. For a file that cannot be read another of its source is taken, and a line in
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
        self.lengths = torch.tensor([*map(len, sources)])

    def __getitem__(self, step):
        seed, batch = self.config.seed, self.config.batch
        draw, micro_batches = generator_for(seed, ORDER, step, 0), []
        sources = torch.multinomial(self.weights, batch, True, generator=draw)
        shares = torch.rand(batch, dtype=torch.float64, generator=draw)
        items = (shares * self.lengths[sources]).long().tolist()

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
        """For this place in a step's batch a clip of an item, or of another that can be read."""
        source, generator = self.sources[source], generator_for(self.config.seed, CLIP, step, place)
        for _ in range(MAX_UNREADABLE):
            try:
                return source.clip(item, generator)
            except Unreadable as error:
                # In any worker of any rank: whole lines at the end of a file do not mix.
                noted = Path(self.config.out, "unreadable.txt")
                with open(noted, "a", errors="surrogateescape") as file:
                    file.write(f"{step}\t{source.name}\t{error.path}\t{error.reason}\n")
                item = torch.randint(len(source), (), generator=generator).item()
        raise ValueError(f"{MAX_UNREADABLE} files of {source.name} in a row cannot be read; "
                         f"{noted} names them")


def loader(batches, start=0, workers=0, device=torch.device("cpu")):
    """The batches from step `start` on."""
    return load(batches, workers, sampler=range(start, batches.config.steps),
                pin_memory=device.type == "cuda")


def load(items, workers, **how):
    """Items one by one, prepared by so many processes, none of which outlives an error; a resumed
    run must not find the global generator moved."""
    try:
        yield from DataLoader(items, batch_size=None, num_workers=workers,
                              worker_init_fn=start_worker, generator=torch.Generator(), **how)
    except Exception:
        end_workers()
        raise


def start_worker(_):
    """A worker leaves Ctrl-C and SIGTERM to the run, which saves and ends it, and keeps no lock."""
    for each in signal.SIGINT, signal.SIGTERM:
        signal.signal(each, signal.SIG_IGN)
    for handle in HELD:
        os.close(handle)


@atexit.register
def end_workers():
    """Kill what is left of the workers: they ignore the signal by which Python would end them."""
    for worker in multiprocessing.active_children():
        with contextlib.suppress(RuntimeError):  # torch's, of a worker that was killed
            worker.kill()
            worker.join()


# ------------------------------------------------------------------------------ lists of your own

LINE = re.compile(r'"?([^"]+?\.\w+)"?(?:[\s,]+"?(\d{1,18})"?)?')
Split = namedtuple("Split", "paths labels")  # labels: whole numbers from 0, or None for all


def files_below(folder):
    """All files below a folder that have a suffix and are not hidden; links are followed."""
    names = glob.glob("**/*.*", root_dir=folder, recursive=True)
    return sorted(Path(folder, name) for name in names if "__MACOSX" not in name)


def folder_split(folder, suffixes):
    """The files below a folder that have one of these suffixes, as a Split. Where all lie directly
    in sub-folders, at least two, each of these is a class, numbered in their order."""
    paths = [file for file in files_below(folder) if file.suffix.lower() in suffixes]
    classes = sorted({file.parent for file in paths})
    if len(classes) < 2 or any(place.parent != folder for place in classes):
        return Split(paths, None)
    return Split(paths, [classes.index(file.parent) for file in paths])


def own_videos(path):
    """The videos of a list file, or all below a folder (by its videos.csv, if there is one), as a
    Split. Raises FileNotFoundError where there is nothing, ValueError for a wrong line.

    A line is `path` or `path label`, separated by a comma, a tab or spaces. The label is a whole
    number; the path ends in a suffix like .mp4, may hold spaces and commas, may stand in double
    quotes, and is relative to the list's folder.
    """
    path = Path(path)
    if (path / "videos.csv").exists():
        path /= "videos.csv"
    elif path.is_dir():
        split = folder_split(path, VIDEOS)
        if not split.paths:
            raise FileNotFoundError(f"there is no video ({', '.join(VIDEOS)}) in or below {path}")
        return split
    pairs = []
    for line in text_lines(path):
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"a line of {path} is not `path` or `path label`, the label a whole "
                             f"number: {line!r:.80}")
        pairs.append((path.parent / match[1], match[2] and int(match[2])))
    paths, labels = make_split(pairs)
    if not any(map(os.path.exists, paths)):
        raise FileNotFoundError(f"{path} lists {len(paths)} videos, none of which exists: "
                                + "".join(map(str, paths[:1])))
    if None in labels and {*labels} != {None}:
        raise ValueError(f"{path} gives some of its videos no label; give all a label, or none")
    return Split(paths, None if None in labels else labels)


def make_split(pairs):
    return Split([path for path, _ in pairs], [label for _, label in pairs])


def text_lines(path):
    """The lines of a text file that are not empty; of names, any byte is kept."""
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    return [line.strip() for line in lines if line.strip()]


def hold_out(split):
    """Labelled videos to train on, and to test on: of each class every third, as listed."""
    seen, parts = Counter(), ([], [])
    for path, label in zip(*split):
        seen[label] += 1
        parts[seen[label] % 3 == 0].append((path, label))
    return tuple(map(make_split, parts))


# ------------------------------------------------ the four datasets, as their publishers ship them

Files = namedtuple("Files", "train test")  # two Splits


def first_there(*paths):
    """The first of these paths that exists. Raises FileNotFoundError."""
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(f"{paths[0]} is missing; README.md, 'The paper's datasets', says what "
                            "belongs to each and who offers it")


def read_splits(parse, *paths):
    """A publisher's lists, for training and for test, as Files; parse(line of text, or item of
    JSON) -> (path, label)."""
    splits = []
    for path in paths:
        entries = text_lines(first_there(path))
        try:
            if path.suffix == ".json":
                entries = json.loads("".join(entries))
            splits.append(make_split([parse(entry) for entry in entries]))
        except Exception as error:
            raise ValueError(f"{path} is not as its publisher writes it: {error!r}")
    return Files(*splits)


def ucf101(root):
    lists, label = root / "ucfTrainTestlist", {}

    def parse(line):  # "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"; test lines lack the number
        name, *number = line.split()
        folder = name.split("/")[0]
        if number:
            label[folder] = int(number[0]) - 1
        return root / "UCF-101" / name, label[folder]
    return read_splits(parse, lists / "trainlist01.txt", lists / "testlist01.txt")


def ssv2(root):
    index, train, test = (first_there(root / f"{name}.json", root / f"labels/{name}.json")
                          for name in ("labels", "train", "validation"))
    videos, label = first_there(root / "20bn-something-something-v2"), read_json(index)

    def parse(entry):  # its template is a class name with brackets: "Pushing [something]"
        name = re.sub(r"\[|\]", "", entry["template"])
        return videos / f"{entry['id']}.webm", int(label[name])
    return read_splits(parse, train, test)


def imagenet100(root):
    train, val = first_there(root / "train"), first_there(root / "val", root / "validation")
    files = Files(folder_split(train, IMAGES), folder_split(val, IMAGES))
    names = [{path.parent.name for path in split.paths} for split in files]
    if not names[0] or names[0] != names[1] or None in (files.train.labels, files.test.labels):
        raise FileNotFoundError(f"train and val of {root} should hold images of the same classes")
    return files


def diving48(root):
    def parse(entry):
        return root / "rgb" / f"{entry['vid_name']}.mp4", range(48).index(entry["label"])
    return read_splits(parse, root / "Diving48_V2_train.json", root / "Diving48_V2_test.json")


# read: folder -> Files. train, test: how many clips were published. UCF-101 is its split 1.
PublicDataset = namedtuple("PublicDataset", "read train test")
DATASETS = {"ucf101": PublicDataset(ucf101, 9_537, 3_783),
            "ssv2": PublicDataset(ssv2, 168_913, 24_777),
            "imagenet100": PublicDataset(imagenet100, 126_689, 5_000),
            "diving48": PublicDataset(diving48, 15_027, 1_970)}
MIXED = {"ucf101": 0.2, "ssv2": 0.6, "imagenet100": 0.2}  # how often the paper draws from each


def open_dataset(name, root, split, *how):
    """The "train" or "test" split of one of the DATASETS; how: frames, crop, step, fps of Clips."""
    return Clips(*getattr(DATASETS[name].read(Path(root)), split), *how, name=name)


# ------------------------------------------------------------------------------ what commands share

HELD = []  # locks, which a loader's worker must not inherit


def write_file(path, content):
    """Write bytes so that a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path))  # the name that a user knows
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1).encode())


def read_json(path):
    """The dict that a JSON file holds, or an empty one. Raises ValueError for a damaged file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError):
        raise ValueError(f"{path} is damaged; put the whole file back, or delete it")


@contextlib.contextmanager
def locked(path):
    """Hold a folder or file for this process alone, until it ends, however that is."""
    handle = os.open(path, os.O_RDONLY)
    HELD.append(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work on {path}; wait, or stop it")
        yield
    finally:
        HELD.remove(handle)
        os.close(handle)


def command(program, smaller, stopped="stopped"):
    """Decorator of a command's main function: what its user can put right is said in one sentence;
    a bug of ours keeps its traceback. Exit status: what the function returns, else 0; 1 after such
    a sentence, 130 after Ctrl-C. smaller: the flags that decide how much memory it takes."""
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
    message = str(error).strip()
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
    return message.split("\n")[-1].removeprefix("ValueError: ")


# --------------------------------------------------- python data.py --check, python data.py --write


def inspect_file(path):
    """Height, width, number of frames and rate; or the reason why evaluation cannot read it."""
    try:
        video = read_video(path, lambda count, rate: evaluation_window(count, 16))
    except Unreadable as error:
        return str(error)
    return *video.frames.shape[1:3], video.count, video.rate


def inspect(title, paths, workers):
    """Read every file and print what there is to say: the median number of frames, 0 where a run on
    these files would stop."""
    results = [*tqdm(load(paths, workers, collate_fn=inspect_file), title, len(paths),
                     disable=None)]
    reasons = [each for each in results if isinstance(each, str)]
    facts = [*zip(*(each for each in results if not isinstance(each, str)))]
    for what, values in zip(("height", "width", "frames", "frames per second"), facts):
        print(f"    {what}: {min(values):.4g} to {max(values):.4g}")
    print(f"    unreadable: {len(reasons):,} (above {MAX_BROKEN:.0%}, a run stops)", *reasons[:5],
          sep="\n      ")
    return np.median(facts[2]) if facts and len(reasons) <= MAX_BROKEN * len(paths) else 0


def check(root, workers):
    """Print what lies in a folder, whole or broken, and the command that trains on it. Raises
    OSError where there is nothing to train on, ValueError where it makes no sense."""
    root, usable, missing = Path(root), {}, []
    for name, dataset in DATASETS.items():
        try:
            files = dataset.read(root)
        except FileNotFoundError as error:
            missing.append(f"{name}: not here. {error}")
            continue
        for split in "test", "train":
            paths, published = getattr(files, split).paths, getattr(dataset, split)
            print(f"{name}, {split}: {len(paths):,} of {published:,} published clips")
            usable[name] = inspect(f"{name} {split}", paths, workers)  # of train, last
    if usable:
        print(*missing, sep="\n")
    if usable.get("ucf101"):
        preset = "mixed" if all(map(usable.get, MIXED)) else "ucf101"
        return print(f"Train with: python train.py --preset {preset} --root '{root}'")
    paths, labels = own_videos(root)
    print(f"Videos of {root}, of every split: {len(paths):,}; "
          f"classes by their labels: {len(set(labels or ()))}")
    count = inspect("videos", paths, workers)
    if not count:
        raise ValueError(f"too many of the videos in {root} cannot be read")
    # At this step training spreads a clip over all of the median video, as evaluation does.
    print(f"Train on a CPU with: python train.py --data '{root}' "
          f"--frame-step {max(1, round(count / 8))}\n"
          f"Train on a GPU with: python train.py --preset mixed --data '{root}' "
          f"--frame-step {max(1, round(count / 16))}")


def write_dataset(folder, source, count, fps):
    """Write items 0 to count - 1 of a source into a new folder, and at last `videos.csv`."""
    import av
    folder, lines = Path(folder), []
    folder.mkdir(parents=True)
    for item in tqdm(range(count), f"writing to {folder}", disable=None):
        clip, label = source.video(item)
        with av.open(f"{folder}/{item:06d}.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.height, stream.width = clip.shape[2:]
            for frame in clip.permute(1, 2, 3, 0).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())
        lines.append(f"{item:06d}.mp4 {label}\n")
    (folder / "videos.csv").write_text("".join(lines))


@command("data.py", smaller="number of --workers")
def main(arguments=None):
    parser = argparse.ArgumentParser(description="Check a folder, or write generated clips.")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--check", help="the folder of the datasets, or your own videos")
    job.add_argument("--write", help="a new folder for generated clips")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read")
    parser.add_argument("--count", type=int, default=64, help="number of clips")
    flags = parser.parse_args(arguments)
    if flags.check:
        check(flags.check, flags.workers)
    else:
        write_dataset(flags.write, Shapes(16, 64, 0), flags.count, 8)


if __name__ == "__main__":
    sys.exit(main())
