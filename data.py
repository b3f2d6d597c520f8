"""Clips for training and evaluation: decoding, windows, transforms, batches, public datasets, your own lists.

    python data.py --check DIR    what of the four datasets lies in DIR, whole or broken, and what it can train

Nothing here knows the method. A source of clips, such as `Videos`, has
    len(source), source.name, source.paths, source.labels    labels: whole numbers from 0, or None
    source.clip(item, generator)        a random clip for training, uint8 [3, T, crop, crop]
    source.evaluation_clip(item)        the clip for evaluation, always the same, uint8 [3, T, crop, crop]
Generated clips cannot fail, and are made by the batch: `source.clips(items)`, uint8 [B, 3, T, crop, crop].
Clips stay uint8 until `normalise`: workers hand over, and the GPU copies, a quarter of the bytes.
"""
import argparse
import functools
import json
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2
from tqdm import tqdm

from synthetic import HELD, Blobs, command, number

# ------------------------------------------------------------------------------------------------------- decoding

# What is opened as a video: demuxers, none of which follows other files, with the suffixes of their files.
FORMATS = {"mov": ".mp4 .m4v .mov .3gp .3g2", "matroska": ".mkv .webm", "avi": ".avi", "mpeg": ".mpg .mpeg .vob",
           "mpegts": ".ts .mts .m2ts", "ogg": ".ogv", "flv": ".flv .f4v", "asf": ".wmv .asf", "gif": ".gif",
           "h264": ".h264", "hevc": ".hevc", "m4v": "", "mpegvideo": ".m2v"}
SUFFIXES = " ".join(FORMATS.values()).split()
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # Pillow would start Ghostscript for others
MOST_PIXELS = 7680 * 4320  # of a frame: a small file can hold huge ones


class Unreadable(Exception):
    """A video or an image that gives no clip."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), str(reason)


class Video(NamedTuple):
    """What was read of a file."""
    frames: np.ndarray  # uint8 [T, H, W, 3], RGB
    count: int  # frames in the whole file
    rate: float  # frames per second, averaged over the whole file


def read_video(path, choose):
    """Read frames of a video by number: `choose(count, rate)` is told its size and returns the numbers, ascending.

    Frame i is the i-th in order of presentation, however long each lasts. The file is passed over once without
    decoding, for the exact count, since many containers give none or a wrong one. Then comes one seek, to the last key
    frame before the first frame chosen, and the decoding of what lies between. That trusts the container's times and
    key frames; where the decoder finds otherwise, frames are counted by decoding from the start, in `from_start`.
    Raises Unreadable for a file that is missing, broken, or without the frames chosen.
    """
    import av  # only where a video is opened: all else runs without it
    found, missing = {}, []
    try:
        container, stream = open_video(path)
        with container:
            packets = [(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
                       for packet in container.demux(stream) if packet.size and not packet.is_corrupt]
            if not packets:
                raise Unreadable(path, "it holds no frames")
            times = sorted(time for time, _, _, cut_away in packets if not cut_away) if trusted(packets, stream) else []
            count, duration = len(times), (times[-1] - times[0]) * stream.time_base if times else 0
            rate = float((count - 1) / duration if duration else stream.average_rate or 1)
            if times:
                chosen = choose(count, rate)
                start = max((time for time, _, is_key, _ in packets if is_key and time <= times[chosen[0]]), default=None)
                found = decode_by_time(container, stream, start, {times[i]: i for i in chosen})
        if not times or len(found) < len(set(chosen)):
            count = count_from_start(path, os.path.getsize(path), os.stat(path).st_mtime_ns)
            chosen = choose(count, rate) if count else []
            found = decode_from_start(path, chosen)
            missing = [i for i in chosen if i not in found]
    except (av.FFmpegError, ValueError) as error:
        raise Unreadable(path, getattr(error, "strerror", None) or error) from None
    if missing or not found:
        raise Unreadable(path, f"frame {missing[0]} of {count} cannot be decoded" if missing else "no frame can be decoded")
    if len({picture.shape for picture in found.values()}) > 1:
        raise Unreadable(path, "its frames change in size")
    return Video(np.stack([found[i] for i in chosen]), count, rate)


def open_video(path):
    """The file as a PyAV container and its video stream."""
    import av
    if not Path(path).is_file():  # a pipe would be waited for
        raise Unreadable(path, "Is a directory" if Path(path).is_dir() else "No such file")
    # The prefix keeps it from taking a colon in a name for a protocol.
    container = av.open(f"file:{path}", metadata_errors="replace", options={"format_whitelist": ",".join(FORMATS)})
    streams = [stream for stream in container.streams.video  # a song's cover is an attached picture
               if not stream.disposition & av.stream.Disposition.attached_pic]
    best = container.streams.best("video")
    stream = best if best in streams else next(iter(streams), None)
    if stream is None or stream.codec_context is None:
        container.close()
        raise Unreadable(path, "it holds no video" if stream is None else "no decoder knows its video")
    if stream.codec_context.width * stream.codec_context.height > MOST_PIXELS:
        container.close()
        raise Unreadable(path, f"its frames have more than {MOST_PIXELS:,} pixels")
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # where the size changes later
    stream.codec_context.thread_count = 1  # the loader's workers are what runs in parallel
    return container, stream


def trusted(packets, stream):
    """Whether a container's times can be the identity and order of its frames, by its packets (pts, dts, key, cut)."""
    times, decoded = [time for time, _, _, _ in packets], [time for _, time, _, _ in packets if time is not None]
    in_order = None not in times and all(a < b for a, b in zip(times, times[1:]))
    return (None not in times and len(set(times)) == len(times)  # none missing, none twice
            and all(a <= b for a, b in zip(decoded, decoded[1:]))  # the clock does not start again
            and not (in_order and stream.codec_context.has_b_frames)  # they are not the order of decoding
            and packets[0][2] and times[0] == min(times))  # it begins with a key frame, and nothing is shown before that


