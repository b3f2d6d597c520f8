"""Train a video JEPA with any of the study's objectives: `python train.py --objective fwm_hw_ld`."""
import argparse
import copy
import csv
import functools
import io
import json
import os
import signal
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import data
import probe
from data import MAX_BROKEN, command, locked, number, read_json, write_file, write_json
from model import SIZES, Block, Encoder, Predictor, level_normalise, load_vjepa, normalise, token_grid
from objectives import (ABLATIONS, OBJECTIVES, MaskOutputs, Outputs, coefficients, draw_masks, losses, make_heads,
                        mean_over_ranks, objective_list, released_form, without)
from synthetic import WORLDS

STUDY = dict(frames=16, crop=224, model="vit_base", patch=16, steps=30_000, batch=32, micro_batch=8, lr=6e-4,
             ema=0.99925, workers=8, log_every=100, save_every=1000)
PRESETS = {
    "synthetic": dict(),
    "ucf101": dict(STUDY, fps=16),
    "mixed": dict(STUDY, frame_step=2),
    # The study's context loss begins at step 15,000, which this regime never reaches.
    "blobs": dict(STUDY, frames=8, crop=128, fps=4, batch=16, steps=5000, ctx_weight=0.0),
}
# Where a run runs, when it saves and when it gives up: settings that do not change what it computes.
NOT_COMPUTED = ("out", "device", "compile", "workers", "save_every", "max_broken")


def setting(default, meaning, least=None, most=10 ** 9, choices=None):
    """A field of `Config`, and so a flag: its metadata is what argparse is told of it."""
    kind = type(default)
    how = dict(type=kind if least is None else number(least, most, kind), choices=choices,
               metavar=kind.__name__.upper())
    if kind is bool or default is None:
        how = dict(action=argparse.BooleanOptionalAction)
    return field(default=default, metadata=dict(how, default=None, help=f"{meaning} [{default}]"))


@dataclass
class Config:
    """Everything that makes a run: the synthetic preset's values, for two CPU cores. Every field is a flag."""
    preset: str = setting("synthetic", "the values that the other flags start from", choices=PRESETS)
    objective: str = setting("baseline", "one of --list", choices=OBJECTIVES)
    as_released: bool = setting(False, "behave as the released code, not as its description (README)")
    ablate: str = setting("", "leave one ingredient out", choices=["", *ABLATIONS])
    out: str = setting("", "the run folder, by default below runs/")
    seed: int = setting(0, "of weights, clips and masks", 0, 2 ** 32 - 1)
    # data
    data: str = setting("", 'your own videos: a list (lines "path label" or "path") or a folder')
    root: str = setting("", "the folder that holds the study's datasets")
    world: str = setting("default", "what the synthetic clips show", choices=WORLDS)
    frames: int = setting(8, "frames of a clip", 1, 10_000)
    crop: int = setting(32, "height and width of a clip in pixels", 1, 10_000)
    frame_step: int = setting(1, "frames of the video from one frame of a clip to the next", 1)
    fps: int = setting(0, "if given, the frame step is ceil(frames per second of the video) // this", 0)
    workers: int = setting(0, "loader processes", 0, 1000)
    max_broken: float = setting(MAX_BROKEN, "stop when a larger share of the clips cannot be read", 0, 1)
    # model
    model: str = setting("tiny", "size of the networks", choices=SIZES)
    weights: str = setting("", "a V-JEPA 2.1 checkpoint for the encoder to start from")
    patch: int = setting(8, "height and width of a token in pixels", 1)
    tubelet: int = setting(2, "frames of a token", 1)
    # optimisation
    steps: int = setting(500, "training steps; every schedule is a share of them", 1)
    batch: int = setting(16, "clips per step, over all ranks together", 1, 10 ** 6)
    micro_batch: int = setting(0, "clips that are masked and averaged together; 0: all that a rank has of a batch", 0)
    lr: float = setting(1e-3, "learning rate after the warm-up, which is the first 1 %% of the steps", 0)
    warmup_lr: float = setting(1e-4, "learning rate before step 0", 0)
    weight_decay: float = setting(0.04, "of all but biases and 1-D tensors", 0)
    ema: float = setting(0.97, "momentum of the target encoder", 0, 1)
    ctx_weight: float = setting(0.5, "what the context loss counts for at the end of the run", 0)
    # machine
    device: str = setting("auto", "where to run", choices=["auto", "cuda", "mps", "cpu"])
    compile: bool = setting(None, "compile the networks; by default on cuda only")
    # logging
    log_every: int = setting(10, "steps between lines of metrics.csv", 1)
    save_every: int = setting(100, "steps between checkpoints", 1)
    probe_clips: int = setting(2304, "labelled synthetic clips of the final table; 0: no table", 0)

    @property
    def grid(self):
        """The token grid (t, h, w) of a clip."""
        return token_grid(self.frames, self.crop, self.crop, self.patch, self.tubelet)


