"""Measure what a frozen encoder knows: `python probe.py --checkpoint runs/NAME/last.pt`.

    (nothing more)                          the table that ends a run, then the paper's blobs
    --benchmark diving48 --root DIR         one of the paper's five benchmarks, by its recipe
    --train-list A.csv --test-list B.csv    your own videos, a line `path label` each: both heads,
                                            on trained and on random weights
    ... --shots 1,5,20,all                  both heads, learning from so few clips per class
    ... --episodes 600                      5-way 1- and 5-shot episodes, nearest class mean
    ... --features FILE.pt                  no head: the features themselves, for code of your own

An encoder is evaluated on its last level alone (D of its 4D channels), as in the paper. Features
and results go into the checkpoint's folder. `--weights FILE --out DIR` takes V-JEPA 2.1 weights in
the place of a checkpoint, and `--untrained vit_base` random ones.
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

LABELS, DRAWS = 5, 5  # labelled clips per class, and how often they are drawn
EPISODES, QUERIES = 600, 15  # and test clips per class of an episode, or as many as there are
FEWEST_CLIPS = 192  # of a world
BLOB_CLIPS = [160, 40]  # to train on, to test on, as in the paper


class Recipe(NamedTuple):
    """How a head is trained: for so many epochs or, if given, steps of AdamW."""
    head: str  # attentive, linear or standardised
    pooled: bool  # on the mean of a clip's tokens, instead of all of them
    lr: float
    batch: int
    epochs: int = 0
    steps: int = 0


BENCHMARKS = {  # the paper's; which frames and which resizing: data.py
    "diving48": Recipe("attentive", False, 1e-3, 16, 100),
    "ssv2": Recipe("attentive", True, 1e-3, 16, 100),
    "imagenet100": Recipe("linear", True, 1e-3, 256, 50),
    "ucf101": Recipe("attentive", False, 3e-4, 16, 100),
    "blobs": Recipe("attentive", False, 3e-4, 32, 100),
}
FEW = Recipe("attentive", False, 1e-3, 32, steps=150)  # for few labels
LINEAR = Recipe("standardised", True, 3e-3, 256, 40)  # for all labels; why: `LinearHead`


# ------------------------------------------------------------------------------ the command line


def whole(least):
    """The type of a flag: a whole number, at least this."""
    def convert(text):
        if not least <= int(text) < 10 ** 9:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {10 ** 9 - 1}")
        return int(text)

    convert.__name__ = "int"  # argparse says "invalid int value"
    return convert


def counts(text):
    """The type of a flag: whole numbers from 1 in a row, 0 for `all`."""
    return [0 if part == "all" else whole(1)(part) for part in text.split(",")]


def parse(arguments):
    """The command line. Flags that are wrong, or do not go together, end with argparse's words."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python probe.py --checkpoint runs/NAME/last.pt --shots 1,5,20")

    add = parser.add_argument_group("encoder").add_argument
    add("--checkpoint", help="last.pt of a run folder")
    add("--weights", help="a V-JEPA 2.1 checkpoint, ViT-B or ViT-L")
    add("--untrained", nargs="?", const="", metavar="SIZE", help="random weights: those of the "
        "run's seed or, without a checkpoint, of a network of this size and --seed")
    add("--out", metavar="DIR", help="folder for features and results [the checkpoint's]")

    add = parser.add_argument_group("clips").add_argument
    add("--benchmark", choices=BENCHMARKS)
    add("--root", metavar="DIR", help="the folder of the datasets (see data.py --check)")
    add("--train-list", metavar="CSV", help="videos to learn from, a line `path label` each")
    add("--test-list", metavar="CSV", help="videos to be tested on, likewise")
    add("--frames", type=whole(1), help="of a clip [as in training, else 16]")
    add("--crop", type=whole(1), help="in pixels [as in training, else 224]")
    add("--clips", type=whole(FEWEST_CLIPS), default=2304, metavar="N",
        help="generated clips to train a head on [%(default)s]")
    add("--blob-clips", type=counts, metavar="TRAIN,TEST", default=BLOB_CLIPS,
        help="[160,40, as in the paper]")

    add = parser.add_argument_group("measurements").add_argument
    add("--shots", type=counts, metavar="K,K,...", help="labelled clips per class, or all")
    add("--episodes", type=whole(1), nargs="?", const=EPISODES, help=f"how many [{EPISODES}]")
    add("--way", type=whole(2), default=5, help="classes of an episode [%(default)s]")
    add("--features", metavar="FILE", help="write paths, labels and pooled features "
        "to this file, and stop")
    add("--tokens", action="store_true", help="with --features: those of all tokens")
    add("--probe-epochs", type=whole(1), help="in the place of the benchmark's own")
    add("--seeds", type=whole(1), default=1, help="how many heads to train on all labels; they "
        "share one order of clips [%(default)s]")
    add("--seed", type=whole(0), default=0, help="the first, of heads and draws [%(default)s]")

    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=whole(0), default=min(8, os.cpu_count()), help="processes that read "
        "videos [%(default)s]")
    flags = parser.parse_args(arguments)
    check(flags, parser.error)
    return flags


