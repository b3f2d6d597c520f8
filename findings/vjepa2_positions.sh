#!/usr/bin/env bash
# transformers' VJEPA2: its rotary position embedding is no rotation, and its grid is the
# configured one, whatever the clip.
#
# Versions: transformers 5.24.0, torch 2.14.1.
#
# One would expect of a rotary embedding that it leaves the length of queries and keys alone, and
# that the score of a query and a key depends only on the distance between their positions. And
# one would expect that a clip larger than the configured crop_size is either refused or given
# positions of its own grid.
#
# What happens:
#   - neighbouring channels (2j, 2j+1) form a pair, but the angles are laid out as all frequencies
#     once and then once more, so the two channels of a pair are turned by different angles. Over
#     16 positions a vector of length 4.36 gets lengths from 4.16 to 4.71, and the score of one
#     query and one key, always three positions apart, varies from -5.27 to 1.22. With each angle
#     twice in a row both are constant.
#   - rows and columns are counted by crop_size of the configuration. A model for 64 x 64 takes a
#     clip of 96 x 96 without a word, and its two time steps of 6 x 6 tokens become five time
#     steps of 4 x 4. Of a clip of 48 x 48, the second time step begins in the middle of the grid
#     of the first.
#
# Why it matters: Meta's own code has the first, says so and keeps it, since the V-JEPA 2 weights
# were trained with it; in transformers nothing says so. Whoever puts a usual rotary layer in its
# place, or copies this one for weights that were trained with a usual one, gets wrong features
# without an error. The second gives bad features for every clip that is not crop_size wide and
# high; the library's video processor hides it, since it crops.
#
# What to do instead: compare features with those of the code that trained the weights before
# using them, and for another resolution set crop_size in the configuration when the model is
# made.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq transformers==5.24.0 torch==2.14.1 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import torch
from transformers import VJEPA2Config, VJEPA2Model
from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

CHANNELS, POSITIONS = 20, torch.arange(16)


def rotate(x):
    """A true rotation: both channels of a pair by the same angle. x [D] -> [positions, D]."""
    frequencies = 10000 ** (-torch.arange(CHANNELS // 2) / (CHANNELS / 2))
    angles = (POSITIONS[:, None] * frequencies).repeat_interleave(2, dim=-1)
    swapped = torch.stack((-x[1::2], x[::2]), dim=-1).flatten()
    return x * angles.cos() + swapped * angles.sin()


def rotate_as_library(x):
    return rotate_queries_or_keys(x.expand(1, 1, len(POSITIONS), -1), POSITIONS)[0, 0]


def spread(x):
    return (x.max() - x.min()).item()


def show(name, function):
    """How much the length, and the score at distance 3, change over the positions."""
    lengths = function(x).norm(dim=-1)
    scores = (function(query) @ function(key).T).diagonal(3)
    print(f"{name:12} length {x.norm():.2f} becomes {lengths.min():.2f} to {lengths.max():.2f}, "
          f"scores {scores.min():.2f} to {scores.max():.2f}")
    return spread(lengths), spread(scores)


x, query, key = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(0))
length, score = show("transformers", rotate_as_library)
assert length > 0.3 and score > 1
length, score = show("a rotation", rotate)
assert length < 1e-5 and score < 1e-5

config = VJEPA2Config(hidden_size=60, num_attention_heads=3, num_hidden_layers=1, crop_size=64,
                      frames_per_clip=4, pred_hidden_size=60, pred_num_attention_heads=3,
                      pred_num_hidden_layers=1, num_pooler_layers=1)
model = VJEPA2Model(config).eval()
grids = {}
for side in (64, 96, 48):
    with torch.no_grad():
        tokens = model(torch.zeros(1, 4, 3, side, side), skip_predictor=True).last_hidden_state
    positions = model.encoder.layer[0].attention.get_position_ids(tokens)
    grids[side] = [int(axis.max()) + 1 for axis in positions]
    print(f"{side} x {side}: {tokens.shape[1]} tokens, a grid of {[2, side // 16, side // 16]}; "
          f"positions of {grids[side]}")
    if side == 48:
        second = [int(axis[9]) for axis in positions]
        print("    the second time step begins at (time, row, column)", second)
assert grids == {64: [2, 4, 4], 96: [5, 4, 4], 48: [2, 4, 4]} and second == [0, 2, 1]
print("as described")
EOF
