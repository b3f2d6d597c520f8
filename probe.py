"""Measure what a frozen encoder knows: `python probe.py --checkpoint runs/NAME/last.pt`.

    (nothing more)                            moving shapes (printed alone) and blobs, generated: no data needed
    --benchmark diving48 --root DIR           one of the study's five benchmarks
    --train-list A.csv --test-list B.csv      videos of one's own, a line `path label` each; as Diving-48
    ... --shots 1,5,10,20                     instead: learn from so few labelled clips per class
    ... --episodes 600                        instead: 5-way 1- and 5-shot episodes, nearest class mean
    ... --pictures                            instead: masks.png and features.png
    --compare A.json B.json                   paired differences between two results, draw by draw
    --compare A0.json A1.json B0.json B1.json the same between several runs of A and as many of B, run by run
    --table DIR                               all runs of a sweep: means, differences to the baseline, a trade-off

An encoder is evaluated on its last level alone (D of its 4D channels), as the study does. Features and results go into
the checkpoint's folder. `--weights FILE --out DIR` takes V-JEPA 2.1 weights in the place of a checkpoint.
"""
import argparse
import csv
import functools
import hashlib
import io
import json
import math
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import save_image
from tqdm import tqdm

import data
from model import LEVELS, SIZES, Encoder, load_foreign, token_grid
from objectives import OBJECTIVES, appearance_and_dynamics, motion_map, sample_masks
from synthetic import APPEARANCES, DIRECTIONS, SPEEDS, Blobs, Parser, Shapes, at_least, command

HELD_OUT = 1_000_003  # seeds of the probes' clips: far from those of any training run
WEIGHT_DECAY = 0.01
BLOB_CLIPS = [160, 40]  # to train on, to test on, as in the study
DRAWS = 5  # of the labelled clips, in k-shot
EPISODES = 600
QUERIES = 15  # test clips per class of an episode, or as many as there are


class Recipe(NamedTuple):
    """How a head is trained."""
    head: str  # attentive, linear or standardised
    pooled: bool  # on the mean of a clip's tokens, instead of all of them
    lr: float
    batch: int
    epochs: int


BENCHMARKS = {  # the study's; which frames and which resizing: data.py
    "diving48": Recipe("attentive", False, 1e-3, 16, 100),
    "ssv2": Recipe("attentive", True, 1e-3, 16, 100),
    "imagenet100": Recipe("linear", True, 1e-3, 256, 50),
    "ucf101": Recipe("attentive", False, 3e-4, 16, 100),  # its batch is not on record; this is Diving-48's
    "blobs": Recipe("attentive", False, 3e-4, 32, 100),
}
SYNTHETIC = {
    "linear": Recipe("standardised", True, 3e-3, 256, 40),  # why not the plain one: `LinearHead`
    "attentive": Recipe("attentive", False, 1e-3, 64, 5),
}


class Labelled(NamedTuple):
    """What a head learns from, or is tested on."""
    features: object  # [n, N, D], N = 1 where pooled: a tensor, or a memory-mapped array of float16
    labels: torch.Tensor  # [n], on the CPU; -1 hides a label from training

    def read(self, rows, device):
        """Features of some rows [b] -> float32 [b, N, D] on a device. Only these rows are ever in memory."""
        return torch.as_tensor(self.features[rows.numpy()]).to(device).float()

    def pool(self):
        """The same clips with the mean of their tokens [n, 1, D], float32 in memory."""
        batches = tqdm(torch.arange(len(self.labels)).split(64), desc="mean over tokens", leave=False)
        return Labelled(torch.cat([self.read(rows, "cpu").mean(1, keepdim=True) for rows in batches]), self.labels)


# -------------------------------------------------------------------------------------------------------- encoders


def load_checkpoint(path):
    """The dict that train.py saved. Raises ValueError or FileNotFoundError, in one sentence, for anything else."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}; train.py writes one as last.pt in its run folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever the bytes of another file lead to
        raise ValueError(f"{path} is not a checkpoint, or was cut short; train.py writes one as last.pt in its run "
                         "folder") from None
    parts = {"config", "evaluated", "step", "encoder", "target"}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        raise ValueError(f"{path} was not written by this project's train.py")
    config, wanted = checkpoint["config"], {}
    if config.get("model") in SIZES:
        with torch.device("meta"):  # shapes without memory
            wanted = Encoder(SIZES[config["model"]], config["patch"], config["tubelet"]).state_dict()
    networks = checkpoint["encoder"], checkpoint["target"]
    if any({name: x.shape for name, x in network.items()} != {name: x.shape for name, x in wanted.items()}
           for network in networks):
        raise ValueError(f"{path} holds an encoder of another version of model.py; train it again with this one")
    return checkpoint


def make_encoder(config, state=None):
    """The encoder of a saved config: with these weights, or with the random ones of the run's seed."""
    torch.manual_seed(config["seed"])
    encoder = Encoder(SIZES[config["model"]], config["patch"], config["tubelet"])
    if state is not None:
        encoder.load_state_dict(state)
    return encoder.eval()


class Subject(NamedTuple):
    """An encoder under evaluation."""
    encoder: Encoder
    config: dict  # of its run; the study's frames and crop for foreign weights
    about: str
    folder: Path  # where features and results go

    @property
    def grid(self):
        """Its token grid (t, h, w)."""
        frames, crop, patch, tubelet = (self.config[name] for name in ("frames", "crop", "patch", "tubelet"))
        return token_grid(frames, crop, crop, patch, tubelet)


def open_subject(flags):
    """The encoder that the command line names. Raises ValueError or OSError where there is none."""
    if flags.weights:
        encoder, found = load_foreign(flags.weights)
        config = {"seed": 0, "objective": "baseline", "frames": 16, "crop": 224, **found}
        about = f"{config['model']} from '{config['weights']}' of {flags.weights}"
    else:
        checkpoint = load_checkpoint(flags.checkpoint)
        config = checkpoint["config"]
        encoder = make_encoder(config, checkpoint[checkpoint["evaluated"]])
        changed = [f" without {config['ablate']}"] if config.get("ablate") else []
        changed += [" as released"] * config["as_released"] + [" cut by level"] * (config.get("fwm_split") == "level")
        about = (f"{config['objective']}{''.join(changed)}, "
                 f"{checkpoint['evaluated']} encoder at step {checkpoint['step']}")
    if flags.untrained:
        encoder, about = make_encoder(config), f"untrained encoder of {flags.weights or flags.checkpoint}"
    config = {**config, "frames": flags.frames or config["frames"], "crop": flags.crop or config["crop"]}
    folder = Path(flags.out or Path(flags.checkpoint).parent)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return Subject(encoder.eval().to(device), config, about, folder)