def check(flags, error):
    """Flags that do not go together."""
    own = flags.train_list or flags.test_list
    if bool(flags.checkpoint) + bool(flags.weights) + bool(flags.untrained) != 1:
        error("give one of --checkpoint, --weights and --untrained SIZE")
    if flags.weights and not flags.out:
        error("--weights needs --out DIR, a folder for features and results")
    if own and not (flags.train_list and flags.test_list):
        error("--train-list and --test-list go together")
    if own and flags.benchmark:
        error("--benchmark and your own lists ask for different clips; give one")
    if len(flags.blob_clips) != 2 or 0 in flags.blob_clips:
        error("--blob-clips takes two numbers, as 160,40")
    if (flags.episodes or flags.features) and not (own or flags.benchmark):
        error("--episodes and --features need --benchmark, or --train-list and --test-list")
    if flags.tokens and not flags.features:
        error("--tokens is for --features")
    if flags.root and not flags.benchmark:
        error("--root is for --benchmark")
    if flags.benchmark == "blobs" and (flags.frames or flags.crop):
        error("blobs are 8 frames of 160 px: no --frames, no --crop")
    if flags.benchmark not in (None, "blobs") and not flags.root:
        error(f"--benchmark {flags.benchmark} needs --root DIR; "
                     "`python data.py --check DIR` says what belongs in there")


if __name__ == "__main__":
    parse(None)  # before torch, which takes seconds: help and mistakes are told at once

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from data import command, locked, read_json, write_file, write_json
from model import SIZES, Encoder, load_tensors, load_vjepa, normalise, token_grid
from synthetic import WORLDS, World

HELD_OUT = 1_000_003  # seeds of the probes' clips: far from those of any training run
WEIGHT_DECAY = 0.01
CHUNK = 16  # clips that are read and encoded together
ALONG_TRAIN, ALONG_TEST = 400, 128  # along a run: clips to draw labels from, and to be tested on
MOST_CLASSES = 100_000  # a head has an output for each; a larger label is a date or an identifier
SIDE_BY_SIDE = 2 ** 26  # features in a step of several heads: more would not fit into memory


# ------------------------------------------------------------------------------ frozen encoders


class Frozen(NamedTuple):
    """A frozen encoder under evaluation."""
    encoder: Encoder
    config: dict  # of its run, as far as there is one
    about: str
    folder: Path  # where features and results go


def load_checkpoint(path):
    """The dict that train.py saved. Raises ValueError or FileNotFoundError, in one sentence, for
    anything else."""
    checkpoint = load_tensors(path)
    parts = {"config", "definition", "evaluated", "step",
             "optimizer", "encoder", "target", "predictor", "heads"}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        raise ValueError(f"{path} was not written by this version of train.py; train it again")
    return checkpoint


def make_encoder(config, state=None):
    """The encoder of a saved config: with these weights, or the random ones of the run's seed."""
    torch.manual_seed(config["seed"])
    encoder = Encoder(SIZES[config["model"]], config["patch"], config["tubelet"])
    if state is not None:
        encoder.load_state_dict(state)
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    elif torch.backends.mps.is_available():
        device = "mps"
    return encoder.eval().to(device)


def open_frozen(flags, untrained):
    """The encoder that the command line names, or an untrained one like it. Raises ValueError or
    OSError for a wrong file."""
    config = {"seed": flags.seed, "model": flags.untrained, "patch": 16, "tubelet": 2,
              "frames": 16, "crop": 224}
    state, folder = None, f"runs/untrained-{flags.untrained}-seed{flags.seed}"
    if flags.checkpoint:
        checkpoint, folder = load_checkpoint(flags.checkpoint), Path(flags.checkpoint).parent
        config, state = checkpoint["config"], checkpoint[checkpoint["evaluated"]]
        about = config["objective"]
        if config["ablate"]:
            about += f" without {config['ablate']}"
        if config["as_released"]:
            about += " as released"
        about += f", {checkpoint['evaluated']} encoder at step {checkpoint['step']}"
    elif flags.weights:
        encoder, found = load_vjepa(flags.weights)
        config, state = {**config, **found}, encoder.state_dict()
        about = f"{found['model']} of {flags.weights}"
    elif flags.untrained not in SIZES:
        raise ValueError(f"--untrained takes {', '.join(SIZES)}, not {flags.untrained}")

    try:
        if untrained:
            state, about = None, f"untrained {config['model']} of seed {config['seed']}"
        config = {**config, "frames": flags.frames or config["frames"],
                  "crop": flags.crop or config["crop"]}
        return Frozen(make_encoder(config, state), config, about, Path(flags.out or folder))
    except torch.OutOfMemoryError:
        raise
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(f"{flags.checkpoint} is of another version of model.py; train it again"
                         ) from None


@torch.no_grad()
def last_level(encoder, clips):
    """Clips [B, 3, T, H, W] in 0..255 -> tokens of the last level [B, N, D], float32 without
    autocast, as in the paper."""
    features = encoder(normalise(clips.to(encoder.video.device)))  # (B, N, 4D)
    return features[..., -encoder.width:].clone()  # a view would keep all levels


