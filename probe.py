"""Measure what a frozen encoder knows: `python probe.py --checkpoint runs/NAME/last.pt`.

    (nothing more)                          the table that ends a run, then the study's blobs: no data needed
    --benchmark diving48 --root DIR         one of the study's five benchmarks, by the study's recipe
    --train-list A.csv --test-list B.csv    your own videos, a line `path label` each: both heads, trained and untrained
    ... --shots 1,5,20,all                  instead: both heads, learning from so few labelled clips per class
    ... --episodes 600                      instead: 5-way 1- and 5-shot episodes, nearest class mean

An encoder is evaluated on its last level alone (D of its 4D channels), as the study does. Features and results go into
the checkpoint's folder. `--weights FILE --out DIR` takes V-JEPA 2.1 weights in the place of a checkpoint, and
`--untrained vit_base` random ones.
"""
import argparse
import functools
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
from tqdm import tqdm

import data
from data import command, locked, number, read_json, write_file, write_json
from model import SIZES, Encoder, load_tensors, load_vjepa, normalise
from objectives import Masking
from synthetic import FACTORS, WORLDS

HELD_OUT = 1_000_003  # seeds of the probes' clips: far from those of any training run
WEIGHT_DECAY = 0.01
BLOB_CLIPS = [160, 40]  # to train on, to test on, as in the study
LABELS, DRAWS = 5, 5  # labelled clips per class, and how often they are drawn
EPISODES, QUERIES = 600, 15  # and test clips per class of an episode, or as many as there are
FEWEST_CLIPS = 192  # of the moving shapes
FEW_FACTORS, LINEAR_FACTORS = ("direction", "motion", "appearance"), ("direction", "speed", "appearance")
ALONG_TRAIN, ALONG_TEST = 400, 192  # clips for the probe along a run: to draw the labelled ones from, to be tested on
CHUNK = 16  # clips in a file of features
MOST_CLASSES = 100_000  # a head has an output for each; a larger label is a date or an identifier


class Recipe(NamedTuple):
    """How a head is trained: for so many epochs or, if given, steps of AdamW."""
    head: str  # attentive, linear or standardised
    pooled: bool  # on the mean of a clip's tokens, instead of all of them
    lr: float
    batch: int
    epochs: int = 0
    steps: int = 0


BENCHMARKS = {  # the study's; which frames and which resizing: data.py
    "diving48": Recipe("attentive", False, 1e-3, 16, 100),
    "ssv2": Recipe("attentive", True, 1e-3, 16, 100),
    "imagenet100": Recipe("linear", True, 1e-3, 256, 50),
    "ucf101": Recipe("attentive", False, 3e-4, 16, 100),
    "blobs": Recipe("attentive", False, 3e-4, 32, 100),
}
FEW = Recipe("attentive", False, 1e-3, 32, steps=150)  # for few labels
LINEAR = Recipe("standardised", True, 3e-3, 256, 40)  # for all labels; why not the plain one: `LinearHead`


class Frozen(NamedTuple):
    """A frozen encoder under evaluation."""
    encoder: Encoder
    config: dict  # of its run, as far as there is one
    masking: Masking  # of its run's objective
    about: str
    folder: Path  # where features and results go


def load_checkpoint(path):
    """The dict that train.py saved. Raises ValueError or FileNotFoundError, in one sentence, for anything else."""
    checkpoint = load_tensors(path)
    parts = {"config", "definition", "evaluated", "step", "optimizer", "encoder", "target", "predictor", "heads"}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        raise ValueError(f"{path} was not written by this version of train.py; train it again")
    return checkpoint


def make_encoder(config, state=None):
    """The encoder of a saved config: with these weights, or with the random ones of the run's seed."""
    torch.manual_seed(config["seed"])
    encoder = Encoder(SIZES[config["model"]], config["patch"], config["tubelet"])
    if state is not None:
        encoder.load_state_dict(state)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return encoder.eval().to(device)


