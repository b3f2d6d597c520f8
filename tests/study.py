"""Many runs, and what they say together: sweeps, tables, intervals, comparisons. Measures; nothing here teaches.

    python tests/study.py --objective all --seeds 0,1,2 --out runs/study    a sweep; the same command goes on if cut
    python tests/study.py --with mine.py --objective mine                   with objectives of your own, 3 seeds
    python tests/study.py --table runs/study/results.jsonl                  what the runs found, differences from one
    python tests/study.py --answer tests/results/study.jsonl                the primary question, and the trade-off
    python tests/study.py --agree A.jsonl B.jsonl                           do two sweeps show the same?
    python tests/study.py --compare A.json B.json                           two results-*.json of probe.py, draw by draw
    python tests/study.py --compare A0.json A1.json B0.json B1.json         runs of A, then as many of B, run by run
    python tests/study.py --gradients                                       which loss trains which network

A sweep takes every flag of train.py but --seed and --resume. Each run is a process of its own, with one thread on a
CPU; its line of results.jsonl holds its name, flags, seed, commit, machine, what the probes found (a list for each draw
of few labels) and what was logged. The objective `untrained` is random weights.
"""
import argparse
import csv
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import objectives
import probe
import train
from data import command, number, read_json, write_json
from model import Size
from synthetic import WORLDS

# ---------------------------------------------------------------------------------------------------------- a sweep


def config_of(flags):
    """The Config of a run; that of `untrained` is the baseline's."""
    return train.parse([flag.replace("--objective=untrained", "--objective=baseline") for flag in flags])[0]


