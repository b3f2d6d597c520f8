"""Run by test_train.py: gradients of one rank with the whole batch beside two ranks with half each, what two ranks could
not read, and a signal to one of them."""
import os
import signal
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from data import Broken
from model import Size
from objectives import OBJECTIVES, coefficients, sample_masks
from train import JEPA, StopSignal

SIZE = Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
CLIPS, GRID = 4, (4, 3, 4)


def gradients(objective, clips, masks, distributed):
    """Gradients of the total loss late in the run, when every term counts."""
    torch.manual_seed(0)
    model = JEPA(objective, SIZE, patch=4, tubelet=2)
    wrapped = DistributedDataParallel(model, static_graph=True) if distributed else model
    torch.manual_seed(1)  # sigreg's directions
    values, _ = wrapped(clips, masks, coefficients(objective, 3, 4))
    values["total"].backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def compare(rank, alone, clips, store):
    """One of two processes: its half of the batch, averaged by DDP, beside the whole."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = slice(rank * CLIPS // 2, (rank + 1) * CLIPS // 2)
    for name, objective in OBJECTIVES.items():
        masks, expected = alone[name]
        mine = [(visible[half], masked[half]) for visible, masked in masks]
        found = gradients(objective, clips[half], mine, distributed=True)
        largest = max((a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in zip(found, expected))
        if rank == 0:
            print(name, f"{largest:.2e}", flush=True)
    broken = Broken()
    broken.add([("videos", f"rank{rank}.mp4", "cut short"), ("videos", "both.mp4", "cut short")], 10)
    broken = broken.over_ranks()
    if rank == 0:
        print(f"unreadable: {broken}, share {broken.share:.2f},", *sorted(broken.files), flush=True)
    with StopSignal() as stop:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        print(f"rank {rank} stops by signal {stop.agreed()}", flush=True)
    dist.destroy_process_group()


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(256, (CLIPS, 3, 8, 12, 16), dtype=torch.uint8, generator=generator)
    alone = {}
    for name, objective in OBJECTIVES.items():  # one process: statistics of the whole batch
        masks = sample_masks(CLIPS, GRID, objective.masking, generator)
        alone[name] = masks, gradients(objective, clips, masks, distributed=False)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(compare, (alone, clips, f"{folder}/store"), 2, start_method="fork")


if __name__ == "__main__":
    main()
