"""Train a video JEPA with any of the paper's objectives: `python train.py --objective fwm_hw_ld`.

From top to bottom: settings and flags; networks and one step; clips, machine and signals; the run
folder; the loop and what a run says of itself.
"""
import argparse
import copy
import functools
import io
import json
import math
import os
import signal
import sys
from contextlib import ExitStack, nullcontext, suppress
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
NOT_COMPUTED = ("out", "device", "compile", "threads", "workers", "save_every")


# -------------------------------------------------------------------- settings and the command line


def setting(default, meaning, least=0, most=10 ** 9, **more):
    """A field of `Config`, and so a flag. more: choices, and a heading of --help that begins."""
    return field(default=default, metadata=dict(more, meaning=meaning, least=least, most=most))


@dataclass
class Config:
    """All settings of a run, with the values of the synthetic preset, which suit two CPU cores."""
    preset: str = setting("synthetic", "what other flags start from", choices=PRESETS, group="run")
    objective: str = setting("baseline", "a name in --list")
    as_released: bool = setting(False, "behave as the released code, not as its description")
    out: str = setting("", "the run folder, by default below runs/")
    seed: int = setting(0, "of weights, clips and masks", most=2 ** 32 - 1)

    data: str = setting("", 'your own videos: a list (lines "path label" or "path") or a folder',
                        group="data")
    test_list: str = setting("", "labelled videos to test on; without, every third of a class")
    root: str = setting("", "the folder that holds the paper's datasets")
    world: str = setting("default", "what synthetic clips show; a wrong name prints all")
    frames: int = setting(8, "frames of a clip", 1)
    crop: int = setting(32, "height and width of a clip in pixels", 1)
    frame_step: int = setting(1, "frames of the video from one frame of a clip to the next", 1)
    fps: int = setting(0, "if given, the frame step is ceil(video's frames per second) // this")

    model: str = setting("tiny", "size of the networks; a wrong name prints all", group="model")
    weights: str = setting("", "a V-JEPA 2.1 checkpoint for the encoder to start from")
    patch: int = setting(8, "height and width of a token in pixels", 1)
    tubelet: int = setting(2, "frames of a token", 1)

    steps: int = setting(500, "training steps; schedules scale with them", 1, group="optimisation")
    batch: int = setting(16, "clips per step, over all processes", 1)
    micro_batch: int = setting(0, "clips masked and averaged together; 0: all that a process has")
    lr: float = setting(3e-4, "learning rate after warm-up, the first 1 %% of the steps")
    warmup_lr: float = setting(1e-4, "learning rate from which the warm-up rises")
    weight_decay: float = setting(0.04, "of all but biases and 1-D tensors")
    ema: float = setting(0.99, "momentum of the target encoder", most=1)
    ctx_weight: float = setting(0.5, "what the context loss counts for at the end of the run")

    device: str = setting("auto", "where to run", choices=["auto", "cuda", "mps", "cpu"],
                          group="machine")
    compile: bool = setting(None, "compile the networks; by default on cuda only")
    threads: int = setting(1, "CPU threads of torch; 0: its own choice. Two are half as fast again "
                           "on idle cores, and many times slower on busy ones")
    workers: int = setting(0, "loader processes")

    log_every: int = setting(10, "steps between lines of metrics.csv", 1, group="logging")
    save_every: int = setting(100, "steps between checkpoints", 1)
    probe_every: int = setting(100, "steps between probes with few labels (probes.csv); 0: never")
    probe_clips: int = setting(2304, "labelled clips of the final table; 0: no table")

    @property
    def grid(self):
        """The token grid (t, h, w) of a clip."""
        return token_grid(self.frames, self.crop, self.crop, self.patch, self.tubelet)


def flag(item):
    return "--" + item.name.replace("_", "-")


