"""Train a video JEPA with any of the paper's objectives: `python train.py --objective fwm_hw_ld`.

From top to bottom: settings and flags; networks and one step; clips, machine and signals; the run
folder; the loop and what a run says of itself.
"""
import argparse
import copy
import csv
import functools
import io
import json
import math
import os
import signal
import sys
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

PAPER = dict(frames=16, crop=224, model="vit_base", patch=16, steps=30_000, batch=32,
             micro_batch=8, lr=6e-4, ema=0.99925, workers=8, threads=0, log_every=100,
             save_every=1000, probe_every=0)
PRESETS = {
    "synthetic": dict(),
    "ucf101": dict(PAPER, fps=16),
    "mixed": dict(PAPER, frame_step=2),
    # The paper's context loss begins at step 15,000, which this regime never reaches.
    "blobs": dict(PAPER, frames=8, crop=128, fps=4, batch=16, steps=5000, ctx_weight=0.0),
}
# Where a run runs, when it saves and when it gives up: what changes nothing that it computes.
NOT_COMPUTED = ("out", "device", "compile", "threads", "workers", "save_every", "max_broken")


# -------------------------------------------------------------------- settings and the command line


def setting(default, meaning, least=None, most=10 ** 9, choices=None, group=None):
    """A field of `Config`, and so a flag. group: the heading of --help that begins with it."""
    return field(default=default, metadata=dict(meaning=meaning, least=least, most=most,
                                                choices=choices, group=group))


@dataclass
class Config:
    """All settings of a run, with the values of the synthetic preset, which suit two CPU cores."""
    preset: str = setting("synthetic", "the values that other flags start from", choices=PRESETS,
                          group="run")
    objective: str = setting("baseline", "a name in --list")
    as_released: bool = setting(False, "behave as the released code, not as its description")
    ablate: str = setting("", "leave an ingredient out; a wrong name prints all")
    out: str = setting("", "the run folder, by default below runs/")
    seed: int = setting(0, "of weights, clips and masks", 0, 2 ** 32 - 1)

    data: str = setting("", 'your own videos: a list (lines "path label" or "path") or a folder',
                        group="data")
    test_list: str = setting("", "labelled videos to test on, where --data has labels; without it, "
                             "every third clip of a class is kept from the heads")
    root: str = setting("", "the folder that holds the paper's datasets")
    world: str = setting("default", "what synthetic clips show; a wrong name prints all")
    frames: int = setting(8, "frames of a clip", 1, 10_000)
    crop: int = setting(32, "height and width of a clip in pixels", 1, 10_000)
    frame_step: int = setting(1, "frames of the video from one frame of a clip to the next", 1)
    fps: int = setting(0, "if given, the frame step is ceil(video's frames per second) // this", 0)
    max_broken: float = setting(0.05, "stop if more than this share of clips is unreadable", 0, 1)

    model: str = setting("tiny", "size of the networks; a wrong name prints all", group="model")
    weights: str = setting("", "a V-JEPA 2.1 checkpoint for the encoder to start from")
    patch: int = setting(8, "height and width of a token in pixels", 1)
    tubelet: int = setting(2, "frames of a token", 1)

    steps: int = setting(500, "training steps; every schedule is a share of them", 1,
                         group="optimisation")
    batch: int = setting(16, "clips per step, over all processes", 1, 10 ** 6)
    micro_batch: int = setting(0, "clips that are masked and averaged together; 0: all that a "
                               "process has of a batch", 0)
    lr: float = setting(1e-3, "learning rate after warm-up, the first 1 %% of the steps", 0)
    warmup_lr: float = setting(1e-4, "learning rate before step 0", 0)
    weight_decay: float = setting(0.04, "of all but biases and 1-D tensors", 0)
    ema: float = setting(0.97, "momentum of the target encoder", 0, 1)
    ctx_weight: float = setting(0.5, "what the context loss counts for at the end of the run", 0)

    device: str = setting("auto", "where to run", choices=["auto", "cuda", "mps", "cpu"],
                          group="machine")
    compile: bool = setting(None, "compile the networks; by default on cuda only")
    threads: int = setting(1, "CPU threads of torch; 0: its own choice. A tiny network gains "
                           "nothing from a second one, and waits for it on a busy machine", 0, 1024)
    workers: int = setting(0, "loader processes", 0, 1000)

    log_every: int = setting(10, "steps between lines of metrics.csv", 1, group="logging")
    save_every: int = setting(100, "steps between checkpoints", 1)
    probe_every: int = setting(100, "steps between lines of probes.csv, accuracies that the "
                               "encoder reaches with few labels; 0: never", 0)
    probe_clips: int = setting(2304, "labelled clips of the final table; 0: no table", 0)

    @property
    def grid(self):
        """The token grid (t, h, w) of a clip."""
        return token_grid(self.frames, self.crop, self.crop, self.patch, self.tubelet)