def decode_by_time(container, stream, start, chosen):
    """Decode from the key frame at `start` the frames chosen, {time: number}: {number: RGB picture}.

    Ends with fewer where the decoder disagrees with the container: frames that do not ascend in time, or do not begin
    with a key picture.
    """
    import av
    context, awaited, found, last = stream.codec_context, set(chosen), {}, None
    if start is None:
        return found
    try:
        container.seek(start, stream=stream)
        context.open(strict=False)  # some decoders would keep to the first skip_frame that they see
        for packet in container.demux(stream):
            if not packet.size and packet.dts is not None:
                continue  # an empty packet repeats the frame before
            # A frame that nobody asked for, and that no other frame refers to, need not be decoded.
            context.skip_frame = "DEFAULT" if packet.pts in chosen else "NONREF"
            frames = context.decode(packet)
            awaited.discard(packet.pts)
            if not awaited:
                frames += context.decode(None)  # those that the decoder still holds back
            for frame in frames:
                agrees = frame.key_frame if last is None else frame.pts is not None and frame.pts > last
                if frame.is_corrupt or not agrees:
                    return found
                last = frame.pts
                if frame.pts in chosen:
                    found[chosen[frame.pts]] = upright(frame)
            if not awaited:
                break
    except av.FFmpegError:
        pass  # the seek, or a damaged frame: counting from the start says which
    return found


def from_start(path):
    """Every frame of a video in the order of the decoder; from the first good one on, None for a damaged one."""
    import av
    container, stream = open_video(path)
    with container:
        begun = False
        for packet in container.demux(stream):
            if not packet.size and packet.dts is not None:
                continue  # an empty packet repeats the frame before
            try:
                frames = stream.codec_context.decode(packet)
            except av.FFmpegError:
                frames = [None]
            for frame in frames:
                good = frame is not None and not frame.is_corrupt
                begun = begun or good
                if begun:
                    yield frame if good else None


@functools.lru_cache(maxsize=None)
def count_from_start(path, size, modified):
    """How many frames decoding finds, to the last good one. It is remembered while size and modified are the same."""
    return max((i + 1 for i, frame in enumerate(from_start(path)) if frame is not None), default=0)


