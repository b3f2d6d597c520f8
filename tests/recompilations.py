"""Compiled training steps as token counts change: how many graphs, how many breaks. A command, which a test runs too.

    python tests/recompilations.py                             ld, which has pairs and a head
    python tests/recompilations.py all                         all objectives, some minutes
    python tests/recompilations.py all --backend inductor      the same with machine code, much longer

The losses of the first step must be those of an uncompiled one.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from model import Size
from objectives import OBJECTIVES


def count_graphs(name, backend):
    torch._dynamo.reset()
    config, _ = train.parse(["--objective", name, "--batch", "4", "--crop", "24", "--compile", "no"])  # 36 tokens
    trainer, uncompiled = (train.Trainer(config, torch.device("cpu")) for _ in range(2))
    trainer.model.compile(fullgraph=True, backend=backend)  # a graph break would be an error
    clips = torch.randint(256, (4, 3, 8, 24, 24), dtype=torch.uint8)
    # The first counts are those of frames and of pixels: that must not be taken for a rule. No mask leaves only as many
    # tokens as there are time steps, 4 (for `spectral` that would be a graph of its own).
    counts, before = [(8, 24), *torch.randint(5, 34, (219, 2)).tolist()], train.compiled_graphs()
    for step, pair in enumerate(counts):
        ids = [torch.rand(4, 36).argsort(dim=1) for _ in pair]
        masks = [(tokens[:, :count].sort().values, tokens[:, count:].sort().values) for tokens, count in zip(ids, pair)]
        values, _, _ = trainer.step(step, clips, masks)
        if step == 0:
            torch.testing.assert_close(values, uncompiled.step(0, clips, masks)[0], rtol=1e-4, atol=1e-5)
        if step == 19:
            warm = train.compiled_graphs()
    graphs, breaks = train.compiled_graphs()
    print(f"{name}: counts {len(set(map(tuple, counts)))} warm {warm[0] - before[0]} end {graphs - before[0]} "
          f"breaks {breaks - before[1]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("objective", nargs="?", default="ld", choices=["all", *OBJECTIVES])
    parser.add_argument("--backend", default="eager", choices=["eager", "inductor"])
    flags = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.fallback_random = True  # draw what an uncompiled step draws
    # Not smaller: inductor writes other code for sums of fewer than 4096 numbers, and so would compile again.
    train.SIZES["tiny"] = Size(96, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    for name in OBJECTIVES if flags.objective == "all" else [flags.objective]:
        count_graphs(name, flags.backend)


if __name__ == "__main__":
    main()
