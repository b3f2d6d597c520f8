"""How fast everything is: a command, not a test. Speed is a ratio within one run, of ways that take turns.

    python tests/benchmark.py --objective baseline,fwm_hw_ld        what a training step costs (or --objective all)
    python tests/benchmark.py --plain [--compile]                   the step of fwm_hw_ld, beside one written plainly
    python tests/benchmark.py --graphs --objective ld,hamiltonian   compiled graphs while token counts change
    python tests/benchmark.py --decode                              random windows of videos, beside decord
    python tests/benchmark.py --head                                the attentive head, beside nn.MultiheadAttention
    python tests/benchmark.py --few --beside DIR                    few-label heads, beside those of another checkout
    python tests/benchmark.py --heads --beside DIR                  five heads on ViT-B's tokens, likewise

Every flag of train.py goes with it; all but the first run on the CPU."""
import argparse
import gc
import importlib
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
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import miniature
import objectives
import probe
import train
from data import command, number
from model import Size
from objectives import OBJECTIVES, losses
from probe import AttentiveHead

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
         "RTX 4090": 165e12}  # dense bfloat16 operations per second by datasheet, two to a multiply-add
WARM_UP, ROUND = 20, 4  # steps before anything is timed, and steps that are timed together
FRAMES, HEAD_SHAPES, CPU = 300, [(16, 1568, 768), (64, 64, 128)], torch.device("cpu")
COUNTERS = torch._dynamo.utils.counters  # of all that is compiled in this process


def take_turns(ways, rounds, warm_up=0, alike=False, title=""):
    """Median seconds of functions {name: function(round)} that take turns, and whose results must agree if alike."""
    seconds = {name: [] for name in ways}
    for i in range(warm_up + rounds):
        results = {}
        for name in list(ways)[::-1 if i % 2 else 1]:
            began = time.perf_counter()
            results[name] = ways[name](i)
            seconds[name].append(time.perf_counter() - began)
        for result in results.values() if alike else ():
            torch.testing.assert_close(result, results["ours"], rtol=1e-4, atol=1e-4)
    medians = {name: statistics.median(each[warm_up:]) for name, each in seconds.items()}
    for name, median in medians.items() if title else ():
        print(f"{title}, {name}: {1000 * median:.1f} ms, {median / medians['ours']:.2f} x ours", flush=True)
    return medians


def draw_steps(config, masking, count, device, ranks=1):
    """The micro-batches of so many steps: random clips, masked as in a run. All ranks have those of the first."""
    clips = torch.randint(256, (config.batch, 3, config.frames, config.crop, config.crop), dtype=torch.uint8)
    source = type("Noise", (list,), {"clips": lambda self, items: clips[:len(items)]})()
    make_masks = partial(objectives.draw_masks, grid=config.grid, masking=masking)
    batches = data.Batches([source], [1.0], config, make_masks, 0, ranks)
    there = clips[:batches.size].to(device)
    return [[(there, [tuple(ids.to(device) for ids in mask) for mask in masks]) for _, masks in batches[step]]
            for step in range(count)]


def time_steps(trainer, steps):
    """Median over rounds of the seconds that a step takes."""
    def several(i):
        for step in steps[i * ROUND:(i + 1) * ROUND]:
            _, _, norm = trainer.step(i, step)
        norm.item()  # waits for the device
    return take_turns({"ours": several}, len(steps) // ROUND)["ours"] / ROUND


@sdpa_kernel(SDPBackend.MATH)
def plain_costs(trainer, steps):
    """Operations and seconds for each clip of a micro-batch, with attention by its mathematics, and how many clips that
    had: half, or a quarter and so on, where memory does not hold the attention of all. torch counts operations in real
    steps: of flash attention too many, on a CPU none. What sigreg's checkpoints compute again is counted, too."""
    count = len(steps[0][0][0])
    try:
        with FlopCounterMode(display=False) as counter:
            time_steps(trainer, steps)
        return counter.get_total_flops() / len(steps) / count, time_steps(trainer, steps) / count, count
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    trainer.optimizer.zero_grad()
    return plain_costs(trainer, [[(clips[:count // 2], [tuple(ids[:count // 2] for ids in mask) for mask in masks])
                                  for clips, masks in step] for step in steps])


def largest_kernels(trainer, steps, activity="CUDA", spent="self_device_time_total"):
    """The three kernels that take most of the steps' time on the device, each with its share."""
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, activity)]) as profiler:
        time_steps(trainer, steps)
    events = sorted(((getattr(event, spent), event.key) for event in profiler.key_averages()), reverse=True)
    return ", ".join(f"{name[:60]} {time / sum(time for time, _ in events):.0%}" for time, name in events[:3])