def flag(item):
    return "--" + item.name.replace("_", "-")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False, usage="python train.py [flags]",
        epilog="example: python train.py --objective hw_ld --data clips/videos.csv --steps 2000")
    parser.add_argument("--list", action="store_true", help="print the named objectives and stop")
    parser.add_argument("--resume", action="store_true", help="continue the run in its folder")

    for item in fields(Config):
        meaning, choices, title = (item.metadata[name] for name in ("meaning", "choices", "group"))
        if title:
            group = parser.add_argument_group(title)

        kind = type(item.default)
        if kind is bool or item.default is None:
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=kind, choices=choices)
            if not choices:
                how["metavar"] = kind.__name__.upper()
        # No default: what is None was not given, and the preset decides.
        group.add_argument(flag(item), default=None, help=f"{meaning} [{item.default}]", **how)
    return parser


def read_flags(arguments):
    """Command line -> (parser, all flags, Config): the preset's values, then what the flags say.

    Wrong flags end the process with one sentence, as argparse does it. Needs no torch.
    """
    parser = make_parser()
    flags = parser.parse_args(arguments)
    names = [item.name for item in fields(Config)]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    preset = PRESETS[given.get("preset", Config.preset)]
    config = Config(**{**preset, **given})
    if "frame_step" in given and "fps" not in given:
        config.fps = 0
    if config.data and not config.test_list and "probe_every" not in given:
        config.probe_every = 0

    for item in fields(Config):
        value, least, most = getattr(config, item.name), *map(item.metadata.get, ("least", "most"))
        if least is not None and not least <= value <= most:  # not a number is not, either
            parser.error(f"argument {flag(item)}: {value} is not from {least} to {most}")
    needs_root = config.preset in ("mixed", "ucf101") and not config.data
    if config.root and not needs_root:
        parser.error("--root is for --preset mixed or ucf101, without --data")
    if needs_root and not config.root:
        parser.error(f"--preset {config.preset} needs --root DIR, the folder that holds the "
                     "paper's datasets, or --data with your own videos; `python data.py --check "
                     "DIR` says what a folder lacks")
    if config.test_list and not config.data:
        parser.error("--test-list needs --data, a list of labelled videos to train on")
    if config.frames < 2 * config.tubelet:
        parser.error(f"{config.frames} frames in tubelets of {config.tubelet} give fewer than 2 "
                     "time steps; raise --frames")

    if not config.out:
        parts = [Path(config.data).stem or config.preset, config.objective]
        if config.as_released:
            parts.append("as-released")
        if config.ablate:
            parts.append(f"without-{config.ablate}")
        if config.world != Config.world:
            parts.append(config.world)
        if config.ema != preset.get("ema", Config.ema):
            parts.append(f"ema-{config.ema:g}")
        config.out = "runs/" + "-".join([*parts, f"seed{config.seed}"])
    return parser, flags, config


if __name__ == "__main__":
    # Torch takes seconds to import: --help, and a wrong flag, are answered before.
    read_flags(sys.argv[1:])

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import data
import probe
from data import command, locked, read_json, write_file, write_json
from model import (SIZES, Block, Encoder, Predictor, level_normalise, load_vjepa, normalise,
                   token_grid)
from objectives import (ABLATIONS, NOT_COMPILED, OBJECTIVES, TERMS, MaskOutputs, Outputs,
                        check_terms, coefficients, draw_masks, losses, make_heads, mean_over_ranks,
                        objective_list, released_form, without)
from synthetic import WORLDS


def parse(arguments):
    """Command line -> (Config, all flags). Whatever is wrong ends the process with one sentence."""
    parser, flags, config = read_flags(arguments)
    tables = {"objective": OBJECTIVES, "ablate": ("", *ABLATIONS), "world": WORLDS, "model": SIZES}
    for name, known in tables.items():
        if getattr(config, name) in known:
            continue
        hint = ""
        if name == "objective":
            hint = ("an objective of your own is trained by the file that adds it, `python "
                    "mine.py` (README, Your own objective); ")
        parser.error(f"argument --{name}: there is no {getattr(config, name)!r}; {hint}choose from "
                     f"{', '.join(filter(None, known))}")
    if 0 < config.probe_clips < probe.FEWEST_CLIPS:
        parser.error(f"--probe-clips {config.probe_clips} are too few; give at least "
                     f"{probe.FEWEST_CLIPS}, or 0 for no table")
    return config, flags


