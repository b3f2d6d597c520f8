"""The synthetic clips: known factors, independent of each other, and no motion in a single frame."""
import csv
import errno
import os
import signal
from pathlib import Path

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


@pytest.mark.parametrize("kind", ["shapes", "blobs"])
def test_written_videos_come_back(tmp_path, kind):
    import av
    assert synthetic.main(["--write", str(tmp_path / "out"), "--kind", kind, "--count", "3"]) == 0
    rows = list(csv.reader((tmp_path / "out" / "videos.csv").open(), delimiter=" "))
    source = Blobs() if kind == "blobs" else Shapes(16, 64, 0)
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


def test_a_stopped_command_leaves_the_folder_free_and_what_lies_beside_it_alone(tmp_path, monkeypatch, capsys):
    """Stopped by Ctrl-C at the second clip, it has written nothing there; the same command then writes everything."""
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "mine.txt").write_text("mine")

    def stopped(path, *rest, whole=synthetic.write_video):
        if Path(path).name == "000001.mp4":
            raise KeyboardInterrupt
        whole(path, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "write_video", stopped)
        assert synthetic.main(["--write", str(tmp_path / "out"), "--count", "2"]) == 130
    assert capsys.readouterr().err.endswith("synthetic.py: stopped\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    assert synthetic.main(["--write", str(tmp_path / "out"), "--count", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.mp4", "000001.mp4", "videos.csv"]
    assert (tmp_path / "out.unfinished" / "mine.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["link", "file", "mount"])
def test_where_no_folder_can_be_put_it_is_refused_before_the_work(tmp_path, monkeypatch, capsys, kind):
    target = tmp_path / "target"
    if kind == "link":
        (tmp_path / "real").mkdir()
        target.symlink_to(tmp_path / "real")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        monkeypatch.setattr(synthetic.os.path, "ismount", lambda path: Path(path) == target)
    monkeypatch.setattr(synthetic, "write_video", None)  # would fail
    assert synthetic.main(["--write", str(target), "--count", "2"]) == 1
    assert f"{target} is not a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("flags, sentence", [
    ([], "the following arguments are required: --write"),
    (["--write"], "argument --write: expected one argument"),
    (["--write", "out", "--count", "0"], "argument --count: 0 is not from 1 to 1000000000"),
    (["--write", "out", "--count", "9" * 20], "is not from 1 to 1000000000"),
    (["--write", "out", "--size", "63"], "--size is 63, but the video format needs an even number"),
    (["--write", "out", "--size", "big"], "argument --size: invalid"),
    (["--write", "out", "--kind", "balls"], "invalid choice: 'balls'"),
    (["--write", "out", "--cuont", "3"], "unrecognized arguments: --cuont 3"),
])
def test_wrong_flags_give_one_sentence_and_write_nothing(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^2$"):
        synthetic.main(flags)
    assert sentence in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- files that commands share


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    synthetic.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    for place, name in ((Path, "write_bytes"), (synthetic.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
                synthetic.write_json(path, {"a": 2})
        assert synthetic.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"3", b"\xff", b"", b"[" * 100_000, b'{"a": 1} x'])
def test_a_damaged_json_file_is_one_sentence_and_a_missing_one_is_empty(tmp_path, content):
    path = tmp_path / "a.json"
    assert synthetic.read_json(path) == {}
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} is damaged; put the whole file back, or delete it$"):
        synthetic.read_json(path)


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path, exit_status):
    """However it ends; within one process it is let go at the end of the block."""
    def hold_and_die():
        with synthetic.locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    def try_it():
        with pytest.raises(ValueError, match=f"another process is at work on {tmp_path}"):
            with synthetic.locked(tmp_path):
                pass
    with synthetic.locked(tmp_path):
        assert exit_status(try_it) == 0
    assert exit_status(hold_and_die) == -signal.SIGKILL
    with synthetic.locked(tmp_path):
        pass
    assert synthetic.HELD == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, sentence, status", [
    (ValueError("it is wrong"), "it is wrong", 1),
    (OSError(errno.ENOSPC, "No space left on device", "last.pt"), "last.pt: No space left on device", 1),
    (MemoryError(), "there is too little memory; give a smaller --batch", 1),
    (torch.OutOfMemoryError("CUDA out of memory."), "there is too little memory; give a smaller --batch", 1),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "too little memory", 1),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "a loader process was killed", 1),
    (ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback\nValueError: line 3 is odd"),
     "line 3 is odd", 1),
    (KeyboardInterrupt(), "stopped", 130)])
def test_what_a_user_can_put_right_is_one_sentence(capsys, error, sentence, status):
    @synthetic.command("it.py", smaller="--batch")
    def main(arguments):
        raise error
    assert main([]) == status
    message, = capsys.readouterr().err.splitlines()
    assert message.startswith("it.py: ") and sentence in message


@pytest.mark.parametrize("error", [
    RuntimeError("shapes must match"), TypeError("a bug"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: shapes must match")])
def test_a_bug_keeps_its_traceback(error):
    @synthetic.command("it.py", smaller="--batch")
    def main(arguments):
        raise error
    with pytest.raises(type(error)):
        main([])