def open_frozen(flags, untrained):
    """The encoder that the command line names, or an untrained one. Raises ValueError or OSError for a wrong file."""
    config = {"seed": flags.seed, "model": flags.untrained, "patch": 16, "tubelet": 2, "frames": 16, "crop": 224}
    state, folder = None, f"runs/untrained-{flags.untrained}-seed{flags.seed}"
    if flags.checkpoint:
        checkpoint, folder = load_checkpoint(flags.checkpoint), Path(flags.checkpoint).parent
        config, state = checkpoint["config"], checkpoint[checkpoint["evaluated"]]
        changed = f" without {config['ablate']}" * bool(config["ablate"]) + " as released" * config["as_released"]
        about = f"{config['objective']}{changed}, {checkpoint['evaluated']} encoder at step {checkpoint['step']}"
    elif flags.weights:
        encoder, found = load_vjepa(flags.weights)
        config, state, about = {**config, **found}, encoder.state_dict(), f"{found['model']} of {flags.weights}"
    if untrained:
        state, about = None, f"untrained {config['model']} of seed {config['seed']}"
    try:
        config = {**config, "frames": flags.frames or config["frames"], "crop": flags.crop or config["crop"]}
        masking = Masking(**checkpoint["definition"]["masking"]) if flags.checkpoint else Masking()
        return Frozen(make_encoder(config, state), config, masking, about, Path(flags.out or folder))
    except torch.OutOfMemoryError:
        raise
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(f"{flags.checkpoint} is of another version of model.py; train it again") from None


@torch.no_grad()
def last_level(encoder, clips):
    """uint8 clips [B, 3, T, H, W] -> tokens of the last level [B, N, D], float32 without autocast, as in the study."""
    features = encoder(normalise(clips.to(encoder.video.device)))  # (B, N, 4D)
    return features[..., -encoder.width:].clone()  # a view would keep all levels


class Labelled(NamedTuple):
    """What a head learns from, or is tested on."""
    features: object  # [n, N, D], N = 1 where pooled: a tensor, or `Stored`
    labels: torch.Tensor  # [n], on the CPU; -1 hides a label from training

    def read(self, rows, device):
        """Features of some rows [b] -> float32 [b, N, D] on a device."""
        return self.features[rows.to(getattr(self.features, "device", "cpu"))].to(device).float()

    def pool(self):
        """The same clips with the mean of their tokens [n, 1, D], float32 in memory."""
        rows = torch.arange(len(self.labels)).split(64)
        return Labelled(torch.cat([self.read(each, "cpu").mean(1, keepdim=True) for each in rows]), self.labels)


class LinearHead(nn.Module):
    """One linear layer on the mean of a clip's tokens [n, N, D]: the study's linear head, as it is.

    `standardise` makes it the head of our own probes, which brings each channel to mean 0 and deviation 1 first: frozen
    features differ in scale by orders of magnitude, no learning rate suits all, and the plain head measures scale, too.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.Linear(width, classes)

    def standardise(self, features):
        """By mean and deviation of all training clips [n, 1, D]. That takes no labels: few-label probes do it, too."""
        self.mean, self.deviation = features.squeeze(1).mean(0), features.squeeze(1).std(0) + 1e-6

    def forward(self, tokens):
        return self.linear((tokens.mean(1) - self.mean) / self.deviation)  # (n, classes)


class AttentiveHead(nn.Module):
    """Class token and all tokens [n, N, D], one 8-head self-attention with residual, LayerNorm, linear.

    Only the class token is read, so it is the only query, the same for every clip. That makes attention cheap: a score
    q . (W_k x) is (W_k^T q) . x, so no key is ever computed (the key bias adds the same to all scores and cancels in
    the softmax), and the mean of values is the value of the mean. Parameters are those of nn.MultiheadAttention.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens):
        token, heads = self.token[0, 0], self.attention.num_heads  # (D)
        w_q, w_k, w_v = self.attention.in_proj_weight.unflatten(0, (3, heads, -1))  # (heads, D/heads, D) each
        b_q, _, b_v = self.attention.in_proj_bias.unflatten(0, (3, heads, -1))  # (heads, D/heads) each
        query = (w_q @ token + b_q) / math.sqrt(w_q.shape[1])  # (heads, D/heads)
        direction = torch.einsum("hcd,hc->dh", w_k, query)  # (D, heads)
        scores = torch.cat(((token @ direction).expand(len(tokens), 1, -1), tokens @ direction), dim=1)
        weights = scores.softmax(1)  # (n, 1 + N, heads)
        mean = weights[:, 1:].transpose(1, 2) @ tokens + weights[:, 0].unsqueeze(-1) * token  # (n, heads, D)
        value = torch.einsum("hcd,nhd->nhc", w_v, mean) + b_v  # (n, heads, D/heads)
        return self.linear(self.norm(token + self.attention.out_proj(value.flatten(1))))  # (n, classes)