class JEPA(nn.Module):
    """The networks of one run, and one forward pass from clips and masks to losses."""

    def __init__(self, objective, size, patch, tubelet):
        super().__init__()
        self.objective = objective
        self.encoder = Encoder(size, patch, tubelet)
        self.predictor = Predictor(size)
        self.heads = make_heads(objective, size.width)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)  # the stop-gradient of the method
        self.losses = losses

    def targets(self, clips):
        """What is to be predicted: features of the whole clip, [B, N, 4D]. Without EMA they carry gradient."""
        encoder = self.target if self.objective.ema else self.encoder
        return level_normalise(encoder(clips)) if self.objective.level_norm else encoder(clips)

    def forward(self, clips, masks, weights):
        """uint8 clips [B, 3, T, H, W], list of (visible, masked), loss weights -> losses by name, targets."""
        clips = normalise(clips)
        grid = token_grid(*clips.shape[2:], self.encoder.patch, self.encoder.tubelet)
        # 1. The target encoder sees the whole clip, once.
        h = self.targets(clips)  # (B, N, 4D)
        # 2. Encoder and predictor run once per mask: encode what it leaves visible, predict the targets.
        outputs = []
        for visible, masked in masks:  # (B, n), (B, k)
            z = self.encoder(clips, visible)  # (B, n, 4D)
            p, c = self.predictor(z, visible, masked, grid)  # (B, k, 4D), (B, n, 4D)
            outputs.append(MaskOutputs(visible, masked, z, p, c))
        # 3. Every loss is a function of these outputs alone.
        return self.losses(Outputs(clips, grid, h, outputs), self.objective, self.heads, weights), h.detach()

    def compile(self, **options):
        """Compile every transformer block (they share one graph, which takes a quarter of the time that the whole step
        would, and is as fast) and the losses with all their terms. options: those of torch.compile."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**options)
        self.losses = torch.compile(losses, **options)


def build(config):
    """The networks of a run with random weights: a pure function of the settings, the seed among them."""
    objective, size = OBJECTIVES[config.objective], SIZES[config.model]
    if config.as_released:
        objective = released_form(objective)
    if config.ablate:
        objective = without(objective, config.ablate)
        size = size._replace(predictor_depth=0) if config.ablate == "predictor" else size
    torch.manual_seed(config.seed)
    return JEPA(objective, size, config.patch, config.tubelet)


@torch.no_grad()
def collapse_meter(h, most_tokens=4096):
    """Are the target features alive? Last level [B, N, D] of them -> effective rank, mean deviation of a channel.

    Effective rank: exp of the entropy of the normalised singular values of the centred token features (at most D). The
    deviation falls to 0 when all tokens look the same. The rank has no scale, and may stay high then.
    """
    tokens = h.flatten(0, 1).float()  # (B*N, D)
    count = min(len(tokens), most_tokens)
    tokens = tokens[torch.arange(count, device=h.device) * len(tokens) // count]  # evenly spread, over all columns
    tokens = tokens - tokens.mean(0)
    gram = tokens.T @ tokens
    squared = torch.linalg.eigvalsh(gram.cpu() if gram.device.type == "mps" else gram)  # singular values, squared
    squared = squared * (squared > 1e-6 * squared[-1])  # what lies below is rounding
    share = squared.sqrt() / squared.sqrt().sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp(), tokens.std(0).mean()


def collapsed(row):
    """Whether features are dead by a line of metrics.csv, a dict: then probes of them mean nothing."""
    return float(row["feature_std"]) < 0.1 or float(row["effective_rank"]) < 2


def make_optimizer(model, config):
    """AdamW; weight decay on all but biases and 1-D tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