@torch.no_grad()
def all_levels(encoder, clips):
    """uint8 clips [B, 3, T, H, W] -> tokens of all four levels [B, N, 4D], float32."""
    device = encoder.video.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return encoder(data.normalise(clips.to(device))).float()


def last_level(encoder, clips):
    """uint8 clips [B, 3, T, H, W] -> tokens of the last level [B, N, D], float32."""
    return all_levels(encoder, clips)[..., -encoder.video.shape[-1]:]


# ----------------------------------------------------------------------------------------------------------- heads


class LinearHead(nn.Module):
    """One linear layer on the mean of a clip's tokens [n, N, D]: the study's linear head, as it is.

    `standardise` makes it the head of our own probes, which brings each channel to mean 0 and deviation 1 first. Frozen
    features differ in scale by orders of magnitude, and an untrained encoder's hardly differ between clips: one
    learning rate cannot suit them all, so that the plain head measures scale, too. ImageNet-100 keeps the plain head,
    to be comparable with the study's numbers.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.Linear(width, classes)

    def standardise(self, features):
        """By the mean and deviation of all training clips [n, 1, D]. That takes no labels: k-shot may do it, too."""
        self.mean, self.deviation = features.squeeze(1).mean(0), features.squeeze(1).std(0) + 1e-6

    def forward(self, tokens):
        return self.linear((tokens.mean(1) - self.mean) / self.deviation)  # (n, classes)


class AttentiveHead(nn.Module):
    """Class token and all tokens [n, N, D], one 8-head self-attention with residual, LayerNorm, linear.

    Only the class token is read, so only its query is computed.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens):
        query = self.token.expand(len(tokens), -1, -1)  # (n, 1, D)
        everything = torch.cat((query, tokens), dim=1)  # (n, 1 + N, D)
        attended, _ = self.attention(query, everything, everything, need_weights=False)
        return self.linear(self.norm(query + attended).squeeze(1))  # (n, classes)