def encode(encoder, source, items, workers=0, about=""):
    """Clips of a world or a labelled source as an encoder sees them, a few at a time. Yields the
    places in `items` of those that can be read [b], their tokens [b, N, D] (None if there are
    none), and {place: why it cannot be read}."""
    if isinstance(source, World):
        read = source.clips
    else:
        read = functools.partial(data.read_all, source=source)
    chunks = [items[start:start + CHUNK] for start in range(0, len(items), CHUNK)]
    # With a generator of its own, the loader leaves the global one alone.
    loader = data.load(chunks, workers, collate_fn=read, generator=torch.Generator())
    start = 0
    for clips in tqdm(loader, f"features of {about}", len(chunks), leave=False, unit="chunk",
                      disable=None):
        readable = [i for i, clip in enumerate(clips) if torch.is_tensor(clip)]
        broken = {start + i: clip for i, clip in enumerate(clips) if i not in readable}
        tokens = None
        if readable:
            tokens = last_level(encoder, torch.stack([clips[i] for i in readable]))
        yield start + torch.tensor(readable, dtype=torch.long), tokens, broken
        start += len(clips)


# ---------------------------------------------------------------------------------------- heads
#
# A head holds its own weights. `logits(p, tokens)` computes S heads side by side: p are their
# weights by name, each [S, ...], and tokens [G, n, N, D]: G = S clips of their own, or G = 1 set of
# clips for all heads. It gives [S, n, classes].


class Labelled(NamedTuple):
    """What a head learns from, or is tested on."""
    features: torch.Tensor  # [n, N, D] on the CPU, perhaps in a file; N = 1 where pooled
    labels: torch.Tensor  # [n], -1 for a clip that cannot be read

    def pool(self):
        """The same clips with the mean of their tokens [n, 1, D], float32 in memory."""
        means = [some.float().mean(1, keepdim=True) for some in self.features.split(CHUNK)]
        return Labelled(torch.cat(means), self.labels)


def reader(features, device):
    """A function that gives rows [b] of features as float32 [b, N, D] on a device. It writes them
    into the same memory each time: on a CPU, new memory for a batch takes longer than the head."""
    stored = torch.empty(0, dtype=features.dtype)
    numbers = torch.empty(0, device=device)

    def read(rows):
        torch.index_select(features, 0, rows, out=stored.resize_(len(rows), *features.shape[1:]))
        return numbers.resize_(stored.shape).copy_(stored)
    return read


def linear(p, name, x):
    """The linear layers `name` of S heads: [S, n, d] -> [S, n, d']."""
    return torch.baddbmm(p[f"{name}.bias"].unsqueeze(1), x, p[f"{name}.weight"].transpose(1, 2))