class Trainer:
    """The networks of a run with their optimizer, one training step, and what a checkpoint keeps of them."""

    def __init__(self, config, device, ranks=1):
        self.config, self.device, self.ranks = config, device, ranks
        self.model = build(config).to(device)
        if config.weights:
            pretrained, found = load_vjepa(config.weights)
            if any(getattr(config, name) != value for name, value in found.items()):
                raise ValueError(f"{config.weights} needs " + ", ".join(f"--{name} {found[name]}" for name in found))
            for network in (self.model.encoder, self.model.target):
                network.load_state_dict(pretrained.state_dict())
        self.objective = self.model.objective
        # At momentum 1 the target never moves: what is learned is in the encoder.
        self.evaluated = "encoder" if self.objective.ema and config.ema == 1 else self.objective.evaluated
        self.optimizer = make_optimizer(self.model, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.update_target = get_ema_multi_avg_fn(config.ema)
        self.metrics = ""  # what metrics.csv holds: a checkpoint keeps it, so that no damage to that file matters
        self.healthy = torch.ones((), dtype=torch.bool, device=device)  # read seldom: reading waits for the device
        self.autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        # Flash attention then: cuDNN's would make a new plan for every token count, and counts change at every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if config.compile or config.compile is None and device.type == "cuda":
            self.model.compile()

    def step(self, step, micro_batches):
        """One training step on micro-batches: uint8 clips [B, 3, T, H, W], and masks, a list of (visible, masked) ids.

        Returns losses by name, targets of the last micro-batch [B, N, 4D], the length of all gradients together.
        """
        # 1. The schedules say what each loss counts for, and the learning rate. What a term draws at random is fresh at
        #    every step, equal on all ranks, and the same after a resume.
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        weights = coefficients(self.objective, step, self.config.steps, self.config.ctx_weight)
        # Tensors, since a compiled step would be compiled again for every new Python number.
        weights = dict(zip(weights, torch.tensor(list(weights.values())).to(self.device, non_blocking=True)))
        # Linear over the first 1 % of the steps (the study's first epoch); as there, steps count from 1.
        warm = min(1.0, (step + 1) / max(1, self.config.steps // 100))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.warmup_lr + (self.config.lr - self.config.warmup_lr) * warm
        found = []
        for clips, masks in micro_batches:
            clips = clips.to(self.device, non_blocking=True)
            masks = [tuple(tokens.to(self.device, non_blocking=True) for tokens in mask) for mask in masks]
            # 2. Forward: target encoder once; encoder and predictor once per mask; every loss; their weighted sum.
            #    Each micro-batch has means and statistics of its own.
            with self.autocast:
                losses, h = self.model(clips, masks, weights)
            # 3. Backward: gradients add up, and are averaged over all micro-batches of all ranks.
            (losses["total"] / len(micro_batches)).backward()
            found.append({name: value.detach() for name, value in losses.items()})
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
            self.update_target(list(self.model.target.parameters()), list(self.model.encoder.parameters()), None)
        losses = {name: torch.stack([each[name].float() for each in found]).mean() for name in found[0]}
        self.healthy &= losses["total"].isfinite() & gradient_norm.isfinite()
        return losses, h, gradient_norm

    def row(self, step, losses, h, gradient_norm):
        """A line of metrics.csv, a dict of numbers. Losses are averaged over ranks, each of which has to call this."""
        means = dict(zip(losses, mean_over_ranks(torch.stack(list(losses.values()))).tolist()))
        rank, deviation = collapse_meter(h[..., -self.model.encoder.width:])
        ctx = coefficients(self.objective, step, self.config.steps, self.config.ctx_weight)["ctx"]
        return {"step": step, **means, "grad_norm": gradient_norm.item(), "lr": self.optimizer.param_groups[0]["lr"],
                "ema": self.config.ema if self.objective.ema else "", "ctx_weight": ctx, "effective_rank": rank.item(),
                "feature_std": deviation.item()}

    def save(self, folder, step):
        """Write all that a later process needs to go on with `step` as its first step."""
        buffer = io.BytesIO()
        torch.save({"config": asdict(self.config), "definition": asdict(self.objective), "step": step,
                    "metrics": self.metrics, "evaluated": self.evaluated, "optimizer": self.optimizer.state_dict(),
                    **{name: part.state_dict() for name, part in self.model.named_children()}}, buffer)
        write_file(folder / "last.pt", buffer.getvalue())

    def load(self, checkpoint):
        """Take over a checkpoint. Raises ValueError where it does not fit the networks or the run."""
        try:
            for name, part in self.model.named_children():
                part.load_state_dict(checkpoint[name])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.metrics = checkpoint["metrics"]
            learning = [*self.model.encoder.parameters(), *self.model.predictor.parameters()]  # a head may be detached
            fits = isinstance(self.metrics, str) and 0 < checkpoint["step"] <= self.config.steps and all(
                self.optimizer.state[p][name].shape == p.shape for p in learning for name in ("exp_avg", "exp_avg_sq"))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{self.config.out}/last.pt does not fit this run of {self.config.steps} steps: it is "
                             "damaged, or was written by another version")


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
    return [data.open_dataset(name, config.root, "train", *how) for name in shares], list(shares.values())


def prepare(config, rank, ranks, device):
    """The trainer and its batches. What can be refused without a run folder is refused here."""
    sources = training_sources(config)  # before the networks, which take seconds: a wrong path is said at once
    trainer = Trainer(config, device, ranks)
    make_masks = functools.partial(draw_masks, grid=config.grid, masking=trainer.objective.masking)
    batches = data.Batches(*sources, config, make_masks, rank, ranks)
    clips = torch.zeros(batches.size, 3, config.frames, config.crop, config.crop, dtype=torch.uint8)
    make_masks(clips, torch.Generator(), torch.Generator())  # refuses a grid or a micro-batch that is too small
    return trainer, batches


def start_ranks(config):
    """(rank, number of ranks, device); starts the process group under torchrun."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = here[0] if config.device == "auto" else config.device
    ranks, device = int(os.environ.get("WORLD_SIZE", 1)), torch.device(name)
    if name not in here:
        raise ValueError(f"--device {name}: torch finds no such device on this machine; leave the flag out")
    if ranks == 1:
        return 0, 1, device
    if name == "cuda":
        device, found = torch.device(name, int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= found:
            raise ValueError(f"this machine has {found} GPUs; give torchrun --nproc_per_node={found}, or fewer")
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    return dist.get_rank(), ranks, device


class StopSignal(ExitStack):
    """Remembers Ctrl-C and SIGTERM, so that the loop ends after a whole step. The same one again ends at once."""
    received = 0

    def __enter__(self):
        for each in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, each, signal.signal(each, self.receive))  # at the end, what was before
        return self

    def receive(self, received, frame):
        self.received = received
        signal.signal(received, signal.SIG_DFL)

    def agreed(self):
        """The signal, on all ranks if it reached any: one that stopped alone would leave the others waiting."""
        received = torch.tensor(self.received)  # on the CPU: nothing waits for the GPU
        if dist.is_initialized():
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return received.item()


def open_run(config, trainer, resume):
    """Judge the run folder, and let the trainer go on from the checkpoint in it, which is returned (or None).
    Raises ValueError, before anything is written, for a folder with something else than the beginning of this run."""
    folder = Path(config.out)
    # The objective itself goes in beside its name: its coefficients may change between two versions of a file.
    content = json.loads(json.dumps({**asdict(config), "definition": asdict(trainer.objective)}))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    begun = sizes.get("last.pt") or sizes.get("metrics.csv")
    left = [name for name in sizes if name.endswith(".tmp")]  # of a process that was killed while it wrote
    if not begun and {*sizes} - {"config.json", "metrics.csv", "unreadable.txt", *left}:
        raise ValueError(f"{folder} holds something that is not a run; choose another --out")
    if begun and not resume:
        raise ValueError(f"{folder} holds a run already; add --resume to go on with it, or choose another --out")
    there = {"config.json": read_json(folder / "config.json")} if begun else {}
    checkpoint = probe.load_checkpoint(folder / "last.pt") if "last.pt" in sizes else None
    if checkpoint:
        there["last.pt"] = {**checkpoint["config"], "definition": json.loads(json.dumps(checkpoint["definition"]))}
    for name, before in there.items():
        different = [key for key in content if key not in NOT_COMPUTED and before.get(key) != content[key]]
        if different:
            what = f"of a different run ({', '.join(different)} differ)" if before else "missing"
            raise ValueError(f"{folder / name} is {what}; choose another --out")
    if checkpoint:
        trainer.load(checkpoint)
    for name in left if checkpoint else [*left, "unreadable.txt"]:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "config.json", content)
    write_file(folder / "metrics.csv", trainer.metrics.encode())  # up to the checkpoint: the rest is computed again
    return checkpoint


def report(trainer, row, bar):
    """Add a line to metrics.csv, a dict of numbers without times, so that on a CPU a resumed run writes the same file;
    and show it. Raises ValueError where too many clips could not be read."""
    config, broken = trainer.config, Path(trainer.config.out) / "unreadable.txt"
    trainer.metrics = (trainer.metrics or ",".join(row) + "\n") + ",".join(map(str, row.values())) + "\n"
    write_file(broken.with_name("metrics.csv"), trainer.metrics.encode())
    # Workers are ahead of this step, and after a resume they meet the same files again.
    noted = {*broken.read_bytes().splitlines()} if broken.exists() else {}
    failed, drawn = sum(int(line.split(b"\t")[0]) <= row["step"] for line in noted), (row["step"] + 1) * config.batch
    shown = ", ".join(f"{name}={value:.3g}" for name, value in row.items()
                      if name not in ("step", "grad_norm", "lr", "ema", "ctx_weight"))
    shown += f", {failed:,} unreadable" * bool(failed)
    bar.set_postfix_str(shown)
    if bar.disable:
        print(f"step {row['step'] + 1} of {config.steps}: {shown}", flush=True)
    if drawn >= 100 and failed > config.max_broken * (failed + drawn):  # fewer would judge by one file
        raise ValueError(f"{failed / (failed + drawn):.0%} of the clips cannot be read, more than --max-broken "
                         f"{config.max_broken:g}; {broken} names them")


def run_steps(trainer, batches, start, rank):
    """Train from step `start` to the end, or to a signal; returns the last step, and the signal's number or 0."""
    config, folder, step, stopping = trainer.config, Path(trainer.config.out), trainer.config.steps - 1, 0
    bar = tqdm(total=config.steps * config.batch, initial=start * config.batch, unit="clip", desc=config.objective,
               file=sys.stdout, disable=True if rank else None)  # None: where there is no terminal
    with StopSignal() as stop, bar:
        for step, micro_batches in enumerate(data.loader(batches, start, config.workers, trainer.device), start):
            losses, h, gradient_norm = trainer.step(step, micro_batches)
            bar.update(config.batch)
            last, stopping = step + 1 == config.steps, stop.agreed()
            logging = step % config.log_every == 0 or last
            saving = (step + 1) % config.save_every == 0 or last or stopping
            if (logging or saving) and not trainer.healthy:  # at these steps alone the host waits for the device
                raise FloatingPointError(f"the loss or its gradient was not finite by step {step}; {folder}/last.pt is "
                                         "the last good checkpoint, if there is one; start again with a lower --lr")
            row = trainer.row(step, losses, h, gradient_norm) if logging else None
            if row and rank == 0:
                report(trainer, row, bar)
            if saving and rank == 0:
                trainer.save(folder, step + 1)
            if stopping:
                break
    return step, stopping


def train(config, resume=False):
    """Run a Config to its end, or to a signal; returns the exit status, 0 or 128 + that signal's number."""
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
        step, stopping = run_steps(trainer, batches, start, rank)
        if rank == 0 and not stopping:
            finish(trainer, folder)
    if rank == 0:
        if stopping:
            print(f"stopped after step {step}; the same command with --resume goes on from there")
        if (folder / "unreadable.txt").exists():
            print(f"some files could not be read; {folder}/unreadable.txt names them")
        print(f"run folder: {folder}")
    if ranks > 1:
        dist.destroy_process_group()
    return 128 + stopping if stopping else 0


def finish(trainer, folder):
    """Probe the trained encoder, and one with random weights on the same clips; write it all to result.json."""
    config, found = trainer.config, {}
    last = list(csv.DictReader(trainer.metrics.splitlines()))[-1]
    if config.probe_clips:
        encoders = {"untrained": build(config).encoder.to(trainer.device),
                    "trained": getattr(trainer.model, trainer.evaluated)}
        with torch.compiler.set_stance("force_eager"):  # blocks would be compiled again for the probes' shapes
            for name, encoder in encoders.items():
                found[name] = probe.probe_shapes(encoder, asdict(config), config.probe_clips, about=f"{name} encoder")
        probe.show_shapes(found, config.probe_clips, config.world)
        if config.data or config.root:
            print("These clips are generated, not yours; probe.py reads yours.")
        if collapsed(last):
            print("The features have collapsed: what the probes say of the trained encoder means nothing.")
    machine = f"{trainer.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    write_json(folder / "result.json", {"config": asdict(config), "machine": machine, "last": last, **found})


def parse(arguments):
    """Command line -> (Config, other flags). The preset's values first, then what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="print the named objectives and stop")
    parser.add_argument("--resume", action="store_true", help="continue the run in its folder")
    for item in fields(Config):
        parser.add_argument("--" + item.name.replace("_", "-"), **item.metadata)
    flags = parser.parse_args(arguments)
    chosen = {item.name: getattr(flags, item.name) for item in fields(Config) if getattr(flags, item.name) is not None}
    config = Config(**{**PRESETS[chosen.get("preset", Config.preset)], **chosen})
    if "frame_step" in chosen and "fps" not in chosen:
        config.fps = 0
    needs_root = config.preset in ("mixed", "ucf101") and not config.data
    wrong = {
        "--root is for --preset mixed or ucf101, without --data": config.root and not needs_root,
        f"--preset {config.preset} needs --root DIR, the folder that holds the study's datasets, or --data with your "
        "own videos; `python data.py --check DIR` says what a folder lacks": needs_root and not config.root,
        f"--probe-clips {config.probe_clips} are too few; give at least {probe.FEWEST_CLIPS}, or 0 for no table":
            0 < config.probe_clips < probe.FEWEST_CLIPS,
        f"{config.frames} frames in tubelets of {config.tubelet} give fewer than 2 time steps; raise --frames":
            config.frames < 2 * config.tubelet}
    for sentence in [sentence for sentence, holds in wrong.items() if holds]:
        parser.error(sentence)
    if not config.out:  # the data, the objective, what of the method was changed by flags, and the seed
        own_ema = config.ema != PRESETS[config.preset].get("ema", Config.ema)
        parts = [Path(config.data).stem or config.preset, config.objective, "as-released" * config.as_released,
                 f"without-{config.ablate}" * bool(config.ablate), config.world * (config.world != Config.world),
                 f"ema-{config.ema:g}" * own_ema, f"seed{config.seed}"]
        config.out = "runs/" + "-".join(filter(None, parts))
    return config, flags


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