# ----------------------------------------------------------------------- the networks, and one step


class JEPA(nn.Module):
    """The networks of one run, and one forward pass from clips and masks to losses."""

    def __init__(self, objective, size, patch, tubelet):
        super().__init__()
        self.objective = objective
        self.encoder = Encoder(size, patch, tubelet)
        self.predictor = Predictor(size)
        self.heads = make_heads(objective, size.width)
        # Features that are the same everywhere are predicted without error, and if targets could
        # learn, they would become so. They cannot: no gradient reaches the target encoder. It
        # follows the encoder slowly (EMA), so there is always something left to predict.
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.losses, self.checked = losses, False

    def targets(self, clips):
        """What is to be predicted: features of the whole clip, [B, N, 4D]. Without EMA they come
        from the encoder itself and carry gradient."""
        encoder = self.target if self.objective.ema else self.encoder
        h = encoder(clips)
        return level_normalise(h) if self.objective.level_norm else h

    def forward(self, clips, masks, weights, context=True, groups=1):
        """uint8 clips [B, 3, T, H, W], list of (visible, masked), loss weights -> losses by name,
        targets [B, N, 4D]. context: predict visible tokens, too. groups: micro-batches of a step.
        """
        clips = normalise(clips)
        grid = token_grid(*clips.shape[2:], self.encoder.patch, self.encoder.tubelet)
        # 1. The target encoder sees the whole clip, once.
        h = self.targets(clips)  # (B, N, 4D)
        # 2. Encoder and predictor run once per mask: encode what is visible, predict the rest.
        outputs = []
        for visible, masked in masks:  # (B, n), (B, k)
            z = self.encoder(clips, visible)  # (B, n, 4D)
            p, c = self.predictor(z, visible, masked, grid, context)  # (B, k, 4D), (B, n, 4D)
            outputs.append(MaskOutputs(visible, masked, z, p, c))
        # 3. Every loss is a function of these outputs alone.
        outputs = Outputs(clips, grid, h, outputs, groups)
        if not self.checked:  # the first batch
            check_terms(outputs, self.objective, self.heads)
            self.checked = True
        return self.losses(outputs, self.objective, self.heads, weights), h.detach()

    @torch.no_grad()
    def update_target(self, momentum):
        for target, encoder in zip(self.target.parameters(), self.encoder.parameters()):
            target.lerp_(encoder, 1 - momentum)

    def compile(self, **options):
        """Compile every transformer block and the losses with all their terms. options: those of
        torch.compile. Blocks share one graph: as fast as one of all, in a quarter of the time."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**options)
        for name in NOT_COMPILED:
            TERMS[name] = torch.compiler.disable(TERMS[name])
        self.losses = torch.compile(losses, **options)


def build(config):
    """The networks of a run with random weights: a pure function of the settings and their seed."""
    objective, size = OBJECTIVES[config.objective], SIZES[config.model]
    if config.as_released:
        objective = released_form(objective)
    if config.ablate:
        objective = without(objective, config.ablate)
    if config.ablate == "predictor":
        size = size._replace(predictor_depth=0)
    torch.manual_seed(config.seed)
    return JEPA(objective, size, config.patch, config.tubelet)


@torch.no_grad()
def collapse_meter(h, most_tokens=4096):
    """Are target features alive? Their last level [B, N, D] -> effective rank, mean deviation.

    The deviation of a channel falls to 0 when all tokens look the same. The effective rank says how
    many directions features use, at most D: exp of the entropy of the normalised singular values
    of the centred tokens. It has no scale, so it finds what the deviation cannot: features that
    vary, but all along one line. If it falls with the loss, the loss falls for the wrong reason.
    """
    tokens = h.flatten(0, 1).float()  # (B*N, D)
    count = min(len(tokens), most_tokens)
    spread = torch.arange(count, device=h.device) * len(tokens) // count
    tokens = tokens[spread]
    tokens = tokens - tokens.mean(0)
    gram = tokens.T @ tokens
    if gram.device.type == "mps":
        gram = gram.cpu()

    squared = torch.linalg.eigvalsh(gram)  # singular values, squared
    squared = squared * (squared > 1e-6 * squared[-1])  # what lies below is rounding
    share = squared.sqrt() / squared.sqrt().sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp(), tokens.std(0).mean()


COLLAPSED = {"effective_rank": 2, "feature_std": 0.1}  # below either, probes mean nothing


def collapsed(row):
    """Whether features are dead by a line of metrics.csv, a dict."""
    return any(float(row[name]) < least for name, least in COLLAPSED.items())


def make_optimizer(model, config):
    """AdamW; weight decay on all but biases and 1-D tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, free = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