def train_head(head, train, recipe, seed, device, progress=""):
    """AdamW on the labelled clips of `train`, by shuffled epochs, or by steps from one shuffled pass after another."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY)
    shuffle, labelled = torch.Generator().manual_seed(seed), (train.labels >= 0).nonzero().squeeze(1)
    epochs = recipe.epochs or math.ceil(recipe.steps * recipe.batch / len(labelled))
    passes = [labelled[torch.randperm(len(labelled), generator=shuffle)] for _ in range(epochs)]
    if recipe.steps:
        passes = [torch.cat(passes)[:recipe.steps * recipe.batch]]
    batches = [rows for each in passes for rows in each.split(recipe.batch)]
    for rows in tqdm(batches, desc=progress, unit="step", leave=False, disable=None if progress else True):
        loss = F.cross_entropy(head(train.read(rows, device)), train.labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def draw_shots(labels, shots, seed):
    """Labels [n] with all but `shots` of each class hidden (-1); all stay where a class has no more.
    Depends on labels and seed alone, so all encoders meet the same clips; what few shots show, more show too."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shown = torch.full_like(labels, -1)
    for label in labels.unique():
        shown[order[labels[order] == label][:shots]] = label
    return shown


def accuracies(recipe, train, test, seeds, device, shots=0, progress=""):
    """Top-1 % on all of `test` of a head per seed, a list. A seed draws the head's weights, the order of clips and, of
    each class, the `shots` labelled clips to learn from (0: all)."""
    found, classes = [], int(max(train.labels.max(), test.labels.max())) + 1
    for seed in seeds:
        torch.manual_seed(seed)
        head = (AttentiveHead if recipe.head == "attentive" else LinearHead)(train.features.shape[-1], classes)
        if recipe.head == "standardised":
            head.standardise(train.features)
        shown = train._replace(labels=draw_shots(train.labels, shots, seed)) if shots else train
        train_head(head.to(device), shown, recipe, seed, device, progress)
        with torch.no_grad():
            scores = torch.cat([head(test.read(rows, device)) for rows in torch.arange(len(test.labels)).split(64)])
        if not scores.isfinite().all():
            raise ValueError("what the head computes is not finite: it diverged, or had too few clips to learn from")
        found.append(100 * (scores.argmax(-1).cpu() == test.labels).double().mean().item())
    return found


