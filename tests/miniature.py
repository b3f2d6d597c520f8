"""Small videos in true containers and codecs, with frame numbers burned in, and a miniature of the
four datasets.

A picture shows its number as a 4x4 board of black and white squares in its central square: one
corner is white, the other three are black, which gives away turning and mirroring, and the twelve
squares left are the bits. Compression, resizing and centre crops leave it readable.
"""

import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

SQUARES = [(row, column) for row in range(4) for column in range(4) if row % 3 or column % 3]
FAST = {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}, "libx264": {"preset": "veryfast"}}


def picture(number, height, width):
    """uint8 [H, W, 3] that shows a number below 4096."""
    board = np.zeros((4, 4), np.uint8)
    board[0, 0] = 255
    for bit, square in enumerate(SQUARES):
        board[square] = 255 * (number >> bit & 1)
    side = min(height, width)
    cells = np.arange(side) * 4 // side
    result = np.full((height, width, 3), 100, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    result[top:top + side, left:left + side] = board[cells][:, cells, None]
    return result


def number_of(image):
    """The number that a picture [H, W, 3] shows; fails where the corners are not as they should
    be."""
    image = np.asarray(image).astype(float).mean(-1)
    side = min(image.shape)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    middle = [int((i + 0.5) * side / 4) for i in range(4)]
    reach = side // 16
    board = [
        [
            image[
                top + y - reach : top + y + reach + 1, left + x - reach : left + x + reach + 1
            ].mean()
            > 128
            for x in middle
        ]
        for y in middle
    ]
    assert [board[0][0], board[0][3], board[3][0], board[3][3]] == [True, False, False, False]
    return sum(int(board[row][column]) << bit for bit, (row, column) in enumerate(SQUARES))


def write_video(
    path,
    frames=50,
    codec="libx264",
    size=(96, 128),
    rate=25,
    first=0,
    times=None,
    quarters=0,
    options=(),
    container=(),
    **open_options,
):
    """Write frames numbered from `first`. times: of each frame, in ms; quarters: quarter turns
    counter-clockwise of the camera (only mp4); options: of the codec; container: of the muxer.
    path: a name, or an object with write(). """
    import av  # only where a video is written: all other tests run without it

    with av.open(
        path if hasattr(path, "write") else str(path), "w", options=dict(container), **open_options
    ) as output:
        stream = output.add_stream(
            codec, rate=rate, options={**FAST.get(codec, {}), **dict(options)}
        )
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            shown = picture(first + i, *(size[::-1] if quarters % 2 else size))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(shown, quarters)))
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    if quarters:
        turn_back(path, quarters)


def turn_back(path, quarters):
    """Write into an mp4's track header that players shall turn it clockwise by so many quarters, as
    phones do."""
    content = bytearray(Path(path).read_bytes())
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters % 4]
    # x' = ax + cy, y' = bx + dy with y downwards; in the order a b u c d v, fixed point 16.16
    struct.pack_into(
        ">6i",
        content,
        content.index(b"tkhd") + 44,
        *(65536 * x for x in (cos, sin, 0, -sin, cos, 0)),
    )
    Path(path).write_bytes(content)


def cut_away(path, frames):
    """Let an mp4's edit list begin so many frames of 512 ticks later, as cutting by copying
    does."""
    content = bytearray(Path(path).read_bytes())
    media_time = content.index(b"elst") + 16
    start = struct.unpack_from(">i", content, media_time)[0] + 512 * frames
    struct.pack_into(">i", content, media_time, start)
    Path(path).write_bytes(content)


class Pipe:
    """A file that can only be written on and on: a container cannot go back to fill in its
    counts."""

    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, content):
        return self.file.write(content)


