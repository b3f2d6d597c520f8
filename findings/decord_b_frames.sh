#!/usr/bin/env bash
# decord gives another frame than the one asked for when an MPEG-4 or H.264 .avi has B-frames.
#
# Versions: decord 0.6.0, PyAV 18.1.0 (writes the files, and decodes them for comparison), numpy
# 2.4.6.
#
# One would expect that reader.get_batch([i]) gives the same picture as the i-th of reading all
# frames in order; decord is known for exact random access.
#
# What happens, with 60 frames, a key frame about every 20 and two B-frames between reference
# frames:
#   - read in order, every frame is right;
#   - asked for alone from a fresh reader, 41 of 60 frames of the MPEG-4 .avi are other frames
#     (often from the group of pictures before, so up to 19 frames off), and 40 of the H.264 .avi;
#   - more than half of all windows of 16 consecutive frames are wrong, of either file;
#   - in .mp4 and .mkv, 12 frames of the same MPEG-4 packets are wrong, since B-frames shown
#     before a key frame are stored behind it; H.264 is right there, and MPEG-4 without B-frames
#     is right in .avi.
# An .avi stores no presentation times, and what decord takes for them does not fit the frames
# that the decoder returns.
#
# Why it matters: XviD and DivX files are MPEG-4 in .avi, and loaders that draw random windows by
# decord are common. The number of frames is right and the pictures are whole, so nothing looks
# wrong; but time jumps inside a clip, and a model that predicts motion learns from it.
#
# What to do instead: check a few files by comparing get_batch([i]) of a fresh reader with reading
# in order. Where they differ, read from frame 0 on and throw away what is not needed, or encode
# the files once again without B-frames.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq av==18.1.0 decord==0.6.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import av
import decord
import numpy as np

COUNT = 60
MPEG4 = {"bf": "2", "b_strategy": "0", "g": "20", "qmin": "1", "qmax": "3"}
H264 = {"bf": "2", "g": "20", "x264-params": "b-adapt=0:scenecut=0", "crf": "5"}
FILES = {"mpeg4.avi": ("mpeg4", MPEG4), "h264.avi": ("libx264", H264),
         "mpeg4.mp4": ("mpeg4", MPEG4), "mpeg4.mkv": ("mpeg4", MPEG4),
         "h264.mp4": ("libx264", H264), "no_b.avi": ("mpeg4", MPEG4 | {"bf": "0"})}


def picture(i):
    """Frame i: eight bars, its number in binary, and a square that moves."""
    image = np.full((96, 128, 3), 90, np.uint8)
    for bit in range(8):
        image[:48, 16 * bit:16 * bit + 16] = 235 if i >> bit & 1 else 16
    image[60:80, (3 * i) % 100:(3 * i) % 100 + 20] = 200
    return image


def number(image):
    return sum(int(image[8:40, 16 * bit + 4:16 * bit + 12].mean() > 125) << bit for bit in range(8))


def fresh(path, frames):
    return [number(image) for image in decord.VideoReader(path).get_batch(frames).asnumpy()]


wrong = {}
for path, (codec, options) in FILES.items():
    with av.open(path, "w") as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for i in range(COUNT):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        output.mux(stream.encode(None))

    right = list(range(COUNT))
    with av.open(path) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [number(image) for image in decoded] == right
    reader = decord.VideoReader(path)
    assert [number(reader[i].asnumpy()) for i in right] == right, "in order, decord is right too"

    alone = [fresh(path, [i])[0] for i in right]
    windows = [list(range(start, start + 16)) for start in range(COUNT - 15)]
    wrong_alone = sum(a != i for i, a in enumerate(alone))
    wrong_windows = sum(fresh(path, window) != window for window in windows)
    wrong[path] = (wrong_alone, wrong_windows)
    print(f"{path:10} wrong: {wrong_alone:2} of {COUNT} frames asked for alone, "
          f"{wrong_windows:2} of {len(windows)} windows of 16")
    if path == "mpeg4.avi":
        print("           alone:", alone)

assert wrong["mpeg4.avi"][0] > 30 and wrong["h264.avi"][0] > 30
assert wrong["mpeg4.avi"][1] > 22 and wrong["h264.avi"][1] > 22
assert 0 < wrong["mpeg4.mp4"][0] < 20 and wrong["mpeg4.mkv"] == wrong["mpeg4.mp4"]
assert wrong["h264.mp4"] == wrong["no_b.avi"] == (0, 0)
print("as described")
EOF
