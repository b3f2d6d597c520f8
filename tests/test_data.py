"""data.py: the frames asked for are the frames that come; windows, crops, mixing, resuming; what is
broken is named."""

import csv
import errno
import math
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch.nn import functional as F

import data
import model
from data import Unreadable, locked, read_image, read_video
from miniature import (DIVES, SYNSETS, UCF_CLASSES, Pipe, cut_away, number_of, picture,
                       write_packed_avi, write_video)
from synthetic import Blobs, Shapes


def numbers_in(path, chosen):
    """The numbers that the chosen frames of a file show."""
    return [number_of(frame) for frame in read_video(path, lambda count, rate: chosen).frames]


def size_of(path):
    """(frames, frames per second) of a file."""
    _, count, rate = read_video(path, lambda count, rate: [count - 1])
    return count, rate


def every_frame(path, numbers):
    """All frames of a file, which must show these numbers; and any read alone or in a window must
    be the same."""
    frames, count, _ = read_video(path, lambda count, rate: range(count))
    assert [number_of(frame) for frame in frames] == list(numbers) and count == len(numbers)
    rng = np.random.default_rng(count)
    windows = [[i] for i in range(count)] + [[count - 1] * 3] + [
        [min(start + step * i, count - 1) for i in range(length)]
        for start, step, length in rng.integers((0, 1, 2), (count, 4, 9), (8, 3))]
    for chosen in windows:
        assert (read_video(path, lambda count, rate: chosen).frames == frames[chosen]).all()
    return frames


def generator(seed):
    return torch.Generator().manual_seed(seed)


def chi_square(counts, shares):
    expected = np.array(shares) * sum(counts)
    return ((np.array(counts) - expected) ** 2 / expected).sum()


# ----------------------------------------------------------------------------------------- decoding