def parse(arguments):
    """Command line -> (Config, all flags). Whatever is wrong ends the process with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False, usage="python train.py [flags]",
        epilog="example: python train.py --objective hw_ld --data clips/videos.csv --steps 2000")
    parser.add_argument("--list", action="store_true", help="print the named objectives and stop")
    parser.add_argument("--resume", action="store_true", help="continue the run in its folder")

    for item in fields(Config):
        about = item.metadata
        if "group" in about:
            # What is not given is left to the preset.
            group = parser.add_argument_group(about["group"], argument_default=argparse.SUPPRESS)
        how = dict(type=item.type, choices=about.get("choices"))
        if item.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        group.add_argument(flag(item), help=f"{about['meaning']} [{item.default}]", **how)
    flags = parser.parse_args(arguments)
    given = dict(vars(flags))
    del given["list"], given["resume"]
    config = Config(**PRESETS[given.get("preset", Config.preset)] | given)
    if "frame_step" in given and "fps" not in given:
        config.fps = 0
    check(config, parser.error)

    if not config.out:
        parts = [Path(config.data).stem or config.preset, config.objective]
        if config.as_released:
            parts.append("as-released")
        if config.world != Config.world:
            parts.append(config.world)
        if "ema" in given:
            parts.append(f"ema-{config.ema:g}")
        config.out = "runs/" + "-".join([*parts, f"seed{config.seed}"])
    return config, flags


def check(config, refuse):
    """Call refuse(sentence) where settings are wrong. What needs no torch comes first."""
    for item in fields(Config):
        value = getattr(config, item.name)
        least, most = item.metadata["least"], item.metadata["most"]
        # Not a number is not between, either.
        if isinstance(value, (int, float)) and not least <= value <= most:
            refuse(f"argument {flag(item)}: {value} is not from {least} to {most}")
    if config.preset in ("mixed", "ucf101") and not (config.data or config.root):
        refuse(f"--preset {config.preset} needs --root DIR, the folder that holds the paper's "
               "datasets, or --data with your own videos; `python data.py --check DIR` says what "
               "a folder lacks")
    if config.test_list and not config.data:
        refuse("--test-list needs --data, a list of labelled videos to train on")
    if config.frames < 2 * config.tubelet:
        refuse(f"{config.frames} frames in tubelets of {config.tubelet} give fewer than 2 time "
               "steps; raise --frames")

    import model
    import objectives
    import probe
    import synthetic
    if 0 < config.probe_clips < probe.FEWEST_CLIPS:
        refuse(f"argument --probe-clips: {config.probe_clips} are too few; give at least "
               f"{probe.FEWEST_CLIPS}, or 0 for no table")
    tables = {"objective": objectives.OBJECTIVES, "world": synthetic.WORLDS, "model": model.SIZES}
    for name, known in tables.items():
        value = getattr(config, name)
        if value not in known:
            refuse(f"argument --{name}: there is no {value!r}; one of your own is known to the "
                   "file that adds it, `python mine.py` (README, Your own objective); choose from "
                   f"{', '.join(known)}")


if __name__ == "__main__":
    # Torch takes seconds to import: --help, and a wrong flag, are answered before.
    parse(sys.argv[1:])

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
from objectives import (NOT_COMPILED, OBJECTIVES, TERMS, MaskOutputs, Outputs, check_terms,
                        coefficients, draw_masks, losses, make_heads, mean_over_ranks,
                        objective_list, released_form)
from synthetic import WORLDS


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
        return level_normalise(encoder(clips))

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
    objective = OBJECTIVES[config.objective]
    if config.as_released:
        objective = released_form(objective)
    torch.manual_seed(config.seed)
    return JEPA(objective, SIZES[config.model], config.patch, config.tubelet)


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

    squared = torch.linalg.eigvalsh((tokens.T @ tokens).cpu())  # singular values, squared
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
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


class Trainer:
    """The networks of a run with their optimizer, one training step, what a checkpoint keeps."""

    def __init__(self, config, device, ranks=1):
        self.config, self.device, self.ranks = config, device, ranks
        self.model = build(config).to(device)
        if config.weights:
            pretrained, found = load_vjepa(config.weights)
            for name, value in found.items():
                if getattr(config, name) != value:
                    raise ValueError(f"{config.weights} needs --{name} {value}")
            for network in self.model.encoder, self.model.target:
                network.load_state_dict(pretrained.state_dict())
        self.objective = self.model.objective
        # The network that is probed; a target that never moves says nothing.
        self.evaluated = "encoder" if config.ema == 1 else self.objective.evaluated
        self.optimizer = make_optimizer(self.model, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # The rows of these files. A checkpoint keeps them, and mends the files.
        self.rows = {"metrics.csv": [], "probes.csv": []}
        self.first_step = 0
        # The objective itself beside its name: its coefficients may change between versions.
        self.definition = json.loads(json.dumps(asdict(self.objective)))
        # Read seldom: reading waits for the device.
        self.healthy = torch.ones((), dtype=torch.bool, device=device)

        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        # Flash attention then: cuDNN's would plan anew for every token count, and counts change.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if config.compile or (config.compile is None and device.type == "cuda"):
            self.model.compile()

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
        weights = coefficients(self.objective, step, self.config.steps, self.config.ctx_weight)
        context, groups = weights["ctx"] > 0 or self.logs(step), len(micro_batches) * self.ranks
        # Tensors, since a compiled step would be compiled again for every new Python number.
        tensors = torch.tensor([*weights.values()]).to(self.device, non_blocking=True)
        weights = dict(zip(weights, tensors))
        warm = min(1.0, (step + 1) / max(1, self.config.steps // 100))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.warmup_lr + (self.config.lr - self.config.warmup_lr) * warm

        found = []
        for clips, masks in micro_batches:
            clips = clips.to(self.device, non_blocking=True)
            masks = [[tokens.to(self.device, non_blocking=True) for tokens in mask]
                     for mask in masks]
            # 2. Forward: target encoder once; encoder and predictor once per mask; every loss;
            #    their weighted sum. Each micro-batch has means and statistics of its own.
            with self.autocast:
                losses, h = self.model(clips, masks, weights, context, groups)
            # 3. Backward: gradients add up, and are averaged over all micro-batches of all ranks.
            (losses["total"] / len(micro_batches)).backward()
            found.append(torch.stack([*losses.values()]).detach())
        for p in self.trained:
            if p.grad is None:  # what was left out of this step decays as in any other
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.trained]
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
        losses = dict(zip(losses, torch.stack(found).float().mean(0)))
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
        # Blocks would be compiled again for the probe's shapes.
        with torch.compiler.set_stance("force_eager"):
            found = probe.along(getattr(self.model, self.evaluated), self.sources)
        self.log("probes.csv", {"step": step, **found})

    def log(self, name, *more):
        """Write metrics.csv or probes.csv with more rows, dicts without times, so that on a CPU a
        resumed run writes the same file."""
        rows = self.rows[name] = [*self.rows[name], *more]
        lines = [rows[0], *(row.values() for row in rows)]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        write_file(Path(self.config.out, name), text.encode())

    def save(self, step):
        """Write all that a later process needs to go on with `step` as its first step."""
        networks = {name: part.state_dict() for name, part in self.model.named_children()}
        buffer = io.BytesIO()
        torch.save({"config": asdict(self.config), "definition": self.definition, "step": step,
                    "rows": self.rows, "evaluated": self.evaluated,
                    "optimizer": self.optimizer.state_dict(), **networks}, buffer)
        write_file(Path(self.config.out, "last.pt"), buffer.getvalue())

    def load(self, checkpoint):
        """Take over a checkpoint. Raises ValueError where it does not fit the run."""
        try:
            for name, part in self.model.named_children():
                part.load_state_dict(checkpoint[name])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.rows, self.first_step = checkpoint["rows"], checkpoint["step"]
        except (KeyError, RuntimeError, ValueError):
            raise ValueError(f"{self.config.out}/last.pt does not fit this run: it is damaged, or "
                             "was written by another version") from None


# ---------------------------------------------------------------------- clips, the machine, signals


def training_sources(config):
    """Where a run's clips come from: a list of sources, and how often each is drawn."""
    how = config.frames, config.crop, config.frame_step, config.fps
    if config.data:
        return [data.Clips(*data.own_videos(config.data), *how)], [1.0]
    if config.preset == "synthetic":
        return [WORLDS[config.world](config.frames, config.crop, config.seed)], [1.0]
    if config.preset == "blobs":
        return [data.BlobClips(*how)], [1.0]
    shares = data.MIXED if config.preset == "mixed" else {"ucf101": 1.0}
    sources = [data.open_dataset(name, config.root, "train", *how) for name in shares]
    return sources, [*shares.values()]