def one_run(flags, shots):
    """Train as train.py would, probe the encoder, and write study.json into the run folder; returns the exit status."""
    config, weights, logged = config_of(flags), None, {}
    folder, settings = Path(config.out), asdict(config)
    if "--objective=untrained" in flags:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        if stopped := train.main([*flags, "--resume", "--probe-clips=0"]):
            return stopped
        checkpoint = probe.load_checkpoint(folder / "last.pt")
        weights, logged = checkpoint[checkpoint["evaluated"]], logged_numbers(folder / "metrics.csv")
    encoder, numbers = probe.make_encoder(settings, weights), {}
    if config.preset == "blobs":
        numbers = probe_blobs(encoder, settings, shots, folder)
    elif config.probe_clips:
        found = probe.probe_shapes(encoder, settings, config.probe_clips, shots=shots)
        numbers = {f"{kind} {factor}": value for kind, values in found.items() for factor, value in values.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    changed = {name: value for name, value in settings.items() if value != getattr(train.Config, name)
               and name not in (*train.NOT_COMPUTED, "objective", "seed")}
    write_json(folder / "study.json", {"name": folder.name.rpartition("-seed")[0], "seed": config.seed,
                                       "flags": changed, "commit": commit.strip(), "machine": machine(),
                                       "numbers": numbers | logged})
    return 0


BLOB_CLIPS = "800,400"  # to learn from, and to be tested on: other clips than those of any run


def probe_blobs(encoder, config, shots, folder):
    """Few labels of the study's blobs: {"5 direction": top-1 % of each draw, ...}."""
    flags = probe.parse(["--untrained=tiny", "--benchmark=blobs", "--blob-clips", BLOB_CLIPS, "--workers=0",
                         f"--shots={','.join(map(str, shots))}"])
    name, *sources = probe.open_sources(flags, 8, 160)
    probe.evaluate(probe.Frozen(encoder, config, objectives.Masking(), "the encoder", folder), name, sources, flags)
    found = read_json(folder / f"results-blobs-{BLOB_CLIPS.replace(',', '-')}.json")["measurements"]
    return {f"{k} direction": found[f"{k} labels, attentive head"]["values"] for k in shots}


def machine():
    """The processor, its vector instructions, threads and torch, which is all that rounding depends on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [*re.findall("^model name\\s*: (.*)", info, re.M), sys.platform]
    vectors = "AVX-512" if "avx512f" in info else "no AVX-512"
    return f"{names[0]}, {vectors}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def logged_numbers(path):
    """Of a metrics.csv: the last feature_std and effective_rank; first and last `pred`; `hard_share`, where it is."""
    lines = list(csv.DictReader(path.read_text().splitlines()))
    found = {name: float(lines[-1][name]) for name in ("feature_std", "effective_rank")}
    for name in ("pred", "hard_share"):
        if name in lines[0]:
            values = [float(line[name]) for line in lines]
            found |= {f"{name}, first": values[0], f"{name}, mean": statistics.mean(values),
                      f"{name}, last": values[-1]}
    return found


def sweep(flags, train_flags):
    """Every objective with every seed, some at a time. What is finished is left alone, what was begun goes on."""
    known, out = [*objectives.OBJECTIVES, "untrained"], flags.out
    names = known if flags.objective == "all" else flags.objective.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown objective '{name}'; known are {', '.join(known)}")
    runs = {}
    for seed, name in itertools.product(flags.seeds, names):
        run_flags = [f"--objective={name}", f"--seed={seed}", *train_flags]
        config = config_of(run_flags)
        run = out / Path(config.out).name.removeprefix(f"{config.preset}-").replace(config.objective, name, 1)
        runs[run] = [*run_flags, f"--out={run}"]
    on_cpu = not torch.cuda.is_available()
    jobs = flags.jobs or (os.cpu_count() if on_cpu else 1)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if on_cpu else {})
    child = [sys.executable, __file__, f"--with={flags.own}", f"--shots={','.join(map(str, flags.shots))}", "--child"]
    out.mkdir(parents=True, exist_ok=True)
    finished = [run for run in runs if (run / "study.json").exists()]
    for run in finished:
        note_result(out, run)
    waiting, running, failed = [run for run in runs if run not in finished], {}, []
    with train.StopSignal() as stop, tqdm(total=len(runs), initial=len(finished), unit="run") as bar:
        try:
            while (running or waiting) and not stop.received:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    with open(f"{run}.log", "a") as log:
                        running[run] = subprocess.Popen([*child, *runs[run]], stdout=log, stderr=log, env=environment)
                time.sleep(0.2)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    if status := running.pop(run).returncode:
                        last = (Path(f"{run}.log").read_text().strip().splitlines() or [""])[-1]
                        failed.append(f"{run} failed with exit status {status}; the end of {run}.log: {last}")
                    else:
                        note_result(out, run)
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()  # a run that gets a signal saves and ends
            for process in running.values():
                process.wait()
    print(*failed, sep="\n", end="\n" * bool(failed), file=sys.stderr)
    print("stopped; the same command goes on from there" if stop.received else
          f"{len(runs) - len(failed)} of {len(runs)} runs finished; "
          f"`python tests/study.py --table {out}/results.jsonl` shows them")
    return 128 + stop.received if stop.received else int(bool(failed))


def note_result(out, run):
    """Add a run's line to results.jsonl, once."""
    line = json.dumps(read_json(run / "study.json"))
    with (out / "results.jsonl").open("a+") as file:
        file.seek(0)
        if line not in file.read().splitlines():
            file.write(line + "\n")


# ------------------------------------------------------------------------------------------------------- statistics


@functools.cache
def t_distribution(freedom):
    """Angles a, and the share of |t| below sqrt(freedom) tan(a): SciPy is no dependency."""
    # With t = sqrt(freedom) tan(a) the density of t becomes cos(a)^(freedom - 1), which is easily summed. Of n values
    # the freedom is n - 1, and tan(a) their mean in units of np.std, which divides by n.
    angle = np.linspace(0, math.pi / 2, 400_001)
    share = np.cos((angle[1:] + angle[:-1]) / 2) ** (freedom - 1)
    return angle, np.concatenate(([0], share.cumsum())) / share.sum()


def interval(values):
    """Half the width of the 95 % confidence interval of the mean of values [n], n >= 2, by Student's t."""
    angle, share = t_distribution(len(values) - 1)
    return math.tan(np.interp(0.95, share, angle)) * np.std(values)


def p_value(values):
    """Of a two-sided t-test that the mean of values [n], n >= 2, is zero."""
    angle = math.atan2(abs(np.mean(values)), np.std(values))
    return 1 - float(np.interp(angle, *t_distribution(len(values) - 1)))


def holm(p_values):
    """Which of several hypotheses, {name: p}, Holm's procedure rejects, so that all stand together at 5 %."""
    ordered = sorted(p_values, key=p_values.get)
    for i, name in enumerate(ordered):
        if p_values[name] > 0.05 / (len(ordered) - i):
            return {*ordered[:i]}
    return {*ordered}


def ranks(values):
    """1 for the smallest of values [..., n] to n for the largest; equal ones share the mean of their ranks."""
    values = np.asarray(values)
    smaller = (values[..., None, :] < values[..., None]).sum(-1)
    return smaller + ((values[..., None, :] == values[..., None]).sum(-1) + 1) / 2


def rank_correlation(first, second):
    """Spearman's, the correlation of the ranks: first, second [..., n] -> [...]."""
    a, b = (rank - rank.mean(-1, keepdims=True) for rank in (ranks(first), ranks(second)))
    with np.errstate(invalid="ignore"):  # all equal: not a number
        return (a * b).sum(-1) / np.sqrt((a ** 2).sum(-1) * (b ** 2).sum(-1))


def bootstrap(first, second, draws=10_000, seed=0):
    """The 95 % interval of `rank_correlation`, from drawing the n pairs of two arrays anew with replacement."""
    picked = np.random.default_rng(seed).integers(len(first), size=(draws, len(first)))
    return np.nanquantile(rank_correlation(first[picked], second[picked]), [0.025, 0.975]).tolist()


# ------------------------------------------------------------------------------------------- tables and comparisons

COLUMNS = {f"{k} {factor}": f"{factor}, {k} labels" for k in (1, 5, 20) for factor in probe.FEW_FACTORS}
COLUMNS |= {f"linear {factor}": f"{factor}, linear" for factor in probe.LINEAR_FACTORS}
LOGGED = ("pred, first", "pred, last", "hard_share, first", "hard_share, mean", "hard_share, last")


def read_results(*paths):
    """Lines of results as {name: {seed: numbers}}, lists of draws as their means; objectives in order, then others.
    Names leave out a world and a momentum that all runs share. Raises ValueError where there is no line, where runs of
    one name differ in settings, or a line is damaged."""
    table, settings = {}, {}
    for path in paths:
        for i, text in enumerate(Path(path).read_text().splitlines(), start=1):
            try:
                line = json.loads(text)
                numbers = {name: float(np.mean(value)) for name, value in line["numbers"].items()}
                name, seed, flags = line["name"], line["seed"], line["flags"]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f"line {i} of {path} is not a line of results") from None
            if settings.setdefault(name, flags) != flags:
                raise ValueError(f"line {i} of {path}: this run of {name} has other settings than those before it")
            table.setdefault(name, {})[seed] = numbers
    if not table:
        raise ValueError(f"{', '.join(map(str, paths))} hold no results; a sweep makes them")
    endings = {re.search(rf"(-({'|'.join(WORLDS)}|slow|ema-[\d.]+))*$", name)[0] for name in table}
    if len(endings) == 1:
        table = {name.removesuffix(*endings): runs for name, runs in table.items()}
    return {name: table[name] for name in ("untrained", *objectives.OBJECTIVES) if name in table} | table


