"""How fast this checkout is beside another one: a command, not a test.

    python tests/beside.py OTHER                what follows, at this checkout and at OTHER
    python tests/beside.py OTHER --only tiny    the rows whose names hold a word

Each row is a process per checkout, on one thread; both do the same work in turns, round by round.
Seconds are CPU seconds, so that a busy machine matters little, and the ratio is the median of the
rounds' ratios, from lowest to highest. Memory is the most that a process had resident.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUNDS = 7
COMMANDS = {"train.py --list": "train.py --list", "train.py --help": "train.py --help",
            "a wrong flag": "train.py --stepz 3"}
# Else a process gives memory back and fetches it anew or does not, by chance: a factor of two.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
STEP = "--objective fwm_hw_ld --device cpu --workers 0 --steps 100 "
TINY, VIT_B = STEP, STEP + "--model vit_base --patch 16 --frames 16 --crop 112 --batch 8"
VIDEOS = {  # how each is written: `miniature.write_video`
    "h264.mp4, a key frame every 12": ("12.mp4", dict(options={"g": "12"})),
    "h264.mp4, a key frame every 250": ("250.mp4", dict(options={"g": "250"})),
    "mpeg4.avi": ("plain.avi", dict(codec="mpeg4", options={"g": "12"})),
    "mpeg4.avi, frames packed": ("packed.avi", None),
    "h264.ts with B frames": ("b.ts", dict(frames=1500, options={"g": "50", "bf": "2"})),
    "h264.mp4 with B frames, cut by copying": ("cut.mp4", dict(
        frames=1500, options={"g": "250", "bf": "2"})),
}


# ------------------------------------------------------- work, by the modules of either checkout


def a_step(flags, share):
    """A training step, at this share of the run."""
    import torch

    import data
    import train
    config = train.parse([*flags.split(), "--out", tempfile.mkdtemp()])[0]
    trainer, batches = train.prepare(config, 0, 1, torch.device("cpu"))
    first = int(share * config.steps) + 1  # not a step whose losses are logged
    clips = enumerate(data.loader(batches, first), first)

    def work():
        trainer.step(*next(clips))
    return work


def heads(recipe, shape, tested, shots, classes):
    """Five heads for each of several factors, of so many classes, on the first channels of random
    features [n, N, D]; returns their accuracies."""
    import torch

    import probe
    recipe = probe.FEW if recipe == "few" else probe.BENCHMARKS[recipe]._replace(epochs=1)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    sets = []
    for count in classes:
        labels = torch.arange(len(features)) % count
        features[:, :, :count] += torch.nn.functional.one_hot(labels).half().unsqueeze(1) / 4
        sets.append([probe.Labelled(features[rows], labels[rows])
                     for rows in (slice(None), slice(tested))])

    def work():
        return [top for each in sets
                for top in probe.accuracies(recipe, *each, range(5), torch.device("cpu"), shots)]
    return work


def random_windows(path):
    """Twenty random windows of 16 frames, every second one."""
    import data
    draws = iter(range(10 ** 6))

    def work():
        for _ in range(20):
            generator = data.generator_for(next(draws))
            data.read_video(path, lambda count, rate: data.window(count, 16, 2, generator))
    return work


def jobs(folder):
    rows = {"step, tiny, first half": partial(a_step, TINY, 0.1),
            "step, tiny, second half": partial(a_step, TINY, 0.7),
            "step, ViT-B, first half": partial(a_step, VIT_B, 0.1),
            "step, ViT-B, second half": partial(a_step, VIT_B, 0.7),
            "15 heads, 5 labels": partial(heads, "few", (640, 64, 128), 256, 5, (8, 32, 8)),
            "5 heads, ViT-B's tokens": partial(heads, "diving48", (48, 1568, 768), 16, 0, (8,))}
    for name, (file, _) in VIDEOS.items():
        rows[f"decoding {name}"] = partial(random_windows, f"{folder}/{file}")
    return rows


def serve(name, folder):
    """In a process of a checkout: a round for each line of input, answered by its CPU seconds, the
    memory so far in MiB, and accuracies, if any."""
    sys.path[0] = os.getcwd()
    import torch
    torch.set_num_threads(1)
    work = jobs(folder)[name]()
    for _ in sys.stdin:
        began = time.process_time()
        found = work() or []
        spent = time.process_time() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(spent, memory, *found, flush=True)


# ------------------------------------------------------------------------------------- the table


def show(name, old, new, unit, ratios):
    print(f"| {name} | {old:.3g} {unit} | {new:.3g} {unit} | {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


def take_turns(name, ways, rounds):
    """A row of the table: CPU seconds of {checkout: function(round)}, the other checkout first."""
    seconds = [[], []]
    for i in range(1 + rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            seconds[j].append(ways[j]())
    old, new = (each[1:] for each in seconds)  # the first is for warming up
    show(name, statistics.median(old), statistics.median(new), "s",
         [a / b for a, b in zip(old, new)])


def command_seconds(command, checkout):
    """CPU seconds of a command and its children, from start to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command.split()], cwd=checkout, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(name, folder, checkouts, rounds):
    """A row of time; for steps one of memory; for heads one of accuracy."""
    command = [sys.executable, __file__, ".", "--serve", name, "--folder", folder]
    environment = os.environ if name.startswith("step") else os.environ | KEEP_MEMORY
    servers = [subprocess.Popen(command, cwd=checkout, env=environment, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True) for checkout in checkouts]
    memory, accuracies = [0.0, 0.0], [[], []]

    def ask(i):
        print("go", file=servers[i].stdin, flush=True)
        answer = servers[i].stdout.readline().split()
        if not answer:
            raise SystemExit(f"beside.py: {name} does not run at {checkouts[i]}")
        spent, memory[i], *accuracies[i] = map(float, answer)
        return spent
    try:
        take_turns(name, [partial(ask, 0), partial(ask, 1)], rounds)
        if name.startswith("step"):
            show(f"memory of {name}", *memory, "MiB", [memory[0] / memory[1]])
        if accuracies[0]:
            apart = max(abs(a - b) for a, b in zip(*accuracies))
            means = [statistics.mean(each) for each in accuracies]
            show(f"accuracies of {name}, apart by up to {apart:.2f}", *means, "%",
                 [means[0] / means[1]])
    finally:
        for server in servers:
            server.communicate()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER", help="a checkout of another commit")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.serve:
        return serve(flags.serve, flags.folder)

    checkouts = flags.other.resolve(), HERE.parent
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(f"| | {flags.other} | here | times as fast, or as small |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in COMMANDS if flags.only in name]:
            run = partial(command_seconds, COMMANDS[name])
            take_turns(name, [partial(run, checkout) for checkout in checkouts], flags.rounds)
        for name in [name for name in jobs(folder) if flags.only in name]:
            if name.startswith("decoding "):
                import miniature
                file, how = VIDEOS[name.removeprefix("decoding ")]
                path = f"{folder}/{file}"
                if how is None:
                    miniature.write_packed_avi(path, 300, size=(256, 340))
                else:
                    how = dict(frames=300, size=(256, 340), rate=30) | how
                    miniature.write_video(path, **how)
                if file == "cut.mp4":
                    miniature.cut_away(path, 10)
            compare(name, folder, checkouts, flags.rounds)


if __name__ == "__main__":
    main()
