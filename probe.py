"""Measure what a frozen encoder knows: `python probe.py --checkpoint runs/NAME/last.pt`.

    (nothing more)                          the table that ends a run, then the paper's blobs
    --benchmark diving48 --root DIR         one of the paper's five benchmarks, by its recipe
    --train-list A.csv --test-list B.csv    your own videos, on trained and on random weights
    ... --shots 1,5,20,all                  both heads, learning from so few clips per class
    ... --features FILE.pt                  no head: the features themselves, for code of your own

An encoder is evaluated on its last level alone (D of its 4D channels), as in the paper. Features
and results go into the checkpoint's folder or, for other weights, below runs/.
"""
import argparse
import functools
import hashlib
import io
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

LABELS, DRAWS = 5, 5  # labelled clips per class, and how often they are drawn
FEWEST_CLIPS = 192  # of a world
BLOB_CLIPS = range(160), range(160, 200)  # to train on, to test on, as in the paper


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
LINEAR = Recipe("standardised", True, 3e-3, 256, 40)  # for all labels; why: `accuracies`


# ------------------------------------------------------------------------------ the command line

def whole(least):
    """The type of a flag: a whole number, at least this."""
    def number(text):
        if int(text) not in range(least, 10 ** 9):
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to 999999999")
        return int(text)
    return number


def counts(text):
    """The type of a flag: whole numbers from 1 in a row, 0 for `all`."""
    return [0 if part == "all" else whole(1)(part) for part in text.split(",")]


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python probe.py --checkpoint runs/NAME/last.pt --shots 1,5,20")

    add = parser.add_argument_group("encoder").add_argument
    add("--checkpoint", help="last.pt of a run folder")
    add("--weights", help="a V-JEPA 2.1 checkpoint, ViT-B or ViT-L")
    add("--untrained", nargs="?", const="", metavar="SIZE", help="random weights: those of the "
        "run's seed or, without a checkpoint, of a network of this size and --seed")
    add("--out", metavar="DIR", help="for features and results [the checkpoint's, or below runs/]")

    add = parser.add_argument_group("clips").add_argument
    add("--benchmark", choices=BENCHMARKS)
    add("--root", metavar="DIR", default=".", help="of the datasets (see data.py --check) [here]")
    add("--train-list", metavar="CSV", help="videos to learn from, a line `path label` each")
    add("--test-list", metavar="CSV", help="videos to be tested on, likewise")
    add("--clips", type=whole(FEWEST_CLIPS), default=2304, metavar="N",
        help="generated clips to train a head on [%(default)s]")

    add = parser.add_argument_group("measurements").add_argument
    add("--shots", type=counts, metavar="K,K,...", help="labelled clips per class, or all")
    add("--features", metavar="FILE", help="write paths, labels and pooled features here, and stop")
    add("--tokens", action="store_true", help="with --features: those of all tokens")
    add("--probe-epochs", type=whole(1), help="in the place of the benchmark's own")
    add("--seeds", type=whole(1), default=1, help="how many heads to train on all labels; they "
        "share one order of clips [%(default)s]")
    add("--seed", type=whole(0), default=0, help="the first, of heads and draws [%(default)s]")
    add("--workers", type=whole(0), default=min(8, os.cpu_count()),
        help="processes that read videos [%(default)s]")

    flags = parser.parse_args(arguments)
    if bool(flags.checkpoint) + bool(flags.weights) + bool(flags.untrained) != 1:
        parser.error("give one of --checkpoint, --weights and --untrained SIZE")
    if bool(flags.train_list) != bool(flags.test_list):
        parser.error("--train-list and --test-list go together")
    if flags.train_list and flags.benchmark:
        parser.error("--benchmark and your own lists ask for different clips; give one")
    return flags


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


# ------------------------------------------------------------------------------ frozen encoders

class Frozen(NamedTuple):
    """A frozen encoder under evaluation."""
    encoder: Encoder
    config: dict  # of its run, as far as there is one
    about: str
    folder: Path  # where features and results go