def train_head(head, train, recipe, seed, device, progress=""):
    """AdamW on shuffled epochs over the labelled clips of `train`; returns the head."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY)
    shuffle = torch.Generator().manual_seed(seed)
    labelled = (train.labels >= 0).nonzero().squeeze(1)
    steps = recipe.epochs * math.ceil(len(labelled) / recipe.batch)
    with tqdm(total=steps, desc=progress, unit="step", disable=not progress, leave=False) as bar:
        for _ in range(recipe.epochs):
            for picked in labelled[torch.randperm(len(labelled), generator=shuffle)].split(recipe.batch):
                loss = F.cross_entropy(head(train.read(picked, device)), train.labels[picked].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
    return head


@torch.no_grad()
def top1(head, test, device):
    """Top-1 % of a trained head on the clips `test`."""
    scores = torch.cat([head(test.read(rows, device)) for rows in torch.arange(len(test.labels)).split(64)])
    if not scores.isfinite().all():
        raise ValueError("what the head computes is not finite: it diverged, or had too few clips to learn from")
    predicted = scores.argmax(-1)
    return 100 * (predicted.cpu() == test.labels).double().mean().item()


def accuracy(recipe, train, test, seed, device, progress=""):
    """Train a head on the clips `train`; its top-1 % on the clips `test`. The seed: of its weights and shuffling."""
    torch.manual_seed(seed)
    width, classes = train.features.shape[-1], int(max(train.labels.max(), test.labels.max())) + 1
    head = (AttentiveHead if recipe.head == "attentive" else LinearHead)(width, classes)
    if recipe.head == "standardised":
        head.standardise(train.features)
    return top1(train_head(head.to(device), train, recipe, seed, device, progress), test, device)


# ------------------------------------------------------------------------------------------------ generated clips

FACTORS = {"direction": DIRECTIONS, "speed": len(SPEEDS), "appearance": len(APPEARANCES)}  # with their classes


class Generated(NamedTuple):
    """Moving-shape clips as an encoder sees them."""
    tokens: torch.Tensor  # [n, N, D] of the last level; None where nobody asked for them
    levels: torch.Tensor  # [n, 1, 4D], the mean over tokens of all four levels
    factors: dict  # labels [n] by factor, on the CPU

    def pooled(self, factor):
        """The mean of the last level, which is what the study evaluates, labelled by a factor."""
        return Labelled(self.levels[..., -(self.levels.shape[-1] // LEVELS):], self.factors[factor])


def synthetic_sets(encoder, frames, crop, count, keep_tokens=False):
    """Held-out moving-shape clips: (`count` to train a head on, a third as many to test it on)."""
    sets, width = [], encoder.video.shape[-1]
    for number, seed in ((count, HELD_OUT), (max(1, count // 3), HELD_OUT + 1)):
        source = Shapes(frames, crop, seed, encoder.video.device)
        tokens, levels = [], []
        for items in torch.arange(number).split(64):
            features = all_levels(encoder, source.clips(items))  # (64, N, 4D)
            levels.append(features.mean(1, keepdim=True))
            if keep_tokens:
                tokens.append(features[..., -width:].clone())  # a copy, since a slice would keep all levels alive
        factors = {name: labels.cpu() for name, labels in source.factors(torch.arange(number)).items()}
        sets.append(Generated(torch.cat(tokens) if keep_tokens else None, torch.cat(levels), factors))
    return sets


def channel_groups(width):
    """The two ways to cut 4D channels into appearance and dynamics, each half as channel numbers, by name."""
    channels = torch.arange(LEVELS * width)
    groups = {}
    for name, by_level in (("by depth", False), ("within levels", True)):
        halves = appearance_and_dynamics(channels, by_level=by_level)
        groups[f"appearance half {name}"], groups[f"dynamics half {name}"] = halves
    return groups


def synthetic_results(encoder, frames, crop, count, seed=0, attentive=True, halves=True, progress=False):
    """All that the moving-shape clips tell of an encoder: {measurement: {factor: top-1 %}}.

    "linear" and "attentive" heads on the last level; "1-shot" and "5-shot": 600 episodes of 5 classes on its mean over
    tokens; and linear heads on each half of all four levels' channels, for both ways to cut them (`channel_groups`).
    Attentive heads, which take memory for all tokens, and halves, which take time, can be left out.
    """
    train, test = synthetic_sets(encoder, frames, crop, count, keep_tokens=attentive)
    device, found = encoder.video.device, {}

    def measure(name, recipe, select):
        """select(clips, factor) -> Labelled."""
        found[name] = {factor: accuracy(recipe, select(train, factor), select(test, factor), seed, device,
                                        f"{name}, {factor}" if progress else "") for factor in FACTORS}
    measure("linear", SYNTHETIC["linear"], Generated.pooled)
    if attentive:
        measure("attentive", SYNTHETIC["attentive"],
                lambda clips, factor: Labelled(clips.tokens, clips.factors[factor]))
    for shot in (1, 5):
        found[f"{shot}-shot"] = {
            factor: episode_accuracies(train.pooled(factor), test.pooled(factor), 5, shot, EPISODES, seed).mean().item()
            for factor in ("direction", "appearance")}
    if halves:
        for name, group in channel_groups(encoder.video.shape[-1]).items():
            measure(name, SYNTHETIC["linear"],
                    lambda clips, factor: Labelled(clips.levels[..., group.to(device)], clips.factors[factor]))
    return found


def show_synthetic(rows):
    """Print results, {name of an encoder: `synthetic_results`}, as one table: a row per encoder and measurement."""
    print(f"\n{'top-1 %':<42}" + "".join(f"{factor:>12}" for factor in FACTORS))
    for encoder, found in rows.items():
        for name, values in found.items():
            print(f"{f'{encoder}: {name}':<42}" + "".join(
                f"{values[factor]:12.1f}" if factor in values else f"{'-':>12}" for factor in FACTORS))
    chance = "chance" + " (5-way shots: 20)" * any("1-shot" in found for found in rows.values())
    print(f"{chance:<42}" + "".join(f"{100 / classes:12.1f}" for classes in FACTORS.values()))


# ----------------------------------------------------------------------------------------------- features in a file

BATCH = 16  # clips
SAVE_EVERY = 8  # batches between two notes of how far extraction has come
MOST_CLASSES = 100_000  # a head has an output for each; a larger label is a date or an identifier


def open_sources(flags, frames, crop):
    """The labelled clips that the command line asks for: their name, and the sources to train and test on."""
    if flags.train_list:
        sources = [data.Videos(*data.own_videos(path), frames, crop) for path in (flags.train_list, flags.test_list)]
        for path, source in zip((flags.train_list, flags.test_list), sources):
            if source.labels is None:
                raise ValueError(f"{path} gives no labels; a line of it should be `path label`")
            if max(source.labels) >= MOST_CLASSES:
                raise ValueError(f"{path} has the label {max(source.labels)}; labels number the classes from 0")
        lists = [Path(path).resolve() for path in (flags.train_list, flags.test_list)]
        return "-".join(["own", lists[1].parent.name, *dict.fromkeys(path.stem for path in lists)]), *sources
    if flags.benchmark in (None, "blobs"):
        if frames > Blobs.FRAMES:
            raise ValueError(f"blobs have {Blobs.FRAMES} frames, {frames} are too many; choose fewer --frames")
        return "blobs", *[data.BlobVideos(HELD_OUT + i, frames, crop, count=count)
                          for i, count in enumerate(flags.blob_clips)]
    return flags.benchmark, *[data.open_dataset(flags.benchmark, flags.root, split, frames, crop)
                              for split in ("train", "test")]


class Reader(Dataset):
    """Each clip of a source as evaluation sees it, or the sentence that says why it cannot be read."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, item):
        try:
            return self.source.evaluation_clip(item)
        except data.Unreadable as error:
            return str(error)


