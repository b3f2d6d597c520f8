"""data.py: the frames asked for are the frames that come; windows, crops, mixing, resuming; what is broken is named."""
import json
import math
import os
import pickle
import shutil
import socket
import struct
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
from data import Unreadable, read_image, read_video
from miniature import DIVES, SYNSETS, UCF_CLASSES, Pipe, number_of, picture, write_packed_avi, write_video


def numbers_in(path, chosen):
    """The numbers that the chosen frames of a file show."""
    return [number_of(frame) for frame in read_video(path, lambda count, rate: chosen).frames]


def size_of(path):
    """(frames, frames per second) of a file."""
    _, count, rate = read_video(path, lambda count, rate: [0])
    return count, rate


def windows(count, seed, draws=8):
    """Ascending frame numbers of every kind: all, one at either end, and windows anywhere, also past a repeated end."""
    rng = np.random.default_rng(seed)
    yield list(range(count))
    yield [0]
    yield [count - 1] * 3
    for _ in range(draws):
        start, step, frames = rng.integers(count), rng.integers(1, 4), rng.integers(1, 9)
        yield [min(start + step * i, count - 1) for i in range(frames)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def chi_square(counts, shares):
    expected = np.array(shares) * sum(counts)
    return ((np.array(counts) - expected) ** 2 / expected).sum()


# -------------------------------------------------------------------------------------------------------- decoding

B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}
CODECS = {
    "ucf.avi": ("mpeg4", (240, 320), 25, {"g": "12"}),
    "ssv2.webm": ("libvpx-vp9", (240, 320), 12, {"g": "20"}),
    "short_gop.mp4": ("libx264", (256, 340), 30, {"g": "12", **B_FRAMES}),
    "long_gop.mp4": ("libx264", (256, 340), 30, {"g": "250", **B_FRAMES}),
    "short_gop.mkv": ("libx264", (96, 128), 30, {"g": "12", **B_FRAMES}),
    "only_keys.mp4": ("libx264", (96, 128), 25, {"g": "1"}),
    "pairs.mkv": ("libx264", (96, 128), 25, {"g": "2", "bf": "1"}),
    "open_gop.mp4": ("libx264", (96, 128), 25, {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}),
    "no_clean_entry.mp4": ("libx264", (96, 128), 25, {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "out_of_order.avi": ("libx264", (96, 128), 25, {"g": "12", **B_FRAMES}),
    "b_frames.avi": ("mpeg4", (96, 128), 25, {"g": "12", "bf": "2"}),
    "raw.h264": ("libx264", (96, 128), 25, {"g": "12", **B_FRAMES}),
    "av1.mp4": ("libsvtav1", (96, 128), 25, {"g": "12", "preset": "12"}),
}


@pytest.mark.parametrize("name", CODECS)
def test_the_frames_asked_for_are_the_frames_that_come(tmp_path, name):
    codec, size, rate, options = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of av has no {codec}")
    write_video(tmp_path / name, 50, codec, size, rate, options=options)
    assert size_of(tmp_path / name) == (50, pytest.approx(rate, rel=1e-3))
    for chosen in windows(50, seed=len(name)):
        assert numbers_in(tmp_path / name, chosen) == chosen
    frames = read_video(tmp_path / name, lambda count, rate: [7]).frames
    assert frames.shape == (1, *size, 3) and frames.dtype == np.uint8


def test_packed_b_frames(tmp_path):
    write_packed_avi(tmp_path / "divx.avi", 41)
    assert size_of(tmp_path / "divx.avi") == (41, 25)
    for chosen in windows(41, seed=0):
        assert numbers_in(tmp_path / "divx.avi", chosen) == chosen


def test_skipping_unneeded_frames_changes_no_pixel(tmp_path):
    write_video(tmp_path / "b.mp4", 50, options={"g": "50", **B_FRAMES})
    with av.open(str(tmp_path / "b.mp4")) as container:
        every = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for chosen in windows(50, seed=3):
        assert (read_video(tmp_path / "b.mp4", lambda count, rate: chosen).frames == every[chosen]).all()


def test_nothing_outside_the_way_from_the_key_frame_is_decoded(tmp_path):
    """Every packet but the first and those from the window's key frame on is wiped out, and the window never notices."""
    path = tmp_path / "holes.mp4"
    write_video(path, 60, options={"g": "12", **B_FRAMES})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for i, (start, size) in enumerate(packets):
        if i and not 24 <= i < 36:
            content[start:start + size] = bytes(size)
    path.write_bytes(content)
    assert numbers_in(path, [26, 28, 30, 32]) == [26, 28, 30, 32]
    with pytest.raises(Unreadable):
        numbers_in(path, [22, 24])


@pytest.mark.parametrize("name, codec", [("vfr.mp4", "libx264"), ("vfr.webm", "libvpx-vp9")])
def test_variable_frame_rate(tmp_path, name, codec):
    """Frames are counted, not timed; the rate is their average."""
    times = np.cumsum(np.random.default_rng(0).integers(10, 200, 50)).tolist()  # nor does the first begin at zero
    write_video(tmp_path / name, 50, codec, times=times, options={"g": "12"})
    assert size_of(tmp_path / name) == (50, pytest.approx(49 / (times[-1] - times[0]) * 1000, rel=1e-3))
    for chosen in windows(50, seed=1):
        assert numbers_in(tmp_path / name, chosen) == chosen


@pytest.mark.parametrize("name, codec, settings", [
    ("live.webm", "libvpx-vp9", dict(format="webm", container={"live": "1"})),
    ("pipe.mkv", "libx264", dict(format="matroska")),
    ("pipe.avi", "mpeg4", dict(format="avi"))])
def test_containers_without_duration_index_or_frame_count(tmp_path, name, codec, settings):
    write_video(Pipe(tmp_path / name), 50, codec, options={"g": "12"}, **settings)
    with av.open(str(tmp_path / name)) as container:
        assert container.streams.video[0].frames != 50
    assert size_of(tmp_path / name) == (50, 25)
    for chosen in windows(50, seed=2):
        assert numbers_in(tmp_path / name, chosen) == chosen


@pytest.mark.parametrize("gop", ["12", "250"])
def test_frames_cut_away_by_an_edit_list_do_not_count(tmp_path, gop):
    path = tmp_path / "edited.mp4"
    write_video(path, 50, options={"g": gop, **B_FRAMES})
    content = bytearray(path.read_bytes())
    media_time = content.index(b"elst") + 16
    delay, = struct.unpack_from(">i", content, media_time)
    struct.pack_into(">i", content, media_time, delay + 10 * 512)  # ten frames of 1/25 s in ticks of 1/12800 s
    path.write_bytes(content)
    assert size_of(path)[0] == 40
    for chosen in windows(40, seed=4):
        assert numbers_in(path, chosen) == [i + 10 for i in chosen]


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotation_metadata_is_applied(tmp_path, quarters):
    write_video(tmp_path / "phone.mp4", 20, size=(96, 128), quarters=quarters)
    frames = read_video(tmp_path / "phone.mp4", lambda count, rate: [3, 11]).frames
    assert frames.shape[1:3] == ((128, 96) if quarters % 2 else (96, 128))
    assert [number_of(frame) for frame in frames] == [3, 11]


@pytest.mark.parametrize("name, codec", [("one.mp4", "libx264"), ("one.avi", "mpeg4"), ("one.webm", "libvpx-vp9")])
def test_a_single_frame_is_a_video(tmp_path, name, codec):
    write_video(tmp_path / name, 1, codec, first=77)
    source = data.Videos([tmp_path / name], None, 8, 32, fps=16)
    assert source.clip(0, generator(0)).shape == (3, 8, 32, 32)
    assert [number_of(frame) for frame in source.evaluation_clip(0).permute(1, 2, 3, 0)] == [77] * 8


def test_odd_sizes_odd_names_and_odd_metadata(tmp_path, monkeypatch):
    path = tmp_path / "été 你好, 1:2 #é%d.mp4"
    write_video(path, 10, "libx264", (97, 131), first=5)
    assert numbers_in(path, [2, 9]) == [7, 14]
    assert read_video(path, lambda count, rate: [0]).frames.shape == (1, 97, 131, 3)
    content = path.read_bytes()
    title = content.index(b"Lavf")  # the name of the writing program
    (tmp_path / "take:1.mp4").write_bytes(content[:title] + b"\xff\xfe\xfd\xfc" + content[title + 4:])
    monkeypatch.chdir(tmp_path)
    assert numbers_in("take:1.mp4", [2, 9]) == [7, 14]


def test_the_rate_of_a_video_that_tells_none():
    stream = SimpleNamespace(average_rate=None, time_base=Fraction(1, 1000))
    assert data.average_rate(stream, [40, 80, 240]) == 10
    assert data.average_rate(stream, [40]) == data.average_rate(stream, None) == 1


def test_a_playlist_does_not_reach_the_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\n"
                                            f"http://127.0.0.1:{server.getsockname()[1]}/a.ts\n#EXT-X-ENDLIST\n")
        with pytest.raises(Unreadable):
            read_video(tmp_path / "list.m3u8", lambda count, rate: [0])
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_truncated_videos_give_what_is_left(tmp_path):
    for name, codec in (("cut.avi", "mpeg4"), ("cut.webm", "libvpx-vp9"), ("cut.mkv", "libx264")):
        write_video(tmp_path / name, 50, codec, options={"g": "12", "bf": "0"})
        content = (tmp_path / name).read_bytes()
        for share in (0.6, 0.65, 0.7, 0.75):
            (tmp_path / name).write_bytes(content[:int(share * len(content))])
            count, _ = size_of(tmp_path / name)
            assert 1 < count < 50
            assert numbers_in(tmp_path / name, list(range(count))) == list(range(count))


@pytest.mark.parametrize("name, codec", [("damaged.mp4", "libx264"), ("damaged.avi", "mpeg4"),
                                         ("damaged.webm", "libvpx-vp9")])
def test_damaged_frames_never_pass_for_good_ones(tmp_path, name, codec):
    path = tmp_path / name
    write_video(path, 48, codec, (240, 320), options={"g": "12"})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    start, size = packets[17]
    content[start + size // 3:start + size] = np.random.default_rng(0).bytes(size - size // 3)
    path.write_bytes(content)
    for whole in ([0, 5, 10], [24, 30], [36, 47]):
        assert numbers_in(path, whole) == whole
    for spoilt in ([17], [10, 20], [22]):
        with pytest.raises(Unreadable, match=rf"{name}: (Invalid data|frame (17|20|22) of 48 cannot be decoded)"):
            numbers_in(path, spoilt)


def test_damage_in_a_video_that_is_read_from_its_start(tmp_path):
    path = tmp_path / "b.avi"
    write_video(path, 48, "mpeg4", (240, 320), options={"g": "12", "bf": "2"})
    with av.open(str(path)) as container:
        start, size = [(packet.pos, packet.size) for packet in container.demux(video=0)][24]
    content = bytearray(path.read_bytes())
    content[start + size // 3:start + size] = np.random.default_rng(0).bytes(size - size // 3)
    path.write_bytes(content)
    assert numbers_in(path, [0, 5, 10]) == [0, 5, 10]
    with pytest.raises(Unreadable, match="b.avi: frame 30 of 48 cannot be decoded"):
        numbers_in(path, [10, 30])


def broken_files(folder):
    """Files of every kind that hold no clip, and what is said of each."""
    write_video(folder / "whole.mp4", 30)
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(whole[:len(whole) // 2])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "text.avi").write_text("no video\n" * 100)
    (folder / "playlist.mkv").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n")
    (folder / "folder.mp4").mkdir()
    with av.open(str(folder / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with av.open(str(folder / "nothing.mkv"), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        output.start_encoding()
    return {"half.mp4": "nvalid data", "zero.mp4": "nvalid data", "garbage.mp4": "nvalid data",
            "text.avi": "nvalid data", "playlist.mkv": "", "folder.mp4": "directory", "sound.mp4": "no video",
            "nothing.mkv": "End of file", "missing.mp4": "No such file"}


def test_broken_files_are_named_with_the_reason(tmp_path, capfd):
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(Unreadable, match=f"{name}: .*{reason}") as error:
            read_video(tmp_path / name, lambda count, rate: [0])
        assert error.value.path == str(tmp_path / name) and error.value.reason and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_everything_but_videos_runs_without_av(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    Image.fromarray(picture(9, 60, 80)).save(tmp_path / "a.png")
    assert number_of(read_image(tmp_path / "a.png").frames[0]) == 9
    with pytest.raises(ImportError, match="av"):
        read_video(tmp_path / "a.mp4", lambda count, rate: [0])


@pytest.mark.filterwarnings("error")
def test_images_of_every_mode_become_rgb(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    grey = colours[..., 0]
    image = Image.fromarray(colours)
    palette = image.quantize(256)

    def read(name, picture, **settings):
        picture.save(tmp_path / name, **settings)
        frames, count, _ = read_image(tmp_path / name)
        assert frames.shape == (1, 5, 7, 3) and frames.dtype == np.uint8 and count == 1
        return frames[0]

    assert (read("rgb.png", image) == colours).all()
    assert (read("grey.png", Image.fromarray(grey)) == grey[..., None]).all()
    assert np.abs(read("grey.jpg", Image.fromarray(grey), quality=100) - grey[..., None].astype(int)).max() <= 3
    assert (read("deep.png", Image.fromarray(grey.astype(np.uint16) * 256 + 99)) == grey[..., None]).all()
    assert (read("alpha.png", Image.fromarray(np.dstack((colours, grey)))) == colours).all()
    assert (read("grey_alpha.png", Image.fromarray(np.dstack((grey, 255 - grey)), "LA")) == grey[..., None]).all()
    assert (read("palette.png", palette) == np.asarray(palette.convert("RGB"))).all()
    assert (read("see_through.png", palette, transparency=bytes(20)) == np.asarray(palette.convert("RGB"))).all()
    assert (read("black_white.png", Image.fromarray(grey > 128)) == 255 * (grey > 128)[..., None]).all()
    flat = Image.new("CMYK", (7, 5), (0, 255, 255, 0))  # pure red in ink
    assert np.abs(read("cmyk.jpg", flat, quality=100).astype(int) - [255, 0, 0]).max() <= 3


def test_broken_images_are_named(tmp_path):
    Image.fromarray(picture(0, 200, 200)).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2000])
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.JPEG").write_text("no image")
    for name in ("cut.jpg", "zero.png", "text.JPEG", "missing.png"):
        with pytest.raises(Unreadable, match=name):
            read_image(tmp_path / name)


# --------------------------------------------------------------------------------------------- windows, transforms


def linspace_floor(start, stop, count):
    """floor(linspace(start, stop, count)) in exact fractions."""
    return [math.floor(Fraction(start) + Fraction(stop - start) * i / (count - 1)) if count > 1 else start
            for i in range(count)]


def test_windows_follow_the_rule_of_the_method():
    for frames, step in [(16, 2), (16, 1), (8, 5), (7, 3), (2, 4), (1, 3)]:
        for n in range(1, 3 * frames * step):
            chosen = data.window(n, frames, step, generator(n))
            assert len(chosen) == frames
            if n > frames * step:
                start = chosen[0]
                expected = [min(i, start + frames * step - 1)
                            for i in linspace_floor(start, start + frames * step, frames)]
            else:
                expected = [min(i, n - 1) for i in linspace_floor(0, n, n // step)]
                while len(expected) < frames:
                    expected.append(n - 1)
            assert chosen == expected and 0 <= min(chosen) and max(chosen) <= n - 1 and chosen == sorted(chosen)


def test_windows_start_anywhere_with_equal_probability():
    counts = Counter(data.window(41, 16, 2, generator(seed))[0] for seed in range(3000))
    assert sorted(counts) == list(range(10))
    assert chi_square([counts[i] for i in range(10)], [0.1] * 10) < 27.9  # 0.1 % of fair draws lie above


def test_evaluation_windows():
    assert data.evaluation_window(31, 16) == list(range(0, 31, 2))
    assert data.evaluation_window(16, 16) == list(range(16))
    assert data.evaluation_window(3, 6) == [0, 1, 2, 2, 2, 2]
    for n in range(16, 300, 7):
        assert data.evaluation_window(n, 16) == linspace_floor(0, n - 1, 16)


def test_frame_step_for_16_fps():
    rates = {1: 1, 12: 1, 24: 1, 25: 1, 29.97: 1, 30: 1, 31.01: 2, 32: 2, 47.95: 3, 59.94: 3, 60: 3, 240: 15}
    assert {rate: data.fps_step(rate, 16) for rate in rates} == rates


def test_sources_space_frames_by_step_or_by_rate(tmp_path):
    write_video(tmp_path / "fast.mp4", 100, rate=50)
    seen = {}
    for name, spacing in (("step", dict(step=3)), ("fps", dict(fps=16))):
        source = data.Videos([tmp_path / "fast.mp4"], None, 4, 32, **spacing)
        source.transform = torch.nn.Identity()
        seen[name] = [number_of(frame) for frame in source.clip(0, generator(1)).permute(1, 2, 3, 0)]
    assert seen["step"] == seen["fps"] == data.window(100, 4, 3, generator(1))


class Landscape(data.Images):
    """An image whose first two colours are its coordinates, which shows what a crop took."""

    def read(self, path, choose):
        y, x = np.mgrid[:100, :200]
        return torch.from_numpy(np.stack((y, x, np.zeros_like(x))).astype(np.uint8))[None]


def test_blobs_are_evaluated_on_their_first_frames():
    source = data.BlobVideos(0, 8, 80, step=2, count=20)
    assert len(source) == len(source.labels) == 20 and source.where(3) == ("blobs", "3")
    video, label = source.blobs.video(3)
    expected = F.interpolate(video[:, :8].float().transpose(0, 1), (80, 80), mode="bilinear", antialias=True)
    assert (source.evaluation_clip(3) - expected.transpose(0, 1)).abs().max() < 1.6 and source.labels[3] == label
    source.transform = torch.nn.Identity()
    chosen = data.window(32, 8, 2, generator(9))
    assert torch.equal(source.clip(3, generator(9)), video[:, chosen])


def test_training_crops_follow_their_law():
    source = Landscape(["x"], None, 4, 40)
    before = torch.get_rng_state()
    areas, flips, draws = [], 0, 300
    for seed in range(draws):
        clip = source.clip(0, generator(seed)).float()
        assert (clip == clip[:, :1]).all()  # every frame is cut alike
        rows, columns = clip[0, 0, :, 20], clip[1, 0, 20]
        flips += (columns[0] > columns[-1]).item()
        height, width = (rows[-1] - rows[0]) * 40 / 39, (columns[-1] - columns[0]).abs() * 40 / 39
        assert 0.7 < width / height < 1.42  # 0.75 to 1.35, but for rounding
        areas.append((height * width / 20000).item())
    assert 0.29 < min(areas) < 0.35 and 0.6 < max(areas) < 0.72  # a 200x100 image holds no larger one of such a ratio
    assert 120 < flips < 180
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(source.clip(0, generator(5)), source.clip(0, generator(5)))
    assert not torch.equal(source.clip(0, generator(5)), source.clip(0, generator(6)))


@pytest.mark.parametrize("kind, mode", [(data.Images, "bicubic"), (data.Videos, "bilinear")])
def test_evaluation_resizes_the_short_side_and_cuts_the_centre(tmp_path, kind, mode):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 90, 131))).float()
    noise = F.avg_pool2d(noise, 5, 1, 2).round()

    class Noise(kind):
        def read(self, path, choose):
            return noise.to(torch.uint8)

    clip = Noise(["x"], None, 2, 48).evaluation_clip(0)
    resized = F.interpolate(noise, (48, 48 * 131 // 90), mode=mode, antialias=True)
    left = round((resized.shape[-1] - 48) / 2)
    assert clip.shape == (3, 2, 48, 48) and torch.equal(clip[:, 0], clip[:, 1])
    assert (clip[:, 0] - resized[0, :, :, left:left + 48].clamp(0, 255)).abs().max() < 1.6


def test_normalise():
    clips = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 8, 8).repeat(2, 3, 1, 1, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    result = data.normalise(clips)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (clips / 255 - mean) / std)


# ------------------------------------------------------------------------------------------------ sources, batches


class Numbers(data.Videos):
    """Clips without files: all pixels hold the item's number; items in `bad` cannot be read."""

    def __init__(self, count, name="numbers", bad=()):
        super().__init__([f"{name}/{i}" for i in range(count)], list(range(count)), 2, 4, name=name)
        self.bad = set(bad)

    def clip(self, item, generator):
        if item in self.bad:
            raise Unreadable(self.paths[item], "it is bad")
        noise = torch.randint(256, (2, 2, 4, 4), generator=generator, dtype=torch.uint8)
        return torch.cat((torch.full((1, 2, 4, 4), item, dtype=torch.uint8), noise))


def draw_masks(clips, generator, sizes=None):
    size = 5 if sizes is None else torch.randint(1000, (), generator=sizes).item()
    return torch.randint(1000, (len(clips), size), generator=generator)


def test_an_epoch_holds_every_item_once():
    order = Numbers(10).order(35, generator(0))
    assert len(order) == 35
    for epoch in order[:30].view(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()


def test_the_mixture_is_drawn_by_weight_with_replacement():
    mixture = data.Mixture([Numbers(7, "a"), Numbers(50, "b"), Numbers(3, "c")], (0.2, 0.6, 0.2))
    assert len(mixture) == 60
    order = mixture.order(30_000, generator(0)).tolist()
    counts = Counter(mixture.where(item)[0] for item in order)
    assert chi_square([counts[name] for name in "abc"], [0.2, 0.6, 0.2]) < 13.8  # 0.1 % of fair draws lie above
    items = Counter(order)
    assert chi_square([items[i] for i in range(60)], [0.2 / 7] * 7 + [0.6 / 50] * 50 + [0.2 / 3] * 3) < 98.3
    assert mixture.where(6) == ("a", "a/6") and mixture.where(7) == ("b", "b/0") and mixture.where(59) == ("c", "c/2")
    assert mixture.clip(57, generator(0))[0, 0, 0, 0] == 0
    for seed in range(20):
        assert mixture.where(mixture.another(58, generator(seed)))[0] == "c"


def test_a_batch_depends_on_seed_and_step_alone():
    def make(seed=1, **ranks):
        return data.Batches(Numbers(20), 4, 6, seed, draw_masks, **ranks)

    first = [make()[step] for step in range(6)]
    later = list(data.loader(make(), start=3, workers=2))  # as a resumed run asks, of other processes
    assert len(later) == 3
    for (clips, masks, _), (clips_again, masks_again, broken) in zip(first[3:], later):
        assert torch.equal(clips, clips_again) and torch.equal(masks, masks_again) and broken == []
    assert len({clips[:, 1:].sum().item() for clips, _, _ in first}) == 6
    assert not torch.equal(make(seed=2)[0][0], first[0][0]) and not torch.equal(first[0][1], first[1][1])
    for step in range(6):
        halves = [make(rank=rank, ranks=2)[step] for rank in range(2)]
        assert torch.equal(torch.cat([clips for clips, _, _ in halves]), first[step][0])
        assert halves[0][1].shape == halves[1][1].shape and not torch.equal(halves[0][1], halves[1][1])
    assert len({make(ranks=2)[step][1].shape for step in range(6)}) == 6  # sizes are drawn anew at every step


def test_batches_can_be_sent_to_a_process(tmp_path):
    batches = data.Batches(data.Videos(["a.mp4"] * 4, None, 8, 32, fps=16), 2, 3, 0, draw_masks)
    assert torch.equal(pickle.loads(pickle.dumps(batches)).items, batches.items)


def test_the_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    assert len(list(data.loader(data.Batches(Numbers(8), 2, 4, 0, draw_masks)))) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_a_source_may_give_whole_batches():
    class Generated:
        def __len__(self):
            return 100

        def order(self, count, generator):
            return torch.arange(count)

        def clips(self, items):
            return items.to(torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4)

    batches = data.Batches(Generated(), 6, 5, 0, draw_masks, rank=1, ranks=2)
    clips, _, broken = batches[2]
    assert clips[:, 0, 0, 0, 0].tolist() == [15, 16, 17] and broken == []


def test_unreadable_items_are_replaced_by_others_of_their_dataset_and_counted(tmp_path):
    mixture = data.Mixture([Numbers(10, "a", bad=range(9)), Numbers(10, "b")], (0.5, 0.5))
    batches = data.Batches(mixture, 5, 20, 0, draw_masks)
    count = data.Broken()
    assert count.share == 0 and str(count) == "none"
    bad = 0
    for step in range(20):
        clips, _, broken = batches[step]
        assert len(clips) == 5
        items = [mixture.where(item)[0] for item in batches.items[step].tolist()]
        assert [name for name, first in zip(items, clips[:, 0, 0, 0, 0].tolist()) if name == "a" and first != 9] == []
        assert all(name == "a" and path.startswith("a/") and reason == "it is bad" for name, path, reason in broken)
        bad += len(broken)
        count.add(broken, len(clips))
    assert bad > 50 and count.counts == {"a": bad} and count.share == bad / (bad + 100)
    assert str(count) == f"{bad:,} of a"
    count.write(tmp_path, first=4)
    lines = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert len(lines) == 4 and all(line.startswith("a\ta/") and line.endswith("\tit is bad") for line in lines)
    resumed = data.Broken()  # the run goes on in another process, and nothing is lost
    resumed.add([("b", "b/7", "cut short"), *broken], 5)
    resumed.write(tmp_path, first=5)
    assert (tmp_path / "unreadable.txt").read_text().splitlines() == [*lines, "b\tb/7\tcut short"]


def test_a_name_that_is_no_text_is_written_byte_for_byte_and_once(tmp_path):
    broken = data.Broken()
    broken.add([("own", os.fsdecode(b"caf\xe9.mp4"), "cut short")], 1)
    broken.write(tmp_path)
    broken.write(tmp_path)
    assert (tmp_path / "unreadable.txt").read_bytes() == b"own\tcaf\xe9.mp4\tcut short\n"


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="a batch of 11 is larger than the data, 10 clips"):
        data.Batches(Numbers(10), 11, 1, 0, draw_masks)
    with pytest.raises(ValueError, match="5 does not divide among 2 ranks"):
        data.Batches(Numbers(10), 5, 1, 0, draw_masks, ranks=2)
    with pytest.raises(ValueError, match="100 files of numbers in a row cannot be read, the last is numbers/"):
        data.Batches(Numbers(10, bad=range(10)), 2, 1, 0, draw_masks)[0]


# ------------------------------------------------------------------------------------------------------ one's own


def test_lists_of_ones_own(tmp_path):
    (tmp_path / "in side").mkdir()
    names = ["a.mp4", "in side/b c 7.webm", "d, e.mp4", "ü 你.AVI"]
    for name in names:
        (tmp_path / name).touch()
    paths = [tmp_path / name for name in names]
    file = tmp_path / "videos.csv"
    for separator in (" ", ",", "\t", " , ", ";"):
        file.write_text("\n".join(f"{name}{separator}{i}" for i, name in enumerate(names)) + "\n\n", encoding="utf-8")
        assert data.own_videos(file) == (paths, [0, 1, 2, 3])
    file.write_text("\ufeff" + "\r\n".join(names), encoding="utf-8")
    assert data.own_videos(file) == (paths, None)
    file.write_text(f'"d, e.mp4",12\n{tmp_path / "a.mp4"} 3\n', encoding="utf-8")
    assert data.own_videos(file) == ([tmp_path / "d, e.mp4", tmp_path / "a.mp4"], [12, 3])


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "x" / "y z").mkdir(parents=True)
    for name in ("b.mp4", "x/a.AVI", "x/y z/ö.webm", "x/y z/c.mkv", "notes.txt", "x/d.mp4.part"):
        (tmp_path / name).touch()
    paths, labels = data.own_videos(tmp_path)
    assert paths == [tmp_path / name for name in ("b.mp4", "x/a.AVI", "x/y z/c.mkv", "x/y z/ö.webm")]
    assert labels is None


@pytest.mark.parametrize("content, message", [
    ("a.mp4 1\nb.mp4\n", "line 2 of .* has no label, unlike the lines before it: b.mp4"),
    ("a.mp4\n\nb.mp4 1\n", "line 3 of .* has a label"),
    ("path,label\na.mp4,1\n", "line 1 of .* is neither `path` nor `path label`: path,label"),
    ("a.mp4 1\nb.mp4 dog\n", "line 2 of .* is neither"),
    ("a.mp4 1 x\n", "line 1 of .* is neither"),
    ("a.mp4 -1\n", "line 1 of .* is neither"),
    ("", "lists no video that exists"),
    ("gone.mp4 1\n", "lists no video that exists; the first is looked for at .*gone.mp4"),
    (b"\xff\xfe\x00\x81", "not a text file"),
    (None, "videos.csv does not exist; it should be a list of videos, or a folder of them")])
def test_lists_that_make_no_sense(tmp_path, content, message):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    file = tmp_path / "videos.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.own_videos(file)
    assert "\n" not in str(error.value)


def test_a_folder_without_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no video \(.mp4, .avi, .webm, .mkv\) lies in or below"):
        data.own_videos(tmp_path)


# ------------------------------------------------------------------------------------------------ the four datasets


@pytest.fixture
def copy(miniature, tmp_path):
    """The miniature with links for its files, to be taken apart."""
    return Path(shutil.copytree(miniature, tmp_path / "root", copy_function=os.link))


@pytest.mark.parametrize("name", data.DATASETS)
def test_the_datasets_are_read_as_published(miniature, name):
    classes = {"ucf101": UCF_CLASSES, "imagenet100": SYNSETS, "diving48": [" ".join(words) for words in DIVES],
               "ssv2": ["Holding something", "Pushing something from left to right", "Turning something upside down"]}
    files = data.DATASETS[name].read(miniature)
    assert files.classes == classes[name]
    assert files.train.labels == [0, 0, 1, 1, 2, 2] and files.test.labels == [0, 1, 2]
    for split in ("train", "test"):
        source = data.open_dataset(name, miniature, split, 16, 112, step=2)
        assert len(source) == len(source.labels) == len(getattr(files, split).paths)
        shown = []
        for item in range(len(source)):
            assert source.clip(item, generator(item)).shape == (3, 16, 112, 112)
            numbers = [number_of(frame) for frame in source.evaluation_clip(item).permute(1, 2, 3, 0)]
            still = name == "imagenet100"
            assert [i - numbers[0] for i in numbers] == [0 if still else i * 35 // 15 for i in range(16)]
            shown.append(numbers[0])
        assert len(set(shown)) == len(shown)


def test_each_dataset_may_lie_in_a_folder_of_its_own(copy):
    for folder, names in {"ucf": ["UCF-101", "ucfTrainTestlist"], "imagenet 100": ["train", "val"],
                          "sth": ["20bn-something-something-v2", "labels"],
                          "dives": ["rgb", "Diving48_V2_train.json", "Diving48_V2_test.json"]}.items():
        (copy / "labels").mkdir(exist_ok=True)
        for name in ("labels.json", "train.json", "validation.json"):  # SSv2's newer layout
            if (copy / name).exists():
                (copy / name).rename(copy / "labels" / name)
        (copy / folder).mkdir()
        for name in names:
            (copy / name).rename(copy / folder / name)
    (copy / "imagenet 100" / "val").rename(copy / "imagenet 100" / "validation")
    assert all(len(dataset.read(copy).train.paths) == 6 for dataset in data.DATASETS.values())
    assert data.diving48(copy).classes == [str(i) for i in range(48)]  # without the vocabulary


@pytest.mark.parametrize("name, piece, publisher", [
    ("ucf101", "UCF-101", "CRCV"), ("ucf101", "ucfTrainTestlist/classInd.txt", "CRCV"),
    ("ucf101", "ucfTrainTestlist/trainlist01.txt", "CRCV"), ("ucf101", "ucfTrainTestlist/testlist01.txt", "CRCV"),
    ("ssv2", "20bn-something-something-v2", "Qualcomm"), ("ssv2", "labels.json", "Qualcomm"),
    ("ssv2", "train.json", "Qualcomm"), ("ssv2", "validation.json", "Qualcomm"),
    ("imagenet100", "train", "image-net.org"), ("imagenet100", "val", "image-net.org"),
    ("diving48", "rgb", "UCSD"), ("diving48", "Diving48_V2_train.json", "UCSD"),
    ("diving48", "Diving48_V2_test.json", "UCSD")])
def test_a_missing_piece_is_named_with_what_it_holds_and_who_offers_it(copy, name, piece, publisher):
    shutil.rmtree(copy / piece) if (copy / piece).is_dir() else (copy / piece).unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.DATASETS[name].read(copy)
    message = str(error.value)
    assert f"{copy / piece} is missing; it should hold " in message and publisher in message and "\n" not in message


def test_two_folders_that_could_be_the_dataset_are_not_chosen_between(copy):
    for folder in ("coco", "imagenet"):
        shutil.copytree(copy / "train", copy / folder / "train")
    assert str(data.imagenet100(copy).train.paths[0]).startswith(str(copy / "train"))  # the root itself comes first
    shutil.rmtree(copy / "train")
    with pytest.raises(ValueError, match="both .*coco and .*imagenet hold train; give the folder of one"):
        data.imagenet100(copy)


@pytest.mark.parametrize("name, piece, content, message", [
    ("ucf101", "ucfTrainTestlist/classInd.txt", "ApplyEyeMakeup\n", "entry 1 of .*classInd.txt"),
    ("ucf101", "ucfTrainTestlist/trainlist01.txt", "Golf/v_Golf_g01_c01.avi 4\n", "entry 1 of .*trainlist01.txt"),
    ("ssv2", "train.json", "[{'id'", "train.json is no valid JSON"),
    ("ssv2", "validation.json", '[{"id": "1", "template": "Eating [something]"}]', "entry 1 of .*validation.json"),
    ("ssv2", "labels.json", "3", "labels.json is not as its publisher writes it"),
    ("ucf101", "ucfTrainTestlist/testlist01.txt", "\n", "testlist01.txt lists nothing"),
    ("diving48", "Diving48_V2_test.json", "[]", "Diving48_V2_test.json lists nothing"),
    ("diving48", "Diving48_V2_test.json", '[{"label": 1}]', "entry 1 of .*Diving48_V2_test.json"),
    ("diving48", "Diving48_V2_train.json", '[{"vid_name": "a", "label": 48}]', "entry 1 of .*Diving48_V2_train.json")])
def test_lists_unlike_their_publishers(copy, name, piece, content, message):
    (copy / piece).unlink()
    (copy / piece).write_text(content)
    with pytest.raises(ValueError, match=message):
        data.DATASETS[name].read(copy)


def test_imagenet_splits_must_agree_on_the_classes(copy):
    (copy / "val" / SYNSETS[0]).rename(copy / "val" / "n09999999")
    with pytest.raises(ValueError, match="should hold the same classes; only one has n0"):
        data.imagenet100(copy)


def test_the_mixed_regime_runs_over_a_broken_file(copy):
    (copy / "20bn-something-something-v2" / "0.webm").unlink()
    batches = data.Batches(data.open_mixed(copy, 16, 32, step=2), 8, 3, 0, draw_masks)
    broken = []
    for clips, _, more in data.loader(batches, workers=1):
        assert clips.shape == (8, 3, 16, 32, 32) and clips.dtype == torch.uint8
        broken += more
    assert broken and {(name, Path(path).name, reason) for name, path, reason in broken} == {
        ("ssv2", "0.webm", "No such file or directory")}


# ---------------------------------------------------------------------------------------------- python data.py --check


def test_check_as_a_user_runs_it(miniature, capsys):
    assert data.main(["--check", str(miniature), "--workers", "1"]) == 0
    output, errors = capsys.readouterr()
    for line in ("UCF-101, split 1: 3 classes",
                 "  train: 6 of 9,537 published clips", "  test: 3 of 3,783 published clips",
                 "  train: 6 of 168,913 published clips", "  test: 3 of 24,777 published clips",
                 "  train: 6 of 126,689 published clips", "  test: 3 of 5,000 published clips",
                 "  train: 6 of 15,027 published clips", "  test: 3 of 1,970 published clips",
                 "    height: 240 to 240", "    frames per second: 12 to 12", "    unreadable: 0"):
        assert line in output.splitlines()
    assert output.endswith(f"Train with: python train.py --preset mixed --root '{miniature}'\n")
    assert "file/s" in errors and "Traceback" not in errors


def test_check_of_a_folder_that_is_not_there(tmp_path, capsys):
    assert data.main(["--check", str(tmp_path / "missing")]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"data.py: {tmp_path}/missing is no folder") and message.count("\n") == 1
    assert data.main(["--check", str(tmp_path), "--workers", "0"]) == 1
    assert capsys.readouterr().err == "data.py: argument --workers: 0 is less than 1\n"


def test_ctrl_c_ends_a_check_with_a_word(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "inspect", interrupted)
    write_video(tmp_path / "a.mp4", 10)
    assert data.main(["--check", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "data.py: stopped\n"


def test_check_names_what_cannot_be_read(copy, capsys):
    shutil.rmtree(copy / "train")
    broken = copy / "UCF-101" / "YoYo" / "v_YoYo_g08_c02.avi"
    broken.unlink()
    broken.write_bytes(b"RIFF")
    data.check(copy, workers=0)
    output = capsys.readouterr().out
    assert f"    unreadable: 1\n      {broken}: Invalid data" in output
    assert "More than 5% of the training clips cannot be read" in output
    assert "ImageNet-100: not here." in output
    assert output.endswith(f"Train with: python train.py --data {copy}\n")
    for folder in ("20bn-something-something-v2", "rgb"):
        shutil.rmtree(copy / folder)
    with pytest.raises(ValueError, match="more than 5% of the videos"):  # one of nine, UCF-101's
        data.check(copy, workers=0)
    capsys.readouterr()
    broken.unlink()
    os.link(copy / "UCF-101" / "YoYo" / "v_YoYo_g08_c01.avi", broken)
    data.check(copy, workers=0)
    assert capsys.readouterr().out.endswith(f"Train with: python train.py --preset ucf101 --root {copy}\n")


def test_up_to_a_twentieth_may_be_unreadable(tmp_path, capsys):
    paths = [tmp_path / f"{i}.png" for i in range(21)]
    for path in paths[:19]:
        Image.fromarray(picture(0, 40, 40)).save(path)
    assert data.inspect("images", paths[:20], data.Images, workers=0)
    assert not data.inspect("images", paths, data.Images, workers=0)
    assert f"    unreadable: 2\n      {paths[19]}: No such file" in capsys.readouterr().out


def test_check_reads_the_videos_beside_whole_datasets_that_no_preset_takes(copy, capsys):
    for folder in ("UCF-101", "20bn-something-something-v2", "rgb"):
        shutil.rmtree(copy / folder)
    (copy / "mine.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="more than 5% of the videos"):
        data.check(copy, workers=0)
    assert "ImageNet-100: 3 classes" in capsys.readouterr().out


def test_check_of_videos_of_ones_own(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", 10)
    data.check(tmp_path, workers=0)
    output = capsys.readouterr().out
    assert output.count(" is missing; it should hold ") == 4
    assert output.endswith(f"Train with: python train.py --data {tmp_path}\n")
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        data.check(tmp_path, workers=0)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="no video"):
        data.check(tmp_path, workers=0)
