"""Run by test_train.py: training steps of a compiled objective with pairs and a head, as token counts change."""
import torch

import train
from model import Size


def main():
    torch.set_num_threads(1)
    config, _ = train.parse(["--objective", "ld", "--batch", "2", "--crop", "24", "--compile", "yes"])  # 36 tokens
    train.SIZES["tiny"] = Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    trainer = train.Trainer(config, torch.device("cpu"))
    # No machine code is made, which takes a minute; a graph break would be an error.
    trainer.model.compile(fullgraph=True, backend="eager")
    clips = torch.randint(256, (2, 3, 8, 24, 24), dtype=torch.uint8)
    # The first counts are those of frames and of pixels: that must not be taken for a rule.
    counts = [(8, 24), *torch.randint(3, 34, (219, 2)).tolist()]
    for step, pair in enumerate(counts):
        ids = [torch.rand(2, 36).argsort(dim=1) for _ in pair]
        trainer.step(step, clips, [(tokens[:, :count].sort().values, tokens[:, count:].sort().values)
                                   for tokens, count in zip(ids, pair)])
        if step == 19:
            warm = train.compiled_graphs()
    graphs, breaks = train.compiled_graphs()
    print(f"counts {len(set(map(tuple, counts)))} warm {warm[0]} end {graphs} breaks {breaks}")


if __name__ == "__main__":
    main()