def is_dead(runs):
    """Whether features have collapsed in every run, {seed: numbers}."""
    return all("feature_std" in numbers and train.collapsed(numbers) for numbers in runs.values())


def mean_cell(runs, column, digits=1):
    """Mean ± standard deviation over runs, {seed: numbers}, of one column; "-" where it was not measured."""
    values = [numbers[column] for numbers in runs.values() if column in numbers]
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else "-"


def differences(table, reference, columns, *needed):
    """What runs have more than the reference run of the same seed: {(name, column): a list, over seeds that both have}.
    Raises ValueError where the reference, or a name that is needed, has no run."""
    for name in (reference, *needed):
        if name not in table:
            raise ValueError(f"there is no run of '{name}' to compare with; there are {', '.join(table)}")
    base = table[reference]
    return {(name, column): [numbers[column] - base[seed][column] for seed, numbers in runs.items()
                             if column in numbers and column in base.get(seed, {})]
            for name, runs in table.items() if name != reference for column in columns}


def difference_cell(values, marked=False):
    """Mean of differences ± half its 95 % interval; in brackets where that includes 0; * where Holm lets it stand."""
    if len(values) < 2:
        return "-"
    half = interval(values)
    cell = f"{np.mean(values):+.1f} ± {half:.1f}"
    return f"{cell}*" * marked or (cell if abs(np.mean(values)) > half else f"({cell})")


