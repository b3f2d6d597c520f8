"""The synthetic clips: known factors, independent of each other, and no motion in a single
frame."""

import itertools
import math

import numpy as np
import pytest
import torch

import probe
from model import Encoder, Size
from synthetic import APPEARANCES, DIRECTIONS, SIDE, WORLDS, Blobs, Dives, Shapes


def chi_square(counts, expected):
    """Standardised chi-square: about 0 +- 1 where `counts` were drawn from `expected`."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def brightness_centre(frames):
    """Centre of the bright pixels of frames [..., size, size] on the torus, as angles in
    [0, 2 pi): [..., 2], row and column."""
    frames = np.asarray(frames, np.float64)
    waves = np.exp(2j * np.pi * (np.arange(frames.shape[-1]) + 0.5) / frames.shape[-1])
    rows, columns = frames.sum(-1) @ waves, frames.sum(-2) @ waves
    return np.angle(np.stack((rows, columns), axis=-1)) % (2 * np.pi)


@pytest.mark.parametrize("world", WORLDS.values())
def test_the_same_seed_and_item_give_the_same_clip_alone_or_in_a_batch(world):
    source = world(8, 32, seed=3)
    together = source.clips([5, 6, 7])
    assert together.dtype == torch.uint8 and together.shape == (3, 3, 8, 32, 32)
    assert torch.equal(together[1], world(8, 32, seed=3).clips([6])[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, world(8, 32, seed=4).clips([5, 6, 7]))
    clip, label = source.video(6)
    assert torch.equal(clip, together[1]) and label == source.factors([6])[world.few[0]]


@pytest.mark.parametrize("world", WORLDS.values())
def test_factors_are_uniform_and_independent_and_the_last_is_all_motion_together(world):
    factors = world(8, 32, seed=0).factors(range(4000))
    assert {name: int(labels.max()) + 1 for name, labels in factors.items()} == world.classes
    assert {*world.few, *world.linear} <= {*world.classes}
    *motion, appearance, together = world.classes
    for pair in itertools.combinations((*motion, appearance), 2):
        sizes = [world.classes[name] for name in pair]
        counts = np.zeros(sizes)
        np.add.at(counts, tuple(factors[name].numpy() for name in pair), 1)
        assert abs(chi_square(counts, np.full(sizes, 4000 / counts.size))) < 4, pair

    combinations = [*itertools.product(*(range(world.classes[name]) for name in motion))]
    drawn = zip(*(factors[name].tolist() for name in motion))
    assert [combinations.index(each) for each in drawn] == factors[together].tolist()


def test_the_place_in_one_frame_is_uniform_whatever_the_direction():
    """A frame alone carries no information about it: 8 directions x 16 places, by chi-square."""
    source, count = Shapes(8, 16, seed=1), 3200
    directions = source.factors(range(count))["direction"].numpy()
    clips = source.clips(range(count))[:, 0]
    for frame in (0, 7):
        centres = brightness_centre(clips[:, frame])
        places = (centres / (2 * np.pi) * 4).astype(int) % 4  # a 4x4 chessboard
        counts = np.zeros((8, 4, 4))
        np.add.at(counts, (directions, places[:, 0], places[:, 1]), 1)
        expected = np.bincount(directions, minlength=8)[:, None, None] / 16 * np.ones_like(counts)
        assert abs(chi_square(counts, expected)) < 4


def nearest_neighbour_accuracy(features, labels, train):
    """Percent of the items after the first `train` whose nearest one among these has its label."""
    nearest = torch.cdist(features[train:], features[:train]).argmin(1)
    return 100 * (labels[:train][nearest] == labels[train:]).float().mean().item()


def test_a_classifier_reads_direction_from_two_frames_but_not_from_one():
    source = Shapes(2, 16, seed=2)
    clips, labels = source.clips(range(4000))[:, 0], source.factors(range(4000))["direction"]
    one = nearest_neighbour_accuracy(clips[:, 0].flatten(1).float(), labels, 3000)
    two = nearest_neighbour_accuracy(clips.flatten(1).float(), labels, 3000)
    assert abs(one - 12.5) < 4.2  # chance, within four standard deviations of 1,000 answers
    assert two > 40


def test_motion_is_the_factor_says_so():
    """The centre of brightness moves by speed * (cos, sin) of the direction, every frame, around
    the edges too."""
    source = Shapes(8, 64, seed=5)
    factors = source.factors(range(40))
    centres = brightness_centre(source.clips(range(40))[:, 0])
    steps = (np.diff(centres, axis=1) + np.pi) % (2 * np.pi) - np.pi  # the short way round
    down, right = (steps.mean(1) / (2 * np.pi) * SIDE).T
    angle = factors["direction"].numpy() * 2 * np.pi / len(DIRECTIONS)
    speed = np.array(Shapes.SPEEDS)[factors["speed"]]
    assert right == pytest.approx(speed * np.cos(angle), abs=0.1)
    assert down == pytest.approx(speed * np.sin(angle), abs=0.1)


def test_appearances_are_told_apart_by_nearest_neighbour():
    source = Shapes(1, 32, seed=6)
    labels = source.factors(range(600))["appearance"]
    clips = source.clips(range(600))[:, 0, 0].float()
    spectrum = torch.fft.fft2(clips).abs().flatten(1)  # the same wherever the shape stands
    assert nearest_neighbour_accuracy(spectrum, labels, 400) > 95
    assert len(APPEARANCES) == Shapes.classes["appearance"]


# -------------------------------------------------------------------------------------------- dives


def all_dives(appearance=0):
    """The factors of each of the 48 dives, in one appearance, as `Dives.draw` gives them."""
    *motion, _, together = Dives.classes
    rows = torch.tensor([*itertools.product(*(range(Dives.classes[name]) for name in motion))])
    factors = dict(zip(motion, rows.T)) | {together: torch.arange(48)}
    return factors | {"appearance": torch.full((48,), appearance)}


@pytest.mark.parametrize("frames", [8, 16])
def test_any_frame_of_a_dive_is_a_frame_of_the_dives_of_its_position(frames):
    """Exactly: another orientation and another side at the start, both uniform, make frame k of
    one dive frame k of another. So no frame says anything about sense, turns or twist."""
    source, factors = Dives(frames, 32, 0), all_dives()
    nuisances = torch.rand(1, Dives.nuisances, generator=torch.Generator().manual_seed(0))
    for frame in (0, frames // 2, frames - 1):
        share = frame / (frames - 1)
        turned = (2 * factors["sense"] - 1) * (factors["turns"] + 1) / 2 * share
        others = nuisances.repeat(48, 1)
        others[:, 8] -= turned  # of a full turn
        others[:, 9] -= factors["twist"] * share
        shown = source.render(factors, others)[:, frame].unflatten(0, (8, 3, 2))
        torch.testing.assert_close(shown, shown[:1, :, :1].expand_as(shown), rtol=0, atol=0.1)
        same = source.render(factors, nuisances.repeat(48, 1))
        assert torch.pdist(same.flatten(1)).min() > 100  # while whole clips of all dives differ


def test_probes_of_one_frame_are_at_chance_in_what_is_motion_and_see_the_position():
    """Linear, by least squares on pixels, and attentive, on tokens of an untrained encoder."""
    source, count, train = Dives(8, 16, seed=3), 1200, 800
    factors = source.factors(range(count))
    frames = source.clips(range(count))[:, :, 4:5]  # (n, 3, 1, 16, 16)
    pixels = torch.cat((frames[:, 0].flatten(1) / 255, torch.ones(count, 1)), dim=1)
    torch.manual_seed(0)
    encoder = Encoder(Size(64, 2, 2), patch=8, tubelet=2)
    tokens = probe.last_level(encoder, frames.repeat(1, 1, 2, 1, 1))  # (n, 4, 64)

    ridge = pixels[:train].T @ pixels[:train] + torch.eye(pixels.shape[1])
    answers = pixels[train:] @ torch.linalg.solve(ridge, pixels[:train].T)  # (n, train)
    for name in ("sense", "turns", "twist", "position"):
        labels, chance = factors[name], 1 / Dives.classes[name]
        one_hot = torch.nn.functional.one_hot(labels[:train]).float()
        linear = 100 * ((answers @ one_hot).argmax(1) == labels[train:]).double().mean().item()
        sets = [probe.Labelled(tokens[rows], labels[rows])
                for rows in (slice(train), slice(train, None))]
        attentive, = probe.accuracies(probe.FEW, *sets, [0], "cpu")

        deviation = 100 * math.sqrt(chance * (1 - chance) / (count - train))
        if name == "position":
            assert min(linear, attentive) > 100 * chance + 4 * deviation
        else:
            assert max(linear, attentive) < 100 * chance + 3 * deviation, name


def test_orientation_tracked_over_the_clip_tells_sense_and_turns():
    """An oracle: the direction from the body's centre to the head's, unwrapped. And the width of
    a straight body changes where it twists, and only there."""
    source, count = Dives(16, 64, seed=4), 64
    factors = {name: labels.numpy() for name, labels in source.factors(range(count)).items()}
    clips = source.clips(range(count))[:, 0].numpy().astype(float)
    head, body = (clips > 190) & (clips < 210), clips > 100
    towards = brightness_centre(head) - brightness_centre(body)
    towards = (towards + np.pi) % (2 * np.pi) - np.pi
    angle = np.unwrap(np.arctan2(towards[..., 0], towards[..., 1]))
    half_turns = (angle[:, -1] - angle[:, 0]) / np.pi
    assert (np.sign(half_turns) == 2 * factors["sense"] - 1).all()
    assert (np.abs(half_turns).round() == factors["turns"] + 1).mean() > 0.95

    area = body.sum((-1, -2))
    changes = area.std(1) / area.mean(1) > 0.06
    straight = factors["position"] == 0
    assert (changes == factors["twist"])[straight].all() and straight.sum() > 10


# -------------------------------------------------------------------------------------------- blobs


def naive_blob(seed, move=None):
    """The paper's clip in loops over frames and rows: uint8 [T, H, W, 3]. move: None for a
    training clip."""
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
        cx, cy = min(max(x0 + dx * t, radius), 159 - radius), min(
            max(y0 + dy * t, radius), 159 - radius
        )
        for y in range(160):
            for channel in range(3):
                frames[t, y, :, channel] = background[channel] + noise[t, y, :, 0]
            inside = [x for x in range(160) if (x - cx) ** 2 + (y - cy) ** 2 <= radius ** 2]
            frames[t, y, inside] = colour
    return frames


def test_blobs_are_the_papers_own_clips():
    moves = [(0, -4), (3, -3), (4, 0), (3, 3), (0, 4), (-3, 3), (-4, 0), (-3, -3)]
    for item in (0, 13):
        clip, label = Blobs().video(item)
        assert label == item % 8 and clip.shape == (3, 32, 160, 160) and clip.dtype == torch.uint8
        assert (clip.permute(1, 2, 3, 0).numpy() == naive_blob(42 + item, moves[item % 8])).all()
    first = Blobs().video(0)[
        0
    ]  # on record: background 42 11 67, noise 23; disc 234 207 250 at x 29, y 22, radius 17
    assert first[:, 0, 0, 0].tolist() == [42 + 23, 11 + 23, 67 + 23] and first[
        0, 0, 0, :3
    ].tolist() == [65, 61, 55]
    assert first[:, 0, 22, 29].tolist() == [234, 207, 250]
    assert (first[0, 0, 22] == 234).nonzero().flatten().tolist() == [*range(12, 47)]


def test_training_blobs_begin_as_evaluation_blobs_do_and_move_on_their_own():
    clip, label = Blobs(0, directions=False).video(47)
    evaluation, _ = Blobs().video(5)
    assert label is None and (clip.permute(1, 2, 3, 0).numpy() == naive_blob(47)).all()
    assert torch.equal(clip[:, 0], evaluation[:, 0]) and not torch.equal(clip, evaluation)