def fingerprint(*parts):
    """SHA-256 of tensors, byte for byte, and of anything else as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().numpy().tobytes() if torch.is_tensor(part) else json.dumps(part).encode())
    return digest.hexdigest()


def encoder_fingerprint(encoder):
    """Of every weight with its name and shape, and of the number of heads, which no weight tells."""
    weights = [part for name, weight in encoder.state_dict().items() for part in (name, list(weight.shape), weight)]
    return fingerprint(encoder.blocks[0].attn.heads, *weights)


def source_fingerprint(source):
    """Of the path, size in bytes and label of every clip, and of the code that reads or makes it."""
    paths = [source.where(item)[1] for item in range(len(source))]
    sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
    code = [Path(__file__).with_name(name).read_text() for name in ("model.py", "data.py", "synthetic.py")]
    return fingerprint(list(map(str, paths)), sizes, source.labels, code)


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


def open_features(path, shape, identity):
    """A memory-mapped float16 array of this shape, and the note that says how much of it is done.

    Goes on with the file that is there if its note tells of the same identity; starts anew otherwise.
    """
    note = path.with_suffix(".json")
    before = read_json(note)
    if before.get("identity") == identity:
        try:
            np.load(path, mmap_mode="r")  # "r+" would fill up a file that was cut short with zeros
            return np.load(path, mmap_mode="r+"), before
        except (FileNotFoundError, EOFError, ValueError):
            pass
    note.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    size, free = 2 * math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:
        # Asked beforehand, since a full disk kills whoever writes to mapped memory.
        raise ValueError(f"the features of {shape[0]:,} clips take {size / 1e9:.1f} GB, but {path.parent} has only "
                         f"{free / 1e9:.1f} GB free")
    features = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    begun = {"identity": identity, "done": 0, "unreadable": []}
    write_json(note, begun)  # a second probe of the same clips then fills the same file, instead of taking it away
    return features, begun


def extract(subject, source, name, pooled, workers):
    """Last-level features of every clip that can be read, as Labelled, and a note on how they came about.

    features-NAME.npy in the subject's folder holds them one after the other, float16 [len(source), N or 1, D]. The
    note, features-NAME.json, says of which weights and clips they are, how many clips are done, and what could not be
    read; it is written after the features that it claims, so that an extraction that was killed goes on from there.
    Stopped or not, a clip meets the encoder in the same batch, so its features are the same to the bit.
    Raises ValueError where no clip can be read, or a feature is not finite.
    """
    path = subject.folder / f"features-{name}.npy"
    shape = (len(source), 1 if pooled else math.prod(subject.grid), subject.encoder.video.shape[-1])
    identity = fingerprint(encoder_fingerprint(subject.encoder), source_fingerprint(source), subject.config["frames"],
                           subject.config["crop"], shape)
    features, note = open_features(path, shape, identity)
    done, unreadable = note["done"], note["unreadable"]
    batches = DataLoader(Reader(source), BATCH, sampler=range(done, len(source)), num_workers=workers, collate_fn=list)
    with tqdm(total=len(source), initial=done, desc=f"features of {name}", unit="clip") as bar:
        for number, clips in enumerate(batches, start=1):
            row = done - len(unreadable)
            unreadable += [[item, clip] for item, clip in enumerate(clips, done) if isinstance(clip, str)]
            clips, read = [clip for clip in clips if torch.is_tensor(clip)], len(clips)
            if clips:
                tokens = last_level(subject.encoder, torch.stack(clips))  # (b, N, D)
                tokens = (tokens.mean(1, keepdim=True) if pooled else tokens).half()
                if not tokens.isfinite().all():
                    raise ValueError(f"features of {name} are not finite in float16; did the training run diverge?")
                features[row:row + len(clips)] = tokens.cpu().numpy()
            done += read
            bar.update(read)
            if number % SAVE_EVERY == 0 or done == len(source):
                features.flush()
                note = {"identity": identity, "done": done, "unreadable": unreadable}
                write_json(path.with_suffix(".json"), note)
    if len(unreadable) == len(source):
        raise ValueError(f"no clip of {name} can be read; the first is {unreadable[0][1]}")
    if unreadable:
        print(f"{len(unreadable):,} of {len(source):,} clips of {name} cannot be read and are left out; to try them "
              f"again, delete {path}")
    lost = {item for item, _ in unreadable}
    labels = [label for item, label in enumerate(source.labels) if item not in lost]
    return Labelled(features[:len(labels)], torch.tensor(labels)), note


# -------------------------------------------------------------------------------------------- few labels, and results


@functools.cache
def student_t(freedom):
    """The 97.5 % quantile of Student's t, by summing its density: SciPy is no dependency."""
    # With t = sqrt(freedom) tan(angle) the density of t becomes cos(angle)^(freedom - 1), which is easily summed.
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)[:-1]
    share = (angle.cos() ** (freedom - 1)).cumsum(0)
    return math.sqrt(freedom) * math.tan(angle[torch.searchsorted(share, 0.95 * share[-1])])


def interval(values):
    """Half the width of the 95 % confidence interval of the mean of values [n], n >= 2: t s / sqrt(n), Student's t."""
    return student_t(len(values) - 1) * values.std().item() / math.sqrt(len(values))


def measurement(values, train, test, **how):
    """One entry of a result: its values in %, their mean, deviation and 95 % interval, and how they came about.

    `how` ends with a hash of all labels. What is drawn depends on labels and seeds alone, so two entries with the same
    `how` used the same draws and can be compared in pairs.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    several = len(values) > 1
    return {"how": {**how, "labels": fingerprint(train.labels, test.labels)}, "values": values.tolist(),
            "mean": values.mean().item(), "deviation": values.std().item() if several else None,
            "interval95": interval(values) if several else None}


def draw_shots(labels, shots, seed):
    """Labels [n] with all but `shots` of each class hidden (-1); all stay where a class has no more.

    For one seed, what few shots show, more shots show too.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shown = torch.full_like(labels, -1)
    for label in labels.unique():
        shown[order[labels[order] == label][:shots]] = label
    return shown


def few_shot(recipe, train, test, pooled, shots, seed, device):
    """Top-1 on the whole test set from few labels per class, of the recipe's head and a linear one.

    pooled: (train, test) once more, with pooled features. Returns {name: measurement}. The linear head is the
    standardised one: with so few clips, the plain one would mostly measure scale.
    """
    measurements = {}
    for each in (recipe, Recipe("standardised", True, 1e-3, recipe.batch, recipe.epochs)):
        known, unknown = pooled if each.pooled else (train, test)
        for k in shots:
            name, values = f"{k}-shot, {each.head} head", []
            for draw in range(seed, seed + DRAWS):
                few = Labelled(known.features, draw_shots(train.labels, k, draw))
                values.append(accuracy(each, few, unknown, draw, device, f"{name}, draw {len(values) + 1} of {DRAWS}"))
            measurements[name] = measurement(
                values, train, test, **each._asdict(), weight_decay=WEIGHT_DECAY, shots=k, draws=DRAWS, seed=seed,
                labelled=int((few.labels >= 0).sum()))  # the same number in every draw
    return measurements


def draw_episodes(train_labels, test_labels, way, shot, episodes, seed):
    """The clips of each episode: a list of (support [way, shot] of the training split, query [q] of the test split).

    Depends on the labels and the seed alone. Raises ValueError where there are too few classes.
    """
    draw = np.random.default_rng(seed)
    support, query = [{label: np.flatnonzero(labels == label) for label in np.unique(labels)}
                      for labels in (train_labels.numpy(), test_labels.numpy())]
    classes = [label for label in support if len(support[label]) >= shot and label in query]
    if len(classes) < way:
        raise ValueError(f"a {way}-way {shot}-shot episode needs {way} classes with {shot} training clips and a test "
                         f"clip, and {len(classes)} have them; choose a smaller --way, or add clips")
    drawn = []
    for _ in range(episodes):
        chosen = draw.choice(classes, way, replace=False)
        drawn.append((np.stack([draw.choice(support[label], shot, replace=False) for label in chosen]),
                      np.concatenate([draw.permutation(query[label])[:QUERIES] for label in chosen])))
    return drawn