def markdown(columns, rows):
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def tables(paths, reference, only):
    """Print the table of means, and the table of differences to a reference run."""
    table = read_results(*paths)
    shown = {name: runs for name, runs in table.items() if not only or name in only}
    label = {name: f"{name} †" if is_dead(runs) else name for name, runs in table.items()}
    print("Top-1 %, mean ± standard deviation over training seeds; chance is 12.5 for direction and appearance, 3.1 "
          "for motion, 25 for speed.\nn labels: per class, attentive head, mean of 5 draws. linear: linear head on all "
          "labels. †: features have collapsed in every seed, so probes mean nothing.\n")
    measured = {column: about for column, about in COLUMNS.items()
                if any(column in numbers for runs in table.values() for numbers in runs.values())}
    changes, stands = differences(table, reference, measured, *(only or ())), set()
    markdown([*measured.values(), "effective_rank", "feature_std", "seeds"], {
        label[name]: [*(mean_cell(runs, column) for column in (*measured, "effective_rank")),
                      mean_cell(runs, "feature_std", 3), str(len(runs))] for name, runs in shown.items()})
    known = [name for name in table if name in objectives.OBJECTIVES and name != reference]
    others = [name for name in table if name not in (*objectives.OBJECTIVES, reference, "untrained")]
    for family, column in itertools.product((known, others), measured):
        stands |= holm({(name, column): p_value(changes[name, column]) for name in family
                        if len(changes[name, column]) > 3})
    print(f"\nDifference from {reference} in points, paired by seed, with 95 % intervals (Student's t, not corrected). "
          "In brackets: not significant (the interval includes 0).\n*: stands after Holm's correction within its "
          f"column over {len(known)} objectives, or {len(others)} other forms; rows of three seeds carry no mark. "
          f"{len(measured) * len(known + others)} comparisons.\n")
    markdown(measured.values(), {
        label[name]: [difference_cell(changes[name, column], (name, column) in stands) for column in measured]
        for name in shown if name != reference})
    print("\nLogged while training, mean ± standard deviation over seeds\n")
    markdown(LOGGED, {name: [mean_cell(runs, column, 3) for column in LOGGED] for name, runs in shown.items()
                      if name != "untrained"})


def answer(paths):
    """Print the primary comparisons, fixed before the runs, and the trade-off of motion with appearance."""
    table, columns = read_results(*paths), ("5 motion", "5 appearance")
    changes = differences(table, "baseline", columns, "fwm_hw_ld", "ld")
    p_values = {key: p_value(changes[key]) for key in itertools.product(("fwm_hw_ld", "ld"), columns)}
    print("Difference from baseline in points at 5 labels per class, 95 % interval (not corrected), p; four "
          "comparisons, Holm over them\n")
    for (name, column), p in p_values.items():
        values, verdict = changes[name, column], "stands" if (name, column) in holm(p_values) else "does not stand"
        print(f"{name}, {column.split()[1]}: {np.mean(values):+.1f} ± {interval(values):.1f}, p = {p:.2g}, "
              f"{len(values)} seeds: {verdict}")
    points = {name: [np.mean(changes[name, column]) for column in columns]
              for name in table if name in objectives.OBJECTIVES and name != "baseline"}
    together = [points.pop(name) for name in [*points] if name.startswith("kinematic")]
    points |= {"kinematic": np.mean(together, axis=0)} if together else {}
    print("\nRank correlation over objectives of the change in motion with the change in appearance, the kinematic "
          "ones counted once; 95 % interval by bootstrap over objectives")
    living = [name for name in points if not is_dead(table.get(name, {}))]
    for about, chosen in (("all", [*points]), ("living", living)):
        pairs = np.array([points[name] for name in chosen]).T
        low, high = bootstrap(*pairs)
        print(f"{about} {len(chosen)}: {rank_correlation(*pairs):+.2f} [{low:+.2f}, {high:+.2f}]")


def agree(first, second):
    """Print how many of the differences that one sweep shows the other shows as well."""
    a, b = (differences(read_results(path), "baseline", COLUMNS) for path in (first, second))
    both = [(a[key], b[key]) for key in a.keys() & b.keys() if key[0] != "untrained"]
    both = [(x, y) for x, y in both if min(len(x), len(y)) > 1]
    shown = [(x, y) for x, y in both if abs(np.mean(x)) > interval(x)]
    print(f"{len(shown)} of {len(both)} differences from the baseline are significant in {first} (95 %, not corrected):"
          f" {sum(np.mean(x) * np.mean(y) > 0 for x, y in shown)} have the same sign in {second}, and "
          f"{sum(abs(np.mean(y)) > interval(y) for _, y in shown)} are significant there, too")