class LinearHead(nn.Module):
    """One linear layer on the mean of a clip's tokens: the paper's linear head, as it is.

    `standardise` makes it the head of our own probes, which brings each channel to mean 0 and
    deviation 1 first: frozen features differ in scale by orders of magnitude, no learning rate
    suits all, and the plain head measures scale, too.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.Linear(width, classes)

    def standardise(self, train):
        """By mean and deviation of all training clips. That takes no labels: few-label probes do
        it, too."""
        features = train.features[train.labels >= 0].float().squeeze(1)  # (n, D)
        self.mean, self.deviation = features.mean(0), features.std(0) + 1e-6

    @staticmethod
    def logits(p, tokens):
        x = (tokens.mean(2) - p["mean"].unsqueeze(1)) / p["deviation"].unsqueeze(1)  # (S, n, D)
        return linear(p, "linear", x)  # (S, n, classes)


class AttentiveHead(nn.Module):
    """Class token and all tokens, one 8-head self-attention with residual, LayerNorm, linear.

    Only the class token is read, so it is the only query, the same for every clip. That makes
    attention cheap: a score q . (W_k x) is (W_k^T q) . x, so no key is ever computed (a key bias
    would add the same to all scores and cancel in the softmax), and the mean of values is the
    value of the mean. Weights start as those of nn.MultiheadAttention do.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, width))
        attention = nn.MultiheadAttention(width, 8)
        weights = attention.in_proj_weight.detach().chunk(3)
        self.w_query, self.w_key, self.w_value = map(nn.Parameter, weights)
        self.b_query, self.b_value = (nn.Parameter(torch.zeros(1, width)) for _ in range(2))
        self.out = attention.out_proj
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    @staticmethod
    def logits(p, tokens):
        token = p["token"]  # (S, 1, D)
        S, _, D = token.shape
        G, n, N, _ = tokens.shape
        query = p["b_query"] + token @ p["w_query"].mT  # (S, 1, D)
        query = query.view(S, 8, 1, -1) / math.sqrt(D // 8)
        direction = (query @ p["w_key"].unflatten(1, (8, -1))).squeeze(2)  # (S, 8, D)

        scores = direction.reshape(G, -1, D) @ tokens.flatten(1, 2).mT  # (G, 8 S/G, n N)
        own = (direction @ token.mT).unsqueeze(2).expand(-1, -1, n, -1)  # (S, 8, n, 1)
        share = torch.cat((own, scores.view(S, 8, n, N)), dim=-1).softmax(-1)

        mean = share[..., 1:].reshape(G, -1, n, N).transpose(1, 2) @ tokens  # (G, n, 8 S/G, D)
        mean = mean.view(G, n, -1, 8, D).permute(0, 2, 3, 1, 4).reshape(S, 8, n, D)
        w_value = p["w_value"].unflatten(1, (8, -1)).mT  # (S, 8, D, D/8)
        value = mean @ w_value + share[..., :1] * (token.unsqueeze(1) @ w_value)
        value = value.transpose(1, 2).flatten(2) + p["b_value"]  # (S, n, D)
        x = F.layer_norm(token + linear(p, "out", value), (D,))
        x = x * p["norm.weight"].unsqueeze(1) + p["norm.bias"].unsqueeze(1)
        return linear(p, "linear", x)  # (S, n, classes)


def clip_order(labels, recipe, seed):
    """The clips of each step, a list of LongTensors: the labelled ones in shuffled epochs or, for
    so many steps, whole batches that are cut from one shuffled pass after another."""
    shuffle = torch.Generator().manual_seed(seed)
    labelled = (labels >= 0).nonzero().squeeze(1)
    epochs = recipe.epochs or math.ceil(recipe.steps * recipe.batch / len(labelled))
    passes = [labelled[torch.randperm(len(labelled), generator=shuffle)] for _ in range(epochs)]
    if recipe.steps:
        passes = [torch.cat(passes)[:recipe.steps * recipe.batch]]
    return [rows for each in passes for rows in each.split(recipe.batch)]


def train_heads(heads, train, orders, recipe, device, progress=""):
    """AdamW on the mean cross-entropy. orders: the clips of each step, for every head its own, or
    one for all heads. Returns the weights of all heads by name, each [S, ...]."""
    parameters, buffers = torch.func.stack_module_state([head.to(device) for head in heads])
    weights = {**parameters, **buffers}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.lr, weight_decay=WEIGHT_DECAY,
                                  fused=True)
    read = reader(train.features, device)
    steps = list(zip(*orders))
    for step in tqdm(steps, progress, leave=False, unit="step", disable=None if progress else True):
        rows = torch.stack(step)  # (G, b)
        tokens = read(rows.flatten()).unflatten(0, rows.shape)  # (G, b, N, D)
        logits = heads[0].logits(weights, tokens)  # (S, b, classes)
        labels = train.labels[rows].to(device).expand(len(heads), -1)
        # Each head's own mean: the sum over heads gives each the gradient that it has alone.
        loss = len(heads) * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights


def draw_shots(labels, shots, seed):
    """Labels [n] with all but `shots` of each class hidden (-1); all stay where a class has no
    more. Depends on labels and seed alone, so all encoders meet the same clips; what few shots
    show, more show too."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shown = torch.full_like(labels, -1)
    for label in labels.unique():
        shown[order[labels[order] == label][:shots]] = label
    return shown


def accuracies(recipe, train, test, seeds, device, shots=0, progress=""):
    """Top-1 % on all of `test` of a head per seed, a list.

    A seed draws the head's weights and, with `shots`, the labelled clips of each class and their
    order. With all labels (0) the heads share the order of the first seed, so that each batch is
    read once for all of them.
    """
    kind = AttentiveHead if recipe.head == "attentive" else LinearHead
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    heads = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            heads.append(kind(train.features.shape[-1], classes))
            if recipe.head == "standardised":
                heads[-1].standardise(train)

    if shots:
        orders = [clip_order(draw_shots(train.labels, shots, seed), recipe, seed) for seed in seeds]
        together = max(1, SIDE_BY_SIDE // (recipe.batch * train.features[0].numel()))
    else:
        orders = [clip_order(train.labels, recipe, seeds[0])]
        together = len(heads)
    parts = []
    for i in range(0, len(heads), together):
        part = slice(i, i + together)
        parts.append(train_heads(heads[part], train, orders[part], recipe, device, progress))
    weights = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    read, tested = reader(test.features, device), (test.labels >= 0).nonzero().squeeze(1)
    with torch.no_grad():
        logits = torch.cat([kind.logits(weights, read(rows).unsqueeze(0))
                            for rows in tested.split(64)], dim=1)  # (S, n, classes)
    if not logits.isfinite().all():
        raise ValueError("what the head computes is not finite: it diverged, or had too few clips "
                         "to learn from")
    right = logits.argmax(-1).cpu() == test.labels[tested]
    return (100 * right.double().mean(1)).tolist()


# ----------------------------------------------------------- the table of a run, and along a run


def features_of(encoder, source, items, keep=None, workers=0, about=""):
    """Of clips [n] of a world or a labelled source, on the CPU: tokens, float16 [n, N, D], their
    means [n, 1, D], and which clips can be read, bool [n]. keep: bool [n], the clips whose tokens
    are wanted, None for all. Rows that are never written take no memory."""
    readable = torch.zeros(len(items), dtype=torch.bool)
    tokens = means = None
    for rows, some, _ in encode(encoder, source, items, workers, about):
        if some is None:
            continue
        if means is None:
            tokens = torch.empty(len(items), *some.shape[1:], dtype=torch.float16)
            means = torch.zeros(len(items), 1, encoder.width)
        readable[rows] = True
        means[rows] = some.mean(1, keepdim=True).cpu()
        kept = slice(None) if keep is None else keep[rows]
        tokens[rows[kept]] = some[kept].half().cpu()
    if means is None:
        raise ValueError(f"none of {len(items):,} clips can be read; data.py --check says why")
    return tokens, means, readable


def held_out(encoder, config):
    """Two worlds like a run's, whose clips no run trains on: to learn from, and to be tested on."""
    world = WORLDS[config.get("world", "default")]
    return [world(config["frames"], config["crop"], HELD_OUT + i, encoder.video.device)
            for i in range(2)]


