"""Train a video JEPA with any of the study's objectives: `python train.py --objective fwm_hw_ld`."""
import copy
import csv
import difflib
import functools
import gc
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import data
import probe
from model import LEVELS, SIZES, Block, Encoder, Predictor, Size, level_normalise, load_foreign, token_grid
from objectives import (ABLATIONS, OBJECTIVES, Record, View, as_released, coefficients, cut_by_level, losses,
                        make_heads, mean_over_ranks, middle_pixels, motion_map, sample_masks)
from synthetic import Parser, Shapes, command


def setting(default, meaning):
    return field(default=default, metadata={"help": f"{meaning} [{default}]"})


@dataclass
class Config:
    """Everything that makes a run: the synthetic preset's values, for two CPU cores. Every field is a flag."""
    preset: str = setting("synthetic", "the values that the other flags start from")
    objective: str = setting("baseline", "one of --list")
    as_released: bool = setting(False, "behave as the released code, not as its description (README)")
    fwm_split: str = setting("depth", "where fwm cuts appearance from dynamics: depth, or level for within every level")
    ablate: str = setting("", "leave one ingredient out: " + ", ".join(ABLATIONS))
    out: str = setting("", "the run folder, by default below runs/; of a sweep the folder of its runs, runs/study")
    seed: int = setting(0, "of weights, clips and masks")
    # data
    data: str = setting("", 'videos of one\'s own: a list (lines "path label" or "path") or a folder')
    root: str = setting("", "the folder that holds the study's datasets")
    frames: int = setting(8, "frames of a clip")
    crop: int = setting(32, "height and width of a clip in pixels")
    frame_step: int = setting(1, "frames of the video from one frame of a clip to the next")
    fps: int = setting(0, "if given, the frame step is ceil(frames per second of the video) // this, at least 1")
    workers: int = setting(0, "loader processes")
    max_broken: float = setting(0.05, "stop when a larger share of the clips cannot be read")
    # model
    model: str = setting("tiny", "size of the networks: " + ", ".join(SIZES))
    weights: str = setting("", "a V-JEPA 2.1 checkpoint for the encoder to start from")
    patch: int = setting(8, "height and width of a token in pixels")
    tubelet: int = setting(2, "frames of a token")
    # optimisation
    steps: int = setting(500, "training steps; every schedule is a share of them")
    batch: int = setting(16, "clips per step, over all ranks together")
    lr: float = setting(1e-3, "learning rate after the warm-up, which is the first 1 %% of the steps")
    warmup_lr: float = setting(1e-4, "learning rate of step 0")
    weight_decay: float = setting(0.04, "of all but biases and 1-D tensors")
    ema: float = setting(0.97, "momentum of the target encoder")
    # machine
    device: str = setting("auto", "cuda, mps or cpu")
    compile: str = setting("auto", "yes or no; auto: on cuda only")
    # logging
    log_every: int = setting(10, "steps between lines of metrics.csv")
    save_every: int = setting(100, "steps between checkpoints")
    probe_clips: int = setting(2304, "labelled synthetic clips of the final table; 0: no table")


STUDY = dict(frames=16, crop=224, model="vit_base", patch=16, steps=30_000, batch=32, lr=6e-4, ema=0.99925, workers=8,
             log_every=100, save_every=1000)
PRESETS = {
    "synthetic": dict(),
    "ucf101": dict(STUDY, fps=16),
    "mixed": dict(STUDY, frame_step=2),
    "blobs": dict(STUDY, frames=8, crop=128, fps=4, batch=16, steps=5000),
}


