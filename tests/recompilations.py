"""Run by test_train.py: compile a step of an objective with pairs and a head; count graphs as token counts change."""
import torch

import train
from model import Size
from objectives import OBJECTIVES


def main():
    torch.set_num_threads(1)
    objective = OBJECTIVES["ld"]
    model = train.JEPA(objective, Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2), 3, 2)
    model.compile(dynamic=True, fullgraph=True, backend="eager")  # a graph break would be an error
    clips = torch.randint(256, (2, 3, 8, 15, 15), dtype=torch.uint8)
    generator, counts = torch.Generator().manual_seed(0), set()
    for step in range(220):
        masks = train.draw_masks(clips, generator, (4, 5, 5), objective.masking)
        weights = dict.fromkeys(("pred", "ctx", *objective.terms), torch.tensor(step / 220))
        model(clips, masks, weights)[0]["total"].backward()
        counts.add(tuple(tokens.shape for mask in masks for tokens in mask))
        if step == 19:
            warm = train.compiled_graphs()
    graphs, breaks = train.compiled_graphs()
    print(f"counts {len(counts)} warm {warm[0]} end {graphs} breaks {breaks}")


if __name__ == "__main__":
    main()
