"""How fast everything is: a command, not a test. Speed is a ratio within one run, of ways that
take turns.

    python tests/benchmark.py --objective baseline,fwm_hw_ld      what a training step costs, or all
    python tests/benchmark.py --graphs --objective ld,hamiltonian
                                         compiled graphs while token counts change, on the CPU
    python tests/benchmark.py --decode   random windows of videos, beside decord, on the CPU

Every flag of train.py goes with it. tests/beside.py measures one commit beside another.
"""
import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import miniature
import objectives
import train
from data import command
from model import Size
from objectives import OBJECTIVES
from probe import whole

# Dense bfloat16 operations per second by datasheet, two to a multiply-add.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
         "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
WARM_UP, ROUND = 20, 4  # steps before anything is timed, and steps that are timed together
FRAMES, CPU = 300, torch.device("cpu")
COUNTERS = torch._dynamo.utils.counters  # of all that is compiled in this process


def take_turns(ways, rounds, warm_up=0, alike=False, title=""):
    """Median seconds of functions {name: function(round)} that take turns, and whose results must
    agree if alike."""
    seconds = {name: [] for name in ways}
    for i in range(warm_up + rounds):
        results = {}
        for name in list(ways)[::-1 if i % 2 else 1]:
            began = time.perf_counter()
            results[name] = ways[name](i)
            seconds[name].append(time.perf_counter() - began)
        if alike:
            for result in results.values():
                torch.testing.assert_close(result, results["ours"], rtol=1e-4, atol=1e-4)
    medians = {name: statistics.median(each[warm_up:]) for name, each in seconds.items()}
    if title:
        for name, median in medians.items():
            print(f"{title}, {name}: {1000 * median:.1f} ms, {median / medians['ours']:.2f} x ours",
                  flush=True)
    return medians


