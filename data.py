"""Clips for training and evaluation: decoding, windows, transforms, batches, the four public datasets, one's own lists.

    python data.py --check DIR    what of the four datasets lies in DIR, whole or broken, and what it can train

A source of clips is anything with these members, such as `Videos` and `Images` (a `Mixture` is for training only):
    len(source), source.labels          items; one whole number for each, or None
    source.order(count, generator)      the items that a whole run sees, LongTensor [count]
    source.clip(item, generator)        a random clip for training, uint8 [3, T, crop, crop]
    source.evaluation_clip(item)        the clip for evaluation, always the same, uint8 [3, T, crop, crop]
    source.another(item, generator)     an item to take the place of one that cannot be read
    source.where(item)                  the name of its dataset, and its path
Clips that are generated, and cannot fail, need len, order and `source.clips(items)`, uint8 [B, 3, T, crop, crop].

Clips stay uint8 until `normalise`: workers hand over, and the GPU copies, a quarter of the bytes.
"""
import json
import math
import os
import re
import shlex
import sys
import time
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from synthetic import Blobs, Parser, at_least, command

# ------------------------------------------------------------------------------------------------------- decoding


class Unreadable(Exception):
    """A video or an image that gives no clip."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), str(reason)


class Pictures(NamedTuple):
    """What was read of one file."""
    frames: np.ndarray  # uint8 [T, H, W, 3], RGB
    count: int = 1  # frames in the whole file
    rate: float = 1.0  # frames per second, averaged over the whole file


def read_video(path, choose):
    """Read frames of a video by number: `choose(count, rate)` is told its size and returns the numbers, ascending.

    Frame i is the i-th in order of presentation, however long each of them lasts. The file is passed over once without
    decoding, for the exact count, since many containers give none or a wrong one. Then comes one seek, to the last
    key frame before the first frame chosen, and the decoding of what lies between.
    Raises Unreadable for a file that is missing, broken, or without the frames chosen.
    """
    import av  # only where a video is opened: all else runs without it
    try:
        container, stream = open_video(path)
        with container:
            packets = [(packet.pts, packet.is_keyframe, packet.is_discard) for packet in container.demux(stream)
                       if packet.size and not packet.is_corrupt]
            times = [time for time, _, cut_away in packets if not cut_away]  # an edit list may cut frames away
            count = len(times)
            if not count:
                raise Unreadable(path, "it holds no frames")
            # AVI knows no times of presentation. Those made up for it fail where frames are stored out of order.
            timed = None not in times and not (container.format.name == "avi" and stream.codec_context.has_b_frames)
            times = sorted(times) if timed else range(count)
            rate = average_rate(stream, times if timed else None)
            chosen = [times[i] for i in choose(count, rate)]
            found = {}
            if timed:
                key_times = [time for time, is_key, _ in packets if is_key and time <= chosen[0]]
                container.seek(max(key_times, default=times[0]), stream=stream)
                found = decode_by_time(container, stream, set(chosen))
        if len(found) < len(set(chosen)):  # also where the key frame was no clean entry
            container, stream = open_video(path)
            with container:
                found = (decode_by_time if timed else decode_by_number)(container, stream, set(chosen))
    except (av.FFmpegError, ValueError) as error:
        raise Unreadable(path, getattr(error, "strerror", None) or error) from None
    missing = [i for i, time in enumerate(times) if time in chosen and time not in found]
    if missing:
        raise Unreadable(path, f"frame {missing[0]} of {count} cannot be decoded")
    if len({picture.shape for picture in found.values()}) > 1:
        raise Unreadable(path, "its frames change in size")
    return Pictures(np.stack([found[time] for time in chosen]), count, rate)


def open_video(path):
    """The file as a PyAV container and its video stream."""
    import av
    # The prefix keeps it from taking a colon in a name for a protocol, and from following a playlist to the network.
    container = av.open(f"file:{path}", metadata_errors="replace")
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        container.close()
        raise Unreadable(path, "it holds no video" if stream is None else "no decoder knows its video")
    stream.codec_context.thread_count = 1  # the loader's workers are what runs in parallel
    return container, stream


def average_rate(stream, times):
    """Frames per second: the average over the frames' times; else what the container says; else 1."""
    duration = (times[-1] - times[0]) * stream.time_base if times else 0
    return float((len(times) - 1) / duration if duration else stream.average_rate or 1)


