#!/usr/bin/env bash
# A mirrored recording (selfie cameras) is turned upside down by OpenCV and decord, and PyAV's
# frame.rotation calls it a rotation.
#
# Versions: PyAV 18.1.0, decord 0.6.0, opencv-python-headless 5.0.0.93, imageio 2.38.1 with the
# ffmpeg 9.0.2 binary of imageio-ffmpeg 0.8.1, numpy 2.4.6.
#
# An .mp4 or .mov says by a display matrix how it is to be shown; it can turn a picture and mirror
# it. One would expect that readers apply all of it, or none of it.
#
# What happens, with a picture whose corners are red, green, blue and white:
#   - turned by a quarter or by half: ffmpeg, OpenCV and decord turn the picture, PyAV and
#     imageio's pyav plugin do not;
#   - mirrored left to right: the ffmpeg command shows it mirrored. OpenCV and decord turn it by
#     180 degrees, so it stands on its head; frame.rotation says -180;
#   - mirrored top to bottom: ffmpeg shows it so; frame.rotation says 0, and OpenCV and decord
#     leave it as stored, that is upside down;
#   - mirrored about its diagonal: ffmpeg shows it so; frame.rotation says -90, and OpenCV and
#     decord turn it by a quarter.
# A mirrored matrix has no angle, and all three compute one from two of its four numbers.
#
# Why it matters: phones can write mirrored matrices with their front camera. Such clips come
# upside down into a training set without a word, and a set read by OpenCV differs from the same
# set read by PyAV.
#
# What to do instead: read the display matrix itself and check the sign of its determinant before
# using an angle, or read these files through ffmpeg; in PyAV, turn frames oneself, since nothing
# else does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq av==18.1.0 imageio==2.38.1 imageio-ffmpeg==0.8.1 decord==0.6.0 \
    opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$work"
export OPENCV_LOG_LEVEL=SILENT
venv/bin/python - <<'EOF'
import struct

import av
import cv2
import decord
import imageio.v3 as imageio
import numpy as np

picture = np.full((64, 96, 3), 90, np.uint8)
picture[:16, :16] = 255, 0, 0
picture[:16, -16:] = 0, 255, 0
picture[-16:, :16] = 0, 0, 255
picture[-16:, -16:] = 255


def corners(image):
    """The colours of the corners, row by row: r, g, b or w."""
    names = ""
    for y, x in ((8, 8), (8, -9), (-9, 8), (-9, -9)):
        red, green, blue = image[y, x] > 150
        names += "w" if red and green and blue else "r" if red else "g" if green else "b"
    return names


def fixed(numbers):
    """The nine numbers of a display matrix a b c d, as an .mp4 stores them."""
    a, b, c, d = (65536 * number for number in numbers)
    return struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)


with av.open("plain.mp4", "w") as output:
    stream = output.add_stream("libx264", rate=10, options={"crf": "5"})
    stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv444p"
    for _ in range(10):
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    output.mux(stream.encode(None))
with open("plain.mp4", "rb") as file:
    plain = file.read()
place = plain.index(fixed((1, 0, 0, 1)), plain.index(b"tkhd"))

# matrix a b c d; corners by ffmpeg; by OpenCV and decord; PyAV's frame.rotation
CASES = {"as it is": ((1, 0, 0, 1), "rgbw", "rgbw", 0),
         "turned by 90": ((0, 1, -1, 0), "brwg", "brwg", -90),
         "turned by 180": ((-1, 0, 0, -1), "wbgr", "wbgr", -180),
         "turned by 270": ((0, -1, 1, 0), "gwrb", "gwrb", 90),
         "mirrored left to right": ((-1, 0, 0, 1), "grwb", "wbgr", -180),
         "mirrored top to bottom": ((1, 0, 0, -1), "bwrg", "rgbw", 0),
         "mirrored about diagonal": ((0, 1, 1, 0), "rbgw", "brwg", -90)}
for name, (matrix, right, turned, angle) in CASES.items():
    with open("shown.mp4", "wb") as file:
        file.write(plain[:place] + fixed(matrix) + plain[place + 36:])
    with av.open("shown.mp4") as container:
        frame = next(container.decode(video=0))
    found = {"ffmpeg": corners(imageio.imread("shown.mp4", index=0, plugin="FFMPEG")),
             "OpenCV": corners(cv2.VideoCapture("shown.mp4").read()[1][..., ::-1]),
             "decord": corners(decord.VideoReader("shown.mp4")[0].asnumpy()),
             "PyAV": corners(frame.to_ndarray(format="rgb24")),
             "rotation": frame.rotation}
    print(f"{name:24}", found)
    assert found == {"ffmpeg": right, "OpenCV": turned, "decord": turned, "PyAV": "rgbw",
                     "rotation": angle}
print("as described")
EOF
