#!/usr/bin/env bash
# PyAV's frame.pts of an H.264 .avi with B-frames does not ascend, and of other .avi files it
# begins one frame late.
#
# Versions: PyAV 18.1.0 (with FFmpeg 8.1.2), numpy 2.4.6.
#
# One would expect that frame.pts (and frame.time) of decoded frames ascends, since that is the
# order in which they are shown, and that it begins at 0; so that frames can be sorted by it, or
# the frame at a time be looked up by it.
#
# What happens: an .avi stores no presentation times. FFmpeg fills them in while it reads.
#   - H.264 with B-frames: frames 0 to 6 come in the right order, with the times 1, 3, 4, 2, 6, 7,
#     5. Sorted by time, 54 of 60 frames stand in the wrong place.
#   - MPEG-4 with B-frames (as XviD and DivX write it) and H.264 without: times ascend, but from 1
#     on, so a lookup by round(time * rate) gives the frame before the one that is meant.
#   - MPEG-4 without B-frames: times are 0, 1, 2, ... as they should be; and so they are for all
#     of these in .mp4.
# Nothing tells these kinds of times apart: packet.pts is set for all.
#
# Why it matters: common ways to sample a clip (the frames nearest to given times; sort a batch of
# frames by pts) give a clip whose motion jumps back and forth, made of whole and sharp pictures.
#
# What to do instead: count frames in the order of decoding. Where the times of decoded frames do
# not ascend from 0, use neither times nor a seek by time.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq av==18.1.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import av
import numpy as np

COUNT = 60
MPEG4 = {"bf": "2", "b_strategy": "0", "g": "20", "qmin": "1", "qmax": "3"}
H264 = {"bf": "2", "g": "20", "x264-params": "b-adapt=0:scenecut=0", "crf": "5"}
FILES = {"h264.avi": ("libx264", H264), "mpeg4.avi": ("mpeg4", MPEG4),
         "no_b_h264.avi": ("libx264", H264 | {"bf": "0"}),
         "no_b_mpeg4.avi": ("mpeg4", MPEG4 | {"bf": "0"}),
         "h264.mp4": ("libx264", H264), "mpeg4.mp4": ("mpeg4", MPEG4)}


def number(picture):
    """Frame i is grey, 10 + 4 i."""
    return round((float(picture.mean()) - 10) / 4)


times = {}
for path, (codec, options) in FILES.items():
    with av.open(path, "w") as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for i in range(COUNT):
            grey = np.full((96, 128, 3), 10 + 4 * i, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        output.mux(stream.encode(None))

    with av.open(path) as container:
        frames = list(container.decode(video=0))
    with av.open(path) as container:
        assert all(packet.pts is not None for packet in container.demux(video=0) if packet.size)
    decoded = [number(frame.to_ndarray(format="rgb24")) for frame in frames]
    assert decoded == list(range(COUNT)), "frames come in the order in which they are shown"
    times[path] = [round(frame.time * 25) for frame in frames]
    by_time = sorted(range(COUNT), key=lambda i: times[path][i])
    wrong = sum(a != i for i, a in enumerate(by_time))
    print(f"{path:14} times of frames 0 to 9, in frames: {times[path][:10]}; "
          f"sorted by time, {wrong} are in the wrong place")
    assert (wrong > 40) == (path == "h264.avi")

assert times["h264.avi"][:7] == [1, 3, 4, 2, 6, 7, 5]
assert times["mpeg4.avi"] == times["no_b_h264.avi"] == list(range(1, COUNT + 1))
for path in ("no_b_mpeg4.avi", "h264.mp4", "mpeg4.mp4"):
    assert times[path] == list(range(COUNT))
print("as described")
EOF
