#!/usr/bin/env bash
# torchvision's centre crop rounds half to even: of two odd margins one is cut one pixel further
# right than the other.
#
# Versions: torchvision 0.29.1, torch 2.14.1, pillow 13.0.0.
#
# One would expect that a centre crop begins at floor((side - crop) / 2), as `(side - crop) // 2`
# in most code does.
#
# What happens: it begins at Python's round((side - crop) / 2), which rounds halves to the even
# number. With margins of 1, 3, 5, 7, 9 pixels it begins at 0, 2, 2, 4, 4, where the floor is 0,
# 1, 2, 3, 4: every second odd margin is one pixel off. It is so for tensors and for PIL images,
# in torchvision.transforms and in transforms.v2.
#
# Why it matters: evaluation by a centre crop is meant to be the same everywhere. Resized to a
# short side of 224, videos of 16:9 (398 wide) and 4:3 (298 wide) have even margins and are cut
# alike; those of 227, 231 or 299 columns are not. So two codebases agree on most videos of a
# benchmark and not on the rest, and a test with an even margin does not show it. One pixel
# changes what every patch of a vision transformer sees.
#
# What to do instead: where results have to equal those of other code, slice with floors:
# pictures[..., top:top + crop, left:left + crop].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torchvision==0.29.1 torch==2.14.1 pillow==13.0.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional, v2

CROP = 224
begins = []
for margin in range(12):
    columns = np.arange(CROP + margin, dtype=np.int32)[None].repeat(CROP, 0)  # in each pixel
    tensor, image = torch.from_numpy(columns)[None], Image.fromarray(columns)
    found = {int(v2.functional.center_crop(tensor, [CROP, CROP])[0, 0, 0]),
             int(functional.center_crop(tensor, [CROP, CROP])[0, 0, 0]),
             int(np.asarray(v2.functional.center_crop(image, [CROP, CROP]))[0, 0])}
    assert len(found) == 1, "all three agree"
    begins.append(found.pop())
    print(f"width {CROP + margin}: begins at {begins[-1]}, the floor is {margin // 2}")
assert begins == [round(margin / 2) for margin in range(12)]
assert begins[1::2] == [0, 2, 2, 4, 4, 6]
print("as described")
EOF