def held_out(encoder, config, count):
    """Moving shapes that no run trains on: (shapes, how many) to learn from, and a third as many to be tested on."""
    how, device, world = (config["frames"], config["crop"]), encoder.video.device, WORLDS[config.get("world", "default")]
    return [(world(*how, HELD_OUT + i, device), clips) for i, clips in enumerate((count, max(1, count // 3)))]


def shape_features(encoder, shapes, count, about, keep=None):
    """Moving shapes as an encoder sees them: tokens, float16 [count, N, D] on the CPU, and their means, [count, 1, D].
    keep: bool [count], the clips whose tokens are wanted, None for all. Rows that are never written take no memory."""
    means, tokens = [], None
    for items in tqdm(torch.arange(count).split(64), desc=f"features of {about}", leave=False, disable=None):
        features = last_level(encoder, shapes.clips(items))  # (64, N, D)
        tokens = torch.empty(count, *features.shape[1:], dtype=torch.float16) if tokens is None else tokens
        rows = items if keep is None else items[keep[items]]
        tokens[rows] = features[rows - items[0]].half().cpu()
        means.append(features.mean(1, keepdim=True))
    return tokens, torch.cat(means)


def probe_shapes(encoder, config, count, seed=0, shots=(LABELS,), about="the encoder"):
    """What held-out moving shapes tell of an encoder, top-1 %: {k: {factor: [of each draw]}, "linear": {factor: %}}.

    k: an attentive head on all tokens, from k labelled clips per class (0, named "all": from `count` clips). "linear":
    a linear head on their mean, from `count` clips. Both are tested on a third as many others.
    """
    sets, device, draws = held_out(encoder, config, count), encoder.video.device, range(seed, seed + DRAWS)
    labels = [shapes.factors(range(clips)) for shapes, clips in sets]
    most = count if 0 in shots else max(shots)
    drawn = torch.stack([draw_shots(labels[0][factor], most, draw) >= 0
                         for factor in FEW_FACTORS for draw in draws]).any(0)
    features = [shape_features(encoder, *each, about, keep) for each, keep in zip(sets, (drawn, None))]
    found = {str(k or "all"): {} for k in shots} | {"linear": {}}
    for factor in FACTORS:
        few, linear = ([Labelled(each[kind], some[factor]) for each, some in zip(features, labels)] for kind in (0, 1))
        for k in shots if factor in FEW_FACTORS else ():
            found[str(k or "all")][factor] = accuracies(FEW, *few, draws, device, k, f"{about}: {factor}")
        if factor in LINEAR_FACTORS:
            found["linear"][factor], = accuracies(LINEAR, *linear, [seed], device, progress=f"linear: {factor}")
    return found


def sample(encoder, source, items):
    """Tokens of some clips of a labelled source as Labelled, without those that cannot be read."""
    found, labels = [], []
    for rows in torch.as_tensor(items).split(CHUNK):
        clips = data.read_all(rows.tolist(), source)
        kept = [row for row, clip in zip(rows.tolist(), clips) if torch.is_tensor(clip)]
        if kept:
            clips = torch.stack([clip for clip in clips if torch.is_tensor(clip)])
            found.append(last_level(encoder, clips).half().cpu())
            labels += [source.labels[row] for row in kept]
    if not found:
        raise ValueError(f"none of {len(items)} clips for the probe along the run can be read")
    return Labelled(torch.cat(found), torch.tensor(labels))


def along(encoder, config, sources=None):
    """What few labels tell of an encoder while it is trained: {factor, or "class": top-1 %}, in about a second.

    One attentive head each, from `LABELS` clips per class, on up to `ALONG_TEST` others: moving shapes that no run
    trains on or, if given, labelled sources (train, test). The random numbers of the run are left alone.
    """
    device, sets = encoder.video.device, {}
    if sources:
        few = draw_shots(torch.tensor(sources[0].labels), LABELS, 0)
        exam = torch.linspace(0, len(sources[1]) - 1, min(ALONG_TEST, len(sources[1]))).long()
        sets["class"] = [sample(encoder, sources[0], (few >= 0).nonzero().squeeze(1)), sample(encoder, sources[1], exam)]
    else:
        (train, _), (test, _) = held_out(encoder, config, FEWEST_CLIPS)
        known = train.factors(range(ALONG_TRAIN))
        # Draws for the other factors are from the clips of the largest one.
        items = (draw_shots(known["motion"], LABELS, 0) >= 0).nonzero().squeeze(1)
        tokens = [torch.cat([last_level(encoder, shapes.clips(rows)).half().cpu() for rows in some.split(64)])
                  for shapes, some in ((train, items), (test, torch.arange(ALONG_TEST)))]
        tested = test.factors(range(ALONG_TEST))
        sets = {factor: [Labelled(tokens[0], known[factor][items]), Labelled(tokens[1], tested[factor])]
                for factor in FEW_FACTORS}
    with torch.random.fork_rng():
        return {name: accuracies(FEW, *each, [0], device, LABELS)[0] for name, each in sets.items()}


def show_shapes(rows, count):
    """Print results, {name of an encoder: `probe_shapes`}, as one table for each number of labels."""
    print(f"\nTop-1 % on {max(1, count // 3):,} generated clips, held out; one training seed; ± over {DRAWS} draws")
    columns = [*FEW_FACTORS, *LINEAR_FACTORS]
    for k in [k for k in next(iter(rows.values())) if k != "linear"]:
        print(f"{'':<12}{f'{k} labels per class, attentive head':<42}all {count:,} labels, linear head")
        cells = {"": columns}
        for name, found in rows.items():
            cells[name] = [f"{np.mean(found[k][factor]):5.1f} ± {np.std(found[k][factor], ddof=1):.1f}"
                           for factor in FEW_FACTORS] + [f"{found['linear'][factor]:5.1f}" for factor in LINEAR_FACTORS]
        cells["chance"] = [f"{100 / FACTORS[factor]:5.1f}" for factor in columns]
        for name, row in cells.items():
            print(f"{name:<12}" + "".join(f"{cell:<14}" for cell in row))


def open_sources(flags, frames, crop):
    """The labelled clips that the command line asks for: their name, and the sources to train and test on."""
    if flags.train_list:
        lists = [Path(path).resolve() for path in (flags.train_list, flags.test_list)]
        sources = [data.Clips(*data.own_videos(path), frames, crop) for path in lists]
        for path, source in zip(lists, sources):
            if source.labels is None or max(source.labels) >= MOST_CLASSES:
                raise ValueError(f"{path} should have lines `path label`, with labels that number the classes from 0")
        unseen = sorted(set(sources[1].labels) - set(sources[0].labels))
        if unseen:
            print(f"{lists[0]} has no clip of class {', '.join(map(str, unseen))}, which {lists[1]} tests")
        return "-".join(["own", lists[1].parent.name, *dict.fromkeys(path.stem for path in lists)]), *sources
    if flags.benchmark in (None, "blobs"):
        (train, test), first = flags.blob_clips, 42 if flags.blob_clips == BLOB_CLIPS else data.CLEAN_BLOBS
        return "blobs", *[data.BlobClips(8, 160, items=items, first=first, directions=True)
                          for items in (range(train), range(train, train + test))]
    return flags.benchmark, *[data.open_dataset(flags.benchmark, flags.root, split, frames, crop)
                              for split in ("train", "test")]


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


class Stored(NamedTuple):
    """Features in files, of which only the rows that are asked for are ever in memory."""
    clips: list  # of each clip [N, D], float16, mapped to its file

    @property
    def shape(self):
        return len(self.clips), *self.clips[0].shape

    def __getitem__(self, rows):
        return torch.stack([self.clips[row] for row in rows])


def open_chunk(path):
    """The features and the unreadable clips in a file of `extract`; None where it is missing or damaged."""
    try:
        return torch.load(path, mmap=True, weights_only=True)
    except Exception:  # whatever the bytes of another file lead to
        return None


def extract(frozen, source, name, pooled, workers):
    """Last-level features of every clip that can be read, as Labelled, and what a result says of them, a dict.

    They lie in a folder named after all that they depend on, below features-NAME, in a file for every `CHUNK` clips, so
    that a killed extraction goes on. Raises ValueError where no clip can be read, or a feature is not finite.
    """
    files = [os.path.exists(path) and (os.path.getsize(path), os.stat(path).st_mtime_ns) for path in source.paths]
    code = [Path(__file__).with_name(each).read_text() for each in ("model.py", "data.py", "synthetic.py")]
    identity = fingerprint(encoder_fingerprint(frozen.encoder), source.paths, files, source.labels, code, source.frames,
                           source.crop, pooled)
    folder, starts = frozen.folder / f"features-{name}" / identity[:16], range(0, len(source), CHUNK)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent):
        for other in {*folder.parent.iterdir()} - {folder}:
            shutil.rmtree(other, ignore_errors=True)  # of other weights or clips
        missing = [start for start in starts if open_chunk(folder / f"{start}.pt") is None]
        read = data.load([range(start, min(start + CHUNK, len(source))) for start in missing], workers,
                         collate_fn=functools.partial(data.read_all, source=source))
        for start, clips in zip(missing, tqdm(read, f"features of {name}", len(missing), unit="chunk", disable=None)):
            unreadable = {start + i: clip for i, clip in enumerate(clips) if isinstance(clip, str)}
            clips = [clip for clip in clips if torch.is_tensor(clip)]
            tokens = last_level(frozen.encoder, torch.stack(clips)) if clips else torch.zeros(0, 1, 1)  # (b, N, D)
            tokens = (tokens.mean(1, keepdim=True) if pooled else tokens).half().cpu()
            if not tokens.isfinite().all():
                raise ValueError(f"features of {name} are not finite in float16; did the training run diverge?")
            buffer = io.BytesIO()
            torch.save({"features": tokens, "unreadable": unreadable}, buffer)
            write_file(folder / f"{start}.pt", buffer.getvalue())
    chunks = [open_chunk(folder / f"{start}.pt") for start in starts]
    unreadable = {item: sentence for chunk in chunks for item, sentence in chunk["unreadable"].items()}
    if len(unreadable) == len(source):
        raise ValueError(f"no clip of {name} can be read; the first is {unreadable[0]}")
    if unreadable:
        print(f"{len(unreadable):,} of {len(source):,} clips of {name} cannot be read and are left out; to try them "
              f"again, delete {folder}")
    labels = torch.tensor([label for item, label in enumerate(source.labels) if item not in unreadable])
    clips = Labelled(Stored([tokens for chunk in chunks for tokens in chunk["features"]]), labels)
    return clips, {"clips": len(labels), "unreadable": [*unreadable.values()], "identity": identity}


def draw_episodes(train_labels, test_labels, way, shot, episodes, seed):
    """The clips of each episode: a list of (support [way, shot] of the training split, query [q] of the test split).
    Depends on the labels and the seed alone. Raises ValueError where there are too few classes."""
    draw = np.random.default_rng(seed)
    support, query = [{label: np.flatnonzero(labels == label) for label in np.unique(labels)}
                      for labels in (np.asarray(train_labels), np.asarray(test_labels))]
    classes = [label for label in support if len(support[label]) >= shot and label in query]
    if len(classes) < way:
        raise ValueError(f"a {way}-way {shot}-shot episode needs {way} classes with {shot} training clips and a test "
                         f"clip, and {len(classes)} have them; choose a smaller --way, or add clips")
    chosen = [draw.choice(classes, way, replace=False) for _ in range(episodes)]
    return [(np.stack([draw.choice(support[label], shot, replace=False) for label in some]),
             np.concatenate([draw.permutation(query[label])[:QUERIES] for label in some])) for some in chosen]


def episode_accuracies(train, test, way, shot, episodes, seed):
    """Nearest class mean of l2-normalised pooled features, top-1 % of each episode: a list."""
    known, unknown = (F.normalize(clips.features.squeeze(1), dim=-1) for clips in (train, test))  # (n, D)
    found = []
    for support, query in draw_episodes(train.labels, test.labels, way, shot, episodes, seed):
        means = known[support].mean(1)  # (way, D)
        nearest = (unknown[query].unsqueeze(1) - means).square().sum(-1).argmin(1)  # (q)
        right = train.labels[support[:, 0]][nearest] == test.labels[query]
        found.append(100 * right.double().mean().item())
    return found


def measure(recipe, train, test, flags, device):
    """What the command line asks for: {measurement: {"values": [%], "how": {...}}}.
    Those with equal "how", which ends with a hash of all labels, used the same draws and can be compared in pairs."""
    found, labels = {}, fingerprint(train.labels, test.labels)
    pooled = (train.pool(), test.pool()) if flags.shots or flags.episodes else None
    for shot in (1, 5) if flags.episodes else ():
        how = dict(way=flags.way, shot=shot, episodes=flags.episodes, seed=flags.seed)
        found[f"{flags.way}-way {shot}-shot episodes"] = episode_accuracies(*pooled, **how), how
    attentive = recipe if recipe.head == "attentive" else BENCHMARKS["diving48"]
    jobs = [(recipe, 0)] if not pooled else []
    for k in flags.shots or []:  # both heads; 0: all labels
        jobs += [(FEW, k), (FEW._replace(head="standardised", pooled=True), k)] if k else [(attentive, 0), (LINEAR, 0)]
    for each, k in jobs:
        each = each._replace(epochs=each.epochs and (flags.probe_epochs or each.epochs))
        name, count = f"{k or 'all'} labels, {each.head} head", DRAWS if k else flags.seeds
        clips = pooled if pooled and each.pooled else (train, test)
        seeds = [*range(flags.seed, flags.seed + count)]
        found[name] = accuracies(each, *clips, seeds, device, k, name), {**each._asdict(), "k": k, "seeds": seeds}
    return {name: {"values": values, "how": {**how, "labels": labels}} for name, (values, how) in found.items()}


def evaluate(frozen, name, sources, flags):
    """Measure what the command line asks for, print it, and write it to results-NAME.json in the encoder's folder.
    Other measurements that this file holds of the same encoder and clips stay in it."""
    recipe = BENCHMARKS.get(name, BENCHMARKS["diving48"])
    # Other clips than usual, or the untrained encoder, have files of their own.
    name += "-{}-{}".format(*flags.blob_clips) * (name == "blobs" and flags.blob_clips != BLOB_CLIPS)
    name += f"-{sources[0].frames}x{sources[0].crop}" * bool(flags.frames or flags.crop)
    name += "-untrained" * frozen.about.startswith("untrained")
    path = frozen.folder / f"results-{name}.json"
    before = read_json(path)  # before hours of extraction: it may be damaged, and episodes may not be there to be drawn
    if flags.episodes:
        draw_episodes(*(source.labels for source in sources), flags.way, 5, 0, 0)
    (train, about_train), (test, about_test) = (
        extract(frozen, source, f"{name}-{split}", recipe.pooled, flags.workers)
        for split, source in zip(("train", "test"), sources))
    measurements = measure(recipe, train, test, flags, frozen.encoder.video.device)
    classes = len({*train.labels.tolist(), *test.labels.tolist()})
    print(f"{frozen.about}, {name}: {len(train.labels):,} clips to learn from, {len(test.labels):,} to be tested on, "
          f"{classes} classes, chance {100 / (flags.way if flags.episodes else classes):.1f}")
    for label, found in measurements.items():
        values = found["values"]
        spread = f" ± {np.std(values, ddof=1):.2f} over {len(values)}" if len(values) > 1 else ""
        print(f"    {label:<36} top-1 {np.mean(values):6.2f}{spread}", flush=True)
    what = {"benchmark": name, "encoder": frozen.about, "checkpoint": flags.weights or flags.checkpoint,
            "sha256": encoder_fingerprint(frozen.encoder), "frames": sources[0].frames, "crop": sources[0].crop,
            "train": about_train, "test": about_test}
    same = all(before.get(key) == value for key, value in what.items())
    write_json(path, {**what, "measurements": (before["measurements"] if same else {}) | measurements})
    print(f"written to {path}")


def parse(arguments):
    """The command line. Flags that are wrong, or do not go together, end with argparse's message."""
    def numbers(text):
        return [0 if part == "all" else number(1)(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="last.pt of a run folder")
    add("--weights", help="a V-JEPA 2.1 checkpoint, ViT-B or ViT-L")
    add("--untrained", nargs="?", const="", choices=["", *SIZES], help="random weights: those of the run's seed or, "
        "without a checkpoint, of a network of this size and --seed")
    add("--out", metavar="DIR", help="folder for features and results; by default the checkpoint's")
    add("--frames", type=number(1), help="of a clip; by default as in training, else 16")
    add("--crop", type=number(1), help="pixels; by default as in training, else 224")
    add("--benchmark", choices=BENCHMARKS)
    add("--root", metavar="DIR", help="the folder that holds the datasets (see data.py --check)")
    add("--train-list", metavar="CSV", help="videos to learn from, a line `path label` each")
    add("--test-list", metavar="CSV", help="videos to be tested on, likewise")
    add("--probe-epochs", type=number(1), help="in the place of the benchmark's own")
    add("--seed", type=number(0), default=0, help="the first, of heads, their shuffling, and draws")
    add("--seeds", type=number(1), default=1, help="how many heads to train on all labels")
    add("--shots", type=numbers, metavar="K,K,...", help="labelled clips per class, or all")
    add("--episodes", type=number(1), nargs="?", const=EPISODES, help=f"how many; {EPISODES} by default")
    add("--way", type=number(2), default=5, help="classes of an episode")
    add("--clips", type=number(FEWEST_CLIPS), default=2304, help="moving shapes to train a head on")
    add("--blob-clips", type=numbers, metavar="TRAIN,TEST", default=BLOB_CLIPS, help="160,40 as in the study")
    add("--workers", type=number(0), default=min(8, os.cpu_count()), help="processes that read videos")
    flags = parser.parse_args(arguments)
    lists = flags.train_list or flags.test_list
    wrong = {
        "give one of --checkpoint, --weights and --untrained SIZE":
            bool(flags.checkpoint) + bool(flags.weights) + bool(flags.untrained) != 1,
        "--weights needs --out DIR, a folder for features and results": flags.weights and not flags.out,
        "--train-list and --test-list go together": lists and not (flags.train_list and flags.test_list),
        "--benchmark and your own lists ask for different clips; give one": lists and flags.benchmark,
        "--blob-clips takes two numbers, as 160,40": len(flags.blob_clips) != 2 or 0 in flags.blob_clips,
        "--episodes needs --benchmark, or --train-list and --test-list":
            flags.episodes and not (flags.benchmark or lists),
        "--root is for --benchmark": flags.root and not flags.benchmark,
        "blobs are 8 frames of 160 px: no --frames, no --crop":
            flags.benchmark == "blobs" and (flags.frames or flags.crop),
        f"--benchmark {flags.benchmark} needs --root DIR; `python data.py --check DIR` says what belongs in there":
            flags.benchmark not in (None, "blobs") and not flags.root}
    for sentence in [sentence for sentence, holds in wrong.items() if holds]:
        parser.error(sentence)
    return flags


@command("probe.py", smaller="number of --clips or --frames, or --crop",
         stopped="stopped; the same command goes on with the features that are done")
def main(arguments=None):
    flags = parse(arguments)
    untrained, own = flags.untrained is not None, flags.train_list
    frozen = open_frozen(flags, untrained)
    name, *sources = open_sources(flags, frozen.config["frames"], frozen.config["crop"])
    print(frozen.about)
    if not (flags.benchmark or own):
        found = probe_shapes(frozen.encoder, frozen.config, flags.clips, flags.seed, flags.shots or [LABELS])
        show_shapes({"untrained" if untrained else "encoder": found}, flags.clips)
    if own and not (flags.shots or flags.episodes):
        flags.shots = [0, LABELS]
    for each in [frozen] + [open_frozen(flags, True)] * bool(own and not untrained):
        evaluate(each, name, sources, flags)


if __name__ == "__main__":
    sys.exit(main())
