#!/usr/bin/env bash
# Seven codecs decode every picture without ever saying "key frame", and one container calls every
# packet a key frame.
#
# Versions: PyAV 18.1.0 (with FFmpeg 8.1.2), decord 0.6.0, numpy 2.4.6.
#
# One would expect that the first picture that a decoder returns is marked as a key frame, since a
# decoder can begin nowhere else, and that packets marked as key frames are those where decoding
# can begin.
#
# What happens:
#   - CineForm, QuickTime Animation, MS Video 1, Apple Video (rpza), Sorenson (svq1) and Flash
#     Screen Video 1 and 2: 20 of 20 pictures are decoded correctly, and frame.key_frame is false
#     for all of them. ProRes, Cinepak and H.264 mark theirs.
#   - packet.is_keyframe, which comes from the container and not from the decoder, is set for 1 to
#     20 packets. In the .mov with Apple Video it is set for all 20, though most hold only what
#     changed since the picture before. decord believes it: each of 20 frames asked for alone, 14
#     are put together wrongly.
#
# Why it matters: "skip frames until the first key frame", the usual rule for files that are cut
# in the middle of a group of pictures, throws such a file away as unreadable. CineForm is what
# action cameras and editing suites write; QuickTime Animation and Flash Screen Video are what
# screen recordings and old archives hold.
#
# What to do instead: believe what decodes without error from the first packet on, flag or no
# flag; use the flag only behind a seek, and compare one frame read alone with the same frame read
# in order before trusting it.
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

decord.logging.set_level(decord.logging.QUIET)
print("FFmpeg", av.ffmpeg_version_info)
COUNT = 20


def picture(i):
    """Frame i: five bars, its number in binary, and a square that moves."""
    image = np.full((96, 128, 3), 90, np.uint8)
    for bit in range(5):
        image[:48, 24 * bit:24 * bit + 24] = 235 if i >> bit & 1 else 16
    image[60:80, 4 * i:4 * i + 20] = 200
    return image


def number(image):
    return sum(int(image[8:40, 24 * bit + 4:24 * bit + 20].mean() > 125) << bit for bit in range(5))


# file: codec, pixels, and how many of the decoded pictures are marked as key frames
FILES = {"cineform.mov": ("cfhd", "yuv422p10le", 0), "animation.mov": ("qtrle", "rgb24", 0),
         "video1.avi": ("msvideo1", "rgb555le", 0), "apple_video.mov": ("rpza", "rgb555le", 0),
         "sorenson.mov": ("svq1", "yuv410p", 0), "screen1.flv": ("flashsv", "bgr24", 0),
         "screen2.flv": ("flashsv2", "bgr24", 0), "prores.mov": ("prores_ks", "yuv422p10le", 20),
         "cinepak.avi": ("cinepak", "rgb24", 3), "h264.mp4": ("libx264", "yuv420p", 3)}
for path, (codec, pixels, right) in FILES.items():
    with av.open(path, "w") as output:
        stream = output.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, pixels
        stream.codec_context.gop_size = 8
        for i in range(COUNT):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        output.mux(stream.encode(None))

    with av.open(path) as container:
        marked = sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    keys = sum(bool(frame.key_frame) for frame in frames)
    decoded = [number(frame.to_ndarray(format="rgb24")) for frame in frames]
    assert decoded == list(range(COUNT))
    alone = [number(decord.VideoReader(path)[i].asnumpy()) for i in range(COUNT)]
    wrong = sum(a != i for i, a in enumerate(alone))
    print(f"{path:16} decodes to {COUNT} pictures; marked as key frames: {marked:2} packets, "
          f"{keys:2} pictures; decord alone: {wrong} wrong")
    assert keys == right
    assert marked == COUNT or path not in ("apple_video.mov", "cineform.mov", "prores.mov")
    assert (wrong > 10) == (path == "apple_video.mov")
print("as described")
EOF
