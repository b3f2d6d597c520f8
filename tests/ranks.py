"""Run by test_train.py: a step in float64, shared by one, two and four processes, beside its four
micro-batches alone.

A line for each objective: how far the gradients of 1, 2 and 4 ranks are from the naive ones, as a
share of the largest, and likewise the total that a run would log. Then a signal to one of two
ranks.
"""

import functools
import os
import signal
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

import data
import train
from data import MASK, SIZE, generator_for
from model import SIZES, Size, normalise
from objectives import OBJECTIVES, TERMS, coefficients, draw_masks, sigreg
from synthetic import Shapes

STEP, STEPS, CLIPS, EACH, SEED = 9, 12, 8, 2, 3  # by this step the context loss counts
DIRECTIONS = 48
# Every way of masking, of drawing at random and of averaging; test_objectives.py has the rest.
NAMES = ["amg", "fwm_hw_ld", "sigreg", "hamiltonian"]


def settings(name):
    flags = (
        f"--objective {name} --seed {SEED} --crop 16 --patch 4 --steps {STEPS} --batch {CLIPS} "
        f"--micro-batch {EACH} --out nowhere"
    )
    return train.parse(flags.split())[0]


def shared(rank, ranks, folder):
    """One of several processes: the gradients that reach the optimizer, and the total logged, for
    each objective."""
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
        )
    results = {}
    for name in NAMES:
        trainer, batches = train.prepare(settings(name), rank, ranks, torch.device("cpu"))
        trainer.model.double()
        micro_batches, found = next(iter(data.loader(batches, STEP))), []
        assert len(micro_batches) == CLIPS // EACH // ranks
        trainer.optimizer.step = lambda: found.extend(p.grad.flatten() for p in trainer.trained)
        row = trainer.row(STEP, *trainer.step(STEP, micro_batches))
        results[name] = torch.cat(found), torch.tensor(row["total"])
    torch.save(results, f"{folder}/{rank}.pt")
    if ranks == 2:
        with train.StopSignal() as stop:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            print(f"rank {rank} stops by signal {stop.agreed()}", flush=True)
    if ranks > 1:
        dist.destroy_process_group()


def naive_sigreg(model, micro_batches, ranks):
    """METHOD.md: cosines and sines are averaged over the ranks' samples, and n counts all clips of
    the step, however many micro-batches of however many ranks share them.

    The micro-batches that have the same number on their ranks make up one sample, with directions
    of its own.
    """
    numbers, total = len(micro_batches) // ranks, 0.0
    torch.manual_seed(SEED * 1_000_003 + STEP)
    for number in range(numbers):
        samples = [
            torch.cat(
                [
                    model.encoder(normalise(clips).double(), visible).flatten(0, 1)
                    for visible, _ in masks
                ]
            )
            for clips, masks in micro_batches[number::numbers]
        ]
        projections = F.normalize(
            torch.randn(samples[0].shape[1], DIRECTIONS, dtype=torch.float64), dim=0
        )
        projections, values = [sample @ projections for sample in samples], []
        for t in torch.linspace(0, 3, 17, dtype=torch.float64):
            cos, sin = (
                sum(wave(t * each).mean(0) for each in projections) / ranks
                for wave in (torch.cos, torch.sin)
            )
            phi = torch.exp(-(t**2) / 2)
            values.append(phi * ((cos - phi) ** 2 + sin**2))
        integral = 2 * 3 / 16 * (sum(values) - (values[0] + values[-1]) / 2)
        total = total + numbers * sum(map(len, samples)) * integral.mean() / numbers
    return total


def naive(name, ranks):
    """Gradients and total of four micro-batches by their definition, each taken alone but for
    sigreg."""
    config = settings(name)
    model, shapes = train.build(config).double(), Shapes(config.frames, config.crop, SEED)
    weights = coefficients(model.objective, STEP, STEPS)
    weights = {
        name: torch.tensor(value) for name, value in weights.items()
    }  # in float32, as in a step
    micro_batches, total = [], 0.0
    for j in range(CLIPS // EACH):
        clips = shapes.clips(range(STEP * CLIPS + j * EACH, STEP * CLIPS + (j + 1) * EACH))
        positions, sizes = generator_for(SEED, MASK, STEP, j), generator_for(SEED, SIZE, STEP, 0)
        micro_batches.append(
            (clips, draw_masks(clips, positions, sizes, (4, 4, 4), model.objective.masking))
        )
    if "sigreg" in weights:
        weights["sigreg"], total = torch.zeros(()), naive_sigreg(model, micro_batches, ranks)
    for clips, masks in micro_batches:
        total = total + model(clips, masks, weights)[0]["total"] / len(micro_batches)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]), total.detach()


def main():
    torch.set_num_threads(1)
    SIZES["tiny"] = Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    TERMS["sigreg"] = functools.partial(sigreg, directions=DIRECTIONS, chunk=DIRECTIONS // 3)
    train.normalise = lambda clips: normalise(clips).double()
    spanning = [name for name in NAMES if "sigreg" in OBJECTIVES[name].terms]
    expected = {1: {name: naive(name, 1) for name in NAMES}}
    expected |= {
        ranks: expected[1] | {name: naive(name, ranks) for name in spanning} for ranks in (2, 4)
    }
    differences = {name: ([], []) for name in NAMES}
    for ranks in expected:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                shared, (ranks, folder), ranks, start_method="fork"
            )
            found = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
        for name, values in expected[ranks].items():
            for i, value in enumerate(values):
                worst = max(
                    (each[name][i] - value).abs().max() / value.abs().max() for each in found
                )
                differences[name][i].append(f"{worst:.1e}")
    for name, (gradients, totals) in differences.items():
        print(name, *gradients, *totals)


if __name__ == "__main__":
    main()
