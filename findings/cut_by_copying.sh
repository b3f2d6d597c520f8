#!/usr/bin/env bash
# A clip cut out of an .mp4 by `ffmpeg -ss ... -c copy` reports frames that no reader shows, and
# decord mixes up the rest.
#
# Versions: the ffmpeg 9.0.2 binary of imageio-ffmpeg 0.8.1, PyAV 18.1.0, decord 0.6.0,
# opencv-python-headless 5.0.0.93, numpy 2.4.6.
#
# One would expect that the number of frames of a short clip is the number of frames that can be
# read from it.
#
# What happens: copying can begin only at a key frame, so ffmpeg keeps the packets from the key
# frame on and an edit list hides those before the cut. Cut at 0.5 s (frame 13 of 60, key frames
# at 0, 20 and 40), the file plays frames 13 to 59.
#   - PyAV's stream.frames and OpenCV's CAP_PROP_FRAME_COUNT say 60; both decode 47.
#   - len(reader) of decord is 60. Read in order, the last 13 are copies of the last frame.
#   - decord asked for frame i alone gives 13 + i as long as i < 20, but i from there on: it shows
#     frame 32 at 19 and frame 20 at 20, so one number means different frames, depending on how it
#     is read.
#   - Cut to .mkv in the same way, the hidden frames are shown: 60 frames, beginning at frame 0.
#
# Why it matters: this is how long videos are cut into the clips of a dataset without encoding
# them again. A sampler that spreads frames over len(reader) ends in a still image, and one that
# draws a window gets frames from another place.
#
# What to do instead: encode the clips (leave out `-c copy`), cut at key frames, or decode and
# count what comes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq imageio-ffmpeg==0.8.1 av==18.1.0 decord==0.6.0 \
    opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$work"
export OPENCV_FFMPEG_LOGLEVEL=-8
venv/bin/python - <<'EOF'
import subprocess

import av
import cv2
import decord
import imageio_ffmpeg
import numpy as np

decord.logging.set_level(decord.logging.QUIET)
COUNT = 60


def number(picture):
    """Frame i is grey, 10 + 4 i."""
    return round((float(picture.mean()) - 10) / 4)


with av.open("whole.mp4", "w") as output:
    options = {"bf": "2", "g": "20", "x264-params": "b-adapt=0:scenecut=0", "crf": "5"}
    stream = output.add_stream("libx264", rate=25, options=options)
    stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
    for i in range(COUNT):
        grey = np.full((96, 128, 3), 10 + 4 * i, np.uint8)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
    output.mux(stream.encode(None))

for path in ("cut.mp4", "cut.mkv"):
    command = f"{imageio_ffmpeg.get_ffmpeg_exe()} -v error -ss 0.5 -i whole.mp4 -c copy {path}"
    subprocess.run(command.split(), check=True)


def by_pyav(path):
    with av.open(path) as container:
        frames = [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        return container.streams.video[0].frames, frames


def by_opencv(path):
    capture, found = cv2.VideoCapture(path), []
    said = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    while True:
        there, picture = capture.read()
        if not there:
            return said, found
        found.append(number(picture))


reader = decord.VideoReader("cut.mp4")
in_order = [number(reader[i].asnumpy()) for i in range(len(reader))]
alone = []
for i in range(len(reader)):
    fresh = decord.VideoReader("cut.mp4")
    alone.append(number(fresh.get_batch([i]).asnumpy()[0]))
said, shown = by_pyav("cut.mp4")
_, of_mkv = by_pyav("cut.mkv")
print(f"PyAV:   says {said}, decodes {len(shown)}: {shown[0]}..{shown[-1]}; "
      f"of the .mkv {of_mkv[0]}..{of_mkv[-1]}")
print("OpenCV: says", by_opencv("cut.mp4")[0], "reads", len(by_opencv("cut.mp4")[1]))
print("decord, in order:", in_order)
print("decord, alone:   ", alone)

right = list(range(13, COUNT))
assert (said, shown) == (60, right) and by_opencv("cut.mp4") == (60, right)
assert in_order == right + [59] * 13
assert alone == [13 + i for i in range(20)] + list(range(20, COUNT))
assert of_mkv == list(range(COUNT))
print("as described")
EOF
