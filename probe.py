"""Measure what a frozen encoder knows: `python probe.py --checkpoint runs/NAME/last.pt`.

    (nothing more)                            moving shapes (printed alone) and blobs, generated: no data needed
    --benchmark diving48 --root DIR           one of the study's five benchmarks
    --train-list A.csv --test-list B.csv      your own videos, a line `path label` each; as Diving-48
    ... --shots 1,5,10,20                     instead: learn from so few labelled clips per class
    ... --episodes 600                        instead: 5-way 1- and 5-shot episodes, nearest class mean
    ... --pictures                            instead: masks.png and features.png

An encoder is evaluated on its last level alone (D of its 4D channels), as the study does. Features and results go into
the checkpoint's folder. `--weights FILE --out DIR` takes V-JEPA 2.1 weights in the place of a checkpoint.
"""
import argparse
import hashlib
import io
import json
import math
import os
import shutil
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
from model import SIZES, Encoder, load_vjepa, token_grid
from objectives import Masking, motion_map, sample_masks
from synthetic import (APPEARANCES, DIRECTIONS, SPEEDS, Blobs, Shapes, command, number, read_json, write_file,
                       write_json)

HELD_OUT = 1_000_003  # seeds of the probes' clips: far from those of any training run
WEIGHT_DECAY = 0.01
BLOB_CLIPS = [160, 40]  # to train on, to test on, as in the study
DRAWS = 5  # of the labelled clips, in k-shot
EPISODES = 600
QUERIES = 15  # test clips per class of an episode, or as many as there are
FEWEST_CLIPS = 192  # of the moving shapes, to probe 8 classes with
FACTORS = {"direction": DIRECTIONS, "speed": len(SPEEDS), "appearance": len(APPEARANCES)}  # with their classes


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
SHAPES = {
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

    def pool(self, device="cpu"):
        """The same clips with the mean of their tokens [n, 1, D], float32 in memory."""
        batches = tqdm(torch.arange(len(self.labels)).split(64), desc="mean over tokens", leave=False, disable=None)
        return Labelled(torch.cat([self.read(rows, device).mean(1, keepdim=True) for rows in batches]), self.labels)


# -------------------------------------------------------------------------------------------------- frozen encoders


def load_checkpoint(path):
    """The dict that train.py saved. Raises ValueError or FileNotFoundError, in one sentence, for anything else."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}; train.py writes one as last.pt in its run folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever the bytes of another file lead to
        raise ValueError(f"{path} is not a checkpoint, or was cut short; train.py writes one as last.pt in its run "
                         "folder") from None
    parts = {"config", "definition", "evaluated", "step", "optimizer", "encoder", "target", "predictor", "heads"}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        raise ValueError(f"{path} was not written by this version of train.py")
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


class Frozen(NamedTuple):
    """A frozen encoder under evaluation."""
    encoder: Encoder
    config: dict  # of its run; the study's frames and crop for V-JEPA 2.1 weights
    masking: Masking  # of its run's objective
    about: str
    folder: Path  # where features and results go

    @property
    def grid(self):
        frames, crop, patch, tubelet = (self.config[name] for name in ("frames", "crop", "patch", "tubelet"))
        return token_grid(frames, crop, crop, patch, tubelet)


def open_frozen(flags):
    """The encoder that the command line names. Raises ValueError or OSError where there is none."""
    if flags.weights:
        encoder, found = load_vjepa(flags.weights)
        config, masking = {"seed": 0, "frames": 16, "crop": 224, **found}, Masking()
        about = f"{config['model']} from '{config['weights']}' of {flags.weights}"
    else:
        checkpoint = load_checkpoint(flags.checkpoint)
        config, masking = checkpoint["config"], Masking(**checkpoint["definition"]["masking"])
        encoder = make_encoder(config, checkpoint[checkpoint["evaluated"]])
        changed = f" without {config['ablate']}" * bool(config["ablate"]) + " as released" * config["as_released"]
        about = f"{config['objective']}{changed}, {checkpoint['evaluated']} encoder at step {checkpoint['step']}"
    if flags.untrained:
        encoder, about = make_encoder(config), f"untrained encoder of {flags.weights or flags.checkpoint}"
    config = {**config, "frames": flags.frames or config["frames"], "crop": flags.crop or config["crop"]}
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return Frozen(encoder.eval().to(device), config, masking, about, Path(flags.out or Path(flags.checkpoint).parent))


@torch.no_grad()
def last_level(encoder, clips):
    """uint8 clips [B, 3, T, H, W] -> tokens of the last level [B, N, D], float32."""
    device, width = encoder.video.device, encoder.video.shape[-1]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return encoder(data.normalise(clips.to(device))).float()[..., -width:].clone()  # a view would keep all levels


# ----------------------------------------------------------------------------------------------------------- heads


class LinearHead(nn.Module):
    """One linear layer on the mean of a clip's tokens [n, N, D]: the study's linear head, as it is.

    `standardise` makes it the head of our own probes, which brings each channel to mean 0 and deviation 1 first. Frozen
    features differ in scale by orders of magnitude, and an untrained encoder's hardly differ between clips: one
    learning rate cannot suit them all, so the plain head measures scale, too. ImageNet-100 keeps the plain head, to be
    comparable with the study's numbers.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.Linear(width, classes)

    def standardise(self, features):
        """By mean and deviation of all training clips [n, 1, D]. That takes no labels: k-shot may do it, too."""
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
    for _ in tqdm(range(recipe.epochs), desc=progress, unit="epoch", leave=False, disable=None if progress else True):
        for picked in labelled[torch.randperm(len(labelled), generator=shuffle)].split(recipe.batch):
            loss = F.cross_entropy(head(train.read(picked, device)), train.labels[picked].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


@torch.no_grad()
def top1(head, test, device):
    """Top-1 % of a trained head on the clips `test`."""
    scores = torch.cat([head(test.read(rows, device)) for rows in torch.arange(len(test.labels)).split(64)])
    if not scores.isfinite().all():
        raise ValueError("what the head computes is not finite: it diverged, or had too few clips to learn from")
    return 100 * (scores.argmax(-1).cpu() == test.labels).double().mean().item()


def accuracy(recipe, train, test, seed, device, progress=""):
    """Train a head on the clips `train`; its top-1 % on the clips `test`. The seed: of its weights and shuffling."""
    torch.manual_seed(seed)
    width, classes = train.features.shape[-1], int(max(train.labels.max(), test.labels.max())) + 1
    head = (AttentiveHead if recipe.head == "attentive" else LinearHead)(width, classes)
    if recipe.head == "standardised":
        head.standardise(train.features)
    return top1(train_head(head.to(device), train, recipe, seed, device, progress), test, device)


# ---------------------------------------------------------------------------------------------------- moving shapes


def probe_shapes(encoder, frames, crop, count, seed=0, attentive=True, about="the encoder"):
    """What held-out moving shapes tell of an encoder: {measurement: {factor: top-1 %}}.

    "linear" and "attentive" heads on the last level, "1-shot" and "5-shot" episodes of 5 classes on the mean over its
    tokens. Heads learn from `count` clips and are tested on a third as many others. Attentive heads keep all tokens in
    memory, and can be left out.
    """
    sets, device, found = [], encoder.video.device, {}
    for clips, clip_seed in ((count, HELD_OUT), (max(1, count // 3), HELD_OUT + 1)):
        source = Shapes(frames, crop, clip_seed, device)
        batches = tqdm(torch.arange(clips).split(64), desc=f"features of {about}", leave=False, disable=None)
        tokens = [last_level(encoder, source.clips(items)) for items in batches]
        pooled = torch.cat([batch.mean(1, keepdim=True) for batch in tokens])
        factors = {name: labels.cpu() for name, labels in source.factors(torch.arange(clips)).items()}
        sets.append((torch.cat(tokens) if attentive else None, pooled, factors))

    def labelled(factor, pooled):
        return [Labelled(set_pooled if pooled else tokens, factors[factor]) for tokens, set_pooled, factors in sets]
    for name, recipe in SHAPES.items():
        if attentive or recipe.pooled:
            found[name] = {factor: accuracy(recipe, *labelled(factor, recipe.pooled), seed, device,
                                            f"{about}: {name} head, {factor}") for factor in FACTORS}
    for shot in (1, 5):
        found[f"{shot}-shot"] = {
            factor: episode_accuracies(*labelled(factor, True), 5, shot, EPISODES, seed).mean().item()
            for factor in ("direction", "appearance")}
    return found


def show_shapes(rows, count, kinds=("linear", "attentive")):
    """Print results, {name of an encoder: `probe_shapes`}, as one table: a row per encoder and measurement."""
    print(f"\nTop-1 % on held-out moving shapes, generated: heads learn from {count:,} labelled clips and are tested on "
          f"{max(1, count // 3):,} others; one seed")
    print(f"{'':<32}" + "".join(f"{factor:>12}" for factor in FACTORS))
    for encoder, found in rows.items():
        for kind in (kind for kind in found if kind in kinds):
            print(f"{f'{encoder}, {kind}':<32}" + "".join(
                f"{found[kind][factor]:12.1f}" if factor in found[kind] else f"{'-':>12}" for factor in FACTORS))
    print(f"{'chance' + ' (5-way shots: 20)' * ('1-shot' in kinds):<32}" + "".join(
        f"{100 / classes:12.1f}" for classes in FACTORS.values()))


# ----------------------------------------------------------------------------------------------- features in a file

BATCH = 16  # clips
SAVE_EVERY = 8  # batches between two notes of how far extraction has come
MOST_CLASSES = 100_000  # a head has an output for each; a larger label is a date or an identifier


def open_sources(flags, frames, crop):
    """The labelled clips that the command line asks for: their name, and the sources to train and test on."""
    if flags.train_list:
        lists = [Path(path).resolve() for path in (flags.train_list, flags.test_list)]
        sources = [data.Videos(*data.own_videos(path), frames, crop) for path in lists]
        for path, source in zip(lists, sources):
            if source.labels is None:
                raise ValueError(f"{path} gives no labels; a line of it should be `path label`")
            if max(source.labels) >= MOST_CLASSES:
                raise ValueError(f"{path} has the label {max(source.labels)}; labels number the classes from 0")
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


def features_identity(frozen, source, shape):
    """What features depend on: weights, paths, sizes in bytes and labels of clips, and the code that reads them."""
    paths = [str(source.where(item)[1]) for item in range(len(source))]
    sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
    code = [Path(__file__).with_name(name).read_text() for name in ("model.py", "data.py", "synthetic.py")]
    return fingerprint(encoder_fingerprint(frozen.encoder), paths, sizes, source.labels, code, frozen.config["frames"],
                       frozen.config["crop"], shape)


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


def extract(frozen, source, name, pooled, workers):
    """Last-level features of every clip that can be read, as Labelled, and a note on how they came about.

    features-NAME.npy in the encoder's folder holds them one after the other, float16 [len(source), N or 1, D]. The
    note, features-NAME.json, says of which weights and clips they are, how many clips are done, and what could not be
    read; it is written after the features that it claims, so an extraction that was killed goes on from there.
    Stopped or not, a clip meets the encoder in the same batch, so its features are the same to the bit.
    Raises ValueError where no clip can be read, or a feature is not finite.
    """
    path = frozen.folder / f"features-{name}.npy"
    shape = (len(source), 1 if pooled else math.prod(frozen.grid), frozen.encoder.video.shape[-1])
    features, note = open_features(path, shape, features_identity(frozen, source, shape))
    unreadable = note["unreadable"]  # [item, sentence] each
    batches = DataLoader(Reader(source), BATCH, sampler=range(note["done"], len(source)), num_workers=workers,
                         collate_fn=list)
    with tqdm(total=len(source), initial=note["done"], desc=f"features of {name}", unit="clip", disable=None) as bar:
        for count, clips in enumerate(batches, start=1):
            row = note["done"] - len(unreadable)
            unreadable += [[item, clip] for item, clip in enumerate(clips, note["done"]) if isinstance(clip, str)]
            note["done"] += len(clips)
            bar.update(len(clips))
            clips = [clip for clip in clips if torch.is_tensor(clip)]
            if clips:
                tokens = last_level(frozen.encoder, torch.stack(clips))  # (b, N, D)
                tokens = (tokens.mean(1, keepdim=True) if pooled else tokens).half()
                if not tokens.isfinite().all():
                    raise ValueError(f"features of {name} are not finite in float16; did the training run diverge?")
                features[row:row + len(clips)] = tokens.cpu().numpy()
            if count % SAVE_EVERY == 0 or note["done"] == len(source):
                features.flush()
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


def measurement(values, train, test, **how):
    """One entry of a result: its values in %, their mean and deviation, and how they came about.

    `how` ends with a hash of all labels. What is drawn depends on labels and seeds alone, so two entries with the same
    `how` used the same draws and can be compared in pairs.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    return {"how": {**how, "labels": fingerprint(train.labels, test.labels)}, "values": values.tolist(),
            "mean": values.mean().item(), "deviation": values.std().item() if len(values) > 1 else None}


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


def measure(frozen, name, train_source, test_source, recipe, flags):
    """Extract features of both sources and train what the command line asks for: (measurements, notes of both)."""
    device, seed = frozen.encoder.video.device, flags.seed
    if flags.episodes:  # refuses, before hours of extraction, what cannot be drawn
        draw_episodes(torch.tensor(train_source.labels), torch.tensor(test_source.labels), flags.way, 5, 0, seed)
    train, train_note = extract(frozen, train_source, f"{name}-train", recipe.pooled, flags.workers)
    test, test_note = extract(frozen, test_source, f"{name}-test", recipe.pooled, flags.workers)
    measurements = {}
    if flags.shots or flags.episodes:
        pooled = train.pool(), test.pool()
    if flags.episodes:
        for shot in (1, 5):
            values = episode_accuracies(*pooled, flags.way, shot, flags.episodes, seed)
            measurements[f"{flags.way}-way {shot}-shot episodes"] = measurement(
                values, train, test, way=flags.way, shot=shot, episodes=flags.episodes, queries=QUERIES, seed=seed)
    if flags.shots:
        measurements |= few_shot(recipe, train, test, pooled, flags.shots, seed, device)
    if not measurements:
        seeds = list(range(seed, seed + flags.seeds))
        values = [accuracy(recipe, train, test, each, device, f"{recipe.head} head, seed {each}") for each in seeds]
        measurements[f"all labels, {recipe.head} head"] = measurement(
            values, train, test, **recipe._asdict(), weight_decay=WEIGHT_DECAY, seeds=seeds)
    classes = len({*train.labels.tolist(), *test.labels.tolist()})
    print(f"{name}: {len(train.labels):,} clips to learn from, {len(test.labels):,} to be tested on, {classes} classes, "
          f"chance {100 / (flags.way if flags.episodes else classes):.1f}")
    return measurements, train_note, test_note


def evaluate(frozen, name, train_source, test_source, flags):
    """Measure what the command line asks for, print it, and write it to results-NAME.json in the encoder's folder.

    Other measurements that this file holds of the same encoder and clips stay in it.
    """
    recipe = BENCHMARKS.get(name, BENCHMARKS["diving48"])
    recipe = recipe._replace(epochs=flags.probe_epochs or recipe.epochs)
    frames, crop = frozen.config["frames"], frozen.config["crop"]
    # Other clips than usual, or the untrained encoder, have files of their own.
    name += "-{}-{}".format(*flags.blob_clips) * (name == "blobs" and flags.blob_clips != BLOB_CLIPS)
    name += f"-{frames}x{crop}" * bool(flags.frames or flags.crop) + "-untrained" * flags.untrained
    measurements, *notes = measure(frozen, name, train_source, test_source, recipe, flags)
    for label, found in measurements.items():
        over = next((word for word in ("draws", "episodes") if word in found["how"]), "seeds of the head")
        spread = f" ± {found['deviation']:.2f} over {len(found['values'])} {over}" if found["deviation"] else ""
        print(f"{label:<36} top-1 {found['mean']:6.2f}{spread}", flush=True)
    path, identity = frozen.folder / f"results-{name}.json", [note["identity"] for note in notes]
    before = read_json(path)
    if before.get("identity") == identity:
        measurements = before["measurements"] | measurements
    splits = {split: {"clips": note["done"] - len(note["unreadable"]),
                      "unreadable": [sentence for _, sentence in note["unreadable"]]}
              for split, note in zip(("train", "test"), notes)}
    write_json(path, {
        "benchmark": name, "encoder": frozen.about, "checkpoint": flags.weights or flags.checkpoint,
        "sha256": encoder_fingerprint(frozen.encoder), "frames": frames, "crop": crop, **splits, "identity": identity,
        "measurements": measurements})
    print(f"written to {path}")


# -------------------------------------------------------------------------------------------------------- pictures

MASKED_COLOUR = (1.0, 0.45, 0.0)


def cells_to_pixels(cells, patch):
    """[..., h, w] -> [..., h * patch, w * patch]."""
    return cells.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def tint_masked(frames, visible, grid, patch):
    """Frames [t, 3, H, W] in 0..1 with every token tinted that is not among the visible ones [n]."""
    masked = torch.ones(math.prod(grid), dtype=torch.bool)
    masked[visible] = False
    masked = cells_to_pixels(masked.view(grid), patch).unsqueeze(1)  # (t, 1, H, W)
    return torch.where(masked, 0.25 * frames + 0.75 * torch.tensor(MASKED_COLOUR).view(3, 1, 1), frames)


def principal_colours(tokens):
    """The three main components of tokens [B, N, D] as red, green and blue in 0..1: [B, N, 3].

    One basis for all clips. A component's sign is arbitrary: here its largest entry is positive, so a second look gives
    the same picture. The outermost percent at either end is clipped.
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


def pictures(frozen, clips):
    """Write masks.png and features.png of uint8 clips [B, 3, T, H, W], a picture for each time step of the grid.

    Both have three rows for each clip. masks.png: its frames, and what each of the two masks hides of them.
    features.png: its frames, the main components of its features, and those of the untrained encoder's.
    """
    grid, patch = frozen.grid, frozen.config["patch"]
    frames = clips[:, :, ::frozen.config["tubelet"]].transpose(1, 2) / 255  # (B, t, 3, H, W)
    motion = motion_map(data.normalise(clips), grid) if frozen.masking.motion_strength else [None] * len(clips)
    mask_rows, feature_rows = [], []
    for i in range(len(clips)):  # one by one, since the masks of a batch are cut to the smallest
        masks = sample_masks(1, grid, frozen.masking, torch.Generator().manual_seed(i), motion[i:i + 1])
        mask_rows += [frames[i]] + [tint_masked(frames[i], visible[0], grid, patch) for visible, _ in masks]
    encoders = frozen.encoder, make_encoder(frozen.config).to(frozen.encoder.video.device)
    tokens = [torch.cat([last_level(encoder, clip.unsqueeze(0)) for clip in clips]) for encoder in encoders]
    colours = [cells_to_pixels(principal_colours(each).unflatten(1, grid).movedim(-1, 2), patch) for each in tokens]
    for rows in zip(frames, *colours):
        feature_rows += rows  # (t, 3, H, W) each
    frozen.folder.mkdir(parents=True, exist_ok=True)
    save_rows(mask_rows, frozen.folder / "masks.png")
    save_rows(feature_rows, frozen.folder / "features.png")


def some_clips(source, count=4):
    """A few clips of a source that can be read, the same ones every time: uint8 [count, 3, T, H, W]."""
    clips = []
    for item in torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist():
        clip = Reader(source)[item]
        clips += [clip] if torch.is_tensor(clip) else []
        if len(clips) == count:
            break
    if not clips:
        raise ValueError(f"none of the {len(source)} clips can be read; the last is {clip}")
    return torch.stack(clips)


# --------------------------------------------------------------------------------------------------------- command


def parse(arguments):
    """The command line. Flags that are wrong, or do not go together, end with argparse's message."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--checkpoint", help="last.pt of a run folder")
    one.add_argument("--weights", help="a V-JEPA 2.1 checkpoint, ViT-B or ViT-L")
    parser.add_argument("--out", metavar="DIR", help="folder for features and results; by default the checkpoint's")
    parser.add_argument("--untrained", action="store_true", help="the same with the random weights of the run's seed")
    parser.add_argument("--frames", type=number(1), help="of a clip; by default as in training, 16 for --weights")
    parser.add_argument("--crop", type=number(1), help="pixels; by default as in training, 224 for --weights")
    parser.add_argument("--benchmark", choices=BENCHMARKS)
    parser.add_argument("--root", metavar="DIR", help="the folder that holds the datasets (see data.py --check)")
    parser.add_argument("--train-list", metavar="CSV", help="videos to learn from, a line `path label` each")
    parser.add_argument("--test-list", metavar="CSV", help="videos to be tested on, likewise")
    parser.add_argument("--probe-epochs", type=number(1), help="in the place of the benchmark's own")
    parser.add_argument("--seed", type=number(0), default=0, help="the first, of heads, their shuffling, and draws")
    parser.add_argument("--seeds", type=number(1), default=1, help="how many heads to train on all labels")
    parser.add_argument("--shots", type=lambda text: [number(1)(part) for part in text.split(",")], metavar="K,K,...",
                        help="labelled clips per class")
    parser.add_argument("--episodes", type=number(1), nargs="?", const=EPISODES, help=f"how many; {EPISODES} by default")
    parser.add_argument("--way", type=number(2), default=5, help="classes of an episode")
    parser.add_argument("--pictures", action="store_true", help="of masks and features")
    parser.add_argument("--clips", type=number(FEWEST_CLIPS), default=2304, help="moving shapes to train a head on")
    parser.add_argument("--blob-clips", type=lambda text: [number(1)(part) for part in text.split(",", 1)],
                        metavar="TRAIN,TEST", default=BLOB_CLIPS, help="of the blobs benchmark; 160,40 as in the study")
    parser.add_argument("--workers", type=number(0), default=min(8, os.cpu_count()), help="processes that read videos")
    flags = parser.parse_args(arguments)
    lists, few = flags.train_list or flags.test_list, flags.shots or flags.episodes
    wrong = {
        "--weights needs --out DIR, a folder for features and results": flags.weights and not flags.out,
        "--train-list and --test-list go together": lists and not (flags.train_list and flags.test_list),
        "--benchmark and your own lists ask for different clips; give one": lists and flags.benchmark,
        "--blob-clips takes two numbers, as 160,40": len(flags.blob_clips) != 2,
        "--shots and --episodes need --benchmark, or --train-list and --test-list":
            few and not (flags.benchmark or lists),
        "--pictures goes without --shots and --episodes": flags.pictures and few,
        "--root is for --benchmark": flags.root and not flags.benchmark,
        f"--benchmark {flags.benchmark} needs --root DIR; `python data.py --check DIR` says what belongs in there":
            flags.benchmark not in (None, "blobs") and not flags.root,
    }
    for sentence in [sentence for sentence, holds in wrong.items() if holds]:
        parser.error(sentence)
    return flags


@command("probe.py", smaller="number of --clips or --frames, or --crop",
         stopped="stopped; the same command goes on with the features that are done")
def main(arguments=None):
    flags = parse(arguments)
    frozen = open_frozen(flags)
    generated = not (flags.benchmark or flags.train_list)
    frames, crop = frozen.config["frames"], frozen.config["crop"]
    print(frozen.about)
    if flags.pictures:
        pictures(frozen, Shapes(frames, crop, HELD_OUT).clips(range(4)) if generated else
                 some_clips(open_sources(flags, frames, crop)[2]))
        return
    sources = open_sources(flags, frames, crop)
    if generated:
        found = probe_shapes(frozen.encoder, frames, crop, flags.clips, flags.seed)
        show_shapes({"untrained" if flags.untrained else "encoder": found}, flags.clips, found)
    evaluate(frozen, *sources, flags)


if __name__ == "__main__":
    sys.exit(main())