def decode_by_time(container, stream, chosen):
    """Decode from where the container stands to the last of the frames chosen by their times: {time: RGB picture}."""
    context, awaited, found = stream.codec_context, set(chosen), {}
    context.open(strict=False)  # some decoders would keep to the first skip_frame that they see
    for packet in container.demux(stream):
        # A frame that nobody asked for, and that no other frame refers to, need not be decoded.
        context.skip_frame = "DEFAULT" if packet.pts in chosen else "NONREF"
        frames = context.decode(packet)
        awaited.discard(packet.pts)
        if not awaited:
            frames += context.decode(None)  # those that the decoder still holds back
        for frame in frames:
            if frame.is_corrupt:  # and so is what builds on it
                return found
            if frame.pts in chosen:
                found[frame.pts] = upright(frame)
        if not awaited:
            break
    return found


def decode_by_number(container, stream, chosen):
    """Decode from the start of the container to the last of the frames chosen by number: {number: RGB picture}."""
    found = {}
    for i, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            break
        if i in chosen:
            found[i] = upright(frame)
        if len(found) == len(chosen):
            break
    return found


def upright(frame):
    """A decoded frame as uint8 [H, W, 3], RGB, turned as its rotation metadata says (mirroring is not undone)."""
    return np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90)


def read_image(path):
    """Read an image as one RGB picture.

    Grey becomes three equal channels, CMYK and palettes are converted, transparency is dropped, of 16 bits the upper
    eight stay, of an animation the first picture; EXIF orientation is left alone, as everywhere with ImageNet.
    Raises Unreadable for a file that is missing or broken.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # Pillow would clip to the lower eight bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("P", "PA"):  # straight to RGB, Pillow warns of lost transparency
                image = image.convert("RGBA")
            return Pictures(np.array(image.convert("RGB"))[None])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(path, getattr(error, "strerror", None) or error) from None


# ----------------------------------------------------------------------------------------------------- which frames


def spread(start, length, count):
    """floor(linspace(start, start + length, count)), in whole numbers so that no rounding interferes: a list."""
    return [start + i * length // max(count - 1, 1) for i in range(count)]


def window(n, frames, step, generator):
    """Frame numbers of a random clip from a video of n frames: one window of frames * step frames, or all there is.

    A video no longer than the window gives floor(linspace(0, n, n // step)), then its last frame again and again.
    """
    length = frames * step
    if n > length:
        start = torch.randint(n - length + 1, (), generator=generator).item()
        return [min(i, start + length - 1) for i in spread(start, length, frames)]
    numbers = [min(i, n - 1) for i in spread(0, n, n // step)]
    return numbers + [n - 1] * (frames - len(numbers))


def fps_step(rate, fps):
    """The frame step that leaves about `fps` frames per second of `rate`: ceil(rate) // fps, at least 1."""
    return max(1, math.ceil(rate) // fps)


def evaluation_window(n, frames):
    """Frame numbers spread evenly over a video of n frames; one shorter than the clip repeats its last frame."""
    return spread(0, n - 1, frames) if n >= frames else list(range(n)) + [n - 1] * (frames - n)


# -------------------------------------------------------------------------------------------------------- sources

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def normalise(clips):
    """uint8 [B, 3, T, H, W] -> float32 of the same shape on the same device, with ImageNet's mean and deviation."""
    # The constants stay Python numbers: a tensor of them would be copied to the GPU, and the copy waited for.
    return torch.stack([(clips[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)


class Videos:
    """Clips of video files.

    step: frames of the video from one frame of a clip to the next; fps, if given, sets it by each video's average rate.
    """
    resize_for_evaluation = InterpolationMode.BILINEAR

    def __init__(self, paths, labels, frames, crop, step=1, fps=None, name="videos"):
        self.paths, self.labels, self.name = [str(path) for path in paths], labels, name
        self.frames, self.step, self.fps = frames, step, fps
        self.transform = v2.Compose([v2.RandomResizedCrop(crop, scale=(0.3, 1.0), ratio=(0.75, 1.35)),
                                     v2.RandomHorizontalFlip(0.5)])
        self.evaluation_transform = v2.Compose([v2.Resize(crop, self.resize_for_evaluation), v2.CenterCrop(crop)])

    def __len__(self):
        return len(self.paths)

    def where(self, item):
        return self.name, self.paths[item]

    def order(self, count, generator):
        """One epoch after the other, each freshly shuffled: LongTensor [count]."""
        epochs = [torch.randperm(len(self), generator=generator) for _ in range(math.ceil(count / len(self)))]
        return torch.cat(epochs)[:count]

    def another(self, item, generator):
        return torch.randint(len(self), (), generator=generator).item()

    def clip(self, item, generator):
        def choose(count, rate):
            step = self.step if self.fps is None else fps_step(rate, self.fps)
            return window(count, self.frames, step, generator)

        pictures = self.read(self.paths[item], choose)
        seed = torch.randint(2 ** 62, (), generator=generator).item()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            return self.finish(self.transform(pictures))

    def evaluation_clip(self, item):
        pictures = self.read(self.paths[item], lambda count, rate: evaluation_window(count, self.frames))
        return self.finish(self.evaluation_transform(pictures))

    def read(self, path, choose):
        """Pictures as torchvision wants them, uint8 [T, 3, H, W]; it then crops, resizes and flips them all alike."""
        return torch.from_numpy(read_video(path, choose).frames).permute(0, 3, 1, 2)

    def finish(self, pictures):
        """[T or 1, 3, crop, crop] -> [3, T, crop, crop]."""
        return pictures.transpose(0, 1).expand(-1, self.frames, -1, -1).contiguous()


class Images(Videos):
    """Clips of image files: each stands still for all of the clip, whatever step or fps."""
    resize_for_evaluation = InterpolationMode.BICUBIC

    def read(self, path, choose):
        return torch.from_numpy(read_image(path).frames).permute(0, 3, 1, 2)


class BlobVideos(Videos):
    """The study's generated clips (`synthetic.Blobs`), cropped, resized and flipped as video files are."""

    def __init__(self, seed, frames, crop, step=1, fps=None, count=10_000):
        self.blobs = Blobs(seed)
        labels = [self.blobs.label(item) for item in range(count)]
        super().__init__(range(count), labels, frames, crop, step, fps, "blobs")

    def evaluation_clip(self, item):
        return self.finish(self.evaluation_transform(self.read(item, lambda count, rate: range(self.frames))))

    def read(self, path, choose):
        clip, _ = self.blobs.video(int(path))
        return clip[:, list(choose(self.blobs.FRAMES, self.blobs.FPS))].transpose(0, 1)


class Mixture:
    """Several sources to train on, each drawn by its weight. Items are counted through all of them."""
    labels = None

    def __init__(self, sources, weights):
        self.sources, self.weights = sources, torch.tensor(list(weights), dtype=torch.float64)
        self.starts = [0, *accumulate(len(source) for source in sources)]

    def __len__(self):
        return self.starts[-1]

    def order(self, count, generator):
        """First the source, by weight, then any of its items, all with replacement: LongTensor [count]."""
        source = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        start, end = torch.tensor(self.starts[:-1])[source], torch.tensor(self.starts[1:])[source]
        share = torch.rand(count, dtype=torch.float64, generator=generator)
        return start + (share * (end - start)).long()

    def locate(self, item):
        """The source that an item belongs to, its first item, and the item's number in there."""
        i = bisect_right(self.starts, item) - 1
        return self.sources[i], self.starts[i], item - self.starts[i]

    def another(self, item, generator):
        source, start, local = self.locate(item)  # of the same source, so that the mixture stays what it is
        return start + source.another(local, generator)

    def where(self, item):
        source, _, local = self.locate(item)
        return source.where(local)

    def clip(self, item, generator):
        source, _, local = self.locate(item)
        return source.clip(local, generator)


# -------------------------------------------------------------------------------------------------------- batches

MAX_UNREADABLE = 100  # in a row
ORDER, CLIP, MASK, SIZE = range(4)  # what random numbers are for: no two uses share a generator


def generator_for(*numbers):
    """A generator that depends on all of these whole numbers (from 0), and on their order."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


class Batches(Dataset):
    """One item per training step, a function of seed and step alone, so that a resumed run goes on as it would have.

    batches[step] -> clips uint8 [batch / ranks, 3, T, H, W], masks = draw_masks(clips, generator, sizes=None), and the
    list of (dataset, path, reason) of what could not be read; another item of the same dataset took its place. The
    ranks of a distributed run share the batch of a step: its clips are the same however many ranks there are, and
    `sizes` is a generator that all ranks have alike, None where there is one.
    Raises ValueError where the batch does not fit the data or the ranks.
    """

    def __init__(self, source, batch, steps, seed, draw_masks, rank=0, ranks=1):
        if batch > len(source):
            raise ValueError(f"a batch of {batch} is larger than the data, {len(source)} clips; choose a smaller one")
        if batch % ranks:
            raise ValueError(f"a batch of {batch} does not divide among {ranks} ranks; choose a multiple of {ranks}")
        self.source, self.seed, self.draw_masks, self.rank, self.ranks = source, seed, draw_masks, rank, ranks
        self.places = range(rank * batch // ranks, (rank + 1) * batch // ranks)  # this rank's, in the batch of a step
        self.items = source.order(steps * batch, generator_for(seed, ORDER, 0, 0)).view(steps, batch)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, step):
        broken = []
        items = self.items[step, self.places.start:self.places.stop]
        if hasattr(self.source, "clips"):
            clips = self.source.clips(items)
        else:
            clips = torch.stack([self.readable_clip(item, generator_for(self.seed, CLIP, step, place), broken)
                                 for item, place in zip(items.tolist(), self.places)])
        sizes = generator_for(self.seed, SIZE, step, 0) if self.ranks > 1 else None
        return clips, self.draw_masks(clips, generator_for(self.seed, MASK, step, self.rank), sizes=sizes), broken

    def readable_clip(self, item, generator, broken):
        """A clip of this item, or of the first other one that can be read; those that cannot go into `broken`."""
        for _ in range(MAX_UNREADABLE):
            try:
                return self.source.clip(item, generator)
            except Unreadable as error:
                broken.append((*self.source.where(item), error.reason))
                item = self.source.another(item, generator)
        dataset, path, reason = broken[-1]
        raise ValueError(f"{MAX_UNREADABLE} files of {dataset} in a row cannot be read, the last is {path}: {reason}")


def loader(batches, start=0, workers=0, device=torch.device("cpu")):
    """The batches from step `start` on, prepared by so many processes (their torch runs one thread each), in memory
    that the device copies from while it computes."""
    # With a generator of its own, the loader leaves the global one alone: a resumed run must not find it moved.
    return DataLoader(batches, batch_size=None, sampler=range(start, len(batches)), num_workers=workers,
                      pin_memory=device.type == "cuda", generator=torch.Generator())


MAX_BROKEN = 0.05  # the share of unreadable files with which a run may go on


class Broken:
    """What could not be read since a process began, counted by dataset."""

    def __init__(self):
        self.clips, self.counts, self.files = 0, Counter(), {}

    def add(self, broken, clips):
        """broken: the list that came with a batch of so many clips."""
        self.clips += clips
        for dataset, path, reason in broken:
            self.counts[dataset] += 1
            self.files.setdefault(path, (dataset, reason))

    def over_ranks(self):
        """The same for all ranks of a distributed run together; each of them has to call it."""
        if not dist.is_initialized():
            return self
        ranks, total = [None] * dist.get_world_size(), Broken()
        dist.all_gather_object(ranks, self)
        for each in ranks:
            total.clips += each.clips
            total.counts += each.counts
            total.files |= each.files
        return total

    @property
    def share(self):
        """Unreadable among all that was drawn."""
        failed = self.counts.total()
        return failed / max(1, failed + self.clips)

    def __str__(self):
        return ", ".join(f"{count:,} of {dataset}" for dataset, count in sorted(self.counts.items())) or "none"

    def write(self, folder, first=100):
        """The first files by name, each a line with dataset and reason, to `unreadable.txt`, if there are any.

        What the file holds of the run before it was resumed stays.
        """
        path, how = Path(folder, "unreadable.txt"), {"encoding": "utf-8", "errors": "surrogateescape"}  # any file name
        before = path.read_text(**how).splitlines(keepends=True) if path.exists() else []
        lines = [f"{dataset}\t{name}\t{reason}\n" for name, (dataset, reason) in self.files.items()]
        lines = list(dict.fromkeys([*before, *lines]))[:first]  # each once
        if lines != before:
            path.write_text("".join(lines), **how)


# ------------------------------------------------------------------------------------------ videos of one's own

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv")
LINE = re.compile(r'"?([^"]+?\.\w+)"?(?:[\s,;]+(\d+))?')


class Split(NamedTuple):
    paths: list
    labels: list  # whole numbers from 0; None where there are none


def own_videos(path):
    """The videos of a list file, or all videos below a folder, as a Split.

    A line of a list is `path` or `path label`, separated by a comma, a semicolon, a tab or spaces. The label is the
    whole number at its end; all before it is the path, which ends in a suffix like .mp4, may hold spaces and commas,
    may stand in double quotes, and is relative to the list's folder. Empty lines are skipped.
    Raises FileNotFoundError where there is nothing, ValueError for a wrong line (with its number).
    """
    path = Path(path)
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"no video ({', '.join(SUFFIXES)}) lies in or below {path}")
        return Split(paths, None)
    paths, labels = [], []
    for number, line in text_lines(path, "a list of videos, or a folder of them"):
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number} of {path} is neither `path` nor `path label`: {line}")
        if paths and (match[2] is None) != (labels[0] is None):
            raise ValueError(f"line {number} of {path} has {'no' if match[2] is None else 'a'} label, unlike the lines "
                             f"before it: {line}")
        paths.append(path.parent / match[1])
        labels.append(None if match[2] is None else int(match[2]))
    if not any(map(os.path.exists, paths)):
        raise FileNotFoundError(f"{path} lists no video that exists" + (
            f"; the first is looked for at {paths[0]}" if paths else ""))
    return Split(paths, None if labels[0] is None else labels)


def text_lines(path, what):
    """(number, line) of every line of a text file that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; it should be {what}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8; it should be {what}") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


# --------------------------------------------------------------------- the four datasets, as their publishers ship them


class Files(NamedTuple):
    """The files of a dataset on disk."""
    train: Split
    test: Split
    classes: list  # class names in the order of their labels


def home(root, name):
    """The folder that holds a dataset, told by one of its pieces: the root itself, or a folder in it."""
    if (root / name).exists():
        return root
    places = [place.parent for place in sorted(root.glob(f"*/{name}"))]
    if len(places) > 1:
        raise ValueError(f"both {places[0]} and {places[1]} hold {name}; give the folder of one as --root, or move one")
    return places[0] if places else root


def piece(folder, names, holds, publisher):
    """Where a piece of a dataset lies, under any of its names. Raises FileNotFoundError that says what to get where."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]} is missing; it should hold {holds}, which {publisher} offers")


def read_split(path, parse):
    """A list of a publisher's: parse(line of text, or item of JSON) -> (path, label), as a Split."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from None
        if not isinstance(content, (dict, list)):
            raise ValueError(f"{path} is not as its publisher writes it: it holds neither a list nor an object")
        entries = enumerate(content.items() if isinstance(content, dict) else content, start=1)
    else:
        entries = text_lines(path, "a list of its publisher's")
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
    """UCF-101, split 1: UCF-101/<class>/*.avi and ucfTrainTestlist/*.txt. Raises OSError or ValueError."""
    publisher = "the CRCV site of the University of Central Florida (UCF101 with its action recognition splits)"
    root = home(root, "UCF-101")
    videos = piece(root, ["UCF-101"], "a folder of .avi files per class", publisher)
    lists = [piece(root, [f"ucfTrainTestlist/{name}"], holds, publisher) for name, holds in (
        ("classInd.txt", "lines like `1 ApplyEyeMakeup`"),
        ("trainlist01.txt", "lines like `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`"),
        ("testlist01.txt", "lines like `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`"))]
    classes, numbers = read_split(lists[0], lambda line: (line.split()[1], int(line.split()[0]) - 1))
    label = dict(zip(classes, numbers))

    def parse(line):
        name = line.split()[0]
        return videos / name, label[name.split("/")[0]]
    return Files(read_split(lists[1], parse), read_split(lists[2], parse), sorted(label, key=label.get))


def ssv2(root):
    """Something-Something V2: 20bn-something-something-v2/<id>.webm and three JSON files, beside it or in labels/."""
    publisher = "Qualcomm's developer site (Something-Something V2, videos and labels)"
    root = home(root, "20bn-something-something-v2")
    videos = piece(root, ["20bn-something-something-v2"], "the videos <id>.webm", publisher)
    lists = [piece(root, [name, f"labels/{name}"], holds, publisher) for name, holds in (
        ("labels.json", "a number for each template text"),
        ("train.json", "id and template of the training videos"),
        ("validation.json", "id and template of the validation videos"))]
    label = dict(zip(*read_split(lists[0], lambda item: (item[0], int(item[1])))))

    def parse(entry):
        return videos / f"{entry['id']}.webm", label[entry["template"].replace("[", "").replace("]", "")]
    return Files(read_split(lists[1], parse), read_split(lists[2], parse), sorted(label, key=label.get))


def imagenet100(root):
    """ImageNet-100: train/<class>/* and val/<class>/* (or validation/<class>/*); classes in order of their names."""
    publisher = "image-net.org (ILSVRC 2012, of which ImageNet-100 is the 100 classes that CMC, Tian et al., lists)"
    root = home(root, "train")
    train = ImageFolder(piece(root, ["train"], "a folder of training images per class", publisher))
    test = ImageFolder(piece(root, ["val", "validation"], "a folder of validation images per class", publisher))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{train.root} and {test.root} should hold the same classes; only one has {odd[0]}")
    return Files(*(Split(*map(list, zip(*folder.samples))) for folder in (train, test)), train.classes)


def diving48(root):
    """Diving-48 V2: rgb/<vid_name>.mp4, Diving48_V2_{train,test}.json, and Diving48_vocab.json if it is there."""
    publisher = "the Diving48 page of UCSD's SVCL lab (V2)"
    root = home(root, "Diving48_V2_train.json")
    videos = piece(root, ["rgb"], "the videos <vid_name>.mp4", publisher)
    lists = [piece(root, [f"Diving48_V2_{split}.json"], f"vid_name and label of the {split} videos", publisher)
             for split in ("train", "test")]
    classes = [str(label) for label in range(48)]
    if (root / "Diving48_vocab.json").exists():
        classes, _ = read_split(root / "Diving48_vocab.json", lambda words: (" ".join(words), None))

    def parse(entry):
        return videos / f"{entry['vid_name']}.mp4", range(len(classes))[entry["label"]]
    return Files(*(read_split(path, parse) for path in lists), classes)


class PublicDataset(NamedTuple):
    title: str
    read: Callable  # root -> Files
    train: int  # published counts
    test: int
    source: type


DATASETS = {
    "ucf101": PublicDataset("UCF-101, split 1", ucf101, 9_537, 3_783, Videos),
    "ssv2": PublicDataset("Something-Something V2", ssv2, 168_913, 24_777, Videos),
    "imagenet100": PublicDataset("ImageNet-100", imagenet100, 126_689, 5_000, Images),
    "diving48": PublicDataset("Diving-48 V2", diving48, 15_027, 1_970, Videos),
}
MIXED = {"ucf101": 0.2, "ssv2": 0.6, "imagenet100": 0.2}  # the study's mixed regime


def open_dataset(name, root, split, frames, crop, **spacing):
    """The "train" or "test" split of one of the DATASETS as a source. spacing: step or fps of `Videos`."""
    dataset = DATASETS[name]
    files = getattr(dataset.read(Path(root)), split)
    return dataset.source(*files, frames, crop, name=name, **spacing)


def open_mixed(root, frames, crop, **spacing):
    """The training splits of the mixed regime."""
    return Mixture([open_dataset(name, root, "train", frames, crop, **spacing) for name in MIXED], MIXED.values())


# ------------------------------------------------------------------------------------------------- python data.py


class Inspection(Dataset):
    """Reads files as evaluation does: height, width, for videos frames and rate; or the reason why it cannot."""

    def __init__(self, paths, source):
        self.paths, self.source = paths, source

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            if self.source is Images:
                return read_image(self.paths[i]).frames.shape[1:3]
            pictures = read_video(self.paths[i], lambda count, rate: evaluation_window(count, 16))
            return *pictures.frames.shape[1:3], pictures.count, pictures.rate
        except Unreadable as error:
            return str(error)


def inspect(title, paths, source, workers):
    """Read every file and print what there is to say. Returns whether a run on these files would go through."""
    started = time.perf_counter()
    results = DataLoader(Inspection(paths, source), batch_size=None, num_workers=workers)
    results = list(tqdm(results, desc=title, unit="file", leave=False))
    speed = len(paths) / (time.perf_counter() - started)
    reasons = [result for result in results if isinstance(result, str)]
    facts = zip(*(result for result in results if not isinstance(result, str)))
    for what, values in zip(("height", "width", "frames", "frames per second"), facts):
        print(f"    {what}: {min(values):.4g} to {max(values):.4g}")
    print(f"    read at {speed:.3g} files per second, {max(1, workers)} at a time")
    print(f"    unreadable: {len(reasons):,}", *reasons[:5], sep="\n      ")
    return bool(paths) and len(reasons) <= MAX_BROKEN * len(paths)


def check(root, workers):
    """Print what lies in a folder, whole or broken, and the command that trains on it.

    Raises OSError where there is nothing to train on, ValueError where what there is makes no sense.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give the one that holds the datasets, or videos of your own")
    usable = {}
    for name, dataset in DATASETS.items():
        try:
            files = dataset.read(root)
        except FileNotFoundError as missing:
            print(f"{dataset.title}: not here. {missing}")
            continue
        print(f"{dataset.title}: {len(files.classes)} classes")
        for split, published in (("test", dataset.test), ("train", dataset.train)):
            paths = getattr(files, split).paths
            print(f"  {split}: {len(paths):,} of {published:,} published clips")
            whole = inspect(f"{name} {split}", paths, dataset.source, workers)
            if split == "train":
                usable[name] = whole
        if not usable[name]:
            print(f"  More than {MAX_BROKEN:.0%} of the training clips cannot be read: a run would stop.")
    place = shlex.quote(str(root))
    if all(usable.get(name) for name in MIXED):
        command = f"--preset mixed --root {place}"
    elif usable.get("ucf101"):
        command = f"--preset ucf101 --root {place}"
    else:
        paths, _ = own_videos(root)
        print(f"Videos below {root}, of every split: {len(paths):,}")
        if not inspect("videos", paths, Videos, workers):
            raise ValueError(f"more than {MAX_BROKEN:.0%} of the videos in {root} cannot be read: a run would stop")
        command = f"--data {place}"
    print(f"Train with: python train.py {command}")


@command("data.py", smaller="number of --workers")
def main(arguments=None):
    parser = Parser(description="Check the datasets in a folder.", allow_abbrev=False)
    parser.add_argument("--check", metavar="DIR", required=True, help="the folder that holds the datasets")
    parser.add_argument("--workers", type=at_least(1), default=min(8, os.cpu_count()),
                        help="processes that read (%(default)s)")
    flags = parser.parse_args(arguments)
    check(flags.check, flags.workers)


if __name__ == "__main__":
    sys.exit(main())
