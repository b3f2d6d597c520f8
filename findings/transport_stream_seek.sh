#!/usr/bin/env bash
# Transport streams (.ts, .mts) with B-frames: a seek to a key frame lands behind it, and decord
# loses the first group of pictures.
#
# Versions: PyAV 18.1.0, decord 0.6.0, opencv-python-headless 5.0.0.93, numpy 2.4.6.
#
# One would expect that seeking to the presentation time of a key frame arrives at that key frame,
# that decord's reader[0] is the first frame of the file, and that OpenCV set to frame 1 reads
# frame 1.
#
# What happens: a transport stream is searched by decoding time, while the time that a caller asks
# for is one of presentation. With B-frames a key frame is presented later than it is decoded, so
#   - PyAV, asked for the presentation time of a key frame, goes on with a packet behind it, and
#     the first picture that can be decoded is the next key frame; asked for its decoding time, it
#     finds it;
#   - decord begins at the second key frame (frame 20 here). It reports the right number of frames
#     and fills the end with copies of the last one: 60 frames, of which only 40 are different;
#   - OpenCV reads in sequence correctly, but set to any of the frames 0 to 20 it gives frame 20
#     or 21.
# PyAV and OpenCV say nothing. decord prints one warning of "frames corrupted and recovered from
# nearest frames", and only where there are more than 16, though nothing in the file is corrupted.
# The same packets in .mp4 are read correctly by all three.
#
# Why it matters: camcorders and broadcasts write this container. A training set read by decord
# never shows the first group of pictures of any such clip, and its clips end in a still image
# that looks like a motionless scene.
#
# What to do instead: seek by decoding time and drop what comes before the frame that was wanted,
# or copy the packets into .mp4 or .mkv first, which does not encode anything again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq av==18.1.0 decord==0.6.0 opencv-python-headless==5.0.0.93 \
    numpy==2.4.6
cd "$work"
export OPENCV_FFMPEG_LOGLEVEL=-8  # the decoder complains of each seek on stderr
venv/bin/python - <<'EOF'
import av
import cv2
import decord
import numpy as np

decord.logging.set_level(decord.logging.QUIET)
COUNT, EVERY = 60, 20  # frames, and from one key frame to the next


def number(picture):
    """Frame i is grey, 10 + 4 i."""
    return round((float(picture.mean()) - 10) / 4)


with av.open("a.mp4", "w") as output:
    options = {"bf": "2", "g": str(EVERY), "x264-params": "b-adapt=0:scenecut=0", "crf": "5"}
    stream = output.add_stream("libx264", rate=25, options=options)
    stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
    for i in range(COUNT):
        grey = np.full((96, 128, 3), 10 + 4 * i, np.uint8)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
    output.mux(stream.encode(None))

with av.open("a.mp4") as source, av.open("a.ts", "w") as output:
    stream = output.add_stream_from_template(source.streams.video[0])
    for packet in source.demux(video=0):
        if packet.dts is not None:
            packet.stream = stream
            output.mux(packet)


def in_sequence(path):
    with av.open(path) as container:
        return [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def after_seek(path, kind):
    """The first frame decoded after a seek to the second key frame's "pts" or "dts"."""
    with av.open(path) as container:
        keys = [packet for packet in container.demux(video=0) if packet.is_keyframe]
        target = getattr(keys[1], kind)
    with av.open(path) as container:
        container.seek(target, stream=container.streams.video[0])
        return number(next(container.decode(video=0)).to_ndarray(format="rgb24"))


def by_decord(path):
    reader = decord.VideoReader(path)
    return [number(reader[i].asnumpy()) for i in range(len(reader))]


def by_opencv(path):
    capture, found = cv2.VideoCapture(path), []
    for i in range(COUNT):
        capture.set(cv2.CAP_PROP_POS_FRAMES, i)
        found.append(number(capture.read()[1]))
    return found


right = list(range(COUNT))
for path in ("a.mp4", "a.ts"):
    assert in_sequence(path) == right, "decoding from the start gives every frame"

print("PyAV, seek to key frame 20 of the .ts by pts:", after_seek("a.ts", "pts"),
      "and by dts:", after_seek("a.ts", "dts"))
print("decord .ts:", by_decord("a.ts"))
print("OpenCV .ts:", by_opencv("a.ts"))
assert after_seek("a.mp4", "pts") == 20
assert after_seek("a.ts", "pts") == 40 and after_seek("a.ts", "dts") == 20
assert by_decord("a.mp4") == right and by_opencv("a.mp4") == right
assert by_decord("a.ts") == right[20:] + [59] * 20
opencv = by_opencv("a.ts")
assert set(opencv[:21]) == {20, 21} and opencv[22:] == right[22:]
print("as described")
EOF
