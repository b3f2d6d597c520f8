#!/usr/bin/env bash
# numpy: three uint8 integers drawn in one call are not the three that three calls give; of int32,
# int64 and floats they are.
#
# Version: numpy 2.4.6.
#
# One would expect that default_rng(42).integers(0, 80, 3, dtype=np.uint8) gives what three calls
# with the same arguments give one after another, as it does for int64 and for floats, and that
# the dtype only says how the result is stored.
#
# What happens:
#   - one call gives 42 11 67, three calls give 42 64 60. A 32-bit random word serves four uint8
#     numbers (or two uint16), but only within a call: what is left of the word is thrown away
#     when the call ends.
#   - the dtype changes the values: uint8 begins with 42 11 67, uint16 with 12 7 78, int32 and
#     int64 with 7 61 52.
#   - what is drawn afterwards differs too: the next float is 0.44 after the one call and 0.86
#     after the three.
#   - with int32, half of a 64-bit word stays in the generator for the next small draw, even
#     across draws of another kind.
#
# Why it matters: synthetic datasets are published as a seed and some lines of code. Who draws a
# colour as three channels one by one, or leaves out dtype=np.uint8, gets another background, and
# after it another motion and other labels.
#
# What to do instead: draw int64 and convert with .astype, or write the dtype and the size of
# every call into the description of the dataset.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import numpy as np

once, split = {}, {}
for dtype in (np.uint8, np.uint16, np.int32, np.int64):
    once[dtype] = np.random.default_rng(42).integers(0, 80, 3, dtype=dtype).tolist()
    generator = np.random.default_rng(42)
    split[dtype] = [int(generator.integers(0, 80, dtype=dtype)) for _ in range(3)]
    print(f"{dtype.__name__:6} in one call {once[dtype]}, in three calls {split[dtype]}")
assert once[np.uint8] == [42, 11, 67] and split[np.uint8] == [42, 64, 60]
assert once[np.uint16] == [12, 7, 78] and split[np.uint16] != once[np.uint16]
assert once[np.int32] == split[np.int32] == once[np.int64] == split[np.int64] == [7, 61, 52]

one_call, three_calls = np.random.default_rng(42), np.random.default_rng(42)
one_call.integers(0, 80, 3, dtype=np.uint8)
for _ in range(3):
    three_calls.integers(0, 80, dtype=np.uint8)
after = round(one_call.random(), 2), round(three_calls.random(), 2)
print("the next float:", after)
assert after == (0.44, 0.86)

kept = np.random.default_rng(42)
first = int(kept.integers(0, 80, dtype=np.int32))
kept.random()
second = int(kept.integers(0, 80, dtype=np.int32))
print("int32, a float, int32:", first, second, "- as without the float:", once[np.int32][:2])
assert [first, second] == once[np.int32][:2]
print("as described")
EOF