def write_packed_avi(path, frames, size=(96, 128)):
    """MPEG-4 in AVI as DivX and XviD pack it: a B frame shares the packet of the frame that it
    needs, and an empty frame stands where it would have stood."""
    import av

    with av.open(str(path), "w") as output:
        stream = output.add_stream(
            "mpeg4", rate=25, options={"g": "12", "bf": "1", "b_strategy": "0"}
        )
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.flags &= ~av.codec.context.Flags.global_header.value
        packets = [
            packet
            for i in range(frames)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(i, *size)))
        ] + stream.encode(None)
        frame_start = b"\0\0\1\xb6"
        packed = []
        for packet in packets:
            content = bytes(packet)
            start = content.index(frame_start)
            if packet.is_keyframe:
                content = content[:start] + b"\0\0\1\xb2DivX503b1393p" + content[start:]
            is_b = content[content.index(frame_start) + 4] >> 6 == 2
            if is_b:
                packed[-1] = (packed[-1][0] + content, packed[-1][1])
                content = frame_start + bytes([0b01010000, 0b01001111])  # a P frame "not coded"
            packed.append((content, packet.is_keyframe))
        for i, (content, is_key) in enumerate(packed):
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), is_key
            packet.pts = packet.dts = i
            output.mux(packet)


UCF_CLASSES = ["ApplyEyeMakeup", "BoxingSpeedBag", "YoYo"]
SSV2_TEMPLATES = [
    "Holding [something]",
    "Pushing [something] from left to right",
    "Turning [something] upside down",
]
SYNSETS = ["n01558993", "n01692333", "n02086240"]
DIVES = [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "NoTwis", "PIKE"],
         ["Forward", "25som", "NoTwis", "TUCK"]]


def write_datasets(root, train=2, test=1):
    """All four datasets as published, in a few clips: three classes each, so many clips of each
    class per split."""
    root = Path(root)
    ucf, lists = root / "UCF-101", root / "ucfTrainTestlist"
    ssv2, rgb = root / "20bn-something-something-v2", root / "rgb"
    for folder in (ucf, lists, ssv2, rgb):
        folder.mkdir(parents=True)
    first = iter(range(0, 4096, 40))
    (lists / "classInd.txt").write_text(
        "".join(f"{i} {name}\n" for i, name in enumerate(UCF_CLASSES, start=1))
    )
    (root / "labels.json").write_text(
        json.dumps(
            {
                template.replace("[", "").replace("]", ""): str(i)
                for i, template in enumerate(SSV2_TEMPLATES)
            }
        )
    )
    (root / "Diving48_vocab.json").write_text(json.dumps(DIVES))
    for split, clips in (("train", train), ("test", test)):
        lines, ssv2_entries, dives = [], [], []
        for i in range(3):
            for k in range(clips):
                group = "g08" if split == "train" else "g01"
                name = f"{UCF_CLASSES[i]}/v_{UCF_CLASSES[i]}_{group}_c{k + 1:02}.avi"
                (ucf / name).parent.mkdir(exist_ok=True)
                write_video(
                    ucf / name, 36, "mpeg4", (240, 320), 25, next(first), options={"g": "12"}
                )
                lines.append(f"{name} {i + 1}\n" if split == "train" else f"{name}\n")

                name = str(1000 * (split == "test") + 100 * i + k)
                write_video(
                    ssv2 / f"{name}.webm",
                    36,
                    "libvpx-vp9",
                    (240, 426),
                    12,
                    next(first),
                    options={"g": "120"},
                )
                ssv2_entries.append(
                    {
                        "id": name,
                        "label": "holding a cup",
                        "template": SSV2_TEMPLATES[i],
                        "placeholders": ["a cup"],
                    }
                )

                name = f"{split}{i}_{k:05}"
                write_video(rgb / f"{name}.mp4", 36, "libx264", (256, 340), 30, next(first),
                            options={"g": ("12", "250")[k % 2]})
                dives.append({"vid_name": name, "label": i, "start_frame": 0, "end_frame": 36})

                suffix = ("JPEG", "png")[k % 2]
                image = (
                    root
                    / ("train" if split == "train" else "val")
                    / SYNSETS[i]
                    / f"{SYNSETS[i]}_{k}.{suffix}"
                )
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(next(first), 300, 400)).save(image)
        (lists / f"{split}list01.txt").write_text("".join(lines))
        (root / f"{'train' if split == 'train' else 'validation'}.json").write_text(
            json.dumps(ssv2_entries)
        )
        (root / f"Diving48_V2_{split}.json").write_text(json.dumps(dives))