def loader_speed(config, rank, ranks, device):
    """Clips per second, over all ranks, that the loader's workers prepare when nobody trains."""
    begun = 3 * max(1, config.workers)  # batches that are under way when the first one arrives
    with tempfile.TemporaryDirectory() as folder:  # for the list of what cannot be read
        _, batches = train.prepare(replace(config, steps=3 * begun, out=folder), rank, ranks, device)
        times = [time.perf_counter() for _ in data.loader(batches, 0, config.workers, device)]
    return f"{2 * begun * config.batch / (times[-1] - times[begun - 1]):.1f}"


def show_steps(config, flags):
    """A table of what a training step of each objective costs; on a GPU the largest kernels follow."""
    rank, ranks, device = train.start_ranks(config)
    show = partial(print, flush=True) if rank == 0 else lambda line: None
    on_gpu, first, notes = device.type == "cuda", None, ""
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    peak = next((PEAKS[name] for name in PEAKS if on_gpu and name in machine), None)
    loader = loader_speed(config, rank, ranks, device) if config.data or config.root else "-"
    show(f"{machine} x {ranks}, torch {torch.__version__}, {config.model}, {config.frames} frames of {config.crop} px, "
         f"batch {config.batch}, micro-batch {config.micro_batch or config.batch // ranks}\nplain: float32, uncompiled,"
         " attention by its mathematics\n\n| objective | ms/step | x first | clips/s | loader, clips/s | TFLOP/s | MFU "
         "| peak memory, GiB | graph breaks | recompilations | x plain |\n|" + "---|" * 11)
    for name in flags.names:
        torch._dynamo.reset()  # every objective compiles the same functions, and there is a limit to how often
        COUNTERS.clear()
        trainer = plain = None
        gc.collect()  # compiled networks hold on to each other, and would count as memory in use
        config = replace(config, objective=name)
        trainer = train.Trainer(config, device, ranks)
        steps = draw_steps(config, trainer.objective.masking, WARM_UP + flags.rounds * ROUND, device, ranks)
        for step in steps[:WARM_UP]:
            trainer.step(0, step)
        steps, warm, memory = steps[WARM_UP:], COUNTERS["stats"]["unique_graphs"], "-"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = time_steps(trainer, steps)
        breaks, again = COUNTERS["graph_break"].total(), COUNTERS["stats"]["unique_graphs"] - warm
        if on_gpu:
            memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}"
            notes += f"largest kernels of {name}: {largest_kernels(trainer, steps[:ROUND])}\n"
        trainer = None  # makes room
        plain = train.Trainer(replace(config, compile=False), device, ranks)
        plain.autocast, clips = torch.autocast(device.type, enabled=False), len(steps[0][0][0])
        operations, each, count = plain_costs(plain, steps[:2 * ROUND])  # fewer: it is slow
        first, rate = first or seconds, operations * clips / seconds
        compiled = config.compile or config.compile is None and on_gpu
        cells = [name, f"{1000 * seconds:.1f}", f"{seconds / first:.2f}", f"{config.batch / seconds:.1f}", loader,
                 f"{rate / 1e12:.3g}", f"{rate / peak:.0%}" if peak else "unknown", memory,
                 *([str(breaks), str(again)] if compiled else "--"),
                 f"{each * clips / seconds:.2f}" + f" (of {count} clips)" * (count < clips)]
        show(f"| {' | '.join(cells)} |")
    show(notes)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def show_graphs(config, flags):
    """How many graphs compiled steps need whose token counts change, and how many of them after the warm-up."""
    train.SIZES["graphs"] = Size(96, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    print("| objective | token counts | graphs | graph breaks | recompilations |\n|" + "---|" * 5)
    for name in flags.names:
        torch._dynamo.reset()
        COUNTERS.clear()
        ours, plain = (train.Trainer(replace(config, objective=name, model="graphs", compile=False), CPU) for _ in "12")
        ours.model.compile(fullgraph=True, backend="eager")  # a graph break would be an error
        (clips, _), = draw_steps(config, ours.objective.masking, 1, CPU)[0]
        t, h, w = config.grid
        counts = torch.randint(t + 1, t * h * w - 2, (config.steps, 2)).tolist()  # for t, `spectral` has another graph
        counts[0] = config.frames, config.crop  # that these are equal must not be taken for a rule
        for step, pair in enumerate(counts):
            parts = [torch.rand(len(clips), t * h * w).argsort(1).tensor_split([count], dim=1) for count in pair]
            micro_batch = clips, [tuple(ids.sort().values for ids in part) for part in parts]
            found, _, _ = ours.step(step, [micro_batch])
            if step == 0:
                torch.testing.assert_close(found, plain.step(0, [micro_batch])[0], rtol=1e-4, atol=1e-5)
            if step < WARM_UP:
                warm = COUNTERS["stats"]["unique_graphs"]
        graphs, breaks = COUNTERS["stats"]["unique_graphs"], COUNTERS["graph_break"].total()
        print(f"| {name} | {len({*map(tuple, counts)})} | {graphs} | {breaks} | {graphs - warm} |", flush=True)


def plain_losses(outputs, objective, heads, weights):
    """The losses of fwm_hw_ld, the terms in time with features scattered onto the full grid, and boolean masks."""
    kept = {name: term for name, term in objective.terms.items() if name in ("hw", "fwm_orth")}
    values = {**losses(outputs, replace(objective, terms=kept), heads, weights), "fwm_static": 0.0, "ld": 0.0}
    target, half = outputs.h.unflatten(1, (outputs.grid[0], -1)), outputs.h.shape[-1] // 2
    for visible, _, z, _, _ in outputs.masks:
        seen = torch.zeros(outputs.h.shape[:2], dtype=torch.bool).scatter(1, visible, True).view(target.shape[:3])
        full = torch.zeros_like(outputs.h).scatter(1, visible[..., None].expand_as(z), z).view_as(target)
        pairs = seen[:, 1:] & seen[:, :-1]
        now, then = full[:, :-1][pairs], full[:, 1:][pairs]
        error = (heads["ld"](now[:, half:]) - target.diff(dim=1)[pairs]).abs().mean(-1)
        values["fwm_static"] += (then - now)[:, :half].abs().mean() / len(outputs.masks)
        values["ld"] += (len(error) * torch.softmax(error.detach(), dim=0) * error).mean() / len(outputs.masks)
    return {**values, "total": sum(weight * values[name] for name, weight in weights.items())}


def show_plain(config, flags):
    """Our step beside one as it is usually written: with `plain_losses`, and blocks each of which works out its own
    angles, and is computed again in the backward pass. Attention is fused as ours, or goes by its mathematics."""
    config = replace(config, objective="fwm_hw_ld")
    ours, plain = (train.Trainer(replace(config, compile=each), CPU) for each in (config.compile, False))
    plain.model.losses = plain_losses
    for network in (plain.model.encoder, plain.model.target, plain.model.predictor):
        for block in network.blocks:
            block.forward = partial(checkpoint, lambda x, places, block=block.forward, rotary=network.rotary.forward:
                                    block(x, rotary(*places)), use_reentrant=False)
        network.rotary.forward = lambda *places: places
    steps = draw_steps(config, ours.objective.masking, 3 + flags.rounds, CPU)
    ours, plain = (lambda i, trainer=trainer: trainer.step(config.steps - 1, steps[i])[0] for trainer in (ours, plain))
    torch.testing.assert_close(plain(0), ours(0), rtol=1e-4, atol=1e-5)  # before they are timed
    ways = {"ours": ours, "plain": plain, "plain, attention by mathematics": sdpa_kernel(SDPBackend.MATH)(plain)}
    take_turns(ways, flags.rounds, 3, title=f"{torch.get_num_threads()} threads, {config.model}, batch {config.batch}")


def show_decoding(config, flags):
    """Random windows of 16 frames, every second one, from h264 of 10 s; each opens its file, as for a loader."""
    def picture(*what, numbered=miniature.picture):  # noise keeps the decoder busy
        return numbered(*what) // 2 + torch.randint(28, (*what[1:], 3), dtype=torch.uint8).numpy()
    windows = [data.window(FRAMES, 16, 2, data.generator_for(i)) for i in range(flags.rounds + 1)]
    ways = {"ours": lambda i: data.read_video(path, lambda count, rate: windows[i]).frames}
    try:
        import decord
        ways["decord"] = lambda i: decord.VideoReader(path, num_threads=1).get_batch(windows[i]).asnumpy()
    except ImportError:
        print("decord is missing, so ours stands alone; `pip install decord` gives the comparison")
    for gop in (12, 250):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(miniature, "picture", picture):
            path = f"{folder}/{gop}.mp4"
            miniature.write_video(path, FRAMES, size=(256, 340), rate=30, options={"g": str(gop)})
            take_turns(ways, flags.rounds, 1, True, f"a key frame every {gop}, {Path(path).stat().st_size >> 10} KiB")


def show_head(config, flags):
    """The attentive head, forward and backward, beside the same head by nn.MultiheadAttention."""
    for shape in HEAD_SHAPES:
        tokens, head = torch.randn(shape), AttentiveHead(shape[-1], 48)
        weights, _ = torch.func.stack_module_state([head])
        attention = torch.nn.MultiheadAttention(shape[-1], 8, batch_first=True)
        attention.load_state_dict({
            "in_proj_weight": torch.cat([head.w_query, head.w_key, head.w_value]),
            "in_proj_bias": torch.zeros(3 * shape[-1]),
            "out_proj.weight": head.out.weight, "out_proj.bias": head.out.bias})

        def ours(tokens):
            return head.logits(weights, tokens.unsqueeze(0))[0]
        def usual(tokens):
            x = torch.cat((head.token.expand(len(tokens), -1, -1), tokens), dim=1)
            return head.linear(head.norm((x + attention(x, x, x, need_weights=False)[0])[:, 0]))
        def run(i, forward):
            return (scores := forward(tokens)).square().mean().backward() or scores.detach()
        ways = {"ours": partial(run, forward=ours), "nn.MultiheadAttention": partial(run, forward=usual)}
        take_turns(ways, flags.rounds, 1, True, f"{list(shape)}")


def probe_of(folder):
    """The module probe of another checkout, with that checkout's own other modules."""
    names = ("probe", "data", "model", "objectives", "synthetic")
    mine = {name: sys.modules.pop(name) for name in names}
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("probe")
    finally:
        sys.path.remove(folder)
        sys.modules.update(mine)


def show_probe(flags, shape, tested, recipe, shots):
    """Five heads on random features [n, N, D], float16, beside those of another checkout: CPU
    seconds, and the largest difference of an accuracy in points."""
    if not flags.beside:
        raise ValueError("give --beside DIR, another checkout")
    features, labels = torch.randn(shape).half(), torch.arange(shape[0]) % 8
    features[:, :, :8] += torch.nn.functional.one_hot(labels, 8).half().unsqueeze(1) / 4
    seconds, differences = {"ours": [], "beside": []}, []
    modules = {"ours": probe, "beside": probe_of(flags.beside)}
    for _ in range(flags.rounds):
        found = {}
        for name, module in modules.items():
            sets = [module.Labelled(features[:count], labels[:count]) for count in (shape[0], tested)]
            began = time.process_time()
            found[name] = module.accuracies(recipe, *sets, range(5), "cpu", shots)
            seconds[name].append(time.process_time() - began)
        differences += [abs(a - b) for a, b in zip(found["ours"], found["beside"])]
    ours, beside = (statistics.median(each) for each in seconds.values())
    print(f"five heads, {shots or 'all'} labels, {list(shape)}: ours {ours:.2f} s, beside {beside:.2f} s, "
          f"{beside / ours:.2f} x ours; accuracies differ by up to {max(differences):.2f} points")


def show_few(config, flags):
    """The few-label heads of the table that ends a run: their draws and orders of clips are the same."""
    show_probe(flags, (2304, 64, 128), 768, probe.FEW, 5)


def show_heads(config, flags):
    """All labels at ViT-B's size: ours share one order of clips. Then few labels, each its own."""
    show_probe(flags, (48, 1568, 768), 16, probe.BENCHMARKS["diving48"]._replace(epochs=1), 0)
    show_probe(flags, (48, 1568, 768), 16, probe.FEW._replace(steps=2, batch=16), 2)


# What runs, how many rounds, and the flags of train.py that it starts from.
MODES = {None: (show_steps, 5, ""), "decode": (show_decoding, 100, ""), "head": (show_head, 5, ""),
         "few": (show_few, 5, ""), "heads": (show_heads, 5, ""),
         "plain": (show_plain, 15, "--model vit_base --patch 16 --frames 16 --crop 112 --batch 4"),
         "graphs": (show_graphs, 1, "--crop 24 --batch 4 --steps 220")}


@command("benchmark.py", smaller="--batch, --micro-batch or --model")
def main(arguments=None):
    parser = argparse.ArgumentParser(None, None, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="baseline", help="one or several with commas, or all [baseline]")
    parser.add_argument("--rounds", type=number(1), help="how often each way is timed [5; --plain 15, --decode 100]")
    parser.add_argument("--beside", metavar="DIR", help="another checkout, for --few and --heads")
    for mode in list(MODES)[1:]:
        parser.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    flags, others = parser.parse_known_args(arguments)
    flags.names = list(OBJECTIVES) if flags.objective == "all" else flags.objective.split(",")
    show, rounds, preset = MODES[flags.mode]
    flags.rounds = flags.rounds or rounds
    # Random clips stand for any data: a preset that needs some is told of a list that nobody reads.
    no_data = [] if {flag.split("=")[0] for flag in others} & {"--data", "--root"} else ["--data", "none"]
    configs = [train.parse([*preset.split(), *no_data, *others, "--objective", name])[0] for name in flags.names]
    show(replace(configs[0], data="" if no_data else configs[0].data), flags)


if __name__ == "__main__":
    sys.exit(main())