def decode_from_start(path, chosen):
    """Decode to the last of the frames chosen by number, or to the first damaged one: {number: RGB picture}."""
    found = {}
    for i, frame in enumerate(from_start(path)):
        if frame is None or len(found) == len(set(chosen)):
            break
        if i in chosen:
            found[i] = upright(frame)
    return found


def upright(frame):
    """A decoded frame as uint8 [H, W, 3], RGB, turned as its rotation metadata says (mirroring is not undone)."""
    return np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90)


def read_image(path):
    """Read an image: uint8 [H, W, 3], RGB. Raises Unreadable for a file that is missing or broken.

    Grey becomes three equal channels, CMYK and palettes are converted, transparency is dropped, of 16 bits the upper
    eight stay, of an animation the first picture; EXIF orientation is left alone, as everywhere with ImageNet.
    """
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("No such file")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has more than {MOST_PIXELS:,} pixels")
            if image.mode.startswith("I"):  # Pillow would clip to the lower eight bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("P", "PA"):  # straight to RGB, Pillow warns of lost transparency
                image = image.convert("RGBA")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(path, getattr(error, "strerror", None) or error) from None


# ----------------------------------------------------------------------------------------------------- which frames


def spread(start, length, count):
    """floor(linspace(start, start + length, count)), in whole numbers so that no rounding interferes: a list."""
    return [start + i * length // max(count - 1, 1) for i in range(count)]


def window(n, frames, step, generator):
    """Frame numbers of a random clip from a video of n frames: one window of frames * step frames, or all there is.

    A window starts at 0 to n - length - 1. A video no longer than one gives floor(linspace(0, n, n // step)), then its
    last frame again and again.
    """
    length = frames * step
    if n > length:
        start = torch.randint(n - length, (), generator=generator).item()
        return [min(i, start + length - 1) for i in spread(start, length, frames)]
    numbers = [min(i, n - 1) for i in spread(0, n, n // step)]
    return numbers + [n - 1] * (frames - len(numbers))


def fps_step(rate, fps):
    """The frame step that leaves about `fps` frames per second of `rate`: ceil(rate) // fps, at least 1.

    Rates are measured, so they are rounded to a tenth first: 15.0016 is 15.
    """
    return max(1, math.ceil(round(rate, 1)) // fps)


def evaluation_window(n, frames):
    """Frame numbers spread evenly over a video of n frames; one shorter than the clip repeats its last frame."""
    return spread(0, n - 1, frames) if n >= frames else list(range(n)) + [n - 1] * (frames - n)


# -------------------------------------------------------------------------------------------------------- sources

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def normalise(clips):
    """uint8 [B, 3, T, H, W] -> float32 of the same shape on the same device, with ImageNet's mean and deviation."""
    # The constants stay Python numbers: a tensor of them would be copied to the GPU, and the copy waited for.
    return torch.stack([(clips[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)


def resize(pictures, size, how="bilinear"):
    """uint8 [T, 3, H, W] -> uint8 [T, 3, *size]: in float, rounded once, without antialiasing, as the study does it."""
    return F.interpolate(pictures.float(), size, mode=how).round().to(torch.uint8)


class Videos:
    """Clips of video files.

    step: frames of the video from one frame of a clip to the next; fps, if not 0, sets it by each video's average rate.
    """

    def __init__(self, paths, labels, frames, crop, step=1, fps=0, name="videos"):
        self.paths, self.labels, self.name = [str(path) for path in paths], labels, name
        self.frames, self.crop, self.step, self.fps = frames, crop, step, fps

    def __len__(self):
        return len(self.paths)

    def clip(self, item, generator):
        """A random window, crop and flip of a video: uint8 [3, T, crop, crop]."""
        def choose(count, rate):
            return window(count, self.frames, fps_step(rate, self.fps) if self.fps else self.step, generator)

        pictures = self.read(item, choose)
        seed = torch.randint(2 ** 62, (), generator=generator).item()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(pictures, scale=(0.3, 1.0), ratio=(0.75, 1.35))
            flip = torch.rand(()) < 0.5
        pictures = resize(pictures[..., top:top + height, left:left + width], (self.crop, self.crop))
        return self.finish(pictures.flip(-1) if flip else pictures)

    def evaluation_clip(self, item):
        """Frames from all of a video, the short side resized to the crop, its centre: uint8 [3, T, crop, crop]."""
        pictures = self.read(item, lambda count, rate: evaluation_window(count, self.frames))
        return self.finish(v2.functional.center_crop(self.shrink(pictures), [self.crop, self.crop]))

    def shrink(self, pictures):
        height, width = pictures.shape[-2:]
        return resize(pictures, [self.crop * side // min(height, width) for side in (height, width)])

    def read(self, item, choose):
        """Frames of one file: uint8 [T, 3, H, W]."""
        return torch.from_numpy(read_video(self.paths[item], choose).frames).permute(0, 3, 1, 2)

    def finish(self, pictures):
        """[T or 1, 3, crop, crop] -> [3, T, crop, crop]."""
        return pictures.transpose(0, 1).expand(-1, self.frames, -1, -1).contiguous()


class Images(Videos):
    """Clips of image files: each stands still for all of the clip, whatever step or fps."""

    def read(self, item, choose):
        return torch.from_numpy(read_image(self.paths[item])).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W)

    def shrink(self, pictures):
        return v2.functional.resize(pictures, self.crop, InterpolationMode.BICUBIC)  # as usual with ImageNet


CLEAN_BLOBS = 10_042  # the seed of the first evaluation clip that no training clip shares its looks with


class BlobVideos(Videos):
    """The study's generated clips, `synthetic.Blobs`; for evaluation their first frames as they are, 160x160."""

    def __init__(self, frames, crop, step=1, fps=0, items=range(10_000), first=0, directions=False):
        self.blobs = Blobs(first, directions)
        labels = [item % len(Blobs.MOVES) for item in items]
        super().__init__(items, labels, frames, crop, step, fps, "blobs")

    def read(self, item, choose):
        clip, _ = self.blobs.video(self.paths[item])
        return clip.transpose(0, 1)[list(choose(self.blobs.FRAMES, self.blobs.FPS))]

    def evaluation_clip(self, item):
        return self.finish(self.read(item, lambda count, rate: range(self.frames)))


def read_all(items, source):
    """Clips of these items as evaluation sees them, or for each that cannot be read the sentence that says why."""
    clips = []
    for item in items:
        try:
            clips.append(source.evaluation_clip(item))
        except Unreadable as error:
            clips.append(str(error))
    return clips


# -------------------------------------------------------------------------------------------------------- batches

MAX_UNREADABLE = 100  # in a row
MAX_BROKEN = 0.05  # the share of unreadable files with which a run may go on
ORDER, CLIP, MASK, SIZE = range(4)  # what random numbers are for: no two uses share a generator


def generator_for(*numbers):
    """A generator that depends on all of these whole numbers (from 0), and on their order."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


class Batches:
    """One item per training step, a function of seed and step alone, so that a resumed run goes on as it would have.

    batches[step] -> a list of micro-batches: uint8 clips [micro_batch, 3, T, H, W] and their masks,
    make_masks(clips, positions, sizes), two generators. Micro-batch j of a step draws the positions of its blocks from
    (seed, step, j) and their sizes from (seed, step), so that all of a step have equal ones; the ranks of a distributed
    run share the micro-batches of a step, which are the same however many ranks there are. Clips are drawn with
    replacement: first the source, by weight, then any of its items; generated ones are new each time.
    In the place of a file that cannot be read another of the same source is taken; a line "dataset, path, reason" in
    the file `unreadable` says so. Raises ValueError where batch, micro-batch and ranks do not fit.
    """

    def __init__(self, sources, weights, config, make_masks, rank=0, ranks=1):
        size = config.micro_batch or max(1, config.batch // ranks)
        if config.batch % (size * ranks):
            raise ValueError(f"a batch of {config.batch} is not a multiple of {ranks} ranks x a micro-batch of {size}; "
                             "change --batch or --micro-batch")
        self.sources, self.size, self.seed, self.make_masks = sources, size, config.seed, make_masks
        self.unreadable, self.alike = Path(config.out, "unreadable.txt"), config.as_released
        each = config.batch // (size * ranks)  # micro-batches of a rank
        self.mine, self.batch, self.steps = range(rank * each, (rank + 1) * each), config.batch, config.steps
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.lengths = torch.tensor([len(source) for source in sources])

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        draw = generator_for(self.seed, ORDER, step, 0)
        sources = torch.multinomial(self.weights, self.batch, replacement=True, generator=draw)
        items = (torch.rand(self.batch, dtype=torch.float64, generator=draw) * self.lengths[sources]).long()
        micro_batches = []
        for j in self.mine:
            places = range(j * self.size, (j + 1) * self.size)  # in the batch of the step
            if hasattr(self.sources[0], "clips"):
                clips = self.sources[0].clips([step * self.batch + place for place in places])
            else:
                clips = torch.stack([
                    self.readable_clip(self.sources[sources[place]], items[place].item(),
                                       generator_for(self.seed, CLIP, step, place)) for place in places])
            # The released code draws the same positions on every GPU (README, departure 11).
            positions = generator_for(self.seed, MASK, step, 0 if self.alike else j)
            micro_batches.append((clips, self.make_masks(clips, positions, generator_for(self.seed, SIZE, step, 0))))
        return micro_batches

    def readable_clip(self, source, item, generator):
        """A clip of this item, or of the first other one that can be read."""
        for _ in range(MAX_UNREADABLE):
            try:
                return source.clip(item, generator)
            except Unreadable as error:
                # In any worker of any rank: whole lines at the end of a file do not mix.
                with open(self.unreadable, "a", encoding="utf-8", errors="surrogateescape") as file:  # any file name
                    file.write(f"{source.name}\t{error.path}\t{error.reason}\n")
                item, last = torch.randint(len(source), (), generator=generator).item(), error
        raise ValueError(f"{MAX_UNREADABLE} files of {source.name} in a row cannot be read, the last is {last}")


def start_worker(_):
    """A loader's worker leaves Ctrl-C and SIGTERM to the run, which saves and then ends it; and it keeps no lock."""
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_of_signal, signal.SIG_IGN)
    for handle in HELD:
        os.close(handle)


def loader(batches, start=0, workers=0, device=torch.device("cpu")):
    """The batches from step `start` on, prepared by so many processes (their torch runs one thread each), in memory
    that the device copies from while it computes."""
    # With a generator of its own, the loader leaves the global one alone: a resumed run must not find it moved.
    return DataLoader(batches, batch_size=None, sampler=range(start, len(batches)), num_workers=workers,
                      worker_init_fn=start_worker, pin_memory=device.type == "cuda", generator=torch.Generator())


# --------------------------------------------------------------------------------------------------- your own videos

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv")
LINE = re.compile(r'"?([^"]+?\.\w+)"?(?:[\s,]+"?(\d+)"?)?')


class Split(NamedTuple):
    paths: list
    labels: list  # whole numbers from 0; None where there are none


def own_videos(path):
    """The videos of a list file, or all videos below a folder, as a Split.

    A line of a list is `path` or `path label`, separated by a comma, a tab or spaces. The label is the whole number at
    its end; all before it is the path, which ends in a suffix like .mp4, may hold spaces and commas, may stand in
    double quotes, and is relative to the list's folder. Empty lines are skipped.
    Raises FileNotFoundError where there is nothing, ValueError for a wrong line (with its number).
    """
    path = Path(path)
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"there is no video ({', '.join(SUFFIXES)}) in or below {path}")
        return Split(paths, None)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it should be a list of videos, or a folder of them")
    paths, labels = [], []
    for i, line in text_lines(path):
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {i} of {path} is neither `path` nor `path label`: {line}")
        if paths and (match[2] is None) != (labels[0] is None):
            raise ValueError(f"line {i} of {path} has {'no' if match[2] is None else 'a'} label, unlike the lines before "
                             f"it: {line}")
        paths.append(path.parent / match[1])
        labels.append(match[2] and int(match[2]))
    if not any(map(os.path.exists, paths)):
        raise FileNotFoundError(f"{path} lists no video that exists" + (
            f"; the first is looked for at {paths[0]}" if paths else ""))
    return Split(paths, None if labels[0] is None else labels)


def text_lines(path):
    """(line number, line) of every line of a text file that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    return [(i, line.strip()) for i, line in enumerate(lines, start=1) if line.strip()]


# --------------------------------------------------------------------- the four datasets, as their publishers ship them


class Files(NamedTuple):
    """The files of a dataset on disk."""
    train: Split
    test: Split
    classes: list  # class names in the order of their labels


def first_there(folder, *names):
    """The path of the first of these names that exists in a folder. Raises FileNotFoundError where none does."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]} is missing")


def read_split(path, parse):
    """A publisher's list: parse(line of text, or item of JSON) -> (path, label), as a Split."""
    entries = text_lines(path)
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entries = enumerate(content.items() if isinstance(content, dict) else list(content), start=1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not JSON as its publisher writes it: {error}") from None
    split = Split([], [])
    for number, entry in entries:
        try:
            item, label = parse(entry)
        except (IndexError, KeyError, TypeError, ValueError):
            raise ValueError(f"entry {number} of {path} is not as its publisher writes it: {entry}") from None
        split.paths.append(item)
        split.labels.append(label)
    if not split.paths:
        raise ValueError(f"{path} lists nothing")
    return split


def ucf101(root):
    videos = first_there(root, "UCF-101")
    index, train, test = (first_there(root / "ucfTrainTestlist", f"{name}.txt")
                          for name in ("classInd", "trainlist01", "testlist01"))
    label = dict(zip(*read_split(index, lambda line: (line.split()[1], int(line.split()[0]) - 1))))

    def parse(line):  # "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"; test lines lack the number
        name = line.split()[0]
        return videos / name, label[name.split("/")[0]]
    return Files(read_split(train, parse), read_split(test, parse), sorted(label, key=label.get))


def ssv2(root):
    videos = first_there(root, "20bn-something-something-v2")
    index, train, test = (first_there(root, f"{name}.json", f"labels/{name}.json")
                          for name in ("labels", "train", "validation"))
    label = dict(zip(*read_split(index, lambda item: (item[0], int(item[1])))))

    def parse(entry):  # its template is a class name with brackets: "Pushing [something]"
        return videos / f"{entry['id']}.webm", label[entry["template"].replace("[", "").replace("]", "")]
    return Files(read_split(train, parse), read_split(test, parse), sorted(label, key=label.get))


def imagenet100(root):
    train, test = ImageFolder(first_there(root, "train")), ImageFolder(first_there(root, "val", "validation"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{train.root} and {test.root} should hold the same classes; only one has {odd[0]}")
    return Files(*(Split(*map(list, zip(*folder.samples))) for folder in (train, test)), train.classes)


def diving48(root):
    videos, vocabulary = first_there(root, "rgb"), root / "Diving48_vocab.json"
    classes = [str(label) for label in range(48)]
    if vocabulary.exists():
        classes, _ = read_split(vocabulary, lambda words: (" ".join(words), None))

    def parse(entry):
        return videos / f"{entry['vid_name']}.mp4", range(len(classes))[entry["label"]]
    return Files(*(read_split(first_there(root, f"Diving48_V2_{split}.json"), parse) for split in ("train", "test")),
                 classes)


class PublicDataset(NamedTuple):
    title: str
    marker: str  # a name that tells its folder
    read: Callable  # folder -> Files
    train: int  # published counts
    test: int
    source: type

    def files(self, root):
        """Its files in a folder, or in one folder below. Raises FileNotFoundError where something is missing."""
        root = Path(root)
        places = [path.parent for path in [*root.glob(self.marker), *sorted(root.glob(f"*/{self.marker}"))]]
        if len(places) > 1 and places[0] != root:
            raise ValueError(f"both {places[0]} and {places[1]} hold {self.marker}; give one of them as --root, or "
                             "move one")
        try:
            return self.read(places[0] if places else root)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; README.md, 'The study's datasets', says what belongs to {self.title} and "
                                    "who offers it") from None


DATASETS = {
    "ucf101": PublicDataset("UCF-101, split 1", "UCF-101", ucf101, 9_537, 3_783, Videos),
    "ssv2": PublicDataset("Something-Something V2", "20bn-something-something-v2", ssv2, 168_913, 24_777, Videos),
    "imagenet100": PublicDataset("ImageNet-100", "train", imagenet100, 126_689, 5_000, Images),
    "diving48": PublicDataset("Diving-48 V2", "Diving48_V2_train.json", diving48, 15_027, 1_970, Videos),
}
MIXED = {"ucf101": 0.2, "ssv2": 0.6, "imagenet100": 0.2}  # the study's mixed regime: how often each is drawn


def open_dataset(name, root, split, *how):
    """The "train" or "test" split of one of the DATASETS as a source. how: frames, crop, step and fps of `Videos`."""
    return DATASETS[name].source(*getattr(DATASETS[name].files(root), split), *how, name=name)


# ------------------------------------------------------------------------------------------------- python data.py


def inspect_file(path, source):
    """Reads a file as evaluation does: height, width, for videos frames and rate; or the reason why it cannot."""
    try:
        if source is Images:
            return read_image(path).shape[:2]
        video = read_video(path, lambda count, rate: evaluation_window(count, 16))
        return *video.frames.shape[1:3], video.count, video.rate
    except Unreadable as error:
        return str(error)


def inspect(title, paths, source, workers):
    """Read every file and print what there is to say. Returns whether a run on these files would go through."""
    results = DataLoader(paths, batch_size=None, num_workers=workers,
                         collate_fn=functools.partial(inspect_file, source=source))
    results = list(tqdm(results, desc=title, unit="file", leave=False))
    reasons = [result for result in results if isinstance(result, str)]
    facts = zip(*(result for result in results if not isinstance(result, str)))
    for what, values in zip(("height", "width", "frames", "frames per second"), facts):
        print(f"    {what}: {min(values):.4g} to {max(values):.4g}")
    print(f"    unreadable: {len(reasons):,}", *reasons[:5], sep="\n      ")
    if len(reasons) > MAX_BROKEN * len(paths):
        print(f"    More than {MAX_BROKEN:.0%} cannot be read: a run would stop.")
    return len(reasons) <= MAX_BROKEN * len(paths)


def check(root, workers):
    """Print what lies in a folder, whole or broken, and the command that trains on it.

    Raises OSError where there is nothing to train on, ValueError where what there is makes no sense.
    """
    root, usable = Path(root), {}
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one that holds the datasets, or your own videos")
    for name, dataset in DATASETS.items():
        try:
            files = dataset.files(root)
        except FileNotFoundError as missing:
            print(f"{dataset.title}: not here. {missing}")
            continue
        print(f"{dataset.title}: {len(files.classes)} classes")
        for split, published in (("test", dataset.test), ("train", dataset.train)):
            paths = getattr(files, split).paths
            print(f"  {split}: {len(paths):,} of {published:,} published clips")
            usable[name] = inspect(f"{name} {split}", paths, dataset.source, workers)  # that of "train" stays
    flags = f"--preset mixed --root {shlex.quote(str(root))}"
    if not all(usable.get(name) for name in MIXED):
        flags = flags.replace("mixed", "ucf101")
        if not usable.get("ucf101"):
            paths, _ = own_videos(root)
            print(f"Videos below {root}, of every split: {len(paths):,}")
            if not inspect("videos", paths, Videos, workers):
                raise ValueError(f"too many of the videos in {root} cannot be read")
            flags = f"--data {shlex.quote(str(root))}"
    print(f"Train with: python train.py {flags}")


@command("data.py", smaller="number of --workers")
def main(arguments=None):
    parser = argparse.ArgumentParser(description="Check the datasets in a folder.", allow_abbrev=False)
    parser.add_argument("--check", metavar="DIR", required=True, help="the folder that holds the datasets")
    parser.add_argument("--workers", type=number(1), default=min(8, os.cpu_count()),
                        help="processes that read (%(default)s)")
    flags = parser.parse_args(arguments)
    check(flags.check, flags.workers)


if __name__ == "__main__":
    sys.exit(main())
