#!/usr/bin/env bash
# Under autocast, positions times frequencies are bfloat16 or float32 depending on how the product
# is written.
#
# Version: torch 2.14.1, on the CPU.
#
# One would expect that the angles of a rotary or sinusoidal embedding keep the float32 of
# positions and frequencies, or at least that all ways to write positions x frequencies are
# treated alike.
#
# What happens, with float32 inputs inside torch.autocast("cpu", torch.bfloat16):
#   - matmul (@), F.linear and tensordot round to bfloat16: of 1,568 positions 581 are told apart,
#     and at frequency 1 an angle is wrong by up to 4 radians.
#   - the same product by broadcasting, torch.outer, or einsum("n,d->nd") stays float32 and exact.
#   - einsum goes over from one to the other with the shapes: einsum("nk,kd->nd") is exact for k =
#     1, but bfloat16 for k = 2 and 3, where the same equation adds the angles of several axes.
#
# Why it matters: a video has 1,568 or more tokens, and three axes (time, row, column) are
# naturally written as one product with a 3 x d matrix. Nothing fails, loss goes down; but
# neighbouring tokens share positions, and evaluation without autocast computes other positions
# than the training did.
#
# What to do instead: compute angles outside autocast (with torch.autocast(device,
# enabled=False)), or by multiplying and adding; assert angles.dtype == torch.float32.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.14.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import torch

positions = torch.arange(1568.0)
ones = torch.ones(4)  # frequency 1
axes = torch.stack((positions // 196, positions // 14 % 14, positions % 14), dim=1)  # [n, 3]
WAYS = {"p[:, None] @ f[None]": lambda: positions[:, None] @ ones[None],
        "F.linear": lambda: torch.nn.functional.linear(positions[:, None], ones[:, None]),
        "tensordot": lambda: torch.tensordot(positions[:, None], ones[None], 1),
        "p[:, None] * f": lambda: positions[:, None] * ones,
        "outer": lambda: torch.outer(positions, ones),
        "einsum n,d->nd": lambda: torch.einsum("n,d->nd", positions, ones),
        "einsum nk,kd->nd, k=1": lambda: torch.einsum("nk,kd->nd", positions[:, None], ones[None])}
rounded = {}
with torch.autocast("cpu", torch.bfloat16):
    for name, product in WAYS.items():
        angles = product()
        error = (angles[:, 0].float() - positions).abs().max().item()
        different = len(angles[:, 0].unique())
        rounded[name] = (different, error)
        print(f"{name:22} {str(angles.dtype):15} {different:5} of 1568 positions told apart, "
              f"largest error {error:g}")
        assert (angles.dtype == torch.bfloat16) == (error > 0)
    for k in (1, 2, 3):
        dtype = torch.einsum("nk,kd->nd", axes[:, :k], torch.rand(k, 4)).dtype
        print(f"einsum nk,kd->nd with k={k}: {dtype}")
        assert dtype == (torch.float32 if k == 1 else torch.bfloat16)
names = list(WAYS)
assert all(rounded[name] == rounded[names[0]] for name in names[:3])
assert rounded[names[0]][0] < 800 and rounded[names[0]][1] >= 1
assert all(rounded[name] == (1568, 0) for name in names[3:])
print("as described")
EOF