def draw_steps(config, masking, count, device, ranks=1):
    """The micro-batches of so many steps: random clips, masked as in a run. All ranks have those of
    the first."""
    size = config.batch, 3, config.frames, config.crop, config.crop
    clips = torch.randint(256, size, dtype=torch.uint8)
    source = type("Noise", (list,), {"clips": lambda self, items: clips[:len(items)]})()
    make_masks = partial(objectives.draw_masks, grid=config.grid, masking=masking)
    config = replace(config, micro_batch=config.micro_batch or max(1, config.batch // ranks))
    batches = data.Batches([source], [1.0], config, make_masks, 0, ranks)
    there = clips[:batches.size].to(device)

    def moved(masks):
        return [tuple(ids.to(device) for ids in mask) for mask in masks]
    return [[(there, moved(masks)) for _, masks in batches[step]] for step in range(count)]


def time_steps(trainer, steps):
    """Median over rounds of the seconds that a step takes."""
    def several(i):
        for step in steps[i * ROUND:(i + 1) * ROUND]:
            _, _, norm = trainer.step(i, step)
        norm.item()  # waits for the device
    return take_turns({"ours": several}, len(steps) // ROUND)["ours"] / ROUND


@sdpa_kernel(SDPBackend.MATH)
def plain_costs(trainer, steps):
    """Operations and seconds for each clip of a micro-batch, with attention by its mathematics, and
    how many clips that had: half, or a quarter and so on, where memory does not hold the attention
    of all. torch counts operations in real steps: of flash attention too many, on a CPU none. What
    is computed again in the backward pass is counted, too."""
    count = len(steps[0][0][0])
    try:
        with FlopCounterMode(display=False) as counter:
            time_steps(trainer, steps)
        operations = counter.get_total_flops() / len(steps)
        return operations / count, time_steps(trainer, steps) / count, count
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    trainer.optimizer.zero_grad()
    half = count // 2

    def halved(masks):
        return [tuple(ids[:half] for ids in mask) for mask in masks]
    steps = [[(clips[:half], halved(masks)) for clips, masks in step] for step in steps]
    return plain_costs(trainer, steps)


def largest_kernels(trainer, steps, activity="CUDA", spent="self_device_time_total"):
    """The three kernels that take most of the steps' time on the device, each with its share."""
    activities = [getattr(torch.profiler.ProfilerActivity, activity)]
    with torch.profiler.profile(activities=activities) as profiler:
        time_steps(trainer, steps)
    events = [(getattr(event, spent), event.key) for event in profiler.key_averages()]
    total = sum(time for time, _ in events)
    largest = sorted(events, reverse=True)[:3]
    return ", ".join(f"{name[:60]} {time / total:.0%}" for time, name in largest)


def loader_speed(config, rank, ranks, device):
    """Clips per second, over all ranks, that the loader's workers prepare when nobody trains."""
    begun = 3 * max(1, config.workers)  # batches that are under way when the first one arrives
    with tempfile.TemporaryDirectory() as folder:  # for the list of what cannot be read
        config = replace(config, steps=3 * begun, out=folder)
        _, batches = train.prepare(config, rank, ranks, device)
        times = [time.perf_counter() for _ in data.loader(batches, 0, config.workers, device)]
    return f"{2 * begun * config.batch / (times[-1] - times[begun - 1]):.1f}"


COLUMNS = ("objective", "ms/step", "x first", "clips/s", "loader, clips/s", "TFLOP/s", "MFU",
           "peak memory, GiB", "graph breaks", "recompilations", "x plain")


def show_steps(config, flags):
    """A table of what a training step of each objective costs; on a GPU the largest kernels
    follow."""
    rank, ranks, device = train.start_ranks(config)
    show = partial(print, flush=True) if rank == 0 else lambda line: None
    on_gpu, first = device.type == "cuda", None
    machine = f"{torch.get_num_threads()} threads of a CPU"
    if on_gpu:
        machine = torch.cuda.get_device_name()
    loader = "-"
    if config.data or config.root:
        loader = loader_speed(config, rank, ranks, device)
    show(f"{machine} x {ranks}, torch {torch.__version__}, {config.model}, {config.frames} frames "
         f"of {config.crop} px, batch {config.batch}, micro-batch "
         f"{config.micro_batch or config.batch // ranks}\nplain: float32, uncompiled, attention by "
         f"its mathematics\n\n| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    notes = []
    for name in flags.names:
        costs, kernels = step_costs(replace(config, objective=name), flags, device, ranks)
        first = first or costs["seconds"]
        show(f"| {' | '.join([name, *cells(costs, config, first, loader, machine)])} |")
        if on_gpu:
            notes.append(f"largest kernels of {name}: {kernels}")
    show("\n".join(notes))
    if ranks > 1:
        torch.distributed.destroy_process_group()


def step_costs(config, flags, device, ranks):
    """What a step of an objective costs, {name: number}, and on a GPU its largest kernels."""
    on_gpu, kernels, memory = device.type == "cuda", "", None
    torch._dynamo.reset()  # every objective compiles the same functions, up to a limit
    COUNTERS.clear()
    gc.collect()  # compiled networks hold on to each other, and would count as memory in use
    trainer = train.Trainer(config, device, ranks)
    count = WARM_UP + flags.rounds * ROUND
    steps = draw_steps(config, trainer.objective.masking, count, device, ranks)
    for step in steps[:WARM_UP]:
        trainer.step(0, step)
    steps, warm = steps[WARM_UP:], COUNTERS["stats"]["unique_graphs"]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = time_steps(trainer, steps)
    breaks = COUNTERS["graph_break"].total()
    again = COUNTERS["stats"]["unique_graphs"] - warm
    if on_gpu:
        memory = torch.cuda.max_memory_allocated() / 2 ** 30
        kernels = largest_kernels(trainer, steps[:ROUND])

    trainer = None  # makes room
    plain = train.Trainer(replace(config, compile=False), device, ranks)
    plain.autocast = torch.autocast(device.type, enabled=False)
    operations, each, count = plain_costs(plain, steps[:2 * ROUND])  # fewer: it is slow
    return dict(seconds=seconds, breaks=breaks, again=again, memory=memory,
                operations=operations, plain=each, count=count,
                clips=len(steps[0][0][0])), kernels


def cells(costs, config, first, loader, machine):
    """What a row of the table says of the costs of a step, but for the name."""
    seconds, clips = costs["seconds"], costs["clips"]
    rate = costs["operations"] * clips / seconds
    on_gpu = costs["memory"] is not None
    peak = next((PEAKS[name] for name in PEAKS if on_gpu and name in machine), None)
    plain = f"{costs['plain'] * clips / seconds:.2f}"
    if costs["count"] < clips:
        plain += f" (of {costs['count']} clips)"
    graphs = ["-", "-"]
    if config.compile or config.compile is None and on_gpu:
        graphs = [str(costs["breaks"]), str(costs["again"])]
    return [f"{1000 * seconds:.1f}", f"{seconds / first:.2f}", f"{config.batch / seconds:.1f}",
            loader, f"{rate / 1e12:.3g}", f"{rate / peak:.0%}" if peak else "unknown",
            f"{costs['memory']:.1f}" if on_gpu else "-", *graphs, plain]


def show_graphs(config, flags):
    """How many graphs compiled steps need whose token counts change, and how many of them after
    the warm-up."""
    size = Size(96, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    train.SIZES["graphs"] = size
    print("| objective | token counts | graphs | graph breaks | recompilations |\n" + "|---" * 5
          + "|")
    for name in flags.names:
        torch._dynamo.reset()
        COUNTERS.clear()
        config = replace(config, objective=name, model="graphs", compile=False)
        ours, plain = (train.Trainer(config, CPU) for _ in range(2))
        ours.model.compile(fullgraph=True, backend="eager")  # a graph break would be an error
        (clips, _), = draw_steps(config, ours.objective.masking, 1, CPU)[0]
        t, h, w = config.grid
        # For t, `spectral` has another graph.
        counts = torch.randint(t + 1, t * h * w - 2, (config.steps, 2)).tolist()
        counts[0] = config.frames, config.crop  # that these are equal is no rule
        for step, pair in enumerate(counts):
            orders = [torch.rand(len(clips), t * h * w).argsort(1) for _ in pair]
            parts = [order.tensor_split([count], dim=1) for order, count in zip(orders, pair)]
            micro_batch = clips, [tuple(ids.sort().values for ids in part) for part in parts]
            found, _, _ = ours.step(step, [micro_batch])
            if step == 0:
                expected, _, _ = plain.step(0, [micro_batch])
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            if step < WARM_UP:
                warm = COUNTERS["stats"]["unique_graphs"]
        graphs, breaks = COUNTERS["stats"]["unique_graphs"], COUNTERS["graph_break"].total()
        print(f"| {name} | {len({*map(tuple, counts)})} | {graphs} | {breaks} | {graphs - warm} |",
              flush=True)


def show_decoding(config, flags):
    """Random windows of 16 frames, every second one, from h264 of 10 s; each opens its file, as
    for a loader."""
    def picture(*what, numbered=miniature.picture):  # noise keeps the decoder busy
        noise = torch.randint(28, (*what[1:], 3), dtype=torch.uint8).numpy()
        return numbered(*what) // 2 + noise
    draws = [data.generator_for(i) for i in range(flags.rounds + 1)]
    windows = [data.window(FRAMES, 16, 2, draw) for draw in draws]
    ways = {"ours": lambda i: data.read_video(path, lambda count, rate: windows[i]).frames}
    try:
        import decord
        ways["decord"] = lambda i: decord.VideoReader(path, num_threads=1).get_batch(
            windows[i]).asnumpy()
    except ImportError:
        print("decord is missing, so ours stands alone; `pip install decord` gives the comparison")
    for gop in (12, 250):
        with (tempfile.TemporaryDirectory() as folder,
              mock.patch.object(miniature, "picture", picture)):
            path = f"{folder}/{gop}.mp4"
            options = {"g": str(gop)}
            miniature.write_video(path, FRAMES, size=(256, 340), rate=30, options=options)
            size = Path(path).stat().st_size >> 10
            take_turns(ways, flags.rounds, 1, True, f"a key frame every {gop}, {size} KiB")


# What runs, how many rounds, and the flags of train.py that it starts from.
MODES = {None: (show_steps, 5, ""),
         "decode": (show_decoding, 100, ""),
         "graphs": (show_graphs, 1, "--crop 24 --batch 4 --steps 220")}


@command("benchmark.py", smaller="--batch, --micro-batch or --model")
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="baseline",
                        help="one or several with commas, or all [baseline]")
    parser.add_argument("--rounds", type=whole(1),
                        help="how often each way is timed [5; --decode 100]")
    for mode in list(MODES)[1:]:
        parser.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    flags, others = parser.parse_known_args(arguments)
    flags.names = flags.objective.split(",")
    if flags.objective == "all":
        flags.names = list(OBJECTIVES)
    show, rounds, preset = MODES[flags.mode]
    flags.rounds = flags.rounds or rounds

    # Random clips stand for any data: a preset that needs some is told of a list that nobody reads.
    given = {flag.split("=")[0] for flag in others} & {"--data", "--root"}
    no_data = [] if given else ["--data", "none"]
    configs = [train.parse([*preset.split(), *no_data, *others, "--objective", name])[0]
               for name in flags.names]
    config = configs[0]
    if no_data:
        config = replace(config, data="")
    show(config, flags)


if __name__ == "__main__":
    sys.exit(main())
