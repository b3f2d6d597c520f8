"""The collapse laboratory: objectives without one ingredient.

    python tests/study.py --with tests/laboratory.py --objective baseline-without-stop_gradient

An `Objective` says where targets come from. To leave out the rest, a function or a size is replaced
once the networks of such a run are built, until the process ends: that trains nothing else.
"""
from dataclasses import replace
from unittest.mock import patch

import torch

import objectives
import train
from model import SIZES, take
from objectives import OBJECTIVES, over_channels

BASELINE, whole = OBJECTIVES["baseline"], train.build
OBJECTIVES.update({
    "baseline-without-stop_gradient": replace(BASELINE, ema=False),
    "baseline-without-level_norm": BASELINE,
    "baseline-without-predictor": BASELINE,
    "baseline-without-l1": BASELINE,
    "baseline-without-cut": BASELINE,
    "fwm_hw_ld-without-cut": OBJECTIVES["fwm_hw_ld"],
})


def squared_errors(outputs):
    """`masked_errors`, squared."""
    return [(mask.p - take(outputs.h, mask.masked)).square() for mask in outputs.masks]


def squared_distance(a, b):
    """`distance`, of squares: the context loss takes it."""
    return over_channels((a - b).square())


def draw_masks(clips, positions, sizes, grid, masking):
    """`draw_masks` that cuts clips to equal counts at random, not from the end."""
    at_random = torch.Generator().manual_seed(positions.initial_seed() + 1)

    def equal_counts(masks):
        tokens = [mask.nonzero().squeeze(1) for mask in masks]
        tokens = [ids[torch.randperm(len(ids), generator=at_random)] for ids in tokens]
        count = min(map(len, tokens))
        return torch.stack([ids[:count] for ids in tokens]).sort().values

    with patch.object(objectives, "equal_counts", equal_counts):
        return objectives.draw_masks(clips, positions, sizes, grid, masking)


def build(config):
    """The networks of a run, which from here on lacks what its name says."""
    what = config.objective.partition("-without-")[2]
    if what == "predictor":  # without blocks, no prediction depends on what is visible
        SIZES[config.model] = SIZES[config.model]._replace(predictor_depth=0)
    elif what == "level_norm":
        train.level_normalise = lambda features: features
    elif what == "l1":
        objectives.masked_errors, objectives.distance = squared_errors, squared_distance
    elif what == "cut":
        train.draw_masks = draw_masks
    return whole(config)


train.build = build