def spread(source, most):
    """At most so many items of a source, evenly spread."""
    return range(0, len(source), max(1, len(source) // most))[:most]


def factors(source, items):
    """What is known of these clips: {factor: labels [n]}. Sources of data.py have one, "class"."""
    if isinstance(source, World):
        return source.factors(items)
    return {"class": torch.tensor(source.labels)[items]}


def probe_clips(encoder, sources, items, seeds, recipe, shots, about, linear=None, workers=0):
    """What clips tell of an encoder, top-1 %: {k: {factor: [of each seed]}, "linear": {factor: %}}.

    sources, items: a world or a labelled source to learn from and one to be tested on, and which
    of their clips. k: attentive heads on all tokens, from k labelled clips per class (0, named
    "all": from all). "linear": a linear head on the mean of the tokens, from all clips.
    """
    labels = [factors(*each) for each in zip(sources, items)]
    few = getattr(sources[0], "few", ["class"])
    if linear is None:
        linear = getattr(sources[0], "linear", few)
    drawn = None  # the clips that few-label heads learn from; any, where some cannot be read
    if isinstance(sources[0], World) and 0 not in shots:
        drawn = torch.stack([draw_shots(labels[0][factor], max(shots), seed) >= 0
                             for factor in few for seed in seeds]).any(0)
    sets = [features_of(encoder, *each, workers, about)
            for each in zip(sources, items, (drawn, None))]

    def labelled(kind, factor):
        return [Labelled(features[kind], known[factor].where(features[2], -1))
                for features, known in zip(sets, labels)]

    device, found = encoder.video.device, {}
    for k in shots:
        found[str(k or "all")] = {
            factor: accuracies(recipe, *labelled(0, factor), seeds, device, k, f"{about}: {factor}")
            for factor in few}
    found["linear"] = {
        factor: accuracies(LINEAR, *labelled(1, factor), seeds[:1], device)[0] for factor in linear}
    return found


def probe_shapes(encoder, config, count, seed=0, shots=(LABELS,), about="the encoder"):
    """`probe_clips` of `count` clips of a run's world, tested on a third as many."""
    items = range(count), range(max(1, count // 3))
    return probe_clips(encoder, held_out(encoder, config), items, range(seed, seed + DRAWS), FEW,
                       shots, about)


def probe_own(encoder, sources, about="the encoder", count=2304, workers=0):
    """`probe_clips` of at most `count` clips of your own, tested on a third as many."""
    items = spread(sources[0], count), spread(sources[1], count // 3)
    return probe_clips(encoder, sources, items, range(DRAWS), FEW, [LABELS], about, None, workers)


def along(encoder, config, sources=None):
    """What few labels tell of an encoder while it trains: {factor, or "class": top-1 %}.

    One attentive head each, trained briefly, from `LABELS` clips per class: clips of the run's
    world that no run trains on or, if given, labelled sources (train, test). It takes about a
    second, and leaves the random numbers of the run alone.
    """
    items = [range(ALONG_TRAIN), range(ALONG_TEST)]
    if sources:
        items = [range(len(sources[0])), spread(sources[1], ALONG_TEST)]
    else:
        sources = held_out(encoder, config)
    # Only clips with a label for the finest factor are looked at; the others draw from these.
    finest = max(factors(sources[0], items[0]).values(), key=torch.Tensor.max)
    items[0] = (draw_shots(finest, LABELS, 0) >= 0).nonzero().squeeze(1).tolist()
    recipe = FEW._replace(steps=math.ceil(FEW.steps * 2 / 3))  # one must not wait for it
    found = probe_clips(encoder, sources, items, [0], recipe, [LABELS], "the probe", linear=())
    return {factor: values[0] for factor, values in found[str(LABELS)].items()}


def show(rows, count, chance):
    """Print what `probe_shapes` or `probe_own` found, {name of an encoder: found}, as one table for
    each number of labels. chance: {factor: top-1 % without knowledge}."""
    first = next(iter(rows.values()))
    for k in [k for k in first if k != "linear"]:
        print(f"{'':<12}{f'{k} labels per class, attentive head':<{14 * max(3, len(first[k]))}}"
              f"all {count:,} labels, linear head")
        few = [*first[k], *[""] * (3 - len(first[k]))]
        table = {"": [*few, *first["linear"]]}
        for name, found in rows.items():
            cells = {factor: f"{np.mean(draws):5.1f} ± {np.std(draws, ddof=1):.1f}"
                     for factor, draws in found[k].items()}
            table[name] = [cells.get(factor, "") for factor in few]
            table[name] += [f"{found['linear'][factor]:5.1f}" for factor in first["linear"]]
        table["chance"] = [f"{chance[factor]:5.1f}" if factor else "" for factor in table[""]]
        for name, cells in table.items():
            print(f"{name:<12}" + "".join(f"{cell:<14}" for cell in cells).rstrip())


def show_shapes(rows, count, world="default"):
    """Print what `probe_shapes` found, {name of an encoder: found}."""
    print(f"\nTop-1 % on {max(1, count // 3):,} generated clips, held out; one training seed; "
          f"± over {DRAWS} draws")
    show(rows, count, {factor: 100 / many for factor, many in WORLDS[world].classes.items()})


def show_own(rows, sources, count=2304):
    """Print what `probe_own` found of these sources, {name of an encoder: found}."""
    learn, exam = min(count, len(sources[0])), min(count // 3, len(sources[1]))
    print(f"\nTop-1 % on {exam:,} of your clips, held out; one training seed; "
          f"± over {DRAWS} draws")
    show(rows, learn, {"class": 100 / len({*sources[0].labels, *sources[1].labels})})
    print(too_few(torch.tensor(sources[0].labels), LABELS).strip())


def too_few(labels, k):
    """How many classes have fewer than k clips to learn from, in brackets; else nothing."""
    clips = np.unique(labels[labels >= 0], return_counts=True)[1]
    if min(clips) >= k:
        return ""
    return f" ({(clips < k).sum()} of {len(clips)} classes have fewer labels, down to {min(clips)})"


# ------------------------------------------------------------------- sources, features in a file


def open_sources(flags, frames, crop):
    """The labelled clips that the command line asks for: their name, and the sources to train and
    test on."""
    if flags.train_list:
        lists = [Path(path).resolve() for path in (flags.train_list, flags.test_list)]
        sources = [data.Clips(*data.own_videos(path), frames, crop) for path in lists]
        for path, source in zip(lists, sources):
            if source.labels is None or max(source.labels) >= MOST_CLASSES:
                raise ValueError(f"{path} should have lines `path label`, with labels that number "
                                 "the classes from 0")
        unseen = sorted({*sources[1].labels} - {*sources[0].labels})
        if unseen:
            print(f"{lists[0]} has no clip of class {', '.join(map(str, unseen))}, which "
                  f"{lists[1]} tests")
        both = {*sources[0].paths} & {*sources[1].paths}
        if both:
            print(f"in both lists: {len(both):,} of {len(sources[1]):,} test clips; heads learn "
                  "from them and are tested on them, so the numbers will be too high")
        name = "-".join(["own", lists[1].parent.name, *dict.fromkeys(path.stem for path in lists)])
    elif flags.benchmark in (None, "blobs"):
        name, (train, test) = "blobs", flags.blob_clips
        first = 42
        if flags.blob_clips != BLOB_CLIPS:
            name, first = f"blobs-{train}-{test}", data.CLEAN_BLOBS
        sources = [data.BlobClips(8, 160, items=items, first=first, directions=True)
                   for items in (range(train), range(train, train + test))]
    else:
        name = flags.benchmark
        sources = [data.open_dataset(name, flags.root, split, frames, crop)
                   for split in ("train", "test")]
    if flags.frames or flags.crop:  # results of other clips than usual have files of their own
        name += f"-{frames}x{crop}"
    return name, *sources


def fingerprint(*parts):
    """SHA-256 of tensors, byte for byte, and of anything else as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().numpy().tobytes() if torch.is_tensor(part)
                      else json.dumps(part).encode())
    return digest.hexdigest()


def encoder_fingerprint(encoder):
    """Of every weight, its name and shape, and the number of heads, which no weight tells."""
    parts = [encoder.blocks[0].attn.heads]
    for name, weight in encoder.state_dict().items():
        parts += [name, list(weight.shape), weight]
    return fingerprint(*parts)


def clips_fingerprint(source):
    """Of which clips they are: path, size and time of each file, or the generator and its seed;
    their labels, and what is seen of them."""
    files = [os.path.exists(path) and (os.path.getsize(path), os.stat(path).st_mtime_ns)
             for path in source.paths]
    seed = source.blobs.first if hasattr(source, "blobs") else None
    return fingerprint(source.paths, files, seed, source.labels, source.frames, source.crop)


def extract(frozen, source, name, pooled, workers):
    """Last-level features of every clip, as Labelled, and what a result says of them, a dict.

    They lie in one file, in a folder named after all that they depend on, below features-NAME.
    Raises ValueError where no clip can be read, or a feature is not finite.
    """
    encoder, clips = frozen.encoder, clips_fingerprint(source)
    code = [Path(__file__).with_name(each).read_text()
            for each in ("model.py", "data.py", "synthetic.py", "probe.py")]
    identity = fingerprint(encoder_fingerprint(encoder), clips, code, pooled)
    folder = frozen.folder / f"features-{name}" / identity[:16]
    folder.mkdir(parents=True, exist_ok=True)
    grid = token_grid(source.frames, source.crop, source.crop, encoder.patch, encoder.tubelet)
    shape = len(source), 1 if pooled else math.prod(grid), encoder.width
    # Blobs keep float32, as in the paper.
    kind = torch.float32 if hasattr(source, "blobs") else torch.float16
    with locked(folder.parent):
        for other in {*folder.parent.iterdir()} - {folder}:
            shutil.rmtree(other, ignore_errors=True)  # of other weights or clips
        try:
            unreadable = fill(folder, encoder, source, name, shape, kind, workers)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None
    if len(unreadable) == len(source):
        raise ValueError(f"no clip of {name} can be read; the first is {unreadable['0']}")
    if unreadable:
        print(f"{len(unreadable):,} of {len(source):,} clips of {name} cannot be read and are left "
              f"out; to try them again, delete {folder}")
    features = torch.from_file(str(folder / "features.bin"), size=math.prod(shape), dtype=kind)
    labels = torch.tensor(source.labels)
    labels[[int(item) for item in unreadable]] = -1
    about = {"clips": len(source) - len(unreadable), "unreadable": [*unreadable.values()],
             "identity": identity, "source": clips}
    return Labelled(features.view(shape), labels), about


def fill(folder, encoder, source, name, shape, kind, workers):
    """Write features.bin: clip by clip [N, D], zeros for one that cannot be read. The file's length
    says how far it came, so that a killed extraction goes on. Returns {item, as text: why it cannot
    be read}, which unreadable.json keeps."""
    row = math.prod(shape[1:]) * kind.itemsize
    with open(folder / "features.bin", "ab") as file:
        done = file.tell() // row
        if done != len(source):  # from the last whole chunk or, where it is damaged, the start
            done = done // CHUNK * CHUNK if done < len(source) else 0
        file.truncate(done * row)
        unreadable = read_json(folder / "unreadable.json") if done else {}
        items = range(done, len(source))
        for rows, tokens, broken in encode(encoder, source, items, workers, name):
            chunk = torch.zeros(len(rows) + len(broken), *shape[1:], dtype=kind)
            if tokens is not None:
                tokens = tokens.mean(1, keepdim=True) if shape[1] == 1 else tokens
                chunk[rows % CHUNK] = tokens.to(kind).cpu()
            if not chunk.isfinite().all():
                raise ValueError(f"features of {name} are not finite in {kind}; did the training "
                                 "run diverge?")
            if broken:
                unreadable |= {str(items[place]): why for place, why in broken.items()}
                write_json(folder / "unreadable.json", unreadable)
            file.write(chunk.numpy())
            file.flush()
    return unreadable


# --------------------------------------------------------------------- episodes, measurements


def draw_episodes(train_labels, test_labels, way, shot, episodes, seed):
    """The clips of each episode: a list of (support [way, shot] of the training split, query [q]
    of the test split). Depends on the labels and the seed alone. Raises ValueError where there are
    too few classes."""
    draw = np.random.default_rng(seed)
    support, query = [
        {label: np.flatnonzero(labels == label) for label in np.unique(labels) if label >= 0}
        for labels in (np.asarray(train_labels), np.asarray(test_labels))]
    classes = [label for label in support if len(support[label]) >= shot and label in query]
    if len(classes) < way:
        raise ValueError(f"a {way}-way {shot}-shot episode needs {way} classes with {shot} "
                         f"training clips and a test clip, and {len(classes)} have them; choose a "
                         "smaller --way, or add clips")
    drawn = []
    for some in [draw.choice(classes, way, replace=False) for _ in range(episodes)]:
        shown = [draw.choice(support[label], shot, replace=False) for label in some]
        asked = [draw.permutation(query[label])[:QUERIES] for label in some]
        drawn.append((np.stack(shown), np.concatenate(asked)))
    return drawn


def episode_accuracies(train, test, way, shot, episodes, seed):
    """Nearest class mean of l2-normalised pooled features, top-1 % of each episode: a list."""
    known, unknown = (F.normalize(clips.features.squeeze(1), dim=-1) for clips in (train, test))
    found = []
    for support, query in draw_episodes(train.labels, test.labels, way, shot, episodes, seed):
        means = known[support].mean(1)  # (way, D)
        nearest = (unknown[query].unsqueeze(1) - means).square().sum(-1).argmin(1)  # (q)
        right = train.labels[support[:, 0]][nearest] == test.labels[query]
        found.append(100 * right.double().mean().item())
    return found


def measure(recipe, train, test, flags, device):
    """Print and return what the command line asks for: {measurement: {"values": [%], "how": {}}}.
    Those of the same clips with equal "how", which ends with a hash of all labels, used the same
    draws and can be compared in pairs."""
    labels = fingerprint(train.labels, test.labels)
    found, pooled = {}, (train.pool(), test.pool()) if flags.shots or flags.episodes else None

    def add(name, values, how):
        found[name] = {"values": values, "how": {**how, "labels": labels}}
        line = f"    {name:<36} top-1 {np.mean(values):6.2f}"
        if len(values) > 1:
            line += f" ± {np.std(values, ddof=1):.2f} over {len(values)}"
        print(line + too_few(train.labels, how.get("k", 0)), flush=True)

    if flags.episodes:
        for shot in (1, 5):
            how = dict(way=flags.way, shot=shot, episodes=flags.episodes, seed=flags.seed)
            add(f"{flags.way}-way {shot}-shot episodes", episode_accuracies(*pooled, **how), how)
    jobs = [] if pooled else [(recipe, 0)]
    for k in flags.shots or []:  # both heads; 0: all labels
        attentive = recipe if recipe.head == "attentive" else BENCHMARKS["diving48"]
        few = FEW, FEW._replace(head="standardised", pooled=True)
        jobs += [(each, k) for each in (few if k else (attentive, LINEAR))]
    for each, k in jobs:
        if each.epochs and flags.probe_epochs:
            each = each._replace(epochs=flags.probe_epochs)
        seeds = [*range(flags.seed, flags.seed + (DRAWS if k else flags.seeds))]
        how = {**each._asdict(), "k": k, "seeds": seeds}
        if len(seeds) > 1 and not k:
            how["order"] = flags.seed  # of clips: all heads share it
        sets = pooled if pooled and each.pooled else (train, test)
        name = f"{k or 'all'} labels, {each.head} head"
        add(name, accuracies(each, *sets, seeds, device, k, name), how)
    return found


def evaluate(frozen, name, sources, flags):
    """Measure what the command line asks for, and write it to results-NAME.json in the encoder's
    folder. Other measurements that this file holds of the same encoder and clips stay."""
    recipe = BENCHMARKS["diving48" if flags.train_list else flags.benchmark or "blobs"]
    if frozen.about.startswith("untrained"):
        name += "-untrained"
    path = frozen.folder / f"results-{name}.json"
    before = read_json(path)  # before hours of extraction: it may be damaged
    if flags.episodes:  # likewise: there may be too few classes
        draw_episodes(*(source.labels for source in sources), flags.way, 5, 0, 0)
    (train, about_train), (test, about_test) = [
        extract(frozen, source, f"{name}-{split}", recipe.pooled, flags.workers)
        for split, source in zip(("train", "test"), sources)]
    classes = len({*train.labels.tolist(), *test.labels.tolist()} - {-1})
    chance = 100 / (flags.way if flags.episodes else classes)
    print(f"{frozen.about}, {name}: {about_train['clips']:,} clips to learn from, "
          f"{about_test['clips']:,} to be tested on, {classes} classes, chance {chance:.1f}")
    measurements = measure(recipe, train, test, flags, frozen.encoder.video.device)

    what = {"benchmark": name, "encoder": frozen.about,
            "checkpoint": flags.weights or flags.checkpoint,
            "sha256": encoder_fingerprint(frozen.encoder),
            "frames": sources[0].frames, "crop": sources[0].crop,
            "train": about_train, "test": about_test}
    if all(before.get(key) == value for key, value in what.items()):
        measurements = before["measurements"] | measurements
    write_json(path, {**what, "measurements": measurements})
    print(f"written to {path}")


def write_features(frozen, name, sources, flags):
    """Write the features of both splits, and what they are of, to the file of --features."""
    content = {"encoder": frozen.about, "sha256": encoder_fingerprint(frozen.encoder)}
    kind = "tokens" if flags.tokens else "pooled"
    for split, source in zip(("train", "test"), sources):
        clips, _ = extract(frozen, source, f"{name}-{kind}-{split}", not flags.tokens,
                           flags.workers)
        there = (clips.labels >= 0).nonzero().squeeze(1)
        features = clips.features[there]  # (n, N, D)
        content[split] = {"paths": [source.paths[item] for item in there],
                          "labels": clips.labels[there],
                          "features": features if flags.tokens else features.squeeze(1)}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(Path(flags.features), buffer.getvalue())
    print(f"written to {flags.features}")


@command("probe.py", smaller="number of --clips or --frames, or --crop",
         stopped="stopped; the same command goes on with the features that are done")
def main(arguments=None):
    flags = parse(arguments)
    untrained, own = flags.untrained is not None, flags.train_list
    frozen = open_frozen(flags, untrained)
    name, *sources = open_sources(flags, frozen.config["frames"], frozen.config["crop"])
    print(frozen.about)
    if flags.features:
        write_features(frozen, name, sources, flags)
        return
    if not (flags.benchmark or own):
        found = probe_shapes(frozen.encoder, frozen.config, flags.clips, flags.seed,
                             flags.shots or [LABELS])
        row = "untrained" if untrained else "encoder"
        show_shapes({row: found}, flags.clips, frozen.config.get("world", "default"))
    if own and not (flags.shots or flags.episodes):
        flags.shots = [0, LABELS]
    evaluate(frozen, name, sources, flags)
    if own and not untrained:
        evaluate(open_frozen(flags, True), name, sources, flags)


if __name__ == "__main__":
    sys.exit(main())
