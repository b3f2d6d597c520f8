"""The synthetic clips: known factors, independent of each other, and no motion in a single frame."""
import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import synthetic
from synthetic import APPEARANCES, DIRECTIONS, SPEEDS, WORLD, Blobs, Shapes


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
    ("direction", "appearance", (DIRECTIONS, len(APPEARANCES))),
    ("direction", "speed", (DIRECTIONS, len(SPEEDS))),
    ("speed", "appearance", (len(SPEEDS), len(APPEARANCES))),
])
def test_factors_are_uniform_and_independent(first, second, sizes):
    factors = Shapes(8, 32, seed=0).factors(range(6400))
    counts = np.zeros(sizes)
    np.add.at(counts, (factors[first].numpy(), factors[second].numpy()), 1)
    assert abs(chi_square(counts, np.full(sizes, 6400 / counts.size))) < 4


@pytest.mark.parametrize("frame", [0, 3, 7])
def test_the_place_in_one_frame_is_uniform_whatever_the_direction(frame):
    """So that a frame alone carries no information about the direction: 8 directions x 16 places, by chi-square."""
    source, count = Shapes(8, 16, seed=1), 3200
    directions = source.factors(range(count))["direction"].numpy()
    clips = source.clips(range(count))[:, 0, frame]
    centres = np.array([brightness_centre(clip) for clip in clips])
    places = (centres / (2 * np.pi) * 4).astype(int) % 4  # a 4x4 chessboard
    counts = np.zeros((DIRECTIONS, 4, 4))
    np.add.at(counts, (directions, places[:, 0], places[:, 1]), 1)
    expected = np.bincount(directions, minlength=DIRECTIONS)[:, None, None] / 16 * np.ones_like(counts)
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
        down, right = (steps.mean(0) / (2 * np.pi) * WORLD)
        angle = factors["direction"][item].item() * 2 * np.pi / DIRECTIONS
        speed = SPEEDS[factors["speed"][item]]
        assert (right, down) == pytest.approx((speed * np.cos(angle), speed * np.sin(angle)), abs=0.1)


def test_appearances_are_told_apart_by_eye_or_nearest_neighbour():
    source = Shapes(1, 32, seed=6)
    labels = source.factors(range(600))["appearance"]
    clips = source.clips(range(600))[:, 0, 0].float()
    spectrum = torch.fft.fft2(clips).abs().flatten(1)  # the same wherever the shape stands
    assert nearest_neighbour_accuracy(spectrum, labels, 400) > 95


def test_blobs_are_as_the_study_describes_them():
    source = Blobs(seed=0)
    for item in range(8):
        clip, direction = source.video(item)
        assert clip.shape == (3, 32, 160, 160) and clip.dtype == torch.uint8 and direction == item % 8
        disc = clip[0] > 200
        assert (disc.flatten(1).sum(1) > 400).all()  # a whole disc of radius 12 in each frame: clamped, never outside
        grid = torch.arange(160.0)
        centres = torch.stack([torch.stack(((d.sum(0) * grid).sum(), (d.sum(1) * grid).sum())) / d.sum() for d in disc])
        steps = centres.diff(dim=0)
        wanted = torch.tensor([np.cos(direction * np.pi / 4), np.sin(direction * np.pi / 4)])
        free = ((centres > 13) & (centres < 146)).all(1)  # the disc does not touch the border
        moving = steps[free[1:] & free[:-1]]
        assert ((moving.norm(dim=1) - 4).abs() < 0.7).all()
        assert torch.allclose(moving / moving.norm(dim=1, keepdim=True), wanted.float(), atol=0.15)
        assert source.video(item)[0].equal(clip)
    noise = clip[:, :, ~disc.any(0)].numpy()  # (3, 32, pixels that the disc never reaches)
    assert abs(chi_square(np.bincount(noise.ravel()), np.full(64, noise.size / 64))) < 4
    assert abs(np.corrcoef(noise.reshape(96, -1)) - np.eye(96)).max() < 0.1  # fresh in every frame and colour


@pytest.mark.parametrize("kind", ["shapes", "blobs"])
def test_written_videos_come_back(tmp_path, kind):
    import av
    assert synthetic.main(["--write", str(tmp_path / "out"), "--kind", kind, "--count", "3"]) == 0
    rows = list(csv.reader((tmp_path / "out" / "videos.csv").open(), delimiter=" "))
    source = Blobs(0) if kind == "blobs" else Shapes(16, 64, 0)
    assert len(rows) == 3
    for item, (name, label) in enumerate(rows):
        clip, direction = source.video(item)
        assert int(label) == direction
        with av.open(str(tmp_path / "out" / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        decoded = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)
        assert decoded.shape == clip.shape
        assert (decoded.float() - clip.float()).abs().mean() < 25  # lossy coding of sharp edges and noise
    assert synthetic.main(["--write", str(tmp_path / "out")]) == 1  # never into a folder that holds something
    assert synthetic.main(["--write", str(tmp_path / "odd"), "--size", "63"]) == 1 and not (tmp_path / "odd").exists()


def test_a_stopped_command_leaves_the_folder_free(tmp_path, monkeypatch, capsys):
    """Stopped by Ctrl-C at the second clip, it has written nothing there; the same command then writes everything."""
    def stopped(path, *rest, whole=synthetic.write_video):
        if Path(path).name == "000001.mp4":
            raise KeyboardInterrupt
        whole(path, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "write_video", stopped)
        assert synthetic.main(["--write", str(tmp_path / "out"), "--count", "2"]) == 130
    assert capsys.readouterr().err.endswith("synthetic.py: stopped\n") and not (tmp_path / "out").exists()
    assert synthetic.main(["--write", str(tmp_path / "out"), "--count", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.mp4", "000001.mp4", "videos.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("flags, sentence", [
    ([], "the following arguments are required: --write"),
    (["--write"], "argument --write: expected one argument"),
    (["--write", "out", "--count", "0"], "argument --count: 0 is less than 1"),
    (["--write", "out", "--seed", "-1"], "argument --seed: -1 is less than 0"),
    (["--write", "out", "--size", "big"], "argument --size: invalid number value: 'big'"),
    (["--write", "out", "--kind", "balls"], "invalid choice: 'balls'"),
    (["--write", "out", "--cuont", "3"], "unrecognized arguments: --cuont 3"),
])
def test_wrong_flags_give_one_sentence_and_write_nothing(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert synthetic.main(flags) == 1
    message, = capsys.readouterr().err.splitlines()
    assert message.startswith("synthetic.py: ") and sentence in message and not list(tmp_path.iterdir())