def episode_accuracies(train, test, way, shot, episodes, seed):
    """Nearest class mean of l2-normalised pooled features, top-1 % of each episode: [episodes].

    `train` and `test` are pooled: the labelled clips of an episode come from one, those to classify from the other.
    """
    known, unknown = (F.normalize(clips.features.squeeze(1).cpu(), dim=-1) for clips in (train, test))  # (n, D)
    accuracies = []
    for support, query in draw_episodes(train.labels, test.labels, way, shot, episodes, seed):
        means = known[support].mean(1)  # (way, D)
        nearest = (unknown[query].unsqueeze(1) - means).square().sum(-1).argmin(1)  # (q)
        right = train.labels[support[:, 0]][nearest] == test.labels[query]
        accuracies.append(100 * right.double().mean())
    return torch.stack(accuracies)


def episode_measurements(train, test, way, episodes, seed):
    """1- and 5-shot episodes: {name: measurement}. The interval tells of other draws from the same clips."""
    return {f"{way}-way {shot}-shot episodes": measurement(
        episode_accuracies(train, test, way, shot, episodes, seed), train, test, way=way, shot=shot,
        episodes=episodes, queries=QUERIES, seed=seed) for shot in (1, 5)}


def show(measurements):
    for name, found in measurements.items():
        over = next((word for word in ("draws", "episodes") if word in found["how"]), "seeds of the head")
        spread = "" if found["interval95"] is None else (
            f" ± {found['interval95']:.2f} (95 %), deviation {found['deviation']:.2f}, "
            f"over {len(found['values'])} {over}")
        print(f"{name:<36} top-1 {found['mean']:6.2f}{spread}", flush=True)


def evaluate(subject, name, train_source, test_source, flags):
    """Measure what the command line asks for, print it, and write it to results-NAME.json in the subject's folder.

    Other measurements that this file holds of the same encoder and clips stay in it.
    """
    recipe = BENCHMARKS.get(name, BENCHMARKS["diving48"])
    recipe = recipe._replace(epochs=flags.probe_epochs or recipe.epochs)
    frames, crop, device = subject.config["frames"], subject.config["crop"], subject.encoder.video.device
    # Other clips than usual, or the untrained encoder, have files of their own.
    if name == "blobs" and flags.blob_clips != BLOB_CLIPS:
        name += "-{}-{}".format(*flags.blob_clips)
    if flags.frames or flags.crop:
        name += f"-{frames}x{crop}"
    name += "-untrained" * flags.untrained
    if flags.episodes:  # refuses, before hours of extraction, what cannot be drawn
        draw_episodes(torch.tensor(train_source.labels), torch.tensor(test_source.labels), flags.way, 5, 0, flags.seed)
    train, train_note = extract(subject, train_source, f"{name}-train", recipe.pooled, flags.workers)
    test, test_note = extract(subject, test_source, f"{name}-test", recipe.pooled, flags.workers)
    measurements = {}
    if flags.shots or flags.episodes:
        pooled = train.pool(), test.pool()
    if flags.episodes:
        measurements |= episode_measurements(*pooled, flags.way, flags.episodes, flags.seed)
    if flags.shots:
        measurements |= few_shot(recipe, train, test, pooled, flags.shots, flags.seed, device)
    if not measurements:
        seeds = list(range(flags.seed, flags.seed + flags.seeds))
        values = [accuracy(recipe, train, test, seed, device, f"{recipe.head} head, seed {seed}") for seed in seeds]
        measurements[f"all labels, {recipe.head} head"] = measurement(
            values, train, test, **recipe._asdict(), weight_decay=WEIGHT_DECAY, seeds=seeds)
    classes = len({*train.labels.tolist(), *test.labels.tolist()})
    print(f"{name}: {len(train.labels):,} clips to learn from, {len(test.labels):,} to be tested on, {classes} classes")
    show(measurements)
    path, identity = subject.folder / f"results-{name}.json", [train_note["identity"], test_note["identity"]]
    before = read_json(path)
    if before.get("identity") == identity:
        measurements = before["measurements"] | measurements
    write_json(path, {
        "benchmark": name, "encoder": subject.about, "checkpoint": flags.weights or flags.checkpoint,
        "sha256": encoder_fingerprint(subject.encoder),
        "frames": frames, "crop": crop,
        "train": {"clips": len(train.labels), "unreadable": [sentence for _, sentence in train_note["unreadable"]]},
        "test": {"clips": len(test.labels), "unreadable": [sentence for _, sentence in test_note["unreadable"]]},
        "identity": identity, "measurements": measurements})
    print(f"written to {path}")