def load_checkpoint(path):
    """The dict that train.py saved; ValueError or FileNotFoundError for anything else."""
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
    return encoder.eval().to(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def open_frozen(flags, untrained):
    """The encoder that the command line names, or an untrained one like it."""
    config = {"seed": flags.seed, "model": flags.untrained, "patch": 16, "tubelet": 2,
              "frames": 16, "crop": 224}
    state, folder = None, f"runs/untrained-{flags.untrained}-seed{flags.seed}"
    if flags.checkpoint:
        checkpoint, folder = load_checkpoint(flags.checkpoint), Path(flags.checkpoint).parent
        config, state = checkpoint["config"], checkpoint[checkpoint["evaluated"]]
        about = f"{checkpoint['evaluated']} of {flags.checkpoint}, step {checkpoint['step']}"
    elif flags.weights:
        encoder, found = load_vjepa(flags.weights)
        config, state = {**config, **found}, encoder.state_dict()
        about, folder = f"{found['model']} of {flags.weights}", f"runs/{Path(flags.weights).stem}"
    elif flags.untrained not in SIZES:
        raise ValueError(f"--untrained takes {', '.join(SIZES)}, not {flags.untrained}")
    try:
        if untrained:
            state, about = None, f"untrained {config['model']} of seed {config['seed']}"
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


def encode(encoder, source, items, about, workers=0):
    """Clips of a world or a labelled source as an encoder sees them, a chunk at a time: yields
    tokens [b, N, D], NaN for a clip that cannot be read."""
    read = functools.partial(data.read_all, source=source)
    if isinstance(source, World):
        read = source.clips
    chunks = [items[start:start + CHUNK] for start in range(0, len(items), CHUNK)]
    loader = data.load(chunks, workers, collate_fn=read)
    for clips in tqdm(loader, f"features of {about}", len(chunks), leave=False, unit="chunk",
                      disable=None):
        broken = [not torch.is_tensor(clip) for clip in clips]
        shown = [torch.zeros(3, source.frames, source.crop, source.crop) if bad else clip
                 for clip, bad in zip(clips, broken)]
        tokens = last_level(encoder, torch.stack(shown)).cpu()
        if not tokens.isfinite().all():
            raise ValueError(f"features of {about} are not finite; did the training run diverge?")
        tokens[broken] = math.nan
        yield tokens


# ---------------------------------------------------------------------------------------- heads

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


# A head holds its own weights. `logits(p, tokens)` computes S heads side by side: p are their
# weights by name, each [S, ...], and tokens are [n, N, D] for all heads or, [S, n, N, D], for each
# its own. It gives [S, n, classes]. In einsum, {s} is the head's letter, if tokens have one.


class LinearHead(nn.Module):
    """One linear layer on the mean of a clip's tokens."""

    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    @staticmethod
    def logits(p, tokens):
        return linear(p, "linear", tokens.mean(-2))


class AttentiveHead(nn.Module):
    """Class token and all tokens, one 8-head self-attention with residual, LayerNorm, linear.

    Only the class token is read, so it is the only query, the same for every clip. That makes
    attention cheap: a score q . (W_k x) is (W_k^T q) . x, so no key is ever computed (a key bias
    would add the same to all scores and cancel in the softmax), and the mean of values is the
    value of the mean.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(width))
        attention = nn.MultiheadAttention(width, 8)
        # Three parameters: of one, the gradients of its parts would be put together.
        self.query, self.key, self.value = map(
            nn.Parameter, attention.in_proj_weight.detach().view(3, 8, -1, width))
        self.biases = nn.Parameter(torch.zeros(2, 8, width // 8))  # of queries and of values
        self.out = attention.out_proj
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    @staticmethod
    def logits(p, tokens):
        token, s = p["token"], "s" if tokens.dim() == 4 else ""  # (S, D)
        S, D = token.shape
        query = torch.einsum("sd, shed -> she", token, p["query"]) + p["biases"][:, 0]
        direction = torch.einsum("she, shed -> shd", query / math.sqrt(D // 8), p["key"])

        own = torch.einsum("shd, sd -> sh", direction, token)  # the class token's score of itself
        scores = torch.einsum(f"shd, {s}nkd -> snhk", direction, tokens)
        own = own[:, None, :, None].expand(*scores.shape[:3], 1)
        share = torch.cat((own, scores), dim=-1).softmax(-1)  # (S, n, 8, 1 + N)
        mean = torch.einsum(f"snhk, {s}nkd -> snhd", share[..., 1:], tokens)
        mean = mean + share[..., :1] * token[:, None, None]
        value = torch.einsum("snhd, shed -> snhe", mean, p["value"]) + p["biases"][:, None, 1]

        x = token[:, None] + linear(p, "out", value.flatten(2))  # (S, n, D)
        x = F.layer_norm(x, (D,)) * p["norm.weight"][:, None] + p["norm.bias"][:, None]
        return linear(p, "linear", x)


def linear(p, name, x):
    """The linear layers `name` of S heads: [S or none, n, d] -> [S, n, d']."""
    return x @ p[f"{name}.weight"].mT + p[f"{name}.bias"][:, None]


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
    weights, _ = torch.func.stack_module_state([head.to(device) for head in heads])
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.lr, weight_decay=WEIGHT_DECAY,
                                  fused=True)
    read = reader(train.features, device)
    for step in tqdm([*zip(*orders)], progress, leave=False, unit="step", disable=None):
        rows = torch.stack(step).squeeze(0)  # (S, b), or (b) for all heads
        tokens = read(rows.flatten()).unflatten(0, rows.shape)  # (S, b, N, D) or (b, N, D)
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
        shown[order[labels[order] == label][:shots or None]] = label
    return shown


def accuracies(recipe, train, test, seeds, device, shots=0, progress=""):
    """Top-1 % on all of `test` of a head per seed, a list.

    A seed draws the head's weights and, with `shots`, the labelled clips of each class and their
    order. With all labels (0) the heads share the order of the first seed, so that each batch is
    read once for all of them.
    """
    if min(train.labels.max(), test.labels.max()) < 0:
        raise ValueError("no clip can be read; `python data.py --check` says why")
    # A head has an output for each class that is there, whatever its number.
    labels = torch.cat((train.labels, test.labels))
    classes = labels[labels >= 0].unique()
    numbers = torch.searchsorted(classes, labels).where(labels >= 0, -1)
    numbers = numbers.split((len(train.labels), len(test.labels)))
    train, test = [Labelled(*each) for each in zip((train.features, test.features), numbers)]
    if recipe.pooled:
        train, test = train.pool(), test.pool()
    if recipe.head == "standardised":
        # Frozen features differ in scale by orders of magnitude: no learning rate suits all, and
        # the paper's linear head measures scale, too. Statistics take no labels.
        known = train.features[train.labels >= 0]
        mean, deviation = known.mean(0), known.std(0) + 1e-6
        train, test = [Labelled((features - mean) / deviation, labels)
                       for features, labels in (train, test)]

    kind = AttentiveHead if recipe.head == "attentive" else LinearHead
    heads = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            heads.append(kind(train.features.shape[-1], len(classes)))
    orders = [clip_order(draw_shots(train.labels, shots, seed), recipe, seed)
              for seed in (seeds if shots else seeds[:1])]
    weights = train_heads(heads, train, orders, recipe, device, progress)

    read, tested = reader(test.features, device), (test.labels >= 0).nonzero().squeeze(1)
    with torch.no_grad():
        logits = torch.cat([kind.logits(weights, read(rows)) for rows in tested.split(64)],
                           dim=1)  # (S, n, classes)
    if not logits.isfinite().all():
        raise ValueError("what the head computes is not finite: it diverged, or had too few clips "
                         "to learn from")
    right = logits.argmax(-1).cpu() == test.labels[tested]
    return (100 * right.double().mean(1)).tolist()


# ----------------------------------------------------------- the table of a run, and along a run

def held_out(encoder, config):
    """Two worlds like a run's, whose clips no run trains on: to learn from, and to be tested on."""
    world = WORLDS[config.get("world", "default")]
    return [world(config["frames"], config["crop"], HELD_OUT + i, encoder.video.device)
            for i in range(2)]


def pick(source, most):
    """At most so many items: of a world the first, of a labelled source evenly spread ones."""
    step = 1 if isinstance(source, World) else max(1, len(source) // most)
    return range(0, len(source), step)[:most]


def look(encoder, source, items, about, workers=0):
    """What an encoder sees in these clips, float16, by what is known of them: {factor: Labelled}.
    A labelled source knows one factor, "class"."""
    tokens = torch.cat([some.half() for some in encode(encoder, source, items, about, workers)])
    return {factor: Labelled(tokens, labels.where(~tokens[:, 0, 0].isnan(), -1))
            for factor, labels in source.factors(items).items()}


def probe_clips(encoder, sources, count, seed=0, shots=(LABELS,), about="the encoder", workers=0):
    """What clips tell of an encoder: {"clips": how many could be read, k: {factor: [top-1 % of each
    draw]}, "linear": {factor: top-1 %}}.

    sources: a world or a labelled source to learn from, `count` clips of it, and one to be tested
    on, a third as many. k: attentive heads on all tokens, from k labelled clips per class (0, named
    "all": from all). "linear": a linear head on the mean of the tokens, from all clips.
    """
    learn, exam = [look(encoder, source, pick(source, most), about, workers)
                   for source, most in zip(sources, (count, count // 3))]

    def top1(recipe, factor, draws, k):
        return accuracies(recipe, learn[factor], exam[factor], range(seed, seed + draws),
                          encoder.video.device, k, factor)

    found = {"clips": {}}
    for name, split in ("learn", learn), ("test", exam):
        labels = next(iter(split.values())).labels  # of any factor
        found["clips"][name] = int((labels >= 0).sum())
    for k in shots:
        found[str(k or "all")] = {factor: top1(FEW, factor, DRAWS, k) for factor in sources[0].few}
    found["linear"] = {factor: top1(LINEAR, factor, 1, 0)[0] for factor in sources[0].linear}
    return found


def along(encoder, sources):
    """What few labels tell of an encoder while it trains, {factor: top-1 %}: one attentive head
    each, trained briefly, from `LABELS` clips per class of a world or a labelled source. It takes
    about a second, and leaves the random numbers of the run alone."""
    items = [pick(source, most) for source, most in zip(sources, (ALONG_TRAIN, ALONG_TEST))]
    # Only clips with a label for the finest factor are looked at; the others draw from these.
    finest = max(sources[0].factors(items[0]).values(), key=torch.Tensor.max)
    items[0] = torch.tensor(items[0])[draw_shots(finest, LABELS, 0) >= 0].tolist()
    learn, exam = [look(encoder, *each, "the probe") for each in zip(sources, items)]
    recipe = FEW._replace(steps=FEW.steps * 2 // 3)  # one must not wait for it
    return {factor: accuracies(recipe, learn[factor], exam[factor], [0], encoder.video.device,
                               LABELS, factor)[0] for factor in sources[0].few}


def show(rows, sources, count):
    """Print what `probe_clips` found of these sources, {name of an encoder: found}, as a table
    beside chance."""
    learn = max(sources[0].factors(pick(sources[0], count)).values(), key=torch.Tensor.max)
    if isinstance(sources[0], World):
        kind, classes = "generated", sources[0].classes
    else:
        kind, classes = "of your", {"class": len({*sources[0].labels, *sources[1].labels})}
    clips = next(iter(rows.values()))["clips"]
    print(f"\nTop-1 % on {clips['test']:,} {kind} clips, held out; ± over {DRAWS} draws of so many"
          f"\nlabels per class for an attentive head; linear head: all {clips['learn']:,} labels"
          + too_few(learn, LABELS))
    table = {"": {name: name for name in classes}}
    for name, found in rows.items():
        for kind, values in found.items():
            if kind != "clips":
                table[f"{name}, {kind}"] = {factor: mean(tops) for factor, tops in values.items()}
    table["chance"] = {name: mean(100 / many) for name, many in classes.items()}
    for name, cells in table.items():
        print(f"{name:<24}" + "".join(f"{cells.get(factor, ''):<14}" for factor in classes))


def mean(values):
    """The mean and, of more than one value, the standard deviation, as text."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if np.size(values) > 1 else ""
    return f"{np.mean(values):5.1f}{spread}"


def too_few(labels, k):
    """How many classes have fewer than k clips to learn from, in brackets; else nothing."""
    clips = np.unique(labels[labels >= 0], return_counts=True)[1]
    if min(clips) >= k:
        return ""
    return f" ({(clips < k).sum()} of {len(clips)} classes have fewer labels, down to {min(clips)})"


# ------------------------------------------------------------------- sources, features in a file

def open_sources(flags, frames, crop):
    """The name of the clips that the command line asks for, and sources to train and test on."""
    if flags.train_list:
        lists = [Path(path).resolve() for path in (flags.train_list, flags.test_list)]
        sources = labelled([*map(data.own_videos, lists)], frames, crop)
        name = f"own-{lists[1].parent.name}-{lists[0].stem}-{lists[1].stem}"
    elif flags.benchmark in (None, "blobs"):
        name = "blobs"
        sources = [data.BlobClips(8, 160, items=items, first=42, directions=True)
                   for items in BLOB_CLIPS]
    else:
        name = flags.benchmark
        sources = [data.open_dataset(name, flags.root, split, frames, crop)
                   for split in ("train", "test")]
    return name, *sources


def labelled(splits, frames, crop):
    """Sources of the videos of two Splits, to learn from and to be tested on. Raises ValueError
    where labels are missing; says how many videos are in both."""
    for split, what in zip(splits, ("learn from", "be tested on")):
        if split.labels is None:
            raise ValueError(f"each video to {what} needs a label: a list with lines `path label`, "
                             "or a folder per class")
    learn, exam = sources = [data.Clips(*split, frames, crop) for split in splits]
    both = {*learn.paths} & {*exam.paths}
    if both:
        print(f"in both lists: {len(both):,} of {len(exam):,} test clips; heads learn from them, "
              "so the numbers will be too high")
    return sources


def fingerprint(*parts):
    """SHA-256 of tensors, byte for byte, and of anything else as Python writes it."""
    digest = hashlib.sha256()
    for part in parts:
        tensor = torch.is_tensor(part)
        digest.update(part.cpu().numpy().tobytes() if tensor else repr(part).encode())
    return digest.hexdigest()


def encoder_fingerprint(encoder):
    return fingerprint(*encoder.state_dict().values())


def clips_fingerprint(source):
    """Of which clips they are: path and time of each file, labels, and what is seen of them."""
    times = [os.path.exists(path) and os.stat(path).st_mtime_ns for path in source.paths]
    return fingerprint(source.paths, times, source.labels, source.frames, source.crop)


def extract(frozen, source, name, pooled, workers):
    """Last-level features of every clip, as Labelled, and what a result says of them, a dict. They
    lie in one file, clip by clip, below features-NAME, named after all that they depend on. Its
    length says how far it came, so that a killed extraction goes on."""
    encoder, clips = frozen.encoder, clips_fingerprint(source)
    code = [Path(__file__).with_name(each).read_text()
            for each in ("model.py", "data.py", "synthetic.py", "probe.py")]
    identity = fingerprint(encoder_fingerprint(encoder), clips, code, pooled)
    path = frozen.folder / f"features-{name}" / f"{identity[:16]}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = token_grid(source.frames, source.crop, source.crop, encoder.patch, encoder.tubelet)
    shape = len(source), 1 if pooled else math.prod(grid), encoder.width
    # Blobs keep float32, as in the paper.
    kind = torch.float32 if hasattr(source, "blobs") else torch.float16
    row = math.prod(shape[1:]) * kind.itemsize
    with locked(path.parent), open(path, "ab") as file:
        for other in {*path.parent.iterdir()} - {path}:
            other.unlink()  # of other weights or clips
        done = file.tell() // row
        if done < len(source):
            done -= done % CHUNK
        file.truncate(done * row)
        for tokens in encode(encoder, source, range(done, len(source)), name, workers):
            if pooled:
                tokens = tokens.mean(1)
            file.write(tokens.to(kind).numpy())
            file.flush()

    features = torch.from_file(str(path), size=math.prod(shape), dtype=kind).view(shape)
    unreadable = features[:, 0, 0].isnan()
    if unreadable.any():
        print(f"{unreadable.sum():,} of {len(source):,} clips of {name} cannot be read and are "
              f"left out (data.py --check says why); to try them again, delete {path}")
    about = {"unreadable": np.array(source.paths)[unreadable].tolist(), "source": clips}
    return Labelled(features, torch.tensor(source.labels).where(~unreadable, -1)), about


# ---------------------------------------------------------------------------------- measurements

def evaluate(frozen, name, sources, flags):
    """Measure what the command line asks for, print it, and write it to results-NAME.json in the
    encoder's folder: {measurement: {"values": [%], "how": {}}}. Others that the file holds of the
    same encoder and clips stay. Those of the same clips with equal "how" used the same draws and
    can be compared in pairs."""
    recipe = BENCHMARKS["diving48" if flags.train_list else flags.benchmark or "blobs"]
    if frozen.about.startswith("untrained"):
        name += "-untrained"
    path = frozen.folder / f"results-{name}.json"
    before, found = read_json(path), {}  # before hours of extraction: it may be damaged
    (train, about_train), (test, about_test) = [
        extract(frozen, source, f"{name}-{split}", recipe.pooled, flags.workers)
        for split, source in zip(("train", "test"), sources)]
    classes = len({*sources[0].labels, *sources[1].labels})
    counts = [(split.labels >= 0).sum() for split in (train, test)]
    print(f"{frozen.about}, {name}: {counts[0]:,} clips to learn from, {counts[1]:,} to be tested "
          f"on, {classes} classes, chance {100 / classes:.1f}")

    for k in flags.shots:  # 0: all labels
        few = FEW, FEW._replace(head="standardised", pooled=True)
        for each in few if k else (recipe, LINEAR):
            if each.epochs and flags.probe_epochs:
                each = each._replace(epochs=flags.probe_epochs)
            seeds = [flags.seed + i for i in range(DRAWS if k else flags.seeds)]
            measurement = f"{k or 'all'} labels, {each.head} head"
            values = accuracies(each, train, test, seeds, frozen.encoder.video.device, k,
                                measurement)
            how = {**each._asdict(), "k": k, "seeds": seeds}
            found[measurement] = {"values": values, "how": how}
            print(f"    {measurement:<36} top-1 {mean(values)} over {len(values)}"
                  + too_few(train.labels, k), flush=True)

    what = {"encoder": frozen.about, "sha256": encoder_fingerprint(frozen.encoder),
            "train": about_train, "test": about_test}
    if all(before.get(key) == value for key, value in what.items()):
        found = before["measurements"] | found
    write_json(path, {**what, "measurements": found})
    print(f"written to {path}")


def write_features(frozen, name, sources, flags):
    """Write the features of both splits, and what they are of, to the file of --features."""
    content = {"encoder": frozen.about, "sha256": encoder_fingerprint(frozen.encoder)}
    for split, source in zip(("train", "test"), sources):
        (features, labels), _ = extract(frozen, source, f"{name}-written-{split}", not flags.tokens,
                                        flags.workers)
        there = labels >= 0
        content[split] = {
            "paths": np.array(source.paths)[there].tolist(), "labels": labels[there],
            "features": features[there] if flags.tokens else features[there, 0]}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(Path(flags.features), buffer.getvalue())
    print(f"written to {flags.features}")


@command("probe.py", smaller="number of --clips",
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
        worlds = held_out(frozen.encoder, frozen.config)
        found = probe_clips(frozen.encoder, worlds, flags.clips, flags.seed,
                            flags.shots or [LABELS])
        show({"untrained" if untrained else "trained": found}, worlds, flags.clips)
    flags.shots = flags.shots or ([0, LABELS] if own else [0])
    evaluate(frozen, name, sources, flags)
    if own and not untrained:
        evaluate(open_frozen(flags, True), name, sources, flags)


if __name__ == "__main__":
    sys.exit(main())