def compare(paths):
    """Print B - A of every measurement that all results of probe.py hold; A is the first half of them, B the second.
    Two results are paired draw by draw; several runs, of other training seeds, run by run in the order given, each by
    its mean over draws. A measurement whose draws do not match is named in the place of a difference."""
    if len(paths) % 2:
        raise ValueError(f"--compare has {len(paths)} results; give as many of A as of B, first those of A")
    found, half = [read_json(Path(path)).get("measurements") for path in paths], len(paths) // 2
    if None in found:
        raise ValueError(f"{paths[found.index(None)]} is missing, or is no result of probe.py")
    names = [name for name in found[0] if all(name in each for each in found)]
    if not names:
        raise ValueError(f"{' and '.join(paths)} have no measurement in common")
    print(*(f"A = {a}\nB = {b}" for a, b in zip(paths[:half], paths[half:])), sep="\n")
    print(f"B - A in points of top-1, paired {'draw by draw' if half == 1 else 'run by run'}, with 95 % intervals")
    for name in names:
        how = [each[name]["how"] for each in found]
        odd = [key for key, value in how[0].items() if any(other.get(key) != value for other in how)]
        if odd:
            print(f"{name:<36} not comparable: its {', '.join(odd)} differ between results")
            continue
        a, b = (np.array([each[name]["values"] for each in part]) for part in (found[:half], found[half:]))
        values = (b - a)[0] if half == 1 else (b - a).mean(1)  # a, b: (runs, draws)
        spread = f"± {interval(values):.2f}" if len(values) > 1 else "(one value each: no interval)"
        print(f"{name:<36} {values.mean():+6.2f} {spread}   A {a.mean():.2f}, B {b.mean():.2f}")


# ------------------------------------------------------------------------------------------ which loss trains what


def gradient_reach(objective, size=Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)):
    """Which losses of an objective, taken alone, reach which networks: {"encoder": [names], ...}."""
    torch.manual_seed(0)
    model = train.JEPA(objective, size, patch=4, tubelet=2)
    clips = torch.randint(256, (4, 3, 8, 16, 16), dtype=torch.uint8)
    masks = objectives.draw_masks(clips, torch.Generator(), torch.Generator(), (4, 4, 4), objective.masking)
    losses, _ = model(clips, masks, objectives.coefficients(objective, 0, 1))
    reached = {part: [] for part in ("encoder", "predictor", "heads", "target")}
    for name in [name for name in losses if name not in ("total", "hard_share")]:
        model.zero_grad()
        if losses[name].requires_grad:
            losses[name].backward(retain_graph=True)
        for part in reached:
            if any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters()):
                reached[part].append(name)
    return reached


def gradients():
    """Print as Markdown which networks each loss of each objective, taken alone, gives a gradient that is not zero."""
    rows = dict(objectives.OBJECTIVES)
    rows |= {f"{name} --as-released": objectives.released_form(objective) for name, objective in rows.items()
             if any(term.options.get("hard") for term in objective.terms.values())}
    markdown(["encoder", "predictor", "its own head", "target"], {
        name: [", ".join(names) or "-" for names in gradient_reach(objective).values()]
        for name, objective in rows.items()})


@command("study.py", smaller="--jobs", stopped="stopped; the same command goes on from there")
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="own", metavar="FILE", default="", help="a Python file that adds objectives")
    parser.add_argument("--objective", metavar="A,B,...", help="a sweep of these, or of all")
    parser.add_argument("--seeds", type=lambda text: [number(0)(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the folder of a sweep's runs")
    parser.add_argument("--jobs", type=number(1), help="runs side by side [one per CPU core; on a GPU 1]")
    parser.add_argument("--shots", type=lambda text: [number(1)(k) for k in text.split(",")], default=[probe.LABELS],
                        help="labels per class of the few-label probes")
    parser.add_argument("--table", nargs="+", metavar="RESULTS")
    parser.add_argument("--reference", default="baseline", help="what the table's differences are from")
    parser.add_argument("--rows", type=lambda text: text.split(","), help="of the table; all by default")
    parser.add_argument("--answer", nargs="+", metavar="RESULTS")
    parser.add_argument("--agree", nargs=2, metavar="RESULTS")
    parser.add_argument("--compare", nargs="+", metavar="RESULT")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    flags, others = parser.parse_known_args(arguments)
    if flags.own and not flags.own.endswith(".py"):
        parser.error(f"--with takes a Python file, NAME.py, not {flags.own}")
    if flags.own:
        spec = importlib.util.spec_from_file_location(Path(flags.own).stem, flags.own)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))  # adds to `TERMS`, `HEADS` and `OBJECTIVES`
    if others and not flags.objective:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    modes = {"child": lambda: one_run(flags.child, flags.shots), "objective": lambda: sweep(flags, others),
             "table": lambda: tables(flags.table, flags.reference, flags.rows), "answer": lambda: answer(flags.answer),
             "agree": lambda: agree(*flags.agree), "compare": lambda: compare(flags.compare), "gradients": gradients}
    for mode, run in modes.items():
        if getattr(flags, mode):
            return run()
    parser.error("say what to do: --objective, --table, --answer, --agree, --compare or --gradients")


if __name__ == "__main__":
    sys.exit(main())