def probed_clips(config, encoder):
    """Clips that probes learn from, and are tested on: those of --data and --test-list if they have
    labels, else generated ones. The run itself trains on all of --data, without labels. Raises
    ValueError where labels are there and cannot be used."""
    if not config.data or not (config.probe_clips or config.probe_every):
        return probe.held_out(encoder, asdict(config))
    splits = [data.own_videos(path) for path in (config.data, config.test_list) if path]
    if len(splits) == 1:
        if splits[0].labels is None:
            return probe.held_out(encoder, asdict(config))
        splits = data.hold_out(*splits)
    try:
        if not splits[1].paths:
            raise ValueError(f"no class of {config.data} has 3 videos, so none can be held out")
        return probe.labelled(splits, config.frames, config.crop)
    except ValueError as error:
        raise ValueError(f"{error}; --probe-clips 0 --probe-every 0 trains without probes")


def prepare(config, rank, ranks, device):
    """The trainer and its batches. What can be refused without a run folder is refused here."""
    # The micro-batch in force decides masks and statistics: all that a checkpoint says includes it.
    config.micro_batch = config.micro_batch or max(1, config.batch // ranks)
    # Before the networks, which take seconds: a wrong path is said at once.
    sources = training_sources(config)
    trainer = Trainer(config, device, ranks)
    trainer.sources = probed_clips(config, trainer.model.encoder)
    make_masks = functools.partial(draw_masks, grid=config.grid, masking=trainer.objective.masking)
    batches = data.Batches(*sources, config, make_masks, rank, ranks)
    return trainer, batches


def start_ranks(config):
    """(rank, number of ranks, device); starts the process group under torchrun."""
    if config.threads:
        torch.set_num_threads(config.threads)
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = found if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", found.type):
        raise ValueError(f"--device {device}: torch finds no such device here; leave the flag out")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return 0, 1, device

    if device.type == "cuda":
        count = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= count:
            raise ValueError(f"this machine has {count} GPUs; give torchrun that --nproc_per_node")
        torch.cuda.set_device(device)
    dist.init_process_group()  # of gloo for tensors of the CPU, NCCL for those of a GPU
    return dist.get_rank(), ranks, device


class StopSignal(ExitStack):
    """Remembers Ctrl-C and SIGTERM, so that the loop ends after a whole step. The same one again
    ends at once. In a thread, where Python allows no handlers, signals stay as they are."""
    received = 0

    def __enter__(self):
        with suppress(ValueError):  # Python's, in a thread
            for each in signal.SIGINT, signal.SIGTERM:  # to be put back at the end
                self.callback(signal.signal, each, signal.signal(each, self.receive))
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


def open_run(config, trainer, resume):
    """Judge the run folder, and let the trainer go on from the checkpoint in it, which is returned
    (or None). Raises ValueError, before anything is written, where the folder holds anything else
    than the beginning of this run."""
    folder, checkpoint = Path(config.out), None
    path, settings = folder / "config.json", {**asdict(config), "definition": trainer.definition}
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
    begun = names - {"config.json", "unreadable.txt"}  # what is left where the first step failed
    if begun and not (resume and path.exists()):
        raise ValueError(f"{folder} is not empty; add --resume to go on with the run of {path}, or "
                         "choose another --out")
    before = read_json(path) if begun else settings
    different = [f"{name} {before.get(name)} there, {value} here"
                 for name, value in settings.items()
                 if name not in NOT_COMPUTED and before.get(name) != value]
    if different:
        raise ValueError(f"{path} is of a different run ({'; '.join(different)}); choose another "
                         "--out")
    if "last.pt" in names:
        checkpoint = probe.load_checkpoint(folder / "last.pt")
        trainer.load(checkpoint)
    else:
        (folder / "unreadable.txt").unlink(missing_ok=True)
    for left in folder.glob("*.tmp"):  # by a process that was killed while it wrote
        left.unlink()
    write_json(path, settings)
    # Lines up to the checkpoint: what came after them is computed again.
    for name, rows in trainer.rows.items():
        (folder / name).unlink(missing_ok=True)
        if rows:
            trainer.log(name)
    return checkpoint


def report(trainer, row, bar):
    """Log a row of metrics.csv and show what matters in it. Raises ValueError where too many clips
    could not be read."""
    config = trainer.config
    trainer.log("metrics.csv", row)
    (probed,) = trainer.rows["probes.csv"][-1:] or [{}]
    shown = {"total": row["total"], "rank": row["effective_rank"], "std": row["feature_std"],
             **probed}
    shown.pop("step", None)

    # Workers are ahead of this step, and after a resume they meet the same files again.
    broken = Path(config.out, "unreadable.txt")
    noted = {*broken.read_bytes().splitlines()} if broken.exists() else ()
    failed = sum(int(line.split(b"\t")[0]) <= row["step"] for line in noted)
    if failed:
        shown["unreadable"] = failed
    bar.set_postfix(shown)
    if bar.disable:
        print(f"step {row['step'] + 1} of {config.steps}: {bar.postfix}", flush=True)

    drawn = (row["step"] + 1) * config.batch
    share = failed / (failed + drawn)
    if drawn >= 100 and share > data.MAX_BROKEN:  # of fewer clips, one file would decide
        raise ValueError(f"{share:.0%} of the clips cannot be read, more than "
                         f"{data.MAX_BROKEN:.0%}; {broken} names them")


def draw_curves(trainer):
    """Draw curves.png, a strip for each number over the steps of the run, from 0 to its largest
    value: losses, whether features are alive, and what probes find in them. The gray line is at 0
    or, for features, where they count as collapsed."""
    (metrics, probes), steps = trainer.rows.values(), trainer.config.steps
    names = [*metrics[0]]
    strips = [(name, metrics) for name in (*names[1:names.index("total") + 1], *COLLAPSED)]
    strips += [(name, probes) for row in probes[:1] for name in row if name != "step"]

    image = Image.new("RGB", (900, 80 * len(strips) + 20), "white")
    draw = ImageDraw.Draw(image)
    for top, (name, rows) in zip(range(10, image.height, 80), strips):
        dead = COLLAPSED.get(name, 0)
        most = max(dead, *(row[name] for row in rows)) or 1
        line = top + 70 * (1 - dead / most)
        curve = [(10 + 650 * row["step"] / steps, top + 70 * (1 - row[name] / most))
                 for row in rows]
        draw.line((10, line, 660, line), "gray")
        if dead:
            draw.text((668, line - 6), "collapsed below", "gray")
        draw.line(curve, "black", 2)
        draw.text((668, top), f"{name}\n0 to {most:.3g}", "black")
    draw.text((10, image.height - 15), f"steps 0 to {steps}", "black")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    write_file(Path(trainer.config.out, "curves.png"), buffer.getvalue())


# ------------------------------------------------------------------ from the first step to the last


def run_steps(trainer, batches, rank):
    """Train to the last step, or to a signal, whose number is returned, else 0."""
    config, start, stopping = trainer.config, trainer.first_step, 0
    bar = tqdm(total=config.steps, initial=start, ncols=100, file=sys.stdout,
               disable=True if rank else None,  # None: where there is no terminal
               bar_format="{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")
    clips = data.loader(batches, start, config.workers, trainer.device)
    with StopSignal() as stop, bar:
        for step, micro_batches in enumerate(clips, start):
            last, logging = step + 1 == config.steps, trainer.logs(step)
            results = trainer.step(step, micro_batches)
            bar.update()

            stopping = stop.agreed()
            saving = last or stopping or (step + 1) % config.save_every == 0
            # At these steps alone the host waits for the device.
            if (logging or saving) and not trainer.healthy:
                raise FloatingPointError(
                    f"the loss or its gradient was not finite by step {step}; {config.out}/last.pt "
                    "is the last good checkpoint, if there is one; start again with a lower "
                    "--lr and another --out")
            if rank == 0 and config.probe_every and (last or step % config.probe_every == 0):
                trainer.probe(step)
            if logging:
                row = trainer.row(step, *results)
                if rank == 0:
                    report(trainer, row, bar)
            if saving and rank == 0:
                trainer.save(step + 1)
                draw_curves(trainer)
            if stopping:
                break
    if stopping and rank == 0:
        print(f"stopped after step {step}; the same command with --resume goes on from there")
    return stopping


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
        del checkpoint  # as large as the networks and their optimizer

        if rank == 0:
            count, own = sum(p.numel() for p in trainer.trained), config.data or config.root
            clips = f"{batches.lengths.sum():,} videos" if own else "generated clips"
            print(f"{config.objective} on {device}, "
                  f"{'bfloat16' if device.type == 'cuda' else 'float32'}, threads: "
                  f"{torch.get_num_threads()}; {count:,} parameters; {clips}, "
                  f"{math.prod(config.grid):,} tokens a clip; run folder: {folder}", flush=True)
        stopping = run_steps(trainer, batches, rank)
        if rank == 0 and not stopping:
            finish(trainer)
    if rank == 0:
        print(f"run folder: {folder}\nhow it went: {folder}/curves.png; what it sees: "
              f"python tests/pictures.py --checkpoint {folder}/last.pt")
    if ranks > 1:
        dist.destroy_process_group()
    return 128 + stopping if stopping else 0


def finish(trainer):
    """Probe the trained encoder and one with random weights alike; write it to result.json."""
    config, found, last = trainer.config, {}, trainer.rows["metrics.csv"][-1]
    if config.probe_clips:
        encoders = {"untrained": build(config).encoder.to(trainer.device),
                    "trained": getattr(trainer.model, trainer.evaluated)}
        # Blocks would be compiled again for the probes' shapes.
        with torch.compiler.set_stance("force_eager"):
            for name, encoder in encoders.items():
                found[name] = probe.probe_clips(encoder, trainer.sources, config.probe_clips,
                                                about=f"{name} encoder", workers=config.workers)
        probe.show(found, trainer.sources, config.probe_clips)
        if config.data and not isinstance(trainer.sources[0], data.Clips):
            print("Your videos have no labels, so these are generated clips.")
        elif config.data and not config.test_list:
            print("Every third clip of a class is held out from the heads; the encoder has seen "
                  "it, without its label.")
        if collapsed(last):
            print("The features have collapsed: what the probes say of the trained encoder means "
                  "nothing.")
    write_json(Path(config.out, "result.json"), {"config": asdict(config), "last": last, **found})


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