class JEPA(nn.Module):
    """The networks of one run, and one forward pass from clips and masks to losses."""

    def __init__(self, objective, size, patch, tubelet):
        super().__init__()
        self.objective = objective
        self.encoder = Encoder(size, patch, tubelet)
        self.predictor = Predictor(size)
        self.heads = make_heads(objective, size.width)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)  # the stop-gradient of the method

    def targets(self, clips):
        """What is to be predicted: features of the whole clip, [B, N, 4D]. Without EMA they carry gradient."""
        encoder = self.target if self.objective.ema else self.encoder
        return level_normalise(encoder(clips)) if self.objective.level_norm else encoder(clips)

    def view(self, clips, visible, masked, grid):
        """Encode what one mask leaves visible, predict the rest."""
        z = self.encoder(clips, visible)  # (B, n, 4D)
        p, c = self.predictor(z, visible, masked, grid)  # (B, k, 4D), (B, n, 4D)
        return View(visible, masked, z, p, c)

    def forward(self, clips, masks, weights):
        """uint8 clips [B, 3, T, H, W], list of (visible, masked), loss weights -> losses by name, targets."""
        clips = data.normalise(clips)
        grid = token_grid(*clips.shape[2:], self.encoder.patch, self.encoder.tubelet)
        h = self.targets(clips)  # (B, N, 4D)
        views = [self.view(clips, visible, masked, grid) for visible, masked in masks]
        return self.losses(Record(clips, grid, h, views), weights), h.detach()

    def losses(self, record, weights):
        """The losses by name; a method, so that `compile` can put a compiled one in its place."""
        return losses(record, self.objective, self.heads, weights)

    def compile(self, **options):
        """Compile what takes the time: every transformer block, and the losses with all their terms.

        All blocks of a network share one compiled graph, so that this takes about a quarter of the time that the
        step as a single graph would, and the step is as fast. options: those of torch.compile.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**options)
        self.losses = torch.compile(self.losses, **options)


def size_of(config):
    size = SIZES[config.model]
    return size._replace(predictor_depth=0) if config.ablate == "predictor" else size


def build(config):
    """The networks of a run with random weights: a pure function of the settings, the seed among them."""
    objective = OBJECTIVES[config.objective]
    if config.as_released:
        objective = as_released(objective)
    if config.fwm_split == "level":
        objective = cut_by_level(objective)
    if config.ablate:
        objective = replace(objective, **ABLATIONS[config.ablate])
    torch.manual_seed(config.seed)
    return JEPA(objective, size_of(config), config.patch, config.tubelet)


@torch.no_grad()
def collapse_meter(h, most_tokens=4096):
    """Are the target features alive? h [B, N, 4D] -> effective rank, mean standard deviation of a channel.

    Effective rank: exp of the entropy of the normalised singular values of the centred token features (at most 4D).
    The deviation falls to 0 when all tokens look the same. The rank need not: it has no scale, and what little
    difference is left may run in many directions.
    """
    tokens = h.flatten(0, 1).float()  # (B*N, 4D)
    count = min(len(tokens), most_tokens)
    tokens = tokens[torch.arange(count, device=h.device) * len(tokens) // count]  # evenly spread, over all columns
    tokens = tokens - tokens.mean(0)
    gram = tokens.T @ tokens
    squared = torch.linalg.eigvalsh(gram.cpu() if gram.device.type == "mps" else gram)  # singular values, squared
    squared = squared * (squared > 1e-6 * squared[-1])  # what lies below is rounding
    share = squared.sqrt() / squared.sqrt().sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp(), tokens.std(0).mean()


def make_optimizer(model, config):
    """AdamW; weight decay on all but biases and 1-D tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(config, step):
    """Linear from warmup_lr to lr over the first 1 % of the steps (the study's first epoch), then constant."""
    warmup = max(1, config.steps // 100)
    return config.warmup_lr + (config.lr - config.warmup_lr) * min(1.0, step / warmup)


def draw_masks(clips, generator, grid, masking, sizes=None):
    """Masks of a batch of uint8 clips (`sample_masks`); a loader's worker calls this, so that no step waits for it."""
    motion = motion_map(data.normalise(middle_pixels(clips, grid)), grid) if masking.motion_strength else None
    return sample_masks(len(clips), grid, masking, generator, motion, sizes)


def training_source(config):
    """Where a run's clips come from."""
    spacing = {"fps": config.fps} if config.fps else {"step": config.frame_step}
    if config.data:
        return data.Videos(*data.own_videos(config.data), config.frames, config.crop, **spacing)
    if config.preset == "synthetic":
        return Shapes(config.frames, config.crop, config.seed)
    if config.preset == "blobs":
        return data.BlobVideos(config.seed, config.frames, config.crop, **spacing)
    if not config.root:
        raise ValueError(f"--preset {config.preset} needs --root DIR, the folder that holds the study's datasets, or "
                         "--data with videos of your own; `python data.py --check DIR` says what a folder lacks")
    if config.preset == "mixed":
        return data.open_mixed(config.root, config.frames, config.crop, **spacing)
    return data.open_dataset("ucf101", config.root, "train", config.frames, config.crop, **spacing)


# ------------------------------------------------------------------------------------------------------ run folder


# Where a run runs, when it saves and when it gives up: not what it computes.
MACHINE = ("out", "device", "compile", "workers", "save_every", "max_broken")


def refuse_other_run(config, before):
    """ValueError where the run in a config's folder, a dict of settings, computes something else."""
    different = [name for name, value in asdict(config).items() if name not in MACHINE and before.get(name) != value]
    if different:
        raise ValueError(f"{config.out} holds a different run ({', '.join(different)} differ); choose another --out")


def open_run(config, resume):
    """The run folder and, to go on from, its checkpoint or None. Never overwrites a run that is there."""
    folder = Path(config.out)
    saved, checkpoint = folder / "config.json", None
    if saved.exists():
        before = probe.read_json(saved)
        if not before:
            raise ValueError(f"{saved} is damaged; choose another --out")
        refuse_other_run(config, before)
        if not resume:
            raise ValueError(f"{folder} holds this run already; add --resume to go on with it, or choose another --out")
        if (folder / "last.pt").exists():
            checkpoint = probe.load_checkpoint(folder / "last.pt")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something that is not a run; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_json(saved, asdict(config))
    return folder, checkpoint


class Metrics:
    """metrics.csv: one line per logged step, no times in it, so that on a CPU a resumed run writes the same file."""

    def __init__(self, path, first_step):
        """Keep the lines before first_step: what comes after them is about to be computed again."""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        steps = [line.split(",")[0] for line in lines[1:]]
        kept = [line for line, step in zip(lines[1:], steps)
                if line.endswith("\n") and step.isdigit() and int(step) < first_step]
        probe.write_file(path, "".join(lines[:1] + kept if kept else []).encode())
        self.file, self.empty = path.open("a", newline=""), not kept

    def write(self, row):
        writer = csv.DictWriter(self.file, row, lineterminator="\n")
        if self.empty:
            writer.writeheader()
            self.empty = False
        writer.writerow(row)
        self.file.flush()


# ------------------------------------------------------------------------------------------------------------ loop


class Trainer:
    """The networks of a run with their optimizer, one training step, and what a checkpoint keeps of them."""
    PARTS = ("encoder", "target", "predictor", "heads")

    def __init__(self, config, device, ranks=1):
        self.config, self.device = config, device
        self.model = build(config).to(device)
        if config.weights:
            self.start_from(config.weights)
        self.objective = self.model.objective
        # At momentum 1 the target never moves: what is learned is in the encoder.
        self.evaluated = "encoder" if self.objective.ema and config.ema == 1 else self.objective.evaluated
        self.optimizer = make_optimizer(self.model, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.update_target = get_ema_multi_avg_fn(config.ema)
        self.healthy = torch.ones((), dtype=torch.bool, device=device)  # read seldom: reading waits for the device
        self.autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        # Flash attention then: cuDNN's would make a new plan for every token count, and counts change at every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if config.compile == "yes" or config.compile == "auto" and device.type == "cuda":
            self.model.compile()
        self.forward = self.model
        if ranks > 1:
            # Blocks are graphs of their own; torch would cut them once more where DDP's buckets end.
            torch._dynamo.config.optimize_ddp = False
            # A static graph may leave parameters without gradient: the released code's latent-dynamics head. The only
            # buffers are tables that never change.
            self.forward = DistributedDataParallel(self.model, static_graph=True, broadcast_buffers=False)

    def start_from(self, path):
        """Give the encoder, and so its target, the weights of a V-JEPA 2.1 checkpoint."""
        foreign, found = load_foreign(path)
        for name in ("model", "patch", "tubelet"):
            if found[name] != getattr(self.config, name):
                raise ValueError(f"{path} holds weights of --{name} {found[name]}, but this run has --{name} "
                                 f"{getattr(self.config, name)}")
        self.model.encoder.load_state_dict(foreign.state_dict())
        self.model.target.load_state_dict(foreign.state_dict())

    def step(self, step, clips, masks):
        """Forward, backward, optimizer, EMA. Returns losses by name, targets [B, N, 4D], gradient norm."""
        # Reseeded so that what a term draws is fresh at every step, equal on all ranks, and the same after a resume.
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        clips = clips.to(self.device, non_blocking=True)
        masks = [tuple(tokens.to(self.device, non_blocking=True) for tokens in mask) for mask in masks]
        weights = coefficients(self.objective, step, self.config.steps)
        # Tensors, since a compiled step would be compiled again for every new Python number.
        weights = dict(zip(weights, torch.tensor(list(weights.values())).to(self.device, non_blocking=True)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        with self.autocast:
            values, h = self.forward(clips, masks, weights)
        values["total"].backward()
        gradient_norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.objective.ema:
            with torch.no_grad():
                self.update_target(list(self.model.target.parameters()), list(self.model.encoder.parameters()), None)
        self.healthy &= values["total"].isfinite() & gradient_norm.isfinite()
        return {name: value.detach() for name, value in values.items()}, h, gradient_norm

    def save(self, folder, step):
        """Write all that a later process needs to go on with `step` as its first step."""
        buffer = io.BytesIO()
        torch.save({"config": asdict(self.config), "step": step, "evaluated": self.evaluated,
                    "optimizer": self.optimizer.state_dict(),
                    **{part: getattr(self.model, part).state_dict() for part in self.PARTS}}, buffer)
        probe.write_file(folder / "last.pt", buffer.getvalue())

    def load(self, checkpoint):
        """Take over a checkpoint; returns the first step to do. Raises ValueError where a part of it is missing."""
        missing = {*self.PARTS, "optimizer"} - checkpoint.keys()
        if missing:
            raise ValueError(f"last.pt holds no {', no '.join(sorted(missing))}; it can be probed, but not resumed")
        for part in self.PARTS:
            getattr(self.model, part).load_state_dict(checkpoint[part])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["step"]


class StopSignal:
    """Remembers Ctrl-C and SIGTERM, so that the loop ends after a whole step. The same one again ends at once."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self):
        """The signal, on all ranks if it reached any of them: one that stopped alone would leave the others waiting.

        The ranks ask each other over the hosts' network, so that nothing waits for the GPU.
        """
        received = torch.tensor(self.received)
        if dist.is_initialized():
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return received.item()


def pick_device(config):
    """"cuda", "mps" or "cpu". Raises ValueError where the machine has no such device."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if config.device == "auto":
        return next(name for name in here if here[name])
    if not here[config.device]:
        raise ValueError(f"--device {config.device}: torch finds no such device on this machine; leave the flag out")
    return config.device


def start_ranks(config):
    """(rank, number of ranks, device); starts the process group under torchrun."""
    name = pick_device(config)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return 0, 1, torch.device(name)
    device = torch.device(name)
    if name == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise ValueError(f"this machine has {found} GPUs; give torchrun --nproc_per_node={found}, or fewer")
        device = torch.device(name, local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    return dist.get_rank(), ranks, device


def train(config, resume=False):
    """Run a Config to its end, or to a signal; returns 0, or that signal's number."""
    rank, ranks, device = start_ranks(config)
    source = training_source(config)  # before the networks, which take seconds: a wrong path is said at once
    trainer = Trainer(config, device, ranks)
    objective = trainer.objective
    grid = token_grid(config.frames, config.crop, config.crop, config.patch, config.tubelet)
    sample_masks(1, grid, objective.masking, torch.Generator())  # refuses a grid too small before anything is written
    batches = data.Batches(source, config.batch, config.steps, config.seed,
                           functools.partial(draw_masks, grid=grid, masking=objective.masking), rank, ranks)
    folder, checkpoint = open_run(config, resume) if rank == 0 else (Path(config.out), None)
    if ranks > 1:
        box = [checkpoint]
        dist.broadcast_object_list(box)
        checkpoint = box.pop()
    start = trainer.load(checkpoint) if checkpoint else 0
    del checkpoint  # as large as the networks and their optimizer
    metrics = Metrics(folder / "metrics.csv", start) if rank == 0 else None
    unreadable_here, stopping = data.Broken(), 0
    peak, began, timed_from = peak_flops(device), time.perf_counter(), start
    title = f"{config.objective}, batch {config.batch} = {ranks} x {config.batch // ranks}"
    bar = tqdm(total=config.steps, initial=start, unit="step", disable=rank > 0, desc=title)
    with StopSignal() as stop, bar:
        for step, (clips, masks, unreadable) in enumerate(data.loader(batches, start, config.workers, device), start):
            values, h, gradient_norm = trainer.step(step, clips, masks)
            unreadable_here.add(unreadable, len(clips))
            bar.update()

            final = step + 1 == config.steps
            log = step % config.log_every == 0 or final
            stopping = stop.agreed()
            save = (step + 1) % config.save_every == 0 or final or stopping
            if (log or save) and not trainer.healthy:  # at these steps alone the host waits for the device
                raise FloatingPointError(f"the loss or its gradient was not finite by step {step}; {folder}/last.pt is "
                                         "the last good checkpoint, if there is one; start again with a lower --lr")
            if log:
                broken = unreadable_here.over_ranks()
                means = mean_over_ranks(torch.stack([value.float() for value in values.values()])).tolist()
            if log and rank == 0:
                effective_rank, feature_std = (value.item() for value in collapse_meter(h))
                row = dict(zip(values, means))
                metrics.write({
                    "step": step, **row, "grad_norm": gradient_norm.item(), "lr": learning_rate(config, step),
                    "ema": config.ema if objective.ema else "",
                    "ctx_weight": coefficients(objective, step, config.steps)["ctx"],
                    "effective_rank": effective_rank, "feature_std": feature_std})
                speed = (step + 1 - timed_from) * config.batch / (time.perf_counter() - began)
                began, timed_from = time.perf_counter(), step + 1
                shown = {**row, "rank": effective_rank, "std": feature_std, "clips/s": speed}
                if peak:
                    shown["MFU"] = flops_of(config, masks, objective.ema) * speed / config.batch / peak
                shown = {name: f"{value:.3g}" for name, value in shown.items()}
                bar.set_postfix({**shown, "unreadable": broken} if broken.files else shown)
                broken.write(folder)
                if broken.clips >= 100 and broken.share > config.max_broken:  # fewer would judge by one file
                    raise ValueError(f"{broken.share:.0%} of the clips cannot be read ({broken}), more than "
                                     f"--max-broken {config.max_broken:g}; {folder}/unreadable.txt names them")
            if save and rank == 0:
                trainer.save(folder, step + 1)
            if stopping:
                break
    broken = unreadable_here.over_ranks()  # the last log may be some steps ago
    if rank == 0:
        if stopping:
            print(f"stopped after step {step}; the same command with --resume goes on from there")
        else:
            finish(trainer, folder)
        if broken.files:
            broken.write(folder)
            print(f"unreadable: {broken}; {folder}/unreadable.txt names the first")
        print(f"run folder: {folder}")
    if ranks > 1:
        dist.destroy_process_group()
    return stopping


def finish(trainer, folder):
    """Probe the trained encoder, and one with random weights on the same clips; write it all to result.json."""
    config, device, found = trainer.config, trainer.device, {}
    if config.probe_clips:
        encoders = {"untrained": build(config).encoder.to(device), "trained": getattr(trainer.model, trainer.evaluated)}
        with torch.compiler.set_stance("force_eager"):  # blocks would be compiled again for the probes' shapes
            for name, encoder in encoders.items():
                attentive = config.preset == "synthetic"  # other presets have too many tokens to keep in memory
                found[name] = probe.synthetic_results(encoder, config.frames, config.crop, config.probe_clips,
                                                      attentive=attentive, halves=attentive and name == "trained")
        probe.show_synthetic({name: {kind: found[name][kind] for kind in ("linear", "attentive") if kind in found[name]}
                              for name in found})
    last = list(csv.DictReader((folder / "metrics.csv").open()))[-1]
    machine = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    probe.write_json(folder / "result.json", {"config": asdict(config), "machine": machine, "last": last, **found})


# ----------------------------------------------------------------------------------------------------------- a sweep


def flags_of(config):
    """The command line of a config, every field said."""
    flags = []
    for name, value in asdict(config).items():
        flag = "--" + name.replace("_", "-")
        flags += ([flag] if value else []) if isinstance(value, bool) else [f"{flag}={value}"]
    return flags


def sweep(config, names, seeds, jobs):
    """Every objective with every seed, each a command of its own that can be run alone, `jobs` at a time.

    A run's folder is <out>/`run_name`. What is finished there is left alone, what was begun goes on. On a
    CPU a run has one thread, so that its numbers do not depend on how many run beside it. Returns 0, 128 + a
    signal's number, or 1 if a run failed; the others go on all the same.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError("a sweep starts processes of its own; run it without torchrun")
    cpu = pick_device(config) == "cpu"
    jobs = jobs or (os.cpu_count() if cpu else 1)
    environment = {**os.environ, "TQDM_MININTERVAL": "10"}  # logs stay short
    if cpu:
        environment["OMP_NUM_THREADS"] = "1"
    pairs = dict.fromkeys((seed, name) for seed in seeds for name in names)  # each once
    runs = [replace(config, objective=name, seed=seed) for seed, name in pairs]
    runs = [check(replace(run, out=f"{config.out}/{run_name(run)}")) for run in runs]
    waiting, running, failed = [], {}, []
    for run in runs:
        finished = probe.read_json(Path(run.out) / "result.json")
        if finished:
            refuse_other_run(run, finished["config"])
        else:
            waiting.append(run)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with StopSignal() as stop, tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar:
        try:
            while running or waiting:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    with open(f"{run.out}.log", "w") as log:
                        running[run.out] = subprocess.Popen([sys.executable, __file__, "--resume", *flags_of(run)],
                                                            stdout=log, stderr=log, env=environment)
                    bar.set_postfix_str(", ".join(Path(out).name for out in running))
                time.sleep(0.2)
                for out in [out for out, process in running.items() if process.poll() is not None]:
                    status = running.pop(out).returncode
                    if status and not stop.received:
                        lines = Path(f"{out}.log").read_text().strip().splitlines() or [""]
                        failed.append(f"{out} failed with exit status {status}; the end of {out}.log: {lines[-1]}")
                    bar.update()
                if stop.received:
                    break
        finally:
            for process in running.values():
                process.terminate()  # a run that gets a signal saves and ends
            for process in running.values():
                process.wait()
    for sentence in failed:
        print(sentence, file=sys.stderr)
    print("stopped; the same command goes on from there" if stop.received else
          f"{len(runs) - len(failed)} of {len(runs)} runs finished; `python probe.py --table {config.out}` shows them")
    return 128 + stop.received if stop.received else int(bool(failed))


# ----------------------------------------------------------------------------------------------------- how fast it is

# Dense bfloat16 multiply-add rates by datasheet, as operations per second.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
         "RTX 4090": 165e12}
WARMUP_STEPS, TIMED_ROUNDS, ROUND = 20, 5, 4  # steps, rounds, steps in a round


def block_flops(tokens, width):
    """Operations of one transformer block forward: its matrices (12 width^2 weights) and its attention."""
    return 2 * tokens * 12 * width ** 2 + 4 * tokens ** 2 * width


def step_flops(size, patch, tubelet, grid, counts, ema=True):
    """Floating-point operations that one clip's training step needs: 2 per multiply-add of every matrix product.

    counts: (visible, masked) tokens of each mask. A backward pass is two forward ones, but that nobody asks for the
    gradient of the pixels. What flash attention or checkpointing computes again does not count, nor do the terms.
    """
    width, narrow, channels = size.width, size.predictor_width, LEVELS * size.width

    def encoder(tokens, trained):
        embedding = 2 * tokens * width * 3 * tubelet * patch ** 2
        return (2 if trained else 1) * embedding + (3 if trained else 1) * size.depth * block_flops(tokens, width)

    def predictor(visible, masked):
        tokens = visible + masked
        return 3 * (2 * visible * (channels * width + width * narrow) + 2 * tokens * narrow * channels
                    + size.predictor_depth * block_flops(tokens, narrow))
    return encoder(math.prod(grid), not ema) + sum(encoder(visible, True) + predictor(visible, masked)
                                                   for visible, masked in counts)


def peak_flops(device):
    """What a device could do at most, in bfloat16 operations per second; None for an unknown one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known_name, peak in PEAKS.items() if known_name in name), None)


def flops_of(config, masks, ema):
    """`step_flops` of a whole batch with these masks."""
    grid = token_grid(config.frames, config.crop, config.crop, config.patch, config.tubelet)
    counts = [(visible.shape[1], masked.shape[1]) for visible, masked in masks]
    return len(masks[0][0]) * step_flops(size_of(config), config.patch, config.tubelet, grid, counts, ema)


def time_steps(trainer, clips, masks):
    """Median over rounds of the seconds that a step takes on clips that lie on the device, each with its own masks."""
    def wait():
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()

    rounds = []
    for first in range(0, len(masks), ROUND):
        wait()
        began = time.perf_counter()
        for step, pair in enumerate(masks[first:first + ROUND], first):
            trainer.step(step, clips, pair)
        wait()
        rounds.append((time.perf_counter() - began) / ROUND)
    return statistics.median(rounds)


def compiled_graphs():
    """(graphs compiled so far, graph breaks so far)."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def largest_kernels(trainer, clips, masks, count=3):
    """The kernels (on a CPU: operators) that take most of the steps' time on the device, each with its share."""
    on_gpu = trainer.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        time_steps(trainer, clips, masks)
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
             for event in profiler.key_averages()}
    largest = sorted((name for name in spent if spent[name]), key=spent.get, reverse=True)[:count]
    return ", ".join(f"{name[:60]} {spent[name] / sum(spent.values()):.0%}" for name in largest)


def time_plain_step(config, device, ranks, clips, masks):
    """Seconds for a clip in an uncompiled step in float32, attention by its mathematics, and how many clips a step had:
    half of them, or half of that and so on, where their attention matrices are too large for the device."""
    trainer = Trainer(replace(config, compile="no"), device, ranks)
    trainer.autocast = nullcontext()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            trainer.step(0, clips, masks[0])
            return time_steps(trainer, clips, masks) / len(clips), len(clips)
    except torch.OutOfMemoryError:
        if len(clips) == 1:
            raise
    del trainer  # or its gradients would take memory while half of the clips are tried
    half = len(clips) // 2
    return time_plain_step(config, device, ranks, clips[:half],
                           [[(visible[:half], masked[:half]) for visible, masked in pair] for pair in masks])


def benchmark_row(config, device, ranks, clips):
    """Of one objective: seconds of a step, the cells of the table that follow from it, on a GPU the largest kernels."""
    objective, generator = build(config).objective, torch.Generator().manual_seed(config.seed)
    grid = token_grid(config.frames, config.crop, config.crop, config.patch, config.tubelet)
    count = WARMUP_STEPS + TIMED_ROUNDS * ROUND
    masks = [draw_masks(clips.cpu(), generator, grid, objective.masking) for _ in range(count)]
    masks = [[(visible.to(device), masked.to(device)) for visible, masked in pair] for pair in masks]
    warm_up, masks = masks[:WARMUP_STEPS], masks[WARMUP_STEPS:]
    torch._dynamo.reset()  # every objective compiles the same functions, and there is a limit to how often
    gc.collect()  # compiled networks of the objective before hold on to each other, and would count as memory in use
    trainer = Trainer(config, device, ranks)
    for step, pair in enumerate(warm_up):
        trainer.step(step, clips, pair)
    before, memory = compiled_graphs(), "-"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = time_steps(trainer, clips, masks)
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}"
    graphs, breaks = (after - earlier for after, earlier in zip(compiled_graphs(), before))
    # On a CPU the profiler would write its own complaints between the lines of the table.
    kernels = largest_kernels(trainer, clips, masks[:ROUND]) if device.type == "cuda" else ""
    del trainer
    plain, plain_clips = time_plain_step(config, device, ranks, clips, masks[:2 * ROUND])  # fewer: it is slow
    ratio = f"{plain / (seconds / len(clips)):.2f}"
    if plain_clips < len(clips):
        ratio += f" (of a step of {plain_clips})"
    peak, rate = peak_flops(device), statistics.mean(flops_of(config, pair, objective.ema) for pair in masks) / seconds
    cells = [f"{rate / 1e12:.3g}", f"{rate / peak:.0%}" if peak else "unknown", memory, str(breaks), str(graphs), ratio]
    return seconds, cells, kernels


def benchmark(config, names):
    """Print a table: what a training step of each of these objectives costs, and how fast files can be read for it.

    On a GPU the largest kernels of each follow.
    """
    rank, ranks, device = start_ranks(config)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch // ranks, 3, config.frames, config.crop, config.crop)
    clips = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    machine = (torch.cuda.get_device_name(device) if device.type == "cuda"
               else f"{device.type}, {torch.get_num_threads()} threads")
    loader = loader_speed(config, device) if config.data or config.root else "-"
    show = functools.partial(print, flush=True) if rank == 0 else lambda line: None
    show(f"{machine} x {ranks}, torch {torch.__version__}, {config.model}, {config.frames} frames of {config.crop} px, "
         f"batch {config.batch}; plain: float32, uncompiled, attention by its mathematics\n")
    show("| objective | ms/step | x first | clips/s | loader alone, clips/s | TFLOP/s | MFU | peak memory, GiB | graph "
         "breaks | recompilations | x plain |\n|" + "---|" * 11)
    first, largest = None, {}
    for name in names:
        seconds, cells, largest[name] = benchmark_row(replace(config, objective=name), device, ranks, clips)
        first = first or seconds
        show(f"| {name} | {1000 * seconds:.1f} | {seconds / first:.2f} | {config.batch / seconds:.0f} | {loader} | "
             + " | ".join(cells) + " |")
    if any(largest.values()):
        show("\nLargest kernels and their share of the time on the device:")
        for name, kernels in largest.items():
            show(f"{name}: {kernels}")
    if ranks > 1:
        dist.destroy_process_group()


def loader_speed(config, device):
    """Clips per second that the loader's workers prepare when nobody trains."""
    grid = token_grid(config.frames, config.crop, config.crop, config.patch, config.tubelet)
    begun = 3 * max(1, config.workers)  # batches that are under way when the first one arrives
    batches = data.Batches(training_source(config), config.batch, 3 * begun, config.seed,
                           functools.partial(draw_masks, grid=grid, masking=OBJECTIVES[config.objective].masking))
    ready = iter(data.loader(batches, workers=config.workers, device=device))
    for _ in range(begun):
        next(ready)
    began = time.perf_counter()
    count = sum(len(clips) for clips, _, _ in ready)
    return f"{count / (time.perf_counter() - began):.0f}"


# ------------------------------------------------------------------------------------------------------- overviews


def describe(objective):
    """What an objective adds to the core loss, how it masks and where its targets come from, as one line of text."""
    parts = []
    for name, term in objective.terms.items():
        options = [option if value is True else f"{option} {value}" for option, value in term.options.items()]
        options += ["annealed"] * term.anneal
        parts.append(f"{term.coefficient:g} {name}" + (f" ({', '.join(options)})" if options else ""))
    masking = objective.masking
    lines = [" + ".join(parts)] if parts else []
    if masking.motion_strength:
        lines.append(f"motion-guided masks s={masking.motion_strength:g} r={masking.uniform_share:g}")
    if masking.first_steps < 1:
        lines.append(f"future-predictive masks {masking.first_steps:g}")
    return "; ".join(lines + ["no EMA"] * (not objective.ema)) or "-"


def objective_list():
    """The 28 objectives, a line each."""
    rows = [(name, objective.regime, describe(objective), objective.about) for name, objective in OBJECTIVES.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths)), row[3]]) for row in rows)


