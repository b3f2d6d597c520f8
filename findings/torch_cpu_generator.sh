#!/usr/bin/env bash
# torch's CPU generator ignores the upper half of a seed, and normal numbers depend on whether 16
# are drawn at once.
#
# Version: torch 2.14.1, on the CPU.
#
# One would expect that different 64-bit seeds give different numbers, since manual_seed takes
# them and initial_seed() returns them whole, and that randn(n) begins with the numbers that n
# calls of randn(1) would give.
#
# What happens:
#   - manual_seed(s) and manual_seed(s + 2**32) give the same numbers; only the lower 32 bits are
#     used. Seeds put together as (run << 32) | step give every run the numbers of run 0, and
#     seeds drawn from 62 bits collide after tens of thousands: 3 of 200,000 here.
#   - up to 15 normal numbers drawn in one call are those of as many single calls. From 16 on
#     another rule computes them: randn(15) and randn(16) with the same seed begin with different
#     numbers, four calls of randn(24) give other numbers than one of randn(96), and four calls of
#     randn(16) give the same as one of randn(64).
#   - float64 and float32 normal numbers of one seed agree for up to 15 numbers and not from 16
#     on. Uniform float32 numbers do not depend on how many are drawn at once.
#
# Why it matters: clips, masks and weights are drawn by seed so that runs can be compared and
# resumed. Runs meant to be independent may share every draw, so their spread says nothing; and
# noise drawn for a batch at once differs from noise drawn clip by clip with the same seed, or
# does not, depending on the size.
#
# What to do instead: hash (run, step) into 32 bits, for instance by numpy's SeedSequence, rather
# than shifting one of them; and keep the sizes of draws that are to be repeated.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.14.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import numpy as np
import torch


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def uniform(seed, count=8):
    return torch.rand(count, generator=seeded(seed))


def normal(count, dtype=torch.float32):
    return torch.randn(count, generator=seeded(0), dtype=dtype)


def normal_in_calls(each, calls):
    generator = seeded(0)
    return torch.cat([torch.randn(each, generator=generator) for _ in range(calls)])


print("seeds 7, 7 + 2**32:", uniform(7, 3).tolist(), uniform(7 + 2 ** 32, 3).tolist())
assert seeded(7 + 2 ** 32).initial_seed() == 7 + 2 ** 32
for run in range(5):
    assert torch.equal(uniform(run << 32 | 7), uniform(7))
seeds = np.random.default_rng(0).integers(0, 2 ** 62, 200_000)
same = len(seeds) - len(np.unique(seeds & 0xFFFFFFFF))
print("of 200,000 seeds of 62 bits so many repeat another:", same)
assert same == 3 and len(np.unique(seeds)) == len(seeds)

print("randn(15):", normal(15)[:3].tolist(), "randn(16):", normal(16)[:3].tolist())
assert torch.equal(normal(15), normal_in_calls(1, 15))
assert not torch.isclose(normal(16), normal_in_calls(1, 16)).all()
assert not torch.isclose(normal(15), normal(16)[:15]).any()
assert torch.equal(normal(64), normal_in_calls(16, 4))
assert not torch.isclose(normal(96), normal_in_calls(24, 4)).all()
assert torch.equal(normal(15), normal(15, torch.float64).float())
assert not torch.isclose(normal(16), normal(16, torch.float64).float()).any()
generator = seeded(0)
singly = torch.cat([torch.rand(1, generator=generator) for _ in range(32)])
assert torch.equal(uniform(0, 32), singly)
print("as described")
EOF
