#!/usr/bin/env bash
# Reading a torch DataLoader moves the global random generator, even where nothing is shuffled and
# no worker is started; other ways to read the same items do not.
#
# Version: torch 2.14.1, on the CPU.
#
# One would expect that a loader without shuffling, without workers and over a fixed dataset draws
# no random number, so that what a program draws afterwards does not depend on whether, or how
# often, such a loader was read before.
#
# What happens:
#   - each `iter(loader)` draws one number from the global generator, the base seed of workers that
#     do not exist. A loop over the loader that is left after one item moves it as far as a whole
#     pass, and an empty loader moves it as well.
#   - `len(loader)` and reading the dataset itself move nothing; nor does a loader that has a
#     generator of its own. That generator is moved, and if it also shuffles, the base seed is drawn
#     first: the order differs from that of a RandomSampler with the same seed.
#   - with persistent workers it moves at the first pass alone, with workers that are started anew
#     at each. So that option, too, decides what a program draws afterwards.
#
# Why it matters: an evaluation in the middle of a training run changes every mask, dropout and
# augmentation after it, and so does a resumed run that opens its loader once more than the one
# that was never stopped. Two runs with equal seeds then differ from the first evaluation on, with
# nothing random in sight.
#
# What to do instead: give every loader `generator=torch.Generator()`, also those that do not
# shuffle, and draw orders outside of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.14.1 numpy==2.4.6
cd "$work"
cat > program.py <<'EOF'
import torch
from torch.utils.data import DataLoader, RandomSampler

items = torch.arange(4)


def after(action, seed=0):
    """The next number of the global generator after an action."""
    torch.manual_seed(seed)
    action()
    return torch.rand(()).item()


def read(passes=1, most=None, **options):
    loader = DataLoader(options.pop("items", items), batch_size=None, **options)

    def action():
        for _ in range(passes):
            for i, _ in enumerate(loader):
                if i == most:
                    break
    return action


if __name__ == "__main__":
    untouched = after(lambda: None)
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    one_later = torch.rand(()).item()
    print("nothing read:", untouched, "a loader read:", after(read()))
    assert after(read()) == one_later != untouched
    assert after(read(most=0)) == one_later
    assert after(read(items=items[:0])) == one_later
    assert after(read(passes=2)) not in (one_later, untouched)
    assert after(lambda: len(DataLoader(items))) == after(lambda: [*items]) == untouched
    assert after(read(generator=torch.Generator())) == untouched
    workers = dict(num_workers=1, persistent_workers=True)
    assert after(read(**workers)) == one_later
    assert after(read(passes=2, **workers)) == one_later
    assert after(read(passes=2, num_workers=1)) == after(read(passes=2))

    own = torch.Generator().manual_seed(0)
    before = own.get_state()
    read(generator=own)()
    print("the loader's own generator moved:", not torch.equal(own.get_state(), before))
    assert not torch.equal(own.get_state(), before)

    many = torch.arange(1000)
    own.manual_seed(0)
    shuffled = torch.stack([*DataLoader(many, batch_size=None, shuffle=True, generator=own)])
    sampler = RandomSampler(many, generator=torch.Generator().manual_seed(0))
    print("order of the loader:", shuffled[:5].tolist(), "of its sampler:", [*sampler][:5])
    sampler.generator.manual_seed(0)
    assert shuffled.tolist() != [*sampler]
    sampler.generator.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_(generator=sampler.generator)
    assert shuffled.tolist() == [*sampler]
    print("as described")
EOF
venv/bin/python program.py