def compare(paths):
    """Print B - A of every measurement that all results hold: of the first half of the paths and of the second.

    Two results are paired draw by draw. Several runs, of other training seeds, are paired run by run in the order
    given, each by its mean over draws. A measurement whose draws do not match is named in the place of a difference.
    Raises ValueError where there is nothing to pair.
    """
    if len(paths) % 2:
        raise ValueError(f"--compare has {len(paths)} results; give as many of A as of B, first those of A")
    found = {path: read_json(Path(path)).get("measurements") for path in paths}
    for path in paths:
        if found[path] is None:
            raise ValueError(f"{path} is missing, or is no result of probe.py")
    names = [name for name in found[paths[0]] if all(name in found[path] for path in paths)]
    if not names:
        raise ValueError(f"{' and '.join(paths)} have no measurement in common")
    halves, compared = (paths[:len(paths) // 2], paths[len(paths) // 2:]), 0
    lines = [f"A = {a}\nB = {b}" for a, b in zip(*halves)]
    lines.append(f"B - A in points of top-1, paired {'draw by draw' if len(paths) == 2 else 'run by run'}, with 95 % "
                 "intervals")
    for name in names:
        odd = [key for key, value in found[paths[0]][name]["how"].items()
               if any(found[path][name]["how"].get(key) != value for path in paths)]
        if odd:
            lines.append(f"{name:<36} not comparable: its {', '.join(odd)} differ between results")
            continue
        compared += 1
        a, b = (torch.tensor([found[path][name]["values"] for path in half], dtype=torch.float64)
                for half in halves)  # (runs, draws) each
        difference = (b - a)[0] if len(a) == 1 else (b - a).mean(1)
        spread = f"± {interval(difference):.2f}" if len(difference) > 1 else "(one value each: no interval)"
        lines.append(f"{name:<36} {difference.mean():+6.2f} {spread}   A {a.mean():.2f}, B {b.mean():.2f}")
    if not compared:
        raise ValueError(f"nothing can be compared; {' '.join(lines[-1].split())}")
    print("\n".join(lines))


# --------------------------------------------------------------------------------------------------- a sweep's table

COLUMNS = [("linear", factor) for factor in FACTORS] + [("attentive", factor) for factor in FACTORS] + [
    (f"{shot}-shot", factor) for factor in ("direction", "appearance") for shot in (1, 5)]
HALVES = [(half, factor) for half in channel_groups(1) for factor in FACTORS]
# What may differ between the runs of a sweep: it is in their names, or changes no number.
OWN_SETTINGS = ("objective", "seed", "as_released", "fwm_split", "ablate", "ema", "out", "device", "compile", "workers",
                "save_every", "max_broken")
LOGGED = ("pred, first", "pred, last", "hard_share, lowest", "hard_share, mean", "hard_share, last")


def logged(path):
    """Of a metrics.csv: {"pred, first": number, ...}: first, lowest, mean and last, of `hard_share` too where it is."""
    lines, found = list(csv.DictReader(path.read_text().splitlines())), {}
    for name in ("pred", "hard_share"):
        if name in lines[0]:
            values = [float(line[name]) for line in lines]
            found |= {f"{name}, first": values[0], f"{name}, lowest": min(values),
                      f"{name}, mean": statistics.mean(values), f"{name}, last": values[-1]}
    return found


def read_sweep(folder):
    """The finished runs of a sweep: {name: {seed: numbers}}, in the order of `OBJECTIVES`, any other name after them.

    numbers: by (measurement, factor), "effective rank" and "feature std" at the end of training, and what `logged`
    finds. The name "untrained" stands for the random weights of a seed. Raises ValueError where there is no run
    with measurements, or runs have other settings than the rest.
    """
    table, common = {}, None
    for path in sorted(Path(folder).glob("*-seed*/result.json")):
        result = read_json(path)
        if "trained" not in result:
            continue
        settings = {key: value for key, value in result["config"].items() if key not in OWN_SETTINGS}
        common = settings if common is None else common
        different = [key for key in {**settings, **common} if settings.get(key) != common.get(key)]
        if different:
            raise ValueError(f"{path.parent} has other settings than the rest of {folder}: {', '.join(different)}")
        for name, part in ((path.parent.name.rpartition("-seed")[0], "trained"), ("untrained", "untrained")):
            numbers = {(kind, factor): number for kind, found in result[part].items()
                       for factor, number in found.items()}
            if part == "trained":
                numbers["effective rank"] = float(result["last"]["effective_rank"])
                numbers["feature std"] = float(result["last"]["feature_std"])
                numbers |= logged(path.parent / "metrics.csv")
            table.setdefault(name, {})[result["config"]["seed"]] = numbers
    if not table:
        raise ValueError(f"{folder} holds no finished run with measurements; `python train.py --objective all --seeds "
                         f"0,1,2 --out {folder}` makes them")
    order = ["untrained", *OBJECTIVES]
    return dict(sorted(table.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def mean_cell(runs, column, digits=1):
    """Mean +- standard deviation over runs, {seed: numbers}, of one column; "-" where it was not measured."""
    values = torch.tensor([numbers[column] for numbers in runs.values() if column in numbers])
    if not len(values):
        return "-"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def paired_differences(runs, baseline, column):
    """What each run has more than the baseline of the same seed: [n], over the seeds that both have."""
    return torch.tensor([numbers[column] - baseline[seed][column] for seed, numbers in runs.items()
                         if column in numbers and column in baseline.get(seed, {})])


def difference_cell(difference):
    """Mean of differences [n] +- half its 95 % interval; in brackets where that holds zero."""
    if len(difference) < 2:
        return "-"
    mean, half = difference.mean().item(), interval(difference)
    cell = f"{mean:+.1f} ± {half:.1f}"
    return cell if abs(mean) > half else f"({cell})"


def ranks(values):
    """1 for the smallest of values [..., n] to n for the largest; equal ones share the mean of their ranks."""
    smaller = (values.unsqueeze(-2) < values.unsqueeze(-1)).sum(-1)
    equal = (values.unsqueeze(-2) == values.unsqueeze(-1)).sum(-1)
    return smaller + (equal + 1) / 2


def rank_correlation(first, second):
    """Spearman's, the correlation of the ranks: first, second [..., n] -> [...]."""
    first, second = (rank - rank.mean(-1, keepdim=True) for rank in (ranks(first), ranks(second)))
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))


def bootstrap(first, second, draws=10_000, seed=0):
    """The 95 % interval of `rank_correlation`, from drawing the n pairs anew with replacement."""
    picked = torch.randint(len(first), (draws, len(first)), generator=torch.Generator().manual_seed(seed))
    found = rank_correlation(first[picked], second[picked])
    return found.nanquantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()


def markdown(columns, rows):
    """Print rows, {name: cells}, as a Markdown table."""
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


ALIVE = 0.1  # feature std; what is below it at the end of training is called dead


def print_table(folder, reference):
    """Print what a sweep found as Markdown tables, and the rank correlation of motion with appearance.

    reference: what differences are taken to, the name of a run without its seed; None for the baseline, if there is
    one. Raises ValueError where the reference is missing.
    """
    table = read_sweep(folder)
    if reference and reference not in table:
        raise ValueError(f"{folder} holds no run of '{reference}' to compare with; it holds {', '.join(table)}")
    reference = reference or "baseline"
    columns = [f"{factor}, {kind}" for kind, factor in COLUMNS]
    print("Top-1 %, mean ± standard deviation over seeds\n")
    markdown([*columns, "effective rank", "feature std", "seeds"], {name: [
        *(mean_cell(runs, column) for column in (*COLUMNS, "effective rank")), mean_cell(runs, "feature std", 3),
        str(len(runs))] for name, runs in table.items()})
    print("\nLinear heads on one half of the channels of all four levels, top-1 %\n")
    markdown([f"{factor}, {half}" for half, factor in HALVES], {
        name: [mean_cell(runs, column) for column in HALVES] for name, runs in table.items() if name != "untrained"})
    print("\nWhat they read from dynamics more than from appearance channels, in points, with 95 % intervals over "
          "seeds\n")
    cuts = [(cut, factor) for cut in ("by depth", "within levels") for factor in FACTORS]
    markdown([f"{factor}, {cut}" for cut, factor in cuts], {name: [
        difference_cell(torch.tensor([
            numbers[f"dynamics half {cut}", factor] - numbers[f"appearance half {cut}", factor]
            for numbers in runs.values() if (f"dynamics half {cut}", factor) in numbers]))
        for cut, factor in cuts] for name, runs in table.items() if name != "untrained"})
    print("\nLogged while training (README, every logged number), mean ± standard deviation over seeds\n")
    markdown(LOGGED, {name: [mean_cell(runs, column, 3) for column in LOGGED]
                      for name, runs in table.items() if name != "untrained"})
    others = {name: runs for name, runs in table.items() if name not in ("untrained", reference)}
    if reference not in table or not others:
        return
    base = table[reference]
    print(f"\nDifference to {reference}, paired by seed, in points (but effective rank), with 95 % intervals "
          "(Student's t over seeds; two seeds at least).\nIn brackets: not shown, since the interval holds zero. Of 20 "
          "differences that do not exist, one stands without brackets\n")
    markdown([*columns, "effective rank"], {
        name: [difference_cell(paired_differences(runs, base, column)) for column in (*COLUMNS, "effective rank")]
        for name, runs in others.items()})
    named = [runs for name, runs in others.items() if name in OBJECTIVES]
    alive = [runs for runs in named if np.mean([numbers["feature std"] for numbers in runs.values()]) > ALIVE]
    for about, chosen in (("objectives", named), (f"objectives with a feature std above {ALIVE}", alive)):
        for kind in ("linear", "5-shot"):
            changes = torch.tensor([[paired_differences(runs, base, (kind, factor)).mean() for runs in chosen]
                                    for factor in ("direction", "appearance")])  # (2, objectives)
            if len(chosen) >= 4 and changes.isfinite().all():
                low, high = bootstrap(*changes)
                print(f"\nRank correlation of the change in direction with the change in appearance ({kind}) over "
                      f"{len(chosen)} {about}: {rank_correlation(*changes):+.2f}, 95 % interval [{low:+.2f}, "
                      f"{high:+.2f}] (bootstrap over objectives)")


# -------------------------------------------------------------------------------------------------------- pictures

HIDDEN_COLOUR = (1.0, 0.45, 0.0)


def cells_to_pixels(cells, patch):
    """[..., h, w] -> [..., h * patch, w * patch]."""
    return cells.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def hide(frames, visible, grid, patch):
    """Frames [t, 3, H, W] in 0..1 with every token tinted that is not among the visible ones [n]."""
    hidden = torch.ones(math.prod(grid), dtype=torch.bool)
    hidden[visible] = False
    hidden = cells_to_pixels(hidden.view(grid), patch).unsqueeze(1)  # (t, 1, H, W)
    return torch.where(hidden, 0.25 * frames + 0.75 * torch.tensor(HIDDEN_COLOUR).view(3, 1, 1), frames)


def principal_colours(tokens):
    """The three main components of tokens [B, N, D] as red, green and blue in 0..1: [B, N, 3].

    One basis for all clips. A component's sign is arbitrary: here its largest entry is positive, so that a second
    look gives the same picture. The outermost percent at either end is clipped.
    """
    flat = tokens.flatten(0, 1).cpu().double()
    flat = flat - flat.mean(0)
    _, basis = torch.linalg.eigh(flat.T @ flat)  # eigenvalues in ascending order
    basis = basis[:, -3:].flip(-1)  # (D, 3)
    basis = basis * basis.take_along_dim(basis.abs().argmax(0, keepdim=True), 0).sign()
    scores = flat @ basis  # (B * N, 3)
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float().unflatten(0, tokens.shape[:2])


def save_rows(rows, path):
    """A list of rows [t, 3, H, W] -> a PNG with a row's pictures side by side, small ones enlarged to about 128."""
    images, buffer = torch.cat(rows), io.BytesIO()
    images = cells_to_pixels(images, max(1, 128 // images.shape[-1]))
    save_image(images, buffer, nrow=len(rows[0]), pad_value=1, format="png")
    write_file(path, buffer.getvalue())
    print(f"written to {path}")


def pictures(subject, clips):
    """Write masks.png and features.png of uint8 clips [B, 3, T, H, W], a picture for each time step of the grid.

    Both have three rows for each clip. masks.png: its frames, and what each of the two masks hides of them.
    features.png: its frames, the main components of its features, and those of the untrained encoder's.
    """
    grid, patch = subject.grid, subject.config["patch"]
    frames = clips[:, :, ::subject.config["tubelet"]].transpose(1, 2) / 255  # (B, t, 3, H, W)
    mask_rows, feature_rows = [], []
    if subject.config["objective"] not in OBJECTIVES:
        raise ValueError(f"the run's objective '{subject.config['objective']}' is not in objectives.py, which would "
                         "tell its masks; add it to OBJECTIVES there")
    masking = OBJECTIVES[subject.config["objective"]].masking
    motion = motion_map(data.normalise(clips), grid)
    for i in range(len(clips)):  # one by one, since the masks of a batch are cut to the smallest
        masks = sample_masks(1, grid, masking, torch.Generator().manual_seed(i),
                             motion[i:i + 1] if masking.motion_strength else None)
        mask_rows += [frames[i]] + [hide(frames[i], visible[0], grid, patch) for visible, _ in masks]
    encoders = (subject.encoder, make_encoder(subject.config).to(subject.encoder.video.device))
    tokens = [torch.cat([last_level(encoder, clip.unsqueeze(0)) for clip in clips]) for encoder in encoders]
    colours = [cells_to_pixels(principal_colours(each).unflatten(1, grid).movedim(-1, 2), patch) for each in tokens]
    for rows in zip(frames, *colours):
        feature_rows += rows  # (t, 3, H, W) each
    subject.folder.mkdir(parents=True, exist_ok=True)
    save_rows(mask_rows, subject.folder / "masks.png")
    save_rows(feature_rows, subject.folder / "features.png")


def some_clips(source, count=4):
    """A few clips of a source that can be read, the same ones every time: uint8 [count, 3, T, H, W]."""
    clips, reader = [], Reader(source)
    for item in torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist():
        clip = reader[item]
        if torch.is_tensor(clip):
            clips.append(clip)
        if len(clips) == count:
            break
    if not clips:
        raise ValueError(f"none of the {len(source)} clips can be read; the last is {clip}")
    return torch.stack(clips)


# --------------------------------------------------------------------------------------------------------- command


def whole_numbers(text):
    return [at_least(1)(number) for number in text.split(",")]


def parse(arguments):
    """The command line. Raises ValueError for flags that are wrong, or do not go together."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="last.pt of a run folder")
    parser.add_argument("--weights", help="a V-JEPA 2.1 checkpoint, ViT-B or ViT-L")
    parser.add_argument("--out", metavar="DIR", help="folder for features and results; by default the checkpoint's")
    parser.add_argument("--untrained", action="store_true", help="the same with the random weights of the run's seed")
    parser.add_argument("--frames", type=at_least(1), help="of a clip; by default as in training, 16 for --weights")
    parser.add_argument("--crop", type=at_least(1), help="pixels; by default as in training, 224 for --weights")
    parser.add_argument("--benchmark", choices=BENCHMARKS)
    parser.add_argument("--root", metavar="DIR", help="the folder that holds the datasets (see data.py --check)")
    parser.add_argument("--train-list", metavar="CSV", help="videos to learn from, a line `path label` each")
    parser.add_argument("--test-list", metavar="CSV", help="videos to be tested on, likewise")
    parser.add_argument("--probe-epochs", type=at_least(1), help="in the place of the benchmark's own")
    parser.add_argument("--seed", type=at_least(0), default=0, help="the first, of heads, their shuffling, and draws")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="how many heads to train on all labels")
    parser.add_argument("--shots", type=whole_numbers, metavar="K,K,...", help="labelled clips per class")
    parser.add_argument("--episodes", type=at_least(1), nargs="?", const=EPISODES,
                        help=f"how many; {EPISODES} if not said")
    parser.add_argument("--way", type=at_least(2), default=5, help="classes of an episode")
    parser.add_argument("--pictures", action="store_true", help="of masks and features")
    parser.add_argument("--clips", type=at_least(1), default=2304, help="moving-shape clips to train a probe on")
    parser.add_argument("--blob-clips", type=whole_numbers, metavar="TRAIN,TEST", default=BLOB_CLIPS,
                        help="of the blobs benchmark; 160,40 as in the study")
    parser.add_argument("--workers", type=at_least(0), default=min(8, os.cpu_count()),
                        help="processes that read videos")
    parser.add_argument("--compare", nargs="+", metavar="RESULT",
                        help="two results-*.json, A and B; or those of several runs of A, then of as many of B")
    parser.add_argument("--table", metavar="DIR", help="the folder of a sweep, `train.py --seeds`")
    parser.add_argument("--reference", metavar="NAME",
                        help="of the table's differences: a run's name without -seedN [baseline]")
    flags = parser.parse_args(arguments)
    own = flags.train_list or flags.test_list
    wrong = {
        "give one of --checkpoint, --weights, --compare and --table":
            sum(map(bool, (flags.checkpoint, flags.weights, flags.compare, flags.table))) != 1,
        "--weights needs --out DIR, a folder for features and results": flags.weights and not flags.out,
        "--train-list and --test-list go together": own and not (flags.train_list and flags.test_list),
        "--benchmark and lists of one's own ask for different clips; give one": own and flags.benchmark,
        f"--clips {flags.clips} are too few to probe 8 classes with; give at least 192": flags.clips < 192,
        "--blob-clips takes two numbers, as 160,40": len(flags.blob_clips) != 2,
        "--shots and --episodes need --benchmark, or --train-list and --test-list":
            (flags.shots or flags.episodes) and not (flags.benchmark or own),
        "--pictures goes without --shots and --episodes": flags.pictures and (flags.shots or flags.episodes),
        "--root is for --benchmark": flags.root and not flags.benchmark,
        "--reference is for --table": flags.reference and not flags.table,
        f"--benchmark {flags.benchmark} needs --root DIR; `python data.py --check DIR` says what belongs in there":
            flags.benchmark not in (None, "blobs") and not flags.root,
    }
    for sentence, holds in wrong.items():
        if holds:
            raise ValueError(sentence)
    return flags


@command("probe.py", smaller="number of --clips or --frames, or --crop",
         stopped="stopped; the same command goes on with the features that are done")
def main(arguments=None):
    flags = parse(arguments)
    if flags.compare:
        return compare(flags.compare)
    if flags.table:
        return print_table(flags.table, flags.reference)
    subject = open_subject(flags)
    generated = not (flags.benchmark or flags.train_list)
    frames, crop = subject.config["frames"], subject.config["crop"]
    print(subject.about)
    if flags.pictures:
        pictures(subject, Shapes(frames, crop, HELD_OUT).clips(range(4)) if generated else
                 some_clips(open_sources(flags, frames, crop)[2]))
        return
    sources = open_sources(flags, frames, crop)
    if generated:
        found = synthetic_results(subject.encoder, frames, crop, flags.clips, flags.seed, progress=True)
        show_synthetic({"untrained" if flags.untrained else "encoder": found})
    evaluate(subject, *sources, flags)


if __name__ == "__main__":
    sys.exit(main())