class Trainer:
    """The networks of a run with their optimizer, one training step, what a checkpoint keeps."""

    def __init__(self, config, device, ranks=1):
        self.config, self.device, self.ranks = config, device, ranks
        self.model = build(config).to(device)
        if config.weights:
            self.take_over(config.weights)
        self.objective = self.model.objective
        self.evaluated = self.objective.evaluated
        if config.ema == 1 and self.objective.ema:
            self.evaluated = "encoder"  # the target never moves
        self.optimizer = make_optimizer(self.model, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # The text of metrics.csv and probes.csv. A checkpoint keeps it, and mends the files.
        self.metrics = self.probes = ""
        self.labelled = None  # clips of your own to probe, instead of generated ones
        # Read seldom: reading waits for the device.
        self.healthy = torch.ones((), dtype=torch.bool, device=device)

        self.autocast = nullcontext()
        if device.type == "cuda":
            self.autocast = torch.autocast("cuda", torch.bfloat16)
        # Flash attention then: cuDNN's would plan anew for every token count, and counts change.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if config.compile or (config.compile is None and device.type == "cuda"):
            self.model.compile()

    def take_over(self, path):
        """Start both encoders from V-JEPA weights; ValueError where the settings do not fit."""
        pretrained, found = load_vjepa(path)
        if any(getattr(self.config, name) != value for name, value in found.items()):
            needed = ", ".join(f"--{name} {value}" for name, value in found.items())
            raise ValueError(f"{path} needs {needed}")
        for network in (self.model.encoder, self.model.target):
            network.load_state_dict(pretrained.state_dict())

    def logs(self, step):
        """Whether a step gets a line of metrics.csv."""
        return step % self.config.log_every == 0 or step + 1 == self.config.steps

    def step(self, step, micro_batches):
        """One training step on micro-batches (uint8 clips [B, 3, T, H, W], list of its masks).

        Returns losses by name, targets of the last micro-batch [B, N, 4D], the gradient's length.
        """
        # 1. Schedules: what each loss counts for, and the learning rate, linear over the first 1 %
        #    of the steps. What a term draws at random is fresh at every step, equal on all ranks,
        #    and the same after a resume.
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        numbers = coefficients(self.objective, step, self.config.steps, self.config.ctx_weight)
        context, groups = numbers["ctx"] > 0 or self.logs(step), len(micro_batches) * self.ranks
        # Tensors, since a compiled step would be compiled again for every new Python number.
        values = torch.tensor(list(numbers.values())).to(self.device, non_blocking=True)
        weights = dict(zip(numbers, values))
        warm = min(1.0, (step + 1) / max(1, self.config.steps // 100))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.warmup_lr + (self.config.lr - self.config.warmup_lr) * warm

        found = []
        for clips, masks in micro_batches:
            clips = clips.to(self.device, non_blocking=True)
            masks = [tuple(tokens.to(self.device, non_blocking=True) for tokens in mask)
                     for mask in masks]
            # 2. Forward: target encoder once; encoder and predictor once per mask; every loss;
            #    their weighted sum. Each micro-batch has means and statistics of its own.
            with self.autocast:
                losses, h = self.model(clips, masks, weights, context, groups)
            # 3. Backward: gradients add up, and are averaged over all micro-batches of all ranks.
            (losses["total"] / len(micro_batches)).backward()
            found.append({name: value.detach() for name, value in losses.items()})
        if not context:  # visible tokens were not predicted; that layer's weights decay alike
            for p in self.model.predictor.to_visible.parameters():
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        if self.ranks > 1:
            flat = nn.utils.parameters_to_vector(gradients)
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat / self.ranks, gradients)
        gradient_norm = nn.utils.get_total_norm(gradients)

        # 4. One step of AdamW for encoder, predictor and heads.
        self.optimizer.step()
        self.optimizer.zero_grad()
        # 5. The target follows the encoder: target = momentum * target + (1 - momentum) * encoder.
        if self.objective.ema:
            self.model.update_target(self.config.ema)
        losses = {name: torch.stack([each[name].float() for each in found]).mean()
                  for name in found[0]}
        self.healthy &= losses["total"].isfinite() & gradient_norm.isfinite()
        return losses, h, gradient_norm

    def row(self, step, losses, h, gradient_norm):
        """A line of metrics.csv, a dict of numbers. Losses are averaged over ranks, each of which
        has to call this."""
        means = mean_over_ranks(torch.stack(list(losses.values()))).tolist()
        rank, deviation = collapse_meter(h[..., -self.model.encoder.width:])
        numbers = coefficients(self.objective, step, self.config.steps, self.config.ctx_weight)
        return {"step": step, **dict(zip(losses, means)),
                "grad_norm": gradient_norm.item(), "lr": self.optimizer.param_groups[0]["lr"],
                "ema": self.config.ema if self.objective.ema else "", "ctx_weight": numbers["ctx"],
                "effective_rank": rank.item(), "feature_std": deviation.item()}

    def probe(self, step):
        """Add a line to probes.csv: what few labels tell of the encoder as it is. The run's random
        numbers are left alone, so that it computes the same with and without."""
        encoder = getattr(self.model, self.evaluated)
        # Blocks would be compiled again for the probe's shapes.
        with torch.compiler.set_stance("force_eager"):
            sources = self.labelled or probe.held_out(encoder, asdict(self.config))
            found = probe.along(encoder, sources)
        self.probes = with_line(self.probes, {"step": step, **found})
        write_file(Path(self.config.out, "probes.csv"), self.probes.encode())

    def save(self, folder, step):
        """Write all that a later process needs to go on with `step` as its first step."""
        networks = {name: part.state_dict() for name, part in self.model.named_children()}
        buffer = io.BytesIO()
        torch.save({"config": asdict(self.config), "definition": asdict(self.objective),
                    "step": step, "metrics": self.metrics, "probes": self.probes,
                    "evaluated": self.evaluated, "optimizer": self.optimizer.state_dict(),
                    **networks}, buffer)
        write_file(folder / "last.pt", buffer.getvalue())

    def load(self, checkpoint):
        """Take over a checkpoint. Raises ValueError where it does not fit the run."""
        try:
            for name, part in self.model.named_children():
                part.load_state_dict(checkpoint[name])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.metrics, self.probes = checkpoint["metrics"], checkpoint["probes"]
            for p, state in self.optimizer.state.items():
                state["exp_avg"].expand_as(p)  # the fused optimizer would crash
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"{self.config.out}/last.pt does not fit this run: it is damaged, or "
                             "was written by another version") from None


# ---------------------------------------------------------------------- clips, the machine, signals


def training_sources(config):
    """Where a run's clips come from: a list of sources, and how often each is drawn."""
    how = config.frames, config.crop, config.frame_step, config.fps
    if config.data:
        return [data.Clips(*data.own_videos(config.data), *how)], [1.0]
    if config.preset == "synthetic":
        world = WORLDS[config.world]
        return [world(config.frames, config.crop, config.seed)], [1.0]
    if config.preset == "blobs":
        return [data.BlobClips(*how)], [1.0]
    shares = data.MIXED if config.preset == "mixed" else {"ucf101": 1.0}
    sources = [data.open_dataset(name, config.root, "train", *how) for name in shares]
    return sources, list(shares.values())


def labelled_clips(config):
    """Clips of your own to probe, [to learn from, to be tested on], where --data has labels and the
    run measures anything; else None. The run itself trains on all of --data, without labels."""
    if not config.data or not (config.probe_clips or config.probe_every):
        return None
    splits = [data.own_videos(path) for path in (config.data, config.test_list) if path]
    labels = [label for split in splits for label in split.labels or []]
    if config.test_list and None in [split.labels for split in splits]:
        raise ValueError("--data and --test-list both need a label behind each path")
    if labels and max(labels) >= probe.MOST_CLASSES:
        raise ValueError(f"{max(labels)} is no label: they number the classes from 0; give "
                         "--probe-clips 0 to train without probes")
    if labels and not config.test_list:
        splits = data.hold_out(*splits)
    if not labels or not splits[1].paths:
        return None
    return [data.Clips(*split, config.frames, config.crop) for split in splits]


def prepare(config, rank, ranks, device):
    """The trainer and its batches. What can be refused without a run folder is refused here."""
    # The micro-batch in force decides masks and statistics: all that a checkpoint says includes it.
    config.micro_batch = config.micro_batch or max(1, config.batch // ranks)
    # Before the networks, which take seconds: a wrong path is said at once.
    sources, labelled = training_sources(config), labelled_clips(config)
    trainer = Trainer(config, device, ranks)
    trainer.labelled = labelled
    make_masks = functools.partial(draw_masks, grid=config.grid, masking=trainer.objective.masking)
    batches = data.Batches(*sources, config, make_masks, rank, ranks)
    clips = torch.zeros(batches.size, 3, config.frames, config.crop, config.crop, dtype=torch.uint8)
    make_masks(clips, torch.Generator(), torch.Generator())  # refuses what is too small for masks
    return trainer, batches


def start_ranks(config):
    """(rank, number of ranks, device); starts the process group under torchrun."""
    if config.threads:
        torch.set_num_threads(config.threads)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    name = config.device
    if name == "auto":
        name = next(each for each in there if there[each])
    if not there[name]:
        raise ValueError(f"--device {name}: torch finds no such device here; leave the flag out")
    ranks, device = int(os.environ.get("WORLD_SIZE", 1)), torch.device(name)
    if ranks == 1:
        return 0, 1, device

    if name == "cuda":
        device, found = torch.device(name, int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= found:
            raise ValueError(f"this machine has {found} GPUs; give torchrun "
                             f"--nproc_per_node={found}, or fewer")
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    return dist.get_rank(), ranks, device


class StopSignal(ExitStack):
    """Remembers Ctrl-C and SIGTERM, so that the loop ends after a whole step. The same one again
    ends at once. In a thread, where Python allows no handlers, signals stay as they are."""
    received = 0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(each, self.receive)
                self.callback(signal.signal, each, before)  # put back at the end
        return self

    def receive(self, received, frame):
        self.received = received
        signal.signal(received, signal.SIG_DFL)

    def agreed(self):
        """The signal, on all ranks if one got it: if that stopped alone, the others would wait."""
        received = torch.tensor(self.received)  # on the CPU: nothing waits for the GPU
        if dist.is_initialized():
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return received.item()


# ----------------------------------------------------------------------------------- the run folder


def differences(there, here, place=""):
    """Where two dicts of settings compute something different, as text with both values."""
    found = []
    for name in [name for name in {**here, **there} if name not in NOT_COMPUTED]:
        before, now = there.get(name), here.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{place}{name}.")
        elif before != now:
            found.append(f"{place}{name} {before} there, {now} here")
    return found


def open_run(config, trainer, resume):
    """Judge the run folder, and let the trainer go on from the checkpoint in it, which is returned
    (or None). Raises ValueError, before anything is written, where the folder holds anything else
    than the beginning of this run."""
    folder = Path(config.out)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    begun = sizes.get("last.pt") or sizes.get("metrics.csv")
    left = [name for name in sizes if name.endswith(".tmp")]  # by a process killed while it wrote
    ours = {"config.json", "metrics.csv", "probes.csv", "unreadable.txt", *left}
    if not begun and set(sizes) - ours:
        raise ValueError(f"{folder} holds something that is not a run; choose another --out")
    if begun and not resume:
        raise ValueError(f"{folder} holds a run already; add --resume to go on with it, or choose "
                         "another --out")

    # The objective itself beside its name: its coefficients may change from version to version.
    settings = json.loads(json.dumps({**asdict(config), "definition": asdict(trainer.objective)}))
    there, checkpoint = {}, None
    if begun:
        there["config.json"] = read_json(folder / "config.json")
    if "last.pt" in sizes:
        checkpoint = probe.load_checkpoint(folder / "last.pt")
        definition = json.loads(json.dumps(checkpoint["definition"]))
        there["last.pt"] = {**checkpoint["config"], "definition": definition}
    for name, before in there.items():
        different = differences(before, settings)
        if different and before:
            raise ValueError(f"{folder / name} is of a different run ({'; '.join(different)}); "
                             "choose another --out")
        if different:
            raise ValueError(f"{folder / name} is missing; choose another --out")

    if checkpoint:
        trainer.load(checkpoint)
    else:
        left.append("unreadable.txt")
    for name in left:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "config.json", settings)
    # Lines up to the checkpoint: what came after them is computed again.
    write_file(folder / "metrics.csv", trainer.metrics.encode())
    if config.probe_every:
        write_file(folder / "probes.csv", trainer.probes.encode())
    return checkpoint


def with_line(text, row):
    """The text of a CSV file with one more line, a dict; the first also brings the heading."""
    heading = text or ",".join(row) + "\n"
    return heading + ",".join(map(str, row.values())) + "\n"


def lines_of(text):
    return list(csv.DictReader(text.splitlines()))


def report(trainer, row, bar):
    """Add a line to metrics.csv, a dict of numbers without times, so that on a CPU a resumed run
    writes the same file; and show what matters of it. Raises ValueError where too many clips could
    not be read."""
    config, folder = trainer.config, Path(trainer.config.out)
    trainer.metrics = with_line(trainer.metrics, row)
    write_file(folder / "metrics.csv", trainer.metrics.encode())

    parts = [f"total={row['total']:.3g}", f"rank={row['effective_rank']:.3g}",
             f"std={row['feature_std']:.2g}"]
    for line in lines_of(trainer.probes)[-1:]:
        parts += [f"{name}={float(line[name]):.0f}" for name in line if name != "step"]
    # Workers are ahead of this step, and after a resume they meet the same files again.
    broken, failed = folder / "unreadable.txt", 0
    if broken.exists():
        noted = {*broken.read_bytes().splitlines()}
        failed = sum(int(line.split(b"\t")[0]) <= row["step"] for line in noted)
    if failed:
        parts.append(f"{failed:,} unreadable")
    bar.set_postfix_str(", ".join(parts))
    if bar.disable:
        print(f"step {row['step'] + 1} of {config.steps}: {', '.join(parts)}", flush=True)

    drawn = (row["step"] + 1) * config.batch
    if drawn >= 100 and failed > config.max_broken * (failed + drawn):  # fewer: judged by one file
        raise ValueError(f"{failed / (failed + drawn):.0%} of the clips cannot be read, more than "
                         f"--max-broken {config.max_broken:g}; {broken} names them")


COLOURS = ("#d62728", "#ff7f0e", "#bcbd22", "#2ca02c", "#17becf", "#1f77b4", "#9467bd", "#e377c2")


def plot(panels, path, connected=False, size=(600, 240), edge=60):
    """Write panels, {title: {name: (x values, y values)}}, one below the other as a PNG: points or
    connected lines, each panel of this size in pixels and on a scale of its own."""
    width, height = size
    image = Image.new("RGB", (width + 5 * edge, len(panels) * (height + 2 * edge)), "white")
    draw = ImageDraw.Draw(image)
    left, top = edge, edge
    for title, series in panels.items():
        right, bottom = left + width, top + height
        first, last = [limit(limit(xs) for xs, ys in series.values()) for limit in (min, max)]
        low, high = [limit(limit(ys) for xs, ys in series.values()) for limit in (min, max)]
        if connected:
            low = min(low, 0)  # else a curve that hardly falls would seem to fall to nothing

        draw.rectangle((left, top, right, bottom), outline="black")
        draw.text((left, top - 24), title, "black")
        for x, y, value in ((left - 46, top, high), (left - 46, bottom - 10, low),
                            (left, bottom + 6, first), (right - 30, bottom + 6, last)):
            draw.text((x, y), f"{value:.5g}", "black")

        for j, (name, (xs, ys)) in enumerate(series.items()):
            colour = COLOURS[j % len(COLOURS)]
            draw.text((right + 8, top + 16 * j), name, colour)
            points = [(left + width * (x - first) / max(last - first, 1e-9),
                       top + height * (high - y) / max(high - low, 1e-9)) for x, y in zip(xs, ys)]
            if connected:
                draw.line(points, colour, 2)
                continue
            for x, y in points:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        top += height + 2 * edge

    buffer = io.BytesIO()
    image.save(buffer, "png")
    write_file(path, buffer.getvalue())


def draw_curves(trainer, path):
    """Draw metrics.csv and probes.csv: losses, accuracies, and whether the features are alive."""
    def curve(text, name):
        lines = lines_of(text)
        return [int(line["step"]) for line in lines], [float(line[name]) for line in lines]

    names = [*lines_of(trainer.metrics)[0]]
    losses, panels = {}, {}
    for name in names[1:names.index("total") + 1]:
        steps, values = curve(trainer.metrics, name)
        largest = max(map(abs, values)) or 1.0
        losses[f"{name} (largest: {largest:.3g})"] = steps, [value / largest for value in values]
    panels["losses over steps, each as a share of its largest value"] = losses
    for line in lines_of(trainer.probes)[:1]:
        panels["top-1 % over steps: heads that learn from few labels"] = {
            name: curve(trainer.probes, name) for name in line if name != "step"}
    least = COLLAPSED["feature_std"]
    panels["feature_std over steps"] = {
        "feature_std": curve(trainer.metrics, "feature_std"),
        f"below {least}: collapsed": (steps, [least] * len(steps))}
    plot(panels, path, connected=True)


# ------------------------------------------------------------------ from the first step to the last


def introduce(trainer, batches):
    """Say what is about to run, where and on how much."""
    config, model = trainer.config, trainer.model
    precision = "bfloat16" if trainer.device.type == "cuda" else "float32"
    counts = {name: sum(p.numel() for p in part.parameters())
              for name, part in model.named_children() if name != "target"}
    clips = "generated clips"
    if config.data or config.root:
        clips = f"clips of {batches.lengths.sum():,} videos"
    networks = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    print(f"{config.objective} on {trainer.device}, {precision}, threads: "
          f"{torch.get_num_threads()}; parameters: {networks}")
    print(f"{clips}, {math.prod(config.grid):,} tokens a clip; run folder: {config.out}",
          flush=True)


def run_steps(trainer, batches, start, rank):
    """Train from step `start` to the end, or to a signal; returns the last step, and the signal's
    number or 0."""
    config, folder = trainer.config, Path(trainer.config.out)
    step, stopping = config.steps - 1, 0
    bar = tqdm(total=config.steps, initial=start, ncols=100, file=sys.stdout,
               disable=True if rank else None,  # None: where there is no terminal
               bar_format="{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")
    clips = data.loader(batches, start, config.workers, trainer.device)
    with StopSignal() as stop, bar:
        for step, micro_batches in enumerate(clips, start):
            last = step + 1 == config.steps
            logging = trainer.logs(step)
            probing = config.probe_every and (last or step % config.probe_every == 0)
            losses, h, gradient_norm = trainer.step(step, micro_batches)
            bar.update()

            stopping = stop.agreed()
            saving = last or stopping or (step + 1) % config.save_every == 0
            # At these steps alone the host waits for the device.
            if (logging or saving) and not trainer.healthy:
                raise FloatingPointError(
                    f"the loss or its gradient was not finite by step {step}; {folder}/last.pt is "
                    "the last good checkpoint, if there is one; start again with a lower --lr")
            if probing and rank == 0:
                trainer.probe(step)
            row = trainer.row(step, losses, h, gradient_norm) if logging else None
            if row and rank == 0:
                report(trainer, row, bar)
            if saving and rank == 0:
                trainer.save(folder, step + 1)
                draw_curves(trainer, folder / "curves.png")
            if stopping:
                break
    return step, stopping


def train(config, resume=False):
    """Run a Config to its end, or to a signal; returns the exit status, 0 or 128 + its number."""
    rank, ranks, device = start_ranks(config)
    trainer, batches = prepare(config, rank, ranks, device)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if rank == 0 else nullcontext():
        checkpoint = [open_run(config, trainer, resume) if rank == 0 else None]
        if ranks > 1:
            dist.broadcast_object_list(checkpoint)
        if rank and checkpoint[0]:
            trainer.load(checkpoint[0])
        start = checkpoint[0]["step"] if checkpoint[0] else 0
        del checkpoint  # as large as the networks and their optimizer

        if rank == 0:
            introduce(trainer, batches)
        step, stopping = run_steps(trainer, batches, start, rank)
        if rank == 0 and not stopping:
            finish(trainer, folder)
    if rank == 0:
        if stopping:
            print(f"stopped after step {step}; the same command with --resume goes on from there")
        if (folder / "unreadable.txt").exists():
            print(f"some files could not be read; {folder}/unreadable.txt names them")
        print(f"run folder: {folder}\nhow it went: {folder}/curves.png; what it sees: "
              f"python tests/pictures.py --checkpoint {folder}/last.pt")
    if ranks > 1:
        dist.destroy_process_group()
    return 128 + stopping if stopping else 0


def finish(trainer, folder):
    """Probe the trained encoder and one with random weights alike; write it to result.json."""
    config, found = trainer.config, {}
    last = lines_of(trainer.metrics)[-1]
    if config.probe_clips:
        encoders = {"untrained": build(config).encoder.to(trainer.device),
                    "trained": getattr(trainer.model, trainer.evaluated)}
        own, count = trainer.labelled, config.probe_clips
        sources = own or probe.held_out(encoders["trained"], asdict(config))
        # Blocks would be compiled again for the probes' shapes.
        with torch.compiler.set_stance("force_eager"):
            for name, encoder in encoders.items():
                found[name] = probe.probe_clips(encoder, sources, count, about=f"{name} encoder",
                                                workers=config.workers)
        probe.show(found, sources, count)
        if own and not config.test_list:
            print("Held out from the heads: every third clip of a class, in the list's order. The "
                  "encoder has seen it, without its label.")
        if not own and (config.data or config.root):
            print("These clips are generated, not yours; probe.py reads yours.")
        if collapsed(last):
            print("The features have collapsed: what the probes say of the trained encoder means "
                  "nothing.")
    machine = f"{trainer.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    write_json(folder / "result.json",
               {"config": asdict(config), "machine": machine, "last": last, **found})


@command("train.py", smaller="--batch, --model or --crop",
         stopped="stopped; a run that had begun goes on with --resume")
def main(arguments=None):
    config, flags = parse(arguments)
    if flags.list:
        print(objective_list())
        return 0
    return train(config, flags.resume)


if __name__ == "__main__":
    sys.exit(main())
