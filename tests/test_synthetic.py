"""The synthetic clips: known factors, independent of each other, and no motion in a single frame."""
import numpy as np
import pytest
import torch

import synthetic
from synthetic import APPEARANCES, DIRECTIONS, FACTORS, SIDE, WORLDS, Blobs, Shapes

SPEEDS = WORLDS["default"].speeds


def chi_square(counts, expected):
    """Standardised chi-square: about 0 +- 1 where `counts` were drawn from `expected`."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def brightness_centre(frame):
    """Centre of the bright pixels of one frame [size, size] on the torus, as angles (row, column) in [0, 2 pi)."""
    size = frame.shape[-1]
    waves = torch.exp(2j * torch.pi * (torch.arange(size) + 0.5) / size)
    weight = frame.double()
    return [torch.angle((weight.sum(1 - axis) * waves).sum()).item() % (2 * np.pi) for axis in (0, 1)]


def test_the_same_seed_and_item_give_the_same_clip_alone_or_in_a_batch():
    source = Shapes(8, 32, seed=3)
    together = source.clips([5, 6, 7])
    assert torch.equal(together[1], Shapes(8, 32, seed=3).clips([6])[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, Shapes(8, 32, seed=4).clips([5, 6, 7]))
    assert together.dtype == torch.uint8 and together.shape == (3, 3, 8, 32, 32)


@pytest.mark.parametrize("first, second, sizes", [
    ("direction", "appearance", (len(DIRECTIONS), len(APPEARANCES))),
    ("direction", "speed", (len(DIRECTIONS), len(SPEEDS))),
    ("speed", "appearance", (len(SPEEDS), len(APPEARANCES))),
])
def test_factors_are_uniform_and_independent(first, second, sizes):
    factors = Shapes(8, 32, seed=0).factors(range(6400))
    counts = np.zeros(sizes)
    np.add.at(counts, (factors[first].numpy(), factors[second].numpy()), 1)
    assert abs(chi_square(counts, np.full(sizes, 6400 / counts.size))) < 4


def test_motion_is_direction_and_speed_together():
    factors = Shapes(8, 32, seed=0).factors(range(500))
    assert factors.keys() == FACTORS.keys()
    assert torch.equal(factors["motion"], 4 * factors["direction"] + factors["speed"])
    assert {name: int(labels.max()) + 1 for name, labels in factors.items()} == FACTORS


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_differ_in_what_moves_and_in_nothing_else(name):
    world, source, default = WORLDS[name], Shapes(8, 32, 0, world=name), Shapes(8, 32, 0)
    usual = default.factors(range(50))
    assert all(torch.equal(labels, usual[factor]) for factor, labels in source.factors(range(50)).items())
    clips = source.clips(range(50))
    assert {clips.min().item(), clips.max().item()} == {world.ground, world.shape}
    inside = (clips.float() - world.ground).mean() / (world.shape - world.ground) * SIDE ** 2  # in square world units
    areas = (default.clips(range(50)).float() / 255).mean() * SIDE ** 2
    expected = areas.item() * (world.radius / 10) ** 2  # large ones overlap themselves
    assert inside.item() == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("frame", [0, 3, 7])
def test_the_place_in_one_frame_is_uniform_whatever_the_direction(frame):
    """So that a frame alone carries no information about the direction: 8 directions x 16 places, by chi-square."""
    source, count = Shapes(8, 16, seed=1), 3200
    directions = source.factors(range(count))["direction"].numpy()
    clips = source.clips(range(count))[:, 0, frame]
    centres = np.array([brightness_centre(clip) for clip in clips])
    places = (centres / (2 * np.pi) * 4).astype(int) % 4  # a 4x4 chessboard
    counts = np.zeros((8, 4, 4))
    np.add.at(counts, (directions, places[:, 0], places[:, 1]), 1)
    expected = np.bincount(directions, minlength=8)[:, None, None] / 16 * np.ones_like(counts)
    assert abs(chi_square(counts, expected)) < 4


def nearest_neighbour_accuracy(features, labels, train):
    """Percent of the items after the first `train` whose nearest one among these has the same label."""
    nearest = torch.cdist(features[train:], features[:train]).argmin(1)
    return 100 * (labels[:train][nearest] == labels[train:]).float().mean().item()


def test_a_classifier_reads_direction_from_two_frames_but_not_from_one():
    source = Shapes(2, 16, seed=2)
    clips, labels = source.clips(range(6000))[:, 0].float(), source.factors(range(6000))["direction"]
    one = nearest_neighbour_accuracy(clips[:, 0].flatten(1), labels, 5000)
    two = nearest_neighbour_accuracy(clips.flatten(1), labels, 5000)
    assert abs(one - 12.5) < 4.2  # chance, within four standard deviations of 1,000 answers
    assert two > 40


def test_motion_is_the_factor_says_so():
    """The centre of brightness moves by speed * (cos, sin) of the direction, every frame, around the edges too."""
    source = Shapes(8, 64, seed=5)
    factors = source.factors(range(40))
    for item, clip in enumerate(source.clips(range(40))[:, 0]):
        centres = np.array([brightness_centre(frame) for frame in clip])
        steps = (np.diff(centres, axis=0) + np.pi) % (2 * np.pi) - np.pi  # the short way round
        down, right = (steps.mean(0) / (2 * np.pi) * SIDE)
        angle = factors["direction"][item].item() * 2 * np.pi / 8
        speed = SPEEDS[factors["speed"][item]]
        assert (right, down) == pytest.approx((speed * np.cos(angle), speed * np.sin(angle)), abs=0.1)


def test_appearances_are_told_apart_by_eye_or_nearest_neighbour():
    source = Shapes(1, 32, seed=6)
    labels = source.factors(range(600))["appearance"]
    clips = source.clips(range(600))[:, 0, 0].float()
    spectrum = torch.fft.fft2(clips).abs().flatten(1)  # the same wherever the shape stands
    assert nearest_neighbour_accuracy(spectrum, labels, 400) > 95


def naive_blob(seed, move=None):
    """METHOD.md section 8 in loops over frames and rows: uint8 [T, H, W, 3]. move: None for a training clip."""
    draw = np.random.default_rng(seed)
    background = draw.integers(0, 80, 3, dtype=np.uint8)
    noise = draw.integers(0, 30, (32, 160, 160, 1))
    colour = draw.integers(120, 256, 3, dtype=np.uint8)
    radius = int(draw.integers(10, 40))
    x0 = int(draw.integers(radius, 160 - radius))
    y0 = int(draw.integers(radius, 160 - radius))
    dx, dy = (int(draw.integers(-4, 5)), int(draw.integers(-4, 5))) if move is None else move
    frames = np.zeros((32, 160, 160, 3), np.uint8)
    for t in range(32):
        cx, cy = min(max(x0 + dx * t, radius), 159 - radius), min(max(y0 + dy * t, radius), 159 - radius)
        for y in range(160):
            for channel in range(3):
                frames[t, y, :, channel] = background[channel] + noise[t, y, :, 0]
            inside = [x for x in range(160) if (x - cx) ** 2 + (y - cy) ** 2 <= radius ** 2]
            frames[t, y, inside] = colour
    return frames


def test_blobs_are_the_studys_own_clips():
    moves = [(0, -4), (3, -3), (4, 0), (3, 3), (0, 4), (-3, 3), (-4, 0), (-3, -3)]
    for item in (0, 5, 13):
        clip, label = Blobs().video(item)
        assert label == item % 8 and clip.shape == (3, 32, 160, 160) and clip.dtype == torch.uint8
        assert (clip.permute(1, 2, 3, 0).numpy() == naive_blob(42 + item, moves[item % 8])).all()
    first = Blobs().video(0)[0]  # on record: background 42 11 67, noise 23; disc 234 207 250 at x 29, y 22, radius 17
    assert first[:, 0, 0, 0].tolist() == [42 + 23, 11 + 23, 67 + 23] and first[0, 0, 0, :3].tolist() == [65, 61, 55]
    assert first[:, 0, 22, 29].tolist() == [234, 207, 250]
    assert (first[0, 0, 22] == 234).nonzero().flatten().tolist() == [*range(12, 47)]


def test_training_blobs_begin_as_evaluation_blobs_do_and_move_on_their_own():
    clip, label = Blobs(0, directions=False).video(47)
    evaluation, _ = Blobs().video(5)
    assert label is None and (clip.permute(1, 2, 3, 0).numpy() == naive_blob(47)).all()
    assert torch.equal(clip[:, 0], evaluation[:, 0]) and not torch.equal(clip, evaluation)
