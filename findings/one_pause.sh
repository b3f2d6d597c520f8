#!/usr/bin/env bash
# A recording with one pause: ffmpeg's constant rate loses nearly every frame after it, OpenCV
# cannot reach those before it, and the frame rate depends on the container.
#
# Versions: the ffmpeg 9.0.2 binary of imageio-ffmpeg 0.8.1, imageio 2.38.1, PyAV 18.1.0, decord
# 0.6.0, opencv-python-headless 5.0.0.93, numpy 2.4.6.
#
# The file: 60 frames of H.264 with B-frames, 40 ms apart, with one gap of ten seconds behind
# frame 29 (a paused screen recording, or a call whose network failed). One would expect the same
# 60 frames from every reader, or 310 where the gap is filled by repeating frame 29; and 25 frames
# per second.
#
# What happens:
#   - ffmpeg, where its output has a constant rate (-r 25, or pixels through a pipe, as imageio's
#     FFMPEG plugin asks for them), gives 531 frames of the .mp4: 0 to 28 once, frame 29 250
#     times, frame 30 252 times, and 31 to 59 never. Nothing is printed. With the filter fps=25 it
#     gives the right 310, with -fps_mode passthrough the right 60, and of a .mkv the right 310.
#     It is the same when ffmpeg itself has copied the .mkv to .mp4; without B-frames it is right.
#   - OpenCV turns a frame number into a time by the mean rate. Set to a frame of the .mp4, it
#     never finds frames 20 to 35, and has no frame at all for the numbers from 44 on. It says
#     that the .mkv has 310 frames.
#   - PyAV's stream.average_rate and decord's get_avg_fps() say 4.84 for the .mp4 and 25 for the
#     .mkv with the same packets. The first is frames divided by duration, the second the frame
#     duration that the header states.
#
# Why it matters: "sample at 8 frames per second" takes every frame of the .mp4 and every third of
# the .mkv, so speed, which a video model learns from, depends on a container; and half a clip can
# become one still picture.
#
# What to do instead: take the median distance between neighbouring presentation times as the
# frame distance, number frames by decoding order, and read with PyAV (or imageio's pyav plugin);
# give ffmpeg the fps filter in place of -r.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq av==18.1.0 imageio==2.38.1 imageio-ffmpeg==0.8.1 decord==0.6.0 \
    opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$work"
export OPENCV_FFMPEG_LOGLEVEL=-8
venv/bin/python - <<'EOF'
import subprocess
from fractions import Fraction

import av
import cv2
import decord
import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np

COUNT = 60
TIMES = [40 * i + (10_000 if i >= 30 else 0) for i in range(COUNT)]  # ms


def number(picture):
    """Frame i is grey, 10 + 4 i."""
    return round((float(picture.mean()) - 10) / 4)


for path, b_frames in (("pause.mp4", "2"), ("pause.mkv", "2"), ("no_b.mp4", "0")):
    with av.open(path, "w") as output:
        options = {"bf": b_frames, "g": "20", "x264-params": "b-adapt=0:scenecut=0", "crf": "5"}
        stream = output.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(TIMES):
            grey = np.full((96, 128, 3), 10 + 4 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def by_ffmpeg(*arguments):
    """Frames that the ffmpeg command gives through a pipe."""
    pixels = ffmpeg(*arguments, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return [number(picture) for picture in np.frombuffer(pixels, np.uint8).reshape(-1, 96, 128, 3)]


lost = list(range(29)) + [29] * 250 + [30] * 252
filled = list(range(29)) + [29] * 251 + list(range(30, COUNT))
piped = by_ffmpeg("-i", "pause.mp4")
never = sorted(set(range(COUNT)) - set(piped))
print("ffmpeg through a pipe:", len(piped), "frames; never shown:", never)
assert piped == by_ffmpeg("-i", "pause.mp4", "-r", "25") == lost
assert [number(picture) for picture in imageio.imiter("pause.mp4", plugin="FFMPEG")] == lost
assert by_ffmpeg("-i", "pause.mp4", "-vf", "fps=25") == filled
assert by_ffmpeg("-i", "pause.mp4", "-fps_mode", "passthrough") == list(range(COUNT))
ffmpeg("-i", "pause.mkv", "-c", "copy", "copied.mp4")
assert by_ffmpeg("-i", "copied.mp4") == lost
for path in ("pause.mkv", "no_b.mp4"):
    frames = by_ffmpeg("-i", path)
    assert len(frames) == 310 and set(frames) == set(range(COUNT))

seen = {}
for path in ("pause.mp4", "pause.mkv"):
    with av.open(path) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [(frame.time, number(frame.to_ndarray(format="rgb24")))
                  for frame in container.decode(video=0)]
    assert [i for _, i in frames] == list(range(COUNT))
    median = float(1 / np.median(np.diff([time for time, _ in frames])))
    by_pyav = [number(picture) for picture in imageio.imiter(path, plugin="pyav")]
    capture, sought = cv2.VideoCapture(path), []
    for i in range(COUNT):
        capture.set(cv2.CAP_PROP_POS_FRAMES, i)
        there, picture = capture.read()
        sought.append(number(picture) if there else None)
    opencv = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    decord_rate = decord.VideoReader(path).get_avg_fps()
    seen[path] = dict(rate=round(rate, 2), decord=round(decord_rate, 2), median=round(median, 2),
                      pyav=len(by_pyav), opencv=opencv, nothing=sought.count(None),
                      unreachable=sorted(set(range(COUNT)) - set(sought)))
    print(path, seen[path])

assert (seen["pause.mp4"]["rate"], seen["pause.mkv"]["rate"]) == (4.84, 25)
assert (seen["pause.mp4"]["decord"], seen["pause.mkv"]["decord"]) == (4.84, 25)
assert seen["pause.mp4"]["median"] == seen["pause.mkv"]["median"] == 25
assert seen["pause.mp4"]["pyav"] == seen["pause.mkv"]["pyav"] == COUNT
assert (seen["pause.mp4"]["opencv"], seen["pause.mkv"]["opencv"]) == (60, 310)
assert seen["pause.mp4"]["unreachable"] == list(range(20, 36))
assert seen["pause.mp4"]["nothing"] == 16
assert seen["pause.mkv"]["unreachable"] == []
print("as described")
EOF