def gradient_table():
    """Markdown: which networks each loss of each objective, taken alone, gives a gradient that is not zero."""
    size = Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    lines = ["| objective | encoder | predictor | its own head | target |", "|---|---|---|---|---|"]
    rows = [(name, objective) for name, objective in OBJECTIVES.items()]
    rows += [(f"{name} `--as-released`", as_released(objective)) for name, objective in rows
             if any("as_released" in term.options for term in as_released(objective).terms.values())]
    for name, objective in rows:
        reached = gradient_reach(objective, size)
        lines.append(f"| {name} | " + " | ".join(", ".join(reached[part]) or "-" for part in reached) + " |")
    return "\n".join(lines)


def gradient_reach(objective, size):
    """Which losses of an objective reach which networks: {"encoder": [names], "predictor", "heads", "target"}."""
    torch.manual_seed(0)
    model = JEPA(objective, size, patch=4, tubelet=2)
    grid = (4, 4, 4)
    clips = torch.randint(256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    masks = draw_masks(clips, torch.Generator().manual_seed(0), grid, objective.masking)
    values, _ = model(clips, masks, coefficients(objective, 0, 1))
    reached = {part: [] for part in ("encoder", "predictor", "heads", "target")}
    for name in [name for name in values if name != "total"]:
        model.zero_grad()
        if values[name].requires_grad:
            values[name].backward(retain_graph=True)
        for part in reached:
            gradients = [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
            if any(gradient.abs().sum() > 0 for gradient in gradients):
                reached[part].append(name)
    return reached


# ------------------------------------------------------------------------------------------------------ command line


def known(kind, name, names):
    """The name itself; a ValueError with the nearest known name if there is no such name."""
    if name in names:
        return name
    nearest = "".join(f"; did you mean '{near}'?" for near in difflib.get_close_matches(name, names, n=1, cutoff=0.4))
    raise ValueError(f"unknown {kind} '{name}'{nearest or '.'} Known: {', '.join(names)}")


def parse(arguments):
    """Command line -> (Config, other flags). The preset's values first, then what the flags say."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="print the 28 objectives and stop")
    parser.add_argument("--gradients", action="store_true", help="print which networks each loss trains and stop")
    parser.add_argument("--benchmark", action="store_true", help="time the training step; --objective a,b or all")
    parser.add_argument("--resume", action="store_true", help="continue the run in its folder")
    parser.add_argument("--seeds", help="a sweep: --objective a,b or all with each of these seeds, as 0,1,2")
    parser.add_argument("--jobs", type=int, help="runs of a sweep side by side [one per CPU core; on a GPU 1]")
    for item in fields(Config):
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=item.metadata["help"])
        else:
            parser.add_argument(flag, type=item.type, metavar=item.type.__name__.upper(), help=item.metadata["help"])
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        known("flag", unknown[0].split("=")[0], flags)
    preset = known("preset", given.preset or Config.preset, PRESETS)
    chosen = {item.name: getattr(given, item.name) for item in fields(Config)
              if getattr(given, item.name) is not None}
    config = Config(**{**PRESETS[preset], **chosen, "preset": preset})
    if "frame_step" in chosen and "fps" not in chosen:
        config.fps = 0
    if given.benchmark or given.seeds:
        given.names = list(OBJECTIVES) if config.objective == "all" else config.objective.split(",")
        config.objective = given.names[0]
        for name in given.names:
            known("objective", name, OBJECTIVES)
    elif config.objective == "all" or "," in config.objective:
        raise ValueError(f"--objective {config.objective} names several; add --seeds 0,1,2 to train each, or "
                         "--benchmark")
    elif given.jobs is not None:
        raise ValueError("--jobs is for a sweep; add --seeds 0,1,2")
    if given.seeds:
        try:
            given.seeds = [int(seed) for seed in given.seeds.split(",")]
        except ValueError:
            raise ValueError(f"--seeds {given.seeds}: give whole numbers with commas, as 0,1,2") from None
        if given.jobs is not None and given.jobs < 1:
            raise ValueError(f"--jobs is {given.jobs}; it must be at least 1")
        config.out = config.out or "runs/study"
    return check(config), given


def check(config):
    """The same Config with its run folder filled in. Raises ValueError for what cannot run."""
    known("objective", config.objective, OBJECTIVES)
    known("model", config.model, SIZES)
    known("device", config.device, ("auto", "cuda", "mps", "cpu"))
    known("value of --compile", config.compile, ("auto", "yes", "no"))
    known("value of --fwm-split", config.fwm_split, ("depth", "level"))
    known("value of --ablate", config.ablate, ("", *ABLATIONS))
    counts = "frames", "crop", "frame_step", "patch", "tubelet", "steps", "batch", "log_every", "save_every"
    if config.seed >= 2 ** 32:
        raise ValueError(f"--seed is {config.seed}; it must be less than 2 ** 32")
    if config.root and (config.data or config.preset not in ("mixed", "ucf101")):
        raise ValueError("--root is for --preset mixed or ucf101, without --data")
    least = dict.fromkeys(counts, 1) | dict.fromkeys(("seed", "fps", "workers", "lr", "warmup_lr", "weight_decay"), 0)
    for name, value in least.items():
        if not getattr(config, name) >= value:  # so put, it refuses nan as well
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least {value}")
    for name in ("ema", "max_broken"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be from 0 to 1")
    if config.probe_clips and config.probe_clips < 192:
        raise ValueError(f"--probe-clips {config.probe_clips} are too few to probe 8 classes with; give at least 192, "
                         "or 0 for no table")
    grid = token_grid(config.frames, config.crop, config.crop, config.patch, config.tubelet)
    if grid[0] < 2:
        raise ValueError(f"{config.frames} frames in tubelets of {config.tubelet} give {grid[0]} time step; "
                         "the method needs at least 2: raise --frames")
    if not config.out:
        config.out = f"runs/{Path(config.data).stem if config.data else config.preset}-{run_name(config)}"
    return config


def run_name(config):
    """The objective, what of the method was changed by flags, and the seed."""
    changes = {"-as-released": config.as_released, f"-fwm-split-{config.fwm_split}": config.fwm_split != "depth",
               f"-without-{config.ablate}": config.ablate,
               f"-ema-{config.ema:g}": config.ema != PRESETS[config.preset].get("ema", Config.ema)}
    return config.objective + "".join(change for change in changes if changes[change]) + f"-seed{config.seed}"


@command("train.py", smaller="--batch, --model or --crop",
         stopped="stopped; a run that had begun goes on with --resume")
def main(arguments=None):
    config, flags = parse(arguments)
    if flags.list:
        print(objective_list())
    elif flags.gradients:
        print(gradient_table())
    elif flags.benchmark:
        benchmark(config, flags.names)
    elif flags.seeds:
        return sweep(config, flags.names, flags.seeds, flags.jobs)
    else:
        stopped = train(config, flags.resume)
        return 128 + stopped if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
