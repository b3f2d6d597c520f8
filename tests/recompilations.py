"""Compiled training steps as token counts change: how many graphs, how many breaks. A command, which a test runs too.

    python tests/recompilations.py          ld, which has pairs and a head
    python tests/recompilations.py all      all objectives, some minutes
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from model import Size
from objectives import OBJECTIVES


def count_graphs(name):
    torch._dynamo.reset()
    config, _ = train.parse(["--objective", name, "--batch", "2", "--crop", "24", "--compile", "yes"])  # 36 tokens
    trainer = train.Trainer(config, torch.device("cpu"))
    # No machine code is made, which takes a minute; a graph break would be an error.
    trainer.model.compile(fullgraph=True, backend="eager")
    clips = torch.randint(256, (2, 3, 8, 24, 24), dtype=torch.uint8)
    # The first counts are those of frames and of pixels: that must not be taken for a rule. No mask leaves only as many
    # tokens as there are time steps, 4 (for `spectral` that would be a graph of its own).
    counts, before = [(8, 24), *torch.randint(5, 34, (219, 2)).tolist()], train.compiled_graphs()
    for step, pair in enumerate(counts):
        ids = [torch.rand(2, 36).argsort(dim=1) for _ in pair]
        trainer.step(step, clips, [(tokens[:, :count].sort().values, tokens[:, count:].sort().values)
                                   for tokens, count in zip(ids, pair)])
        if step == 19:
            warm = train.compiled_graphs()
    graphs, breaks = train.compiled_graphs()
    print(f"{name}: counts {len(set(map(tuple, counts)))} warm {warm[0] - before[0]} end {graphs - before[0]} "
          f"breaks {breaks - before[1]}", flush=True)


def main():
    torch.set_num_threads(1)
    train.SIZES["tiny"] = Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    for name in OBJECTIVES if sys.argv[1:] == ["all"] else ["ld"]:
        count_graphs(name)


if __name__ == "__main__":
    main()