G12, VP9 = {"g": "12"}, "libvpx-vp9"
B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}
OPEN_GOP = "keyint=12:min-keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"
COUNT = 30
TIMES = np.cumsum(np.random.default_rng(0).integers(10, 200, COUNT)).tolist()
OF_SUFFIX = {
    ".mov": "mpeg4",
    ".3gp": "h263",
    ".3g2": "h263",
    ".webm": "libvpx",
    ".avi": "msmpeg4",
    ".mpg": "mpeg2video",
    ".mpeg": "mpeg1video",
    ".vob": "mpeg2video",
    ".ogv": "libvpx",
    ".flv": "flv",
    ".wmv": "wmv2",
    ".asf": "msmpeg4",
}
KINDS = {  # of videos, as `write_video` writes them
    "ucf.avi": dict(codec="mpeg4", size=(120, 160), options=G12),
    "ssv2.webm": dict(codec=VP9, size=(120, 160), rate=12, options={"g": "20"}),
    "short_gop.mp4": dict(size=(128, 170), rate=30, options={**G12, **B_FRAMES}),
    "long_gop.mp4": dict(size=(128, 170), rate=30, options={"g": "250", **B_FRAMES}),
    "only_keys.mp4": dict(options={"g": "1"}),
    "pairs.mkv": dict(options={"g": "2", "bf": "1"}),
    "open_gop.mp4": dict(options={"x264-params": OPEN_GOP}),
    "no_clean_entry.mp4": dict(options={"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "out_of_order.avi": dict(options={**G12, **B_FRAMES}),
    "b_frames.avi": dict(codec="mpeg4", options={**G12, "bf": "2"}),
    "av1.mp4": dict(codec="libsvtav1", options={**G12, "preset": "12"}),
    "één, 1:2 #é%d 你好.mp4": dict(size=(97, 131)),
    **{f"turned{quarters}.mp4": dict(quarters=quarters) for quarters in (1, 2, 3)},
    "one.mp4": dict(frames=1),
    "one.avi": dict(frames=1, codec="mpeg4"),
    "one.webm": dict(frames=1, codec=VP9),
    "vfr.mp4": dict(times=TIMES, options=G12),  # frames are counted, not timed
    "vfr.webm": dict(codec=VP9, times=TIMES, options=G12),
    "live.webm": dict(codec=VP9, options=G12, format="webm", container={"live": "1"}),
    "pipe.mkv": dict(
        options=G12, format="matroska"
    ),  # like those beside it, it tells no number of frames
    "pipe.avi": dict(codec="mpeg4", options=G12, format="avi"),
    **{
        f"any{suffix}": dict(codec=OF_SUFFIX.get(suffix, "libx264"), size=(144, 176), options=G12)
        for suffix in data.VIDEOS
    },
}


@pytest.mark.parametrize("name, how", KINDS.items(), ids=KINDS)
def test_the_frames_asked_for_are_the_frames_that_come(tmp_path, name, how):
    path = tmp_path / name
    how = {"frames": COUNT, **how}
    count, size, turns = how["frames"], how.get("size", (96, 128)), how.get("quarters", 0)
    write_video(Pipe(path) if "format" in how else path, **how)
    rate = 1000 / np.median(np.diff(TIMES)) if "times" in how else how.get("rate", 25)
    assert size_of(path) == (count, pytest.approx(rate, rel=0.1 if "times" in how else 1e-3))
    frames = every_frame(path, range(count))
    assert (
        frames.shape[1:] == (*(size[::-1] if turns % 2 else size), 3) and frames.dtype == np.uint8
    )
    with av.open(str(path)) as container:
        assert "format" not in how or container.streams.video[0].frames != count
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (frames == [np.rot90(frame, -turns) for frame in decoded]).all()


def spoil(path, chosen):
    """Write noise over the packets for which chosen(number, key frame or not) is true, but for
    their first third."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for i, packet in enumerate(container.demux(video=0)):
            if packet.size and chosen(i, packet.is_keyframe):
                start, end = packet.pos + packet.size // 3, packet.pos + packet.size
                content[start:end] = np.random.default_rng(0).bytes(end - start)
    path.write_bytes(content)


def copied(first=0, times=lambda packet: (packet.pts, packet.dts)):
    """Change a file to its packets from number `first` on, with the times that a function of the
    packet gives them."""
    def change(path):
        other = path.with_stem("other")
        with av.open(str(path)) as source, av.open(str(other), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in [packet for packet in source.demux(video=0) if packet.size][first:]:
                packet.stream, (packet.pts, packet.dts) = stream, times(packet)
                target.mux(packet)
        other.replace(path)
    return change


def edited(change):
    return lambda path: path.write_bytes(change(bytearray(path.read_bytes())))


def table(name, header, change):
    """Change one of an mp4's tables of numbers: its name, a header, how many there are, each; it
    may become shorter."""
    def changed(content):
        start = content.index(name) + 4 + header
        count, = struct.unpack_from(">i", content, start)
        numbers = change(struct.unpack_from(f">{count}i", content, start + 4))
        struct.pack_into(f">{len(numbers) + 1}i", content, start, len(numbers), *numbers)
        return content
    return edited(changed)


G16, MSMPEG4, EMPTY = (
    dict(options={"g": "16", **B_FRAMES}),
    dict(codec="msmpeg4", options=G12),
    (13, 20),
)
# Videos of 40 frames: how `write_video` writes them, what is changed then, which numbers their
# frames show.
WRONG = {
    # Frames have the times at which they are decoded; or times that two of them share; or the clock
    # starts again.
    "no_ctts.mp4": (G16, copied(times=lambda packet: [packet.dts + 1024] * 2), range(40)),
    "same_time.webm": (
        dict(codec=VP9),
        copied(times=lambda packet: [packet.pts - 40 * (packet.pts in (120, 320))] * 2),
        range(40),
    ),
    "clock_restarts.ts": (G16, edited(lambda content: 2 * content), [*range(40)] * 2),
    # It begins after its first key frame, or with B frames that need what is missing; or an edit
    # list cuts some away.
    **{
        f"no_key{suffix}": (G16, copied(first=13), range(16, 40))
        for suffix in (".mp4", ".mkv", ".ts")
    },
    "open_gop.mkv": (
        dict(codec="libx265", options={"x265-params": OPEN_GOP + ":log-level=none"}),
        copied(first=9),
        range(12, 40),
    ),
    "edited.mp4": (G16, lambda path: cut_away(path, 10), range(10, 40)),
    "edited_long_gop.mp4": (
        dict(options={"g": "250", **B_FRAMES}),
        lambda path: cut_away(path, 10),
        range(10, 40),
    ),
    # Its table of key frames leaves out the first; or it is cut short, and without an index calls
    # every frame one.
    "first_key_unnamed.mp4": (G16, table(b"stss", 4, lambda keys: keys[1:]), range(40)),
    **{
        f"cut{share}{suffix}": (
            how,
            edited(lambda content, share=share: content[: len(content) * share // 100]),
            None,
        )
        for share in (70, 75, 80, 90)
        for suffix, how in (
            (".avi", MSMPEG4),
            (".webm", dict(codec=VP9)),
            (".mkv", dict(options={**G12, "bf": "0"})),
        )
    },
    # A packet without bytes repeats the frame before. Here its bytes become the tail of that
    # frame's, and go unread.
    "empty_packets.mov": (
        dict(codec="msmpeg4", options={"g": "1"}),
        table(
            b"stsz",
            8,
            lambda sizes: [
                0 if i in EMPTY else sum(sizes[i : i + 1 + (i + 1 in EMPTY)]) for i in range(40)
            ],
        ),
        [i for i in range(40) if i not in EMPTY],
    ),
    "take:1.mp4": (
        G16,
        edited(lambda content: content.replace(b"Lavf", b"\xff\xfe\xfd\xfc")),
        range(40),
    ),  # no text
    "packed.avi": ({}, lambda path: write_packed_avi(path, 40), range(40)),
}  # two frames to a packet


@pytest.mark.parametrize("name", WRONG)
def test_containers_that_are_wrong_about_their_frames(tmp_path, monkeypatch, name):
    how, change, numbers = WRONG[name]
    write_video(tmp_path / name, 40, **how)
    change(tmp_path / name)
    monkeypatch.chdir(tmp_path)  # where a colon in a name could be taken for a protocol
    count, rate = size_of(name)
    every_frame(name, numbers or range(count))
    assert rate == pytest.approx(25, rel=0.06) and (
        count == len(numbers) if numbers else 1 < count < 40
    )


def moving(count, size=(48, 64)):
    """Pictures [H, W, 3] that all differ and that any codec can hold."""
    for i in range(count):
        frame = np.full((*size, 3), 30, np.uint8)
        frame[10:34, 2 * i:2 * i + 14] = 220
        yield frame


# Every codec that PyAV can write here with the pixels that it takes, and every container.
CODECS = {"libx264": "yuv420p", "libx265": "yuv420p", "mpeg4": "yuv420p", "mpeg2video": "yuv420p",
          "mpeg1video": "yuv420p", "msmpeg4": "yuv420p", "wmv2": "yuv420p", "flv": "yuv420p",
          "libvpx": "yuv420p", "libvpx-vp9": "yuv420p", "mjpeg": "yuvj420p", "cfhd": "yuv422p10le",
          "qtrle": "rgb24", "msvideo1": "rgb555le", "rpza": "rgb555le", "svq1": "yuv410p",
          "flashsv": "bgr24", "zmbv": "bgr0", "cinepak": "rgb24", "ffv1": "yuv420p",
          "prores": "yuv422p10le", "huffyuv": "rgb24", "png": "rgb24"}
CONTAINERS = (".mp4", ".mov", ".mkv", ".avi", ".ts", ".mpg", ".flv", ".wmv", ".webm", ".ogv")


def write_plainly(path, codec, pixels, count=14):
    """False where the container or the build does not take the codec."""
    try:
        with av.open(str(path), "w") as output:
            stream = output.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
            stream.codec_context.gop_size, stream.codec_context.thread_count = 5, 1
            if codec in ("libx264", "mpeg4", "mpeg2video"):
                stream.codec_context.max_b_frames = 2
            if codec == "libx265":
                stream.options = {"x265-params": "keyint=5:bframes=2:log-level=none:pools=1"}
            for frame in moving(count):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode(None))
    except (av.FFmpegError, ValueError):
        return False
    return True


def decoded_plainly(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_any_window_of_any_codec_is_what_plain_decoding_shows(tmp_path, suffix):
    """Nothing is refused, whether or not its decoder marks key frames or its container knows the
    order of frames."""
    written = 0
    for codec, pixels in CODECS.items():
        path = tmp_path / f"{codec}{suffix}"
        if path.name == "rpza.wmv" or not write_plainly(path, codec, pixels):
            continue  # of that one neither container nor decoder says where it may begin
        try:
            plain = decoded_plainly(path)
        except (av.FFmpegError, IndexError):
            continue  # written, but a player cannot read it either
        if not plain:
            continue
        written += 1
        frames, count, rate = read_video(path, lambda count, rate: range(count))
        assert count == len(plain) and (frames == plain).all(), path.name
        assert rate == pytest.approx(25, rel=0.02), path.name
        for chosen in [[i] for i in range(count)] + [[i, i + 2, i + 3] for i in range(count - 3)]:
            found = read_video(path, lambda count, rate: chosen).frames
            assert (found == frames[chosen]).all(), (path.name, chosen)
    assert written


def write_packed(path, count=43):
    """XviD's way with up to two B frames: of each group the first shares the packet of the frame
    that it needs, and a frame "not coded" ends the group."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=25,
                                   options={"g": "12", "bf": "2", "b_strategy": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.flags &= ~av.codec.context.Flags.global_header.value
        packets = [packet for frame in moving(count // 2) for packet in stream.encode(
            av.VideoFrame.from_ndarray(frame, format="rgb24"))] + stream.encode(None)
        mark, groups = b"\0\0\1\xb6", []
        for packet in packets:
            content, is_key = bytes(packet), packet.is_keyframe
            start = content.index(mark)
            if is_key:
                content = content[:start] + b"\0\0\1\xb2DivX503b1393p" + content[start:]
            if content[content.index(mark) + 4] >> 6 == 2:
                groups[-1].append((content, False))
            else:
                groups.append([(content, is_key)])
        written = []
        for (first, is_key), *others in groups:
            if not others:
                written.append((first, is_key))
                continue
            written += [(first + others[0][0], is_key), *others[1:],
                        (mark + bytes([0b01010000, 0b01001111]), False)]
        for i, (content, is_key) in enumerate(written):
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.is_keyframe, packet.pts, packet.dts = is_key, i, i
            output.mux(packet)


def write_not_coded(path):
    """MPEG-4 without B frames, where every fifth packet says that there is no frame."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=25, options={"g": "6"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        place = 0
        for frame in moving(20):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                contents = [(bytes(packet), packet.is_keyframe)]
                if place % 5 == 3:
                    contents.append((b"\0\0\1\xb6" + bytes([0b01010000, 0b01001111]), False))
                for content, is_key in contents:
                    packet = av.Packet(content)
                    packet.stream, packet.time_base = stream, Fraction(1, 25)
                    packet.is_keyframe, packet.pts, packet.dts = is_key, place, place
                    output.mux(packet)
                    place += 1


@pytest.mark.parametrize("write", [write_packed, write_not_coded])
def test_where_packets_are_not_frames_any_window_is_what_plain_decoding_shows(tmp_path, write):
    write(tmp_path / "a.avi")
    plain = decoded_plainly(tmp_path / "a.avi")
    assert len(plain) > 15
    for start in range(len(plain)):
        for chosen in ([start], [*range(start, len(plain))][:8:2], [*range(start, len(plain))][:8]):
            found = read_video(tmp_path / "a.avi", lambda count, rate: chosen)
            assert found.count == len(plain)
            assert (found.frames == [plain[i] for i in chosen]).all(), chosen


def test_a_window_is_decoded_from_a_key_frame_near_it(tmp_path, monkeypatch):
    """Wherever frames are looked up by time or number: at most two groups of frames are decoded."""
    decoded = Counter()

    def counted(*how, decode=data.decode):
        for frame in decode(*how):
            decoded["frames"] += 1
            yield frame
    monkeypatch.setattr(data, "decode", counted)
    kinds = {
        "a.mp4": G16,
        "a.ts": G16,
        "a.mkv": G16,
        "a.flv": G16,
        "a.mpg": dict(codec="mpeg2video", options={"g": "16", "bf": "2"}),
        "cut.mp4": G16,
        "b.avi": dict(codec="mpeg4", options={"g": "16", "bf": "2"}),
    }
    for name, how in kinds.items():
        path = tmp_path / name
        write_video(path, 160, size=(48, 64), **how)
        if name == "cut.mp4":
            cut_away(path, 10)
        numbers = numbers_in(path, [0])  # what is remembered of a file is remembered now
        for start in (17, 75, 120):
            decoded.clear()
            assert numbers_in(path, [start, start + 3]) == [
                numbers[0] + start,
                numbers[0] + start + 3,
            ]
            assert decoded["frames"] <= 36, (name, start)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_pause_does_not_change_the_rate(tmp_path, suffix):
    times = [40 * i + 5000 * (i > 20) for i in range(40)]
    write_video(tmp_path / f"a{suffix}", 40, dict([(".mp4", "libx264"), (".webm", VP9)])[suffix],
                times=times)
    assert size_of(tmp_path / f"a{suffix}") == (40, pytest.approx(25, rel=0.01))


def test_recordings_are_turned_and_mirrored_as_their_display_matrix_says(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, 3, size=(64, 96), options={"crf": "5"})
    content = path.read_bytes()
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    place = content.index(unit, content.index(b"tkhd"))
    stored = read_video(path, lambda count, rate: [1]).frames[0]
    for quarters in range(4):
        for mirrored in (False, True):
            for degrees in (-2, 0, 2):
                angle = math.radians(90 * quarters + degrees)
                a, b, c, d = math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
                if mirrored:
                    a, b = -a, -b
                matrix = [round(65536 * each) for each in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
                path.write_bytes(content[:place] + struct.pack(">9i", *matrix)
                                 + content[place + 36:])
                shown = read_video(path, lambda count, rate: [1]).frames[0]
                expected = stored[:, ::-1] if mirrored else stored
                assert (shown == np.rot90(expected, -quarters)).all(), (quarters, mirrored, degrees)


@pytest.mark.parametrize(
    "name, codec, muxer",
    [("a.hevc", "libx265", "hevc"), ("a.ivf", VP9, "ivf"), ("a.mxf", "mpeg2video", "mxf")],
)
def test_a_format_that_is_not_opened_is_named_as_such(tmp_path, name, codec, muxer):
    write_video(tmp_path / name, 5, codec, format=muxer)
    with pytest.raises(Unreadable, match=f"{name}: its format is none that is opened: mov, mat"):
        size_of(tmp_path / name)


def test_nothing_outside_the_way_from_the_key_frame_is_decoded(tmp_path):
    """All packets but the first and those from a window's key frame on are spoilt, and the window
    never notices."""
    path = tmp_path / "holes.mp4"
    write_video(path, 60, options={**G12, **B_FRAMES})
    spoil(path, lambda i, is_key: i and not 24 <= i < 36)
    assert numbers_in(path, [26, 28, 30, 32]) == [26, 28, 30, 32]
    with pytest.raises(Unreadable):
        numbers_in(path, [22, 24])


def test_a_list_of_other_files_is_followed_neither_to_the_network_nor_to_a_file_beside_it(tmp_path):
    write_video(tmp_path / "a.ts", 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\n{}a.ts\n#EXT-X-ENDLIST\n"
        for content in (hls.format(""), hls.format(f"http://127.0.0.1:{server.getsockname()[1]}/"),
                        "ffconcat version 1.0\nfile a.ts\n"):
            for name in ("list.m3u8", "list.mp4", "list.ts"):
                (tmp_path / name).write_text(content)
                with pytest.raises(Unreadable, match=name):
                    numbers_in(tmp_path / name, [0])
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_a_size_that_changes_and_a_file_that_changes(tmp_path):
    path = tmp_path / "grows.ts"
    for name, size in (("a.ts", (96, 128)), ("b.ts", (192, 256))):
        write_video(tmp_path / name, 20, size=size)
    small, large = ((tmp_path / name).read_bytes() for name in ("a.ts", "b.ts"))
    path.write_bytes(small + large)
    assert numbers_in(path, [5, 15]) == [5, 15] and numbers_in(path, [25, 30]) == [5, 10]
    with pytest.raises(Unreadable, match="grows.ts: all input arrays must have the same shape"):
        numbers_in(path, [5, 30])
    path.write_bytes(small + small + small)  # what was counted before no longer holds
    assert numbers_in(path, [5, 30]) == [5, 10] and size_of(path)[0] == 60


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.webm", VP9), ("b.avi", "mpeg4")]
)
def test_damaged_frames_never_pass_for_good_ones(tmp_path, name, codec):
    path, from_start = tmp_path / name, name == "b.avi"  # AVI knows no order of B frames
    write_video(path, 48, codec, (240, 320), options={**G12, **({"bf": "2"} if from_start else {})})
    spoil(path, lambda i, is_key: 20 < i < 30 and is_key if from_start else i == 17)
    for chosen in ([0, 5, 10], *([] if from_start else ([24, 30], [36, 47]))):
        assert numbers_in(path, chosen) == chosen
    for chosen in ([25], [10, 30]) if from_start else ([17], [10, 20], [22]):
        with pytest.raises(
            Unreadable, match=rf"{name}: (Invalid data|frame {chosen[-1]} of 48 cannot be decoded)"
        ):
            numbers_in(path, chosen)


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.wmv", "wmv2")]
)
def test_frames_that_build_on_a_damaged_first_one_never_pass_for_good_ones(tmp_path, name, codec):
    write_video(tmp_path / name, 48, codec, (240, 320), options=G12)
    spoil(tmp_path / name, lambda i, is_key: i == 0)
    shown = set()
    for chosen in ([0], [5], [11], [0, 6, 18], [20], [30]):
        try:
            shown.update(numbers_in(tmp_path / name, chosen))
        except Unreadable:
            continue
    assert shown and min(shown) >= 12


def write_song(path):
    """A second of silence with a cover, an attached picture."""
    with av.open(str(path), "w") as output:
        sound, cover = output.add_stream("aac", rate=16000, layout="mono"), output.add_stream(
            "png", rate=25
        )
        cover.width, cover.height, cover.pix_fmt = 128, 96, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        for i in range(16):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, 1024 * i
            output.mux(sound.encode(frame))
        output.mux(
            sound.encode(None) + cover.encode(av.VideoFrame.from_ndarray(picture(5, 96, 128)))
        )


def test_broken_files_are_named_with_the_reason(tmp_path, capfd, monkeypatch, exit_status):
    write_video(tmp_path / "a.mp4", 30)
    Image.fromarray(picture(0, 200, 200)).save(tmp_path / "a.jpg")
    write_song(tmp_path / "song.mp4")
    with av.open(str(tmp_path / "nothing.mkv"), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        output.start_encoding()
    (tmp_path / "folder.mp4").mkdir()
    video, image = ((tmp_path / name).read_bytes() for name in ("a.mp4", "a.jpg"))
    contents = {
        "cut.mp4": video[: len(video) // 2],
        "zero.mp4": b"",
        "text.avi": b"no video\n" * 100,
        "garbage.mp4": np.random.default_rng(0).bytes(5000),
        "zero.png": b"",
        "text.JPEG": b"no image",
        "cut.jpg": image[:-2000],
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
        b"showpage\n%%EOF\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gs").write_text(
        f"#!/bin/sh\ntouch {tmp_path}/started\n"
    )  # what Pillow would read a script with
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    reasons = {
        **dict.fromkeys(contents, "nvalid data|cannot identify|truncated"),
        "folder.mp4": "Is a directory",
        "song.mp4": "it holds no video",
        "nothing.mkv": "End of file",
        **dict.fromkeys(("gone.mp4", "gone.png"), "No such file"),
    }

    def read_each():
        for name, reason in reasons.items():
            with pytest.raises(Unreadable, match=f"{name}: .*({reason})") as error:
                data.Clips([tmp_path / name], None, 2, 32).evaluation_clip(0)
            assert (
                error.value.path == str(tmp_path / name)
                and error.value.reason
                and "\n" not in str(error.value)
            )
    status = exit_status(read_each)
    assert capfd.readouterr().err == "" and status == 0 and not (tmp_path / "started").exists()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_images_of_every_kind_become_rgb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # which only videos need
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    grey = colours[..., 0]
    rgb = Image.fromarray(colours)
    palette = rgb.quantize(256)
    flat = Image.new("CMYK", (7, 5), (0, 255, 255, 0))  # pure red in ink
    for name, image, expected, error, *settings in [
        ("rgb.png", rgb, colours, 0),
        ("grey.png", Image.fromarray(grey), grey[..., None], 0),
        ("deep.png", Image.fromarray(grey.astype(np.uint16) * 256 + 99), grey[..., None], 0),
        ("grey.jpg", Image.fromarray(grey), grey[..., None], 3, {"quality": 100}),
        ("alpha.png", Image.fromarray(np.dstack((colours, grey))), colours, 0),
        (
            "grey_alpha.png",
            Image.fromarray(np.dstack((grey, 255 - grey)), "LA"),
            grey[..., None],
            0,
        ),
        ("palette.png", palette, np.asarray(palette.convert("RGB")), 0),
        (
            "see_through.png",
            palette,
            np.asarray(palette.convert("RGB")),
            0,
            {"transparency": bytes(20)},
        ),
        ("black_white.png", Image.fromarray(grey > 128), 255 * (grey > 128)[..., None], 0),
        ("cmyk.jpg", flat, np.array([255, 0, 0]), 3, {"quality": 100}),
    ]:
        image.save(tmp_path / name, **dict(*settings))
        result = read_image(tmp_path / name)
        assert result.shape == (5, 7, 3) and result.dtype == np.uint8
        assert np.abs(result - expected.astype(int)).max() <= error, name
    for suffix in data.IMAGES:
        Image.fromarray(picture(9, 60, 80)).convert("L" if suffix == ".pgm" else "RGB").save(
            tmp_path / f"a{suffix}"
        )
        assert (
            data.is_image(f"a{suffix.upper()}")
            and number_of(read_image(tmp_path / f"a{suffix}")) == 9
        )


# ------------------------------------------------------------------------------ windows, transforms


def linspace_floor(start, stop, count):
    """floor(linspace(start, stop, count)) in exact fractions."""
    return [
        (
            math.floor(Fraction(start) + Fraction(stop - start) * i / (count - 1))
            if count > 1
            else start
        )
        for i in range(count)
    ]


def test_windows_follow_the_rules_of_the_method():
    for frames, step in [(16, 2), (16, 1), (8, 5), (7, 3), (2, 4), (1, 3)]:
        for n in range(1, 3 * frames * step):
            chosen = data.window(n, frames, step, generator(n))
            if n > frames * step:
                start = chosen[0]
                expected = [min(i, start + frames * step - 1)
                            for i in linspace_floor(start, start + frames * step, frames)]
            else:
                expected = [min(i, n - 1) for i in linspace_floor(0, n, n // step)]
                expected += [n - 1] * (frames - len(expected))
            assert (
                chosen == expected
                and 0 <= min(chosen)
                and max(chosen) <= n - 1
                and chosen == sorted(chosen)
            )
    for n, starts in ((41, 9), (34, 2), (33, 1)):  # of L = 32 frames, from 0 to n - L - 1
        counts = Counter(data.window(n, 16, 2, generator(seed))[0] for seed in range(3000))
        assert sorted(counts) == list(range(starts))
        assert (
            chi_square([counts[i] for i in range(starts)], [1 / starts] * starts) < 26.2
        )  # 0.1 % of fair draws above
    assert data.evaluation_window(31, 16) == list(range(0, 31, 2))
    assert data.evaluation_window(16, 16) == list(range(16))
    assert data.evaluation_window(3, 6) == [0, 1, 2, 2, 2, 2]
    assert all(
        data.evaluation_window(n, 16) == linspace_floor(0, n - 1, 16) for n in range(16, 300, 7)
    )


def test_frame_step_for_a_rate(tmp_path):
    rates = {
        1: 1,
        12: 1,
        24: 1,
        25: 1,
        29.97: 1,
        30: 1,
        31.01: 1,
        31.2: 2,
        32: 2,
        47.95: 3,
        59.94: 3,
        60: 3,
        240: 15,
    }
    def step(rate, fps):
        source = Pictures(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "a.mp4", 4, 8, fps=fps)
        source.rate = rate
        source.clip(0, generator(1))
        return next(i for i in range(1, 99)
                    if data.window(100, 4, i, generator(1)) == source.chosen)

    assert {rate: step(rate, 16) for rate in rates} == rates
    for count in (46, 47, 48):  # times in whole milliseconds give rates that differ by the length
        write_video(
            tmp_path / "a.webm", count, VP9, times=[round(i * 1000 / 15) for i in range(count)]
        )
        assert step(size_of(tmp_path / "a.webm")[1], 8) == 1


GET_CROP = "torchvision.transforms.RandomResizedCrop.get_params"


class Pictures(data.Clips):
    """Clips of one file whose pictures, uint8 [T, 3, H, W], are given; keeps the frame numbers
    asked for."""

    def __init__(self, pictures, name, *how, **more):
        super().__init__([name], None, *how, **more)
        self.pictures, self.rate = pictures, 50.0

    def read(self, item, choose):
        self.chosen = choose(100, self.rate)
        return self.pictures


def test_sources_space_frames_by_step_or_by_rate():
    for how, step in ((dict(step=5), 5), (dict(fps=16), 3), (dict(step=5, fps=16), 3)):
        source = Pictures(torch.zeros(4, 3, 40, 40, dtype=torch.uint8), "a.mp4", 4, 32, **how)
        source.clip(0, generator(1))
        assert source.chosen == data.window(100, 4, step, generator(1))


def test_blobs_are_evaluated_on_their_first_frames_as_they_are(monkeypatch):
    source = data.BlobClips(8, 160, items=range(3, 9), first=42, directions=True)
    assert source.labels == [3, 4, 5, 6, 7, 0] and len(source) == 6
    assert all(
        torch.equal(source.evaluation_clip(i), Blobs(42).video(3 + i)[0][:, :8]) for i in range(6)
    )
    monkeypatch.setattr(GET_CROP, lambda *_: (0, 0, 160, 160))
    source, (video, _) = data.BlobClips(8, 160, 1, 4), Blobs(0, directions=False).video(77)
    chosen = video[:, data.window(32, 8, 2, generator(9))]
    assert any(
        torch.equal(source.clip(77, generator(9)), clip) for clip in (chosen, chosen.flip(-1))
    )


def test_training_crops_follow_their_law():
    y, x = np.mgrid[
        :100, :200
    ]  # an image whose first two colours are its coordinates shows what a crop took
    source = Pictures(
        torch.from_numpy(np.stack((y, x, 0 * x)).astype(np.uint8))[None], "a.png", 4, 40
    )
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
    assert (
        0.29 < min(areas) < 0.35 and 0.6 < max(areas) < 0.72
    )  # a 200x100 image holds no larger one of such a ratio
    assert 120 < flips < 180
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(source.clip(0, generator(5)), source.clip(0, generator(5)))
    assert not torch.equal(source.clip(0, generator(5)), source.clip(0, generator(6)))


def bilinear(pictures, height, width):
    """Pictures [..., H, W] between their four nearest pixels, whose centres lie at halves; the
    border continues."""
    def weights(n, count):
        at = np.clip((np.arange(count) + 0.5) * n / count - 0.5, 0, n - 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)))  # (count, n)
    return (
        weights(pictures.shape[-2], height)
        @ pictures.astype(float)
        @ weights(pictures.shape[-1], width).T
    )


@pytest.mark.parametrize(
    "height, width", [(240, 320), (240, 426), (360, 640), (720, 1280), (100, 90)]
)
def test_only_images_for_evaluation_are_resized_with_antialiasing(monkeypatch, height, width):
    noise = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, height, width))
    ).float()
    noise = F.avg_pool2d(noise, 3, 1, 1).round().to(torch.uint8)
    source = Pictures(noise, "a.mp4", 2, 112)
    top, left, tall, wide = height // 7, width // 9, height // 2, width * 2 // 3
    monkeypatch.setattr(GET_CROP, lambda *_: (top, left, tall, wide))
    expected = bilinear(
        noise.numpy()[..., top : top + tall, left : left + wide], 112, 112
    ).swapaxes(0, 1)
    closest = Counter()
    for seed in range(8):
        clip = source.clip(0, generator(seed)).numpy()
        errors = [np.abs(each - expected).max() for each in (clip, clip[..., ::-1])]
        closest[np.argmin(errors)] += 1
        assert (
            min(errors) < 0.52
        )  # half a level, and what float32 does to the position in a picture so wide
    assert len(closest) == 2  # as it is, and flipped
    sides = [112 * side // min(height, width) for side in (height, width)]
    top, left = ((side - 112) // 2 for side in sides)
    images = F.interpolate(noise.float(), sides, mode="bicubic", antialias=True).clamp(
        0, 255
    )  # as usual with ImageNet
    for name, resized, error in (("a.mp4", bilinear(noise.numpy(), *sides), 0.02),  # unrounded
                                 ("a.JPEG", images.numpy(), 1.6)):
        clip, expected = Pictures(noise, name, 2, 112).evaluation_clip(0), resized.swapaxes(0, 1)
        assert clip.dtype == torch.float32
        clip = clip.numpy()
        assert np.abs(clip - expected[..., top:top + 112, left:left + 112]).max() < error


def test_normalise():
    clips = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 8, 8).repeat(2, 3, 1, 1, 1)
    mean, std = (
        torch.tensor(x).view(3, 1, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    result = model.normalise(clips)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (clips / 255 - mean) / std)


# ------------------------------------------------------------------------------------------ batches


class Numbers(data.Clips):
    """Clips without files: their first channel holds the item's number, others noise; `bad` items
    cannot be read."""

    def __init__(self, count, name="numbers", bad=()):
        super().__init__([f"{name}/{i}" for i in range(count)], list(range(count)), 2, 4, name=name)
        self.bad = set(bad)

    def clip(self, item, generator):
        if item in self.bad:
            raise Unreadable(self.paths[item], "it is bad")
        noise = torch.randint(256, (2, 2, 4, 4), generator=generator, dtype=torch.uint8)
        return torch.cat((torch.full((1, 2, 4, 4), item, dtype=torch.uint8), noise))


def draw_masks(clips, positions, sizes):
    return torch.randint(10**6, (len(clips),), generator=positions), torch.randint(
        10**6, (1,), generator=sizes
    )


def make_batches(*sources, weights=(1.0,), folder="", rank=0, ranks=1, **changes):
    config = (
        dict(batch=8, micro_batch=2, steps=6, seed=1, as_released=False, out=str(folder)) | changes
    )
    return data.Batches(sources, list(weights), SimpleNamespace(**config), draw_masks, rank, ranks)


def flat(step):
    """A step's tensors: of each micro-batch its clips, what its positions generator drew, and its
    sizes generator."""
    return [tensor for clips, masks in step for tensor in (clips, *masks)]


def alike(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("as_released", [False, True])
def test_a_step_is_the_same_micro_batches_whatever_rank_takes_them(as_released):
    def make(**changes):
        return make_batches(Numbers(20), as_released=as_released, **changes)

    whole = [flat(make()[step]) for step in range(6)]
    assert all(len(step) == 4 * 3 and step[0].shape == (2, 3, 2, 4, 4) for step in whole)
    for ranks in (2, 4):
        shared = [make(rank=rank, ranks=ranks) for rank in range(ranks)]
        assert all(
            alike(whole[i], [tensor for each in shared for tensor in flat(each[i])])
            for i in range(6)
        )
    for kind, in_a_step in (
        (0, 4),
        (1, 1 if as_released else 4),
        (2, 1),
    ):  # how many differ: clips, positions, sizes
        drawn = [{str(tensor.tolist()) for tensor in step[kind::3]} for step in whole]
        assert [len(each) for each in drawn] == [in_a_step] * 6 and len(
            set.union(*drawn)
        ) == 6 * in_a_step
    assert alike(
        flat(make(batch=4)[3])[1::3], whole[3][1::3][:2]
    )  # nor on how many more micro-batches there are
    assert not any(map(torch.equal, flat(make(seed=2)[0]), whole[0]))
    halves, quarters = flat(make(micro_batch=4, rank=1, ranks=2)[3])[::3], whole[3][::3][2:]
    assert len(halves) == 1 and torch.equal(halves[0], torch.cat(quarters))
    before = torch.get_rng_state()
    for workers in (0, 2):
        resumed = list(data.loader(make(), start=3, workers=workers))
        assert len(resumed) == 3 and all(map(alike, whole[3:], map(flat, resumed)))
    assert torch.equal(torch.get_rng_state(), before)
    assert alike(
        flat(pickle.loads(pickle.dumps(make()))[2]), whole[2]
    )  # as where processes are not forked


def test_clips_are_drawn_by_weight_with_replacement():
    sizes, shares, counts = (7, 50, 3), (0.2, 0.6, 0.2), Counter()
    sources = [Numbers(size) for size in sizes]
    for i, source in enumerate(sources):
        source.clip = lambda item, generator, i=i: torch.tensor([i, item])
    batches = make_batches(*sources, weights=shares, batch=500, micro_batch=500, steps=20)
    for step in range(20):
        counts.update(map(tuple, batches[step][0][0].tolist()))
    expected = {(i, item): shares[i] / sizes[i] for i in range(3) for item in range(sizes[i])}
    assert set(counts) == set(expected)
    assert (
        chi_square([counts[each] for each in expected], list(expected.values())) < 98.3
    )  # 0.1 % of fair draws above


def test_a_generated_source_makes_new_clips_at_every_step():
    class Generated:
        def __len__(self):
            return 2 ** 31

        def clips(self, items):
            return torch.tensor(items).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4)

    for how, items in (
        (dict(micro_batch=3, rank=1), [[15, 16, 17]]),
        (dict(micro_batch=1), [[12], [13], [14]]),
    ):
        step = make_batches(Generated(), batch=6, ranks=2, **how)[2]
        assert [clips[:, 0, 0, 0, 0].tolist() for clips, _ in step] == items


def test_unreadable_items_are_replaced_by_others_of_their_source_and_noted(tmp_path):
    def run(bad, folder, workers):
        folder.mkdir()
        batches = make_batches(
            Numbers(10, "a", bad), Numbers(10, "b"), weights=(1, 1), folder=folder, steps=12
        )
        return torch.cat(
            [tensor for step in data.loader(batches, workers=workers) for tensor in flat(step)[::3]]
        )

    whole, here, there = (
        run((), tmp_path / "0", 0),
        run(range(9), tmp_path / "1", 0),
        run(range(9), tmp_path / "2", 2),
    )
    untouched = (whole == here).flatten(1).all(1)
    assert (
        30 < untouched.sum() < 70 and (here[~untouched, 0] == 9).all() and torch.equal(here, there)
    )
    lines, others = (
        sorted((tmp_path / name / "unreadable.txt").read_text().splitlines()) for name in "12"
    )
    assert (
        len(lines) > 96 - untouched.sum()
        and lines == others
        and not (tmp_path / "0" / "unreadable.txt").exists()
    )
    steps, notes = zip(*(line.split("\t", 1) for line in lines))
    assert set(map(int, steps)) == {i // 8 for i in range(96) if not untouched[i]}
    assert set(notes) == {f"a\ta/{i}\tit is bad" for i in range(9)}


def test_a_name_that_is_no_text_is_noted_byte_for_byte(tmp_path):
    Image.fromarray(picture(0, 40, 40)).save(tmp_path / "whole.png")
    gone = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4")
    batches = make_batches(
        data.Clips([gone, tmp_path / "whole.png"], None, 2, 8, name="own"), folder=tmp_path
    )
    assert len(list(data.loader(batches, workers=1))) == 6
    assert {
        line.split(b"\t", 1)[1] for line in (tmp_path / "unreadable.txt").read_bytes().splitlines()
    } == {b"own\t%b/caf\xe9.mp4\tNo such file or directory" % bytes(tmp_path)}


def test_batches_that_cannot_be_are_refused(tmp_path):
    for batch, micro_batch, ranks in ((6, 4, 1), (8, 4, 4), (8, 2, 3), (2, 1, 4)):
        with pytest.raises(
            ValueError, match=f"a batch of {batch} is not a multiple of {ranks} ranks x a micro"
        ):
            make_batches(Numbers(10), batch=batch, micro_batch=micro_batch, ranks=ranks)
    with pytest.raises(
        ValueError,
        match="^100 files of numbers in a row cannot be read; .*unreadable.txt names them",
    ):
        make_batches(Numbers(10, bad=range(10)), folder=tmp_path)[0]


def test_a_worker_outlives_the_signals_meant_for_the_run_and_holds_no_lock(tmp_path):
    class Signalled(Numbers):
        def clip(self, item, generator):
            for each in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), each)
            return super().clip(item, generator)

    with locked(tmp_path):
        steps = iter(data.loader(make_batches(Signalled(10)), workers=1))
        assert alike(flat(next(steps)), flat(make_batches(Numbers(10))[0]))
    with locked(tmp_path):  # although the worker lives, and began while the folder was locked
        assert len(list(steps)) == 5


def test_a_process_ends_after_an_error_in_a_worker_while_another_lives():
    code = """
import data, test_data
def steps():
    return iter(data.loader(test_data.make_batches(test_data.Numbers(9)), workers=1))
living = steps()
next(living)
test_data.Numbers.clip = 0
next(steps())
"""
    folders = os.pathsep.join((str(Path(__file__).parent), str(Path(data.__file__).parent)))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": folders}, timeout=60)
    assert "TypeError: 'int' object is not callable" in process.stderr and process.returncode == 1


# ---------------------------------------------------------------------------------- your own videos


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_lists_of_your_own(tmp_path):
    names, file = ["a.mp4", "in side/b c 7.webm", "d, e.mp4", "ü 你.AVI"], tmp_path / "videos.csv"
    paths = touch(tmp_path, *names)
    for form in (
        "{} {}",
        "{},{}",
        "{}\t{}",
        "{} , {}",
        '"{}","{}"',
        '"{}" {}',
        '{},"{}"',
        '"{}"\t"{}"',
    ):
        file.write_text(
            "\n".join(form.format(name, i) for i, name in enumerate(names)) + "\n\n",
            encoding="utf-8",
        )
        assert data.own_videos(file) == (paths, [0, 1, 2, 3])
    for form in ("{}", '"{}"'):
        file.write_text("\ufeff" + "\r\n".join(map(form.format, names)), encoding="utf-8")
        assert data.own_videos(file) == (paths, None)
    file.write_text(f'"d, e.mp4",12\n{tmp_path / "a.mp4"} 3\n', encoding="utf-8")
    assert data.own_videos(file) == ([tmp_path / "d, e.mp4", tmp_path / "a.mp4"], [12, 3])


def test_a_folder_of_your_own(tmp_path):
    own = tmp_path / "own"
    touch(
        own,
        "notes.txt",
        "x/d.mp4.part",
        "._b.mp4",
        ".hidden/c.mp4",
        "__MACOSX/b.mp4",
        "x/__MACOSX/y z/._b.mp4",
    )
    with pytest.raises(FileNotFoundError, match=r"there is no video \(.mp4, .*\) in or below"):
        data.own_videos(own)
    there = touch(
        own,
        "b.mp4",
        "x/y z/ö.webm",
        *(
            f"{name}{suffix}"
            for suffix in data.VIDEOS
            for name, suffix in (("all/a", suffix), ("all/B", suffix.upper()))
        ),
    )
    assert data.own_videos(own) == (sorted(there), None)
    touch(tmp_path, "elsewhere/deep/c.mkv", "d.mkv")
    (own / "link").symlink_to(tmp_path / "elsewhere")
    (own / "x" / "e.mkv").symlink_to(tmp_path / "d.mkv")
    there += [own / "link" / "deep" / "c.mkv", own / "x" / "e.mkv"]
    assert data.own_videos(own).paths == sorted(there)


def test_a_folder_with_a_sub_folder_for_each_class_gives_labels(tmp_path):
    paths = touch(tmp_path, "b/1.mp4", "b/2.webm", "a/3.mp4", "c d/4.avi")
    assert data.own_videos(tmp_path) == (sorted(paths), [0, 1, 1, 2])
    touch(tmp_path, "a/deep/6.mp4")
    assert data.own_videos(tmp_path).labels is None  # train/walk/1.mp4: train is no class
    touch(tmp_path / "stray", "a/1.mp4", "b/2.mp4", "5.mp4")
    assert data.own_videos(tmp_path / "stray").labels is None


def test_every_third_clip_of_a_class_is_held_out():
    split = data.Split([f"{i}.mp4" for i in range(10)], [0, 1, 0, 0, 1, 1, 0, 0, 0, 2])
    train, test = data.hold_out(split)
    assert test == (["3.mp4", "5.mp4", "8.mp4"], [0, 1, 0])
    assert sorted(train.paths + test.paths) == split.paths and len(train.labels) == 7


@pytest.mark.parametrize("content, message", [
    ("a.mp4 1\nb.mp4\n", "gives some of its videos no label; give all a label, or none"),
    ("a.mp4\n\nb.mp4 1\n", "gives some of its videos no label"),
    ("path,label\na.mp4,1\n", "is not .* the label a whole number: 'path,label'"),
    ("a.mp4 1\nb.mp4 dog\n", "is not `path` or .* the label a whole number: 'b.mp4 dog'"),
    ("a.mp4 1 x\n", "a line of .* is not `path`"),
    ("a.mp4 -1\n", "a line of .* is not `path`"),
    ("a.mp4;1\n", "a line of .* is not `path`"),
    ("", "lists 0 videos, none of which exists"),
    ("gone.mp4 1\n", "lists 1 videos, none of which exists: .*gone.mp4"),
    (b"\xff\xfe\x00\x81", "is not `path` or `path label`"),
    (None, "No such file or directory: '.*videos.csv'")])
def test_lists_that_make_no_sense(tmp_path, content, message):
    touch(tmp_path, "a.mp4", "b.mp4")
    if content is not None:
        (tmp_path / "videos.csv").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.own_videos(tmp_path / "videos.csv")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- the four datasets


@pytest.fixture
def copy(miniature, tmp_path):
    """The miniature with links for its files, to be taken apart."""
    return Path(shutil.copytree(miniature, tmp_path / "root", copy_function=os.link))


def files_of(name, root):
    return data.DATASETS[name].read(root)


def replace(file, content):
    """Write a file anew: a link to one of the miniature, which must stay as it is."""
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("name", data.DATASETS)
def test_the_datasets_are_read_as_published(miniature, name):
    files = files_of(name, miniature)
    assert files.train.labels == [0, 0, 1, 1, 2, 2] and files.test.labels == [0, 1, 2]
    for split in ("train", "test"):
        source = data.open_dataset(name, miniature, split, 16, 112, 2)
        assert len(source) == len(source.labels) == len(getattr(files, split).paths)
        shown = []
        for item in range(len(source)):
            assert source.clip(item, generator(item)).shape == (3, 16, 112, 112)
            numbers = [
                number_of(frame) for frame in source.evaluation_clip(item).permute(1, 2, 3, 0)
            ]
            still = name == "imagenet100"
            assert [i - numbers[0] for i in numbers] == [
                0 if still else i * 35 // 15 for i in range(16)
            ]
            shown.append(numbers[0])
        assert len(set(shown)) == len(shown)


def test_other_names_that_publishers_gave(copy):
    (copy / "labels").mkdir()
    for name in ("labels.json", "train.json", "validation.json"):  # SSv2's newer layout
        (copy / name).rename(copy / "labels" / name)
    (copy / "val").rename(copy / "validation")
    assert all(len(files_of(name, copy).train.paths) == 6 for name in data.DATASETS)


@pytest.mark.parametrize("name, piece", [
    ("ucf101", "ucfTrainTestlist/trainlist01.txt"), ("ucf101", "ucfTrainTestlist/testlist01.txt"),
    ("ssv2", "20bn-something-something-v2"), ("ssv2", "labels.json"), ("ssv2", "train.json"),
    ("ssv2", "validation.json"), ("imagenet100", "train"), ("imagenet100", "val"),
    ("diving48", "Diving48_V2_train.json"), ("diving48", "Diving48_V2_test.json")])
def test_a_missing_piece_is_named(copy, name, piece):
    shutil.rmtree(copy / piece) if (copy / piece).is_dir() else (copy / piece).unlink()
    with pytest.raises(FileNotFoundError, match=f"{copy / piece} is missing; README.md"):
        files_of(name, copy)


def test_images_of_different_classes(copy):
    (copy / "val" / SYNSETS[0]).rename(copy / "val" / "n09999999")
    with pytest.raises(FileNotFoundError, match=f"train and val of {copy} should hold images of"):
        files_of("imagenet100", copy)


@pytest.mark.parametrize(
    "name, piece, content, message",
    [
        (
            "ucf101",
            "ucfTrainTestlist/trainlist01.txt",
            "Golf/v_Golf_g01_c01.avi x\n",
            ".*trainlist01.txt",
        ),
        (
            "ucf101",
            "ucfTrainTestlist/testlist01.txt",
            "Golf/v_Golf_g01_c01.avi\n",
            ".*testlist01.txt",
        ),
        ("ssv2", "train.json", "[{'id'", "train.json is not as its publisher"),
        ("ssv2", "train.json", "[" * 100_000, "train.json is not as its publisher"),
        ("ssv2", "labels.json", "3", "labels.json is damaged"),
        (
            "ssv2",
            "validation.json",
            '[{"id": "1", "template": "Eating [something]"}]',
            ".*validation.json",
        ),
        (
            "diving48",
            "Diving48_V2_test.json",
            '[{"label": 1}]',
            ".*Diving48_V2_test.json",
        ),
        (
            "diving48",
            "Diving48_V2_train.json",
            '[{"vid_name": "a", "label": 48}]',
            ".*Diving48_V2_train.json",
        ),
        (
            "diving48",
            "Diving48_V2_train.json",
            '[{"vid_name": "a", "label": -1}]',
            ".*Diving48_V2_train.json",
        ),
    ],
)
def test_lists_unlike_their_publishers(copy, name, piece, content, message):
    replace(copy / piece, content.encode())
    with pytest.raises(ValueError, match=message) as error:
        files_of(name, copy)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_byte_order_marks_links_and_hidden_files_change_nothing(copy, tmp_path):
    before = {name: files_of(name, copy) for name in data.DATASETS}
    for file in [*copy.glob("*.json"), *copy.glob("ucfTrainTestlist/*.txt")]:
        replace(file, b"\xef\xbb\xbf" + file.read_bytes())
    linked = copy / "train" / SYNSETS[0]
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    touch(
        copy / "train",
        f"{SYNSETS[0]}/._a.JPEG",
        f"{SYNSETS[0]}/list.txt",
        ".hidden/a.png",
        "__MACOSX/a.png",
    )
    assert {name: files_of(name, copy) for name in data.DATASETS} == before
    touch(linked, "a.PNG")
    assert linked / "a.PNG" in files_of("imagenet100", copy).train.paths


# --------------------------------------------------------------------------- python data.py --check


def test_check_as_a_user_runs_it(miniature, capsys):
    assert data.main(["--check", str(miniature), "--workers", "1"]) == 0
    output, errors = capsys.readouterr()
    published = dict(
        zip(("9,537", "168,913", "126,689", "15,027"), ("3,783", "24,777", "5,000", "1,970"))
    )
    for line in (*(f"{name}, train: 6 of {count} published clips"
                   for name, count in zip(data.DATASETS, published)),
                 *(f"{name}, test: 3 of {count} published clips"
                   for name, count in zip(data.DATASETS, published.values())),
                 "    height: 240 to 240", "    frames per second: 12 to 12",
                 "    unreadable: 0 (above 5%, a run stops)"):
        assert line in output.splitlines()
    assert (
        output.endswith(f"Train with: python train.py --preset mixed --root '{miniature}'\n")
        and errors == ""
    )


def test_check_tells_the_frame_step_at_which_training_sees_what_evaluation_sees(
        tmp_path, monkeypatch, capsys):
    """The median video has 48 frames: 8, spread evenly, lie 6 apart, and 16 lie 3 apart."""
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    monkeypatch.setattr(data, "load", lambda *items, **how: [(96, 128, count, 25.0)
                                                             for count in (200, 24, 48)])
    data.check(tmp_path, 1)
    small, large = capsys.readouterr().out.splitlines()[-2:]
    assert small.endswith("--frame-step 6") and large.endswith("--frame-step 3")


def test_check_says_in_a_line_why_it_ends(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    assert data.main(["--check", str(tmp_path / "missing")]) == 1
    message = capsys.readouterr().err
    assert (
        message == f"data.py: {tmp_path}/missing: No such file or directory\n"
        and message.count("\n") == 1
    )
    touch(tmp_path, "a.mp4")
    assert data.main(["--check", str(tmp_path), "--workers", "-1"]) == 1
    assert capsys.readouterr().err.startswith("data.py: num_workers option should be non-negative")
    monkeypatch.setattr(data, "inspect", interrupted)
    touch(tmp_path, "a.mp4")
    assert data.main(["--check", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "data.py: stopped\n"


def test_check_names_what_cannot_be_read_and_allows_a_twentieth(copy, capsys):
    paths = [copy / f"{i}.png" for i in range(21)]
    for path in paths[:19]:
        Image.fromarray(picture(0, 40, 40)).save(path)
    assert data.inspect("images", paths[:20], workers=0) == 1
    assert data.inspect("images", paths, workers=0) == 0
    output = capsys.readouterr().out
    assert f"    unreadable: 2 (above 5%, a run stops)\n      {paths[19]}: No such file" in output
    shutil.rmtree(copy / "train")
    broken = copy / "UCF-101" / "YoYo" / "v_YoYo_g08_c02.avi"
    replace(broken, b"RIFF")
    data.check(copy, workers=0)
    output = capsys.readouterr().out
    assert f"    unreadable: 1 (above 5%, a run stops)\n      {broken}: Invalid data" in output
    assert "unreadable: 1 (above 5%, a run stops)" in output and "imagenet100: not here. " in output
    assert output.endswith(f"python train.py --preset mixed --data '{copy}' --frame-step 2\n")
    for folder in ("20bn-something-something-v2", "rgb"):
        shutil.rmtree(copy / folder)
    for file in copy.glob("*.json"):
        file.unlink()
    with pytest.raises(ValueError, match="too many of the videos"):  # one of nine, UCF-101's
        data.check(copy, workers=0)
    capsys.readouterr()
    replace(broken, (copy / "UCF-101" / "YoYo" / "v_YoYo_g08_c01.avi").read_bytes())
    data.check(copy, workers=0)
    assert capsys.readouterr().out.endswith(
        f"Train with: python train.py --preset ucf101 --root '{copy}'\n"
    )


def test_a_list_in_a_folder_gives_its_labels_and_both_can_be_checked(tmp_path, capsys):
    """As `--write` leaves them. A list of that name decides; other files of the folder do not."""
    for i in range(2):
        write_video(tmp_path / f"{i}.mp4", 16)
    (tmp_path / "videos.csv").write_text("1.mp4 3\n")
    split = data.own_videos(tmp_path)
    assert split == data.own_videos(tmp_path / "videos.csv")
    assert split.labels == [3] and [path.name for path in split.paths] == ["1.mp4"]
    for place in tmp_path, tmp_path / "videos.csv":
        data.check(place, workers=0)
        output = capsys.readouterr().out
        assert f"Videos of {place}, of every split: 1; classes by their labels: 1\n" in output
        assert f"python train.py --data '{place}' --frame-step 2\n" in output


def test_check_of_videos_of_your_own_beside_a_dataset_that_no_preset_takes(copy, capsys):
    for folder in ("UCF-101", "ucfTrainTestlist", "20bn-something-something-v2", "rgb"):
        shutil.rmtree(copy / folder)
    for file in copy.glob("*.json"):
        file.unlink()
    touch(copy, "x/b.mpx", "c.mpx", "._a.mp4", "__MACOSX/a.mp4")
    write_video(copy / "a.mp4", 10)
    data.check(copy, workers=0)
    output = capsys.readouterr().out
    assert output.count(" is missing; README.md, ") == 3 and "imagenet100, train: 6 of " in output
    assert f"Videos of {copy}, of every split: 1" in output
    assert output.splitlines()[-2:] == [
        f"Train on a CPU with: python train.py --data '{copy}' --frame-step 1",
        f"Train on a GPU with: python train.py --preset mixed --data '{copy}' --frame-step 1"]
    replace(copy / "a.mp4", b"")
    with pytest.raises(ValueError, match="too many of the videos in .* cannot be read"):
        data.check(copy, workers=0)
    (copy / "a.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="no video"):
        data.check(copy, workers=0)


# ------------------------------------------------------------------------ generated clips as videos


def test_written_videos_come_back(tmp_path):
    assert data.main(["--write", str(tmp_path / "out"), "--count", "3"]) == 0
    rows = list(csv.reader((tmp_path / "out" / "videos.csv").open(), delimiter=" "))
    source = Shapes(16, 64, 0)
    assert len(rows) == 3
    for item, (name, label) in enumerate(rows):
        clip, direction = source.video(item)
        assert int(label) == direction
        with av.open(str(tmp_path / "out" / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        decoded = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)
        assert decoded.shape == clip.shape
        assert (
            decoded.float() - clip.float()
        ).abs().mean() < 25  # lossy coding of sharp edges and noise
    assert (
        data.main(["--write", str(tmp_path / "out")]) == 1
    )  # never into a folder that holds something


def test_what_is_there_already_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    touch(tmp_path, "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(Shapes, "video", None)  # would fail
    for name in ("file", "folder", "link"):
        assert data.main(["--write", str(tmp_path / name), "--count", "2"]) == 1
        assert f"{name}: File exists" in capsys.readouterr().err


@pytest.mark.parametrize("flags, sentence", [
    ([], "one of the arguments --check --write is required"),
    (["--write"], "argument --write: expected one argument"),
    (["--write", "out", "--count", "big"], "argument --count: invalid int value: 'big'"),
    (["--write", "out", "--cuont", "3"], "unrecognized arguments: --cuont 3"),
])
def test_wrong_flags_of_writing_give_one_sentence_and_write_nothing(
    tmp_path, monkeypatch, capsys, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^2$"):
        data.main(flags)
    assert sentence in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ files that commands share


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    data.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    for place, name in ((Path, "write_bytes"), (data.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(OSError, match="No space left on device"):
                data.write_json(path, {"a": 2})
        assert data.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"3", b"\xff", b"", b'{"a": 1} x']
)
def test_a_damaged_json_file_is_one_sentence_and_a_missing_one_is_empty(tmp_path, content):
    path = tmp_path / "a.json"
    assert data.read_json(path) == {}
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"^{path} is damaged; put the whole file back, or delete it$"
    ):
        data.read_json(path)


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path, exit_status):
    """However it ends; within one process it is let go at the end of the block."""
    def hold_and_die():
        with data.locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    def try_it():
        with pytest.raises(ValueError, match=f"another process is at work on {tmp_path}"):
            with data.locked(tmp_path):
                pass
    with data.locked(tmp_path):
        assert exit_status(try_it) == 0
    assert exit_status(hold_and_die) == -signal.SIGKILL
    with data.locked(tmp_path):
        pass
    assert data.HELD == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, sentence, status",
    [
        (ValueError("it is wrong"), "it is wrong", 1),
        (
            OSError(errno.ENOSPC, "No space left on device", "last.pt"),
            "last.pt: No space left on device",
            1,
        ),
        (MemoryError(), "there is too little memory; give a smaller --batch", 1),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "there is too little memory; give a smaller --batch",
            1,
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "too little memory",
            1,
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
            "a loader process was killed",
            1,
        ),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nTraceback\n"
                "ValueError: line 3 is odd"
            ),
            "line 3 is odd",
            1,
        ),
        (KeyboardInterrupt(), "stopped", 130),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(capsys, error, sentence, status):
    @data.command("it.py", smaller="--batch")
    def main(arguments):
        raise error
    assert main([]) == status
    message, = capsys.readouterr().err.splitlines()
    assert message.startswith("it.py: ") and sentence in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes must match"),
        TypeError("a bug"),
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: shapes must match"
        ),
    ],
)
def test_a_bug_keeps_its_traceback(error):
    @data.command("it.py", smaller="--batch")
    def main(arguments):
        raise error
    with pytest.raises(type(error)):
        main([])


def test_findings_are_scripts_that_run():
    for script in (Path(__file__).parent.parent / "findings").iterdir():
        assert script.read_text().startswith("#!/usr/bin/env bash\n"), script
        assert os.access(script, os.X_OK), script
