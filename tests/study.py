"""Many runs, and what they say together: sweeps, tables, intervals, comparisons. Measures; nothing here teaches.

    python tests/study.py --objective all --seeds 0,1,2 --out runs/study    a sweep; the same command goes on if cut
    python tests/study.py --with mine.py --objective mine                   with objectives of your own, 3 seeds
    python tests/study.py --table runs/study/results.jsonl                  what the runs found, differences from one
    python tests/study.py --answer tests/results/study.jsonl                the primary question, and the trade-off
    python tests/study.py --agree A.jsonl B.jsonl                           do two sweeps show the same?
    python tests/study.py --compare A.json B.json                           two results-*.json of probe.py, draw by draw
    python tests/study.py --compare A0.json A1.json B0.json B1.json         runs of A, then as many of B, run by run
    python tests/study.py --gradients                                       which loss trains which network

A sweep takes every flag of train.py but --seed and --resume. Each of its runs is a process of its own with one thread
on a CPU; the line that it adds to results.jsonl holds every number of it: objective, flags, seed, commit, machine, what
the probes found (a list for each draw of few labels) and what was logged. The objective `untrained` is random weights.
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
from model import Size
from synthetic import WORLDS, command, number, read_json, write_json

# ---------------------------------------------------------------------------------------------------------- a sweep


def load_own(path):
    """Import a file of your own, which adds to `TERMS`, `HEADS` and `OBJECTIVES`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def one_run(flags, shots):
    """Train as train.py would, probe the encoder, and write study.json into the run folder; returns the exit status."""
    untrained = "--objective=untrained" in flags
    config, _ = train.parse(["--objective=baseline" if flag == "--objective=untrained" else flag for flag in flags])
    folder, count = Path(config.out), config.probe_clips
    if untrained:
        folder.mkdir(parents=True, exist_ok=True)
        encoder, logged = probe.make_encoder(asdict(config)), {}
    else:
        stopped = train.main([*flags, "--resume", "--probe-clips=0"])
        if stopped:
            return stopped
        checkpoint = probe.load_checkpoint(folder / "last.pt")
        encoder = probe.make_encoder(asdict(config), checkpoint[checkpoint["evaluated"]])
        logged = logged_numbers(folder / "metrics.csv")
    if config.preset == "blobs":
        numbers = probe_blobs(encoder, asdict(config), shots, folder)
    else:
        found = probe.probe_shapes(encoder, asdict(config), count, shots=shots) if count else {}
        numbers = {f"{kind} {factor}": value for kind, values in found.items() for factor, value in values.items()}
    write_json(folder / "study.json", {
        "name": folder.name.rpartition("-seed")[0], "seed": config.seed,
        "flags": flags_of(config, asdict(train.Config())),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
                                 ).stdout.strip(),
        "machine": machine(), "numbers": numbers | logged})
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
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    vectors = "AVX-512" if "avx512f" in info else "no AVX-512"
    return f"{[*names, sys.platform][0]}, {vectors}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def flags_of(config, defaults):
    """The settings that make a run's numbers and are not the default ones: {flag: value}."""
    return {name: value for name, value in asdict(config).items()
            if value != defaults[name] and name not in (*train.NOT_COMPUTED, "objective", "seed")}


def logged_numbers(path):
    """Of a metrics.csv: the last feature_std and effective_rank; first and last `pred`; `hard_share`, where it is."""
    lines, found = list(csv.DictReader(path.read_text().splitlines())), {}
    for name in ("feature_std", "effective_rank"):
        found[name] = float(lines[-1][name])
    for name in ("pred", "hard_share"):
        if name in lines[0]:
            values = [float(line[name]) for line in lines]
            found |= {f"{name}, first": values[0], f"{name}, mean": statistics.mean(values),
                      f"{name}, last": values[-1]}
    return found


def sweep(names, seeds, out, train_flags, own, shots, jobs):
    """Every objective with every seed, `jobs` at a time. What is finished is left alone, what was begun goes on."""
    known = [*objectives.OBJECTIVES, "untrained"]
    names = known if names == "all" else names.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown objective '{name}'; known are {', '.join(known)}")
    runs = []
    for seed, name in dict.fromkeys(itertools.product(seeds, names)):
        flags = [f"--objective={name}", f"--seed={seed}", *train_flags]
        config, _ = train.parse([f"--objective={'baseline' if name == 'untrained' else name}", *flags[1:]])
        run = Path(config.out).name.removeprefix(f"{config.preset}-")
        run = out / (run.replace("baseline", "untrained", 1) if name == "untrained" else run)
        runs.append((run, [*flags, f"--out={run}"]))
    on_cpu = not torch.cuda.is_available()
    jobs = jobs or (os.cpu_count() if on_cpu else 1)
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if on_cpu else {})}
    out.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = [], {}, []
    for run, flags in runs:
        (waiting.append((run, flags)) if not (run / "study.json").exists() else note_result(out, run))
    with train.StopSignal() as stop, tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar:
        try:
            while (running or waiting) and not stop.received:
                while waiting and len(running) < jobs:
                    run, flags = waiting.pop(0)
                    child = [sys.executable, __file__, *(["--with", own] if own else []), "--shots",
                             ",".join(map(str, shots)), "--child", *flags]
                    with open(f"{run}.log", "w") as log:
                        running[run] = subprocess.Popen(child, stdout=log, stderr=log, env=environment)
                time.sleep(0.2)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    status = running.pop(run).returncode
                    if status:
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
    path, line = out / "results.jsonl", json.dumps(read_json(run / "study.json"))
    before = path.read_text().splitlines() if path.exists() else []
    if line not in before:
        with path.open("a") as file:
            file.write(line + "\n")


# ------------------------------------------------------------------------------------------------------- statistics


@functools.cache
def t_distribution(freedom):
    """Angles a, and the share of |t| below sqrt(freedom) tan(a): SciPy is no dependency."""
    # With t = sqrt(freedom) tan(a) the density of t becomes cos(a)^(freedom - 1), which is easily summed.
    angle = np.linspace(0, math.pi / 2, 400_001)
    share = np.cos((angle[1:] + angle[:-1]) / 2) ** (freedom - 1)
    return angle, np.concatenate(([0], share.cumsum())) / share.sum()


def interval(values):
    """Half the width of the 95 % confidence interval of the mean of values [n], n >= 2, by Student's t."""
    freedom = len(values) - 1
    angle, share = t_distribution(freedom)
    t = math.sqrt(freedom) * math.tan(np.interp(0.95, share, angle))
    return t * np.std(values, ddof=1) / math.sqrt(len(values))


def p_value(values):
    """Of a two-sided t-test that the mean of values [n], n >= 2, is zero."""
    freedom, deviation = len(values) - 1, np.std(values, ddof=1)
    t = abs(np.mean(values)) * math.sqrt(len(values)) / max(deviation, 1e-12)
    return 1 - float(np.interp(math.atan(t / math.sqrt(freedom)), *t_distribution(freedom)))


def holm(p_values, level=0.05):
    """Which of several hypotheses, {name: p}, Holm's procedure rejects, so that all stand together at this level."""
    rejected = set()
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[name] > level / (len(p_values) - rank):
            break
        rejected.add(name)
    return rejected


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
    """The 95 % interval of `rank_correlation`, from drawing the n pairs anew with replacement."""
    picked = np.random.default_rng(seed).integers(len(first), size=(draws, len(first)))
    found = rank_correlation(np.asarray(first)[picked], np.asarray(second)[picked])
    return np.nanquantile(found, [0.025, 0.975]).tolist()


# ----------------------------------------------------------------------------------------------------------- tables

COLUMNS = {f"{k} {factor}": f"{factor}, {k} labels" for k in (1, 5, 20) for factor in probe.FEW_FACTORS}
COLUMNS |= {f"linear {factor}": f"{factor}, linear" for factor in probe.LINEAR_FACTORS}
LOGGED = ("pred, first", "pred, last", "hard_share, first", "hard_share, mean", "hard_share, last")
KINEMATIC = [name for name in objectives.OBJECTIVES if name.startswith("kinematic")]


def read_results(*paths):
    """Lines of results as {name: {seed: numbers}}, lists of draws as their means; objectives in order, then others.

    Names leave out a world and a momentum that all runs share.
    Raises ValueError where there is none, where runs of one name differ in settings, or a line is damaged.
    """
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
    endings = {re.search(rf"(-({'|'.join(WORLDS)}|ema-[\d.]+))*$", name)[0] for name in table}
    if len(endings) == 1:
        table = {name.removesuffix(*endings): runs for name, runs in table.items()}
    order = ["untrained", *objectives.OBJECTIVES]
    return dict(sorted(table.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def runs_of(table, *names):
    """The runs of these names. Raises ValueError where one has none."""
    for name in names:
        if name not in table:
            raise ValueError(f"there is no run of '{name}' to compare with; there are {', '.join(table)}")
    return [table[name] for name in names]


def is_dead(numbers):
    return "feature_std" in numbers and train.collapsed(numbers)


def mean_cell(runs, column, digits=1):
    """Mean ± standard deviation over runs, {seed: numbers}, of one column; "-" where it was not measured."""
    values = [numbers[column] for numbers in runs.values() if column in numbers]
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else "-"


def differences(runs, base, column):
    """What each run has more than the base run of the same seed: a list, over the seeds that both have."""
    return [numbers[column] - base[seed][column] for seed, numbers in runs.items()
            if column in numbers and column in base.get(seed, {})]


def difference_cell(values, marked=False):
    """Mean of differences ± half its 95 % interval; in brackets where that includes 0; * where Holm lets it stand."""
    if len(values) < 2:
        return "-"
    half = interval(values)
    cell = f"{np.mean(values):+.1f} ± {half:.1f}"
    return f"{cell}*" * marked or (cell if abs(np.mean(values)) > half else f"({cell})")


def marks(rows, base, columns, least=4):
    """Which (name, column) stand after Holm's correction over the names within each column; few seeds carry none."""
    found = set()
    for column in columns:
        values = {name: differences(runs, base, column) for name, runs in rows.items()}
        p_values = {name: p_value(each) for name, each in values.items() if len(each) >= least}
        found |= {(name, column) for name in holm(p_values)}
    return found


def markdown(columns, rows):
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def name_cell(name, runs):
    return f"{name} †" if all(map(is_dead, runs.values())) else name


def tables(paths, reference, only):
    """Print the table of means, and the table of differences to a reference run."""
    table = read_results(*paths)
    shown = {name: runs for name, runs in table.items() if not only or name in only}
    print("Top-1 %, mean ± standard deviation over training seeds; chance is 12.5 for direction and appearance, 3.1 "
          "for motion, 25 for speed.\nn labels: per class, attentive head, mean of 5 draws. linear: linear head on all "
          "labels. †: features have collapsed in every seed, so probes mean nothing.\n")
    measured = {column: about for column, about in COLUMNS.items()
                if any(column in numbers for runs in table.values() for numbers in runs.values())}
    columns = [*measured, "effective_rank"]
    markdown([*(measured.get(column, column) for column in columns), "feature_std", "seeds"], {
        name_cell(name, runs): [*(mean_cell(runs, column) for column in columns), mean_cell(runs, "feature_std", 3),
                                str(len(runs))] for name, runs in shown.items()})
    base, = runs_of(table, reference)
    families = {"objective": {}, "other form": {}}
    for name, runs in table.items():
        if name not in (reference, "untrained"):
            families["objective" if name in objectives.OBJECTIVES else "other form"][name] = runs
    stands = set().union(*(marks(rows, base, measured) for rows in families.values()))
    print(f"\nDifference from {reference} in points, paired by seed, with 95 % intervals (Student's t, not corrected). "
          "In brackets: not significant (the interval includes 0).\n*: stands after Holm's correction within its column "
          f"over {len(families['objective'])} objectives, or {len(families['other form'])} other forms; rows of three "
          f"seeds carry no mark. {len(measured) * sum(map(len, families.values()))} comparisons.\n")
    markdown(measured.values(), {name_cell(name, runs): [
        difference_cell(differences(runs, base, column), (name, column) in stands) for column in measured]
        for name, runs in shown.items() if name != reference})
    print("\nLogged while training, mean ± standard deviation over seeds\n")
    markdown(LOGGED, {name: [mean_cell(runs, column, 3) for column in LOGGED] for name, runs in shown.items()
                      if name != "untrained"})


def answer(paths):
    """Print the primary comparisons, fixed before the runs, and the trade-off of motion with appearance."""
    table = read_results(*paths)
    base, *_ = runs_of(table, "baseline", "fwm_hw_ld", "ld")
    primary = {(name, column): differences(table[name], base, column) for name in ("fwm_hw_ld", "ld")
               for column in ("5 motion", "5 appearance")}
    p_values = {key: p_value(values) for key, values in primary.items()}
    stands = holm(p_values)
    print("Difference from baseline in points at 5 labels per class, 95 % interval (not corrected), p; four "
          "comparisons, Holm over them\n")
    for (name, column), values in primary.items():
        verdict = "stands" if (name, column) in stands else "does not stand"
        print(f"{name}, {column.split()[1]}: {np.mean(values):+.1f} ± {interval(values):.1f}, "
              f"p = {p_values[name, column]:.2g}, {len(values)} seeds: {verdict}")
    rows = {name: runs for name, runs in table.items() if name in objectives.OBJECTIVES and name != "baseline"}
    changes = {name: [np.mean(differences(runs, base, column)) for column in ("5 motion", "5 appearance")]
               for name, runs in rows.items()}
    together = [changes.pop(name) for name in KINEMATIC if name in changes]
    changes |= {"kinematic": np.mean(together, axis=0)} if together else {}
    print("\nRank correlation over objectives of the change in motion with the change in appearance, the kinematic "
          "ones counted once; 95 % interval by bootstrap over objectives")
    for about, chosen in (("all", list(changes)), ("living", [name for name in changes if not all(
            map(is_dead, rows[name].values()))])):
        pairs = np.array([changes[name] for name in chosen]).T
        low, high = bootstrap(*pairs)
        print(f"{about} {len(chosen)}: {rank_correlation(*pairs):+.2f} [{low:+.2f}, {high:+.2f}]")


def agree(first, second):
    """Print how many of the differences that one sweep shows the other shows as well."""
    found = []
    for path in (first, second):
        table = read_results(path)
        base, = runs_of(table, "baseline")
        found.append({(name, column): differences(runs, base, column) for name, runs in table.items()
                      for column in COLUMNS if name not in ("baseline", "untrained")})
    keys = [key for key in found[0] if len(found[0][key]) > 1 and len(found[1].get(key, ())) > 1]
    a, b = ({key: (np.mean(each[key]), interval(each[key])) for key in keys} for each in found)
    shown = [key for key in keys if abs(a[key][0]) > a[key][1]]
    print(f"{len(shown)} of {len(keys)} differences from the baseline are significant in {first} (95 %, not corrected):"
          f" {sum(a[key][0] * b[key][0] > 0 for key in shown)} have the same sign in {second}, and "
          f"{sum(abs(b[key][0]) > b[key][1] for key in shown)} are significant there, too")


# ---------------------------------------------------------------------------------------- results of probe.py, pairs


def compare(paths):
    """Print B - A of every measurement that all results hold: of the first half of the paths and of the second.

    Two results are paired draw by draw. Several runs, of other training seeds, are paired run by run in the order
    given, each by its mean over draws. A measurement whose draws do not match is named in the place of a difference.
    """
    if len(paths) % 2:
        raise ValueError(f"--compare has {len(paths)} results; give as many of A as of B, first those of A")
    found = {path: read_json(Path(path)).get("measurements") for path in paths}
    for path in paths:
        if found[path] is None:
            raise ValueError(f"{path} is missing, or is no result of probe.py")
    names = [name for name in found[paths[0]] if all(name in found[path] for path in paths)]
    if not names:
        raise ValueError(f"{' and '.join(paths)} have no measurement in common")
    halves = paths[:len(paths) // 2], paths[len(paths) // 2:]
    print(*(f"A = {a}\nB = {b}" for a, b in zip(*halves)), sep="\n")
    paired = "draw by draw" if len(paths) == 2 else "run by run"
    print(f"B - A in points of top-1, paired {paired}, with 95 % intervals")
    for name in names:
        odd = [key for key, value in found[paths[0]][name]["how"].items()
               if any(found[path][name]["how"].get(key) != value for path in paths)]
        if odd:
            print(f"{name:<36} not comparable: its {', '.join(odd)} differ between results")
            continue
        a, b = (np.array([found[path][name]["values"] for path in half]) for half in halves)  # (runs, draws) each
        values = (b - a)[0] if len(a) == 1 else (b - a).mean(1)
        spread = f"± {interval(values):.2f}" if len(values) > 1 else "(one value each: no interval)"
        print(f"{name:<36} {values.mean():+6.2f} {spread}   A {a.mean():.2f}, B {b.mean():.2f}")


# ------------------------------------------------------------------------------------------ which loss trains what


def gradient_reach(objective, size=Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)):
    """Which losses of an objective, taken alone, reach which networks: {"encoder": [names], ...}."""
    torch.manual_seed(0)
    model, grid = train.JEPA(objective, size, patch=4, tubelet=2), (4, 4, 4)
    clips = torch.randint(256, (4, 3, 8, 16, 16), dtype=torch.uint8)
    generators = (torch.Generator().manual_seed(i) for i in range(2))
    losses, _ = model(clips, train.masks_of_clips(clips, *generators, grid, objective.masking),
                      objectives.coefficients(objective, 0, 1))
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
    reach = {name: gradient_reach(objective) for name, objective in rows.items()}
    markdown(["encoder", "predictor", "its own head", "target"], {
        name: [", ".join(names) or "-" for names in reached.values()] for name, reached in reach.items()})


@command("study.py", smaller="--jobs", stopped="stopped; the same command goes on from there")
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="own", metavar="FILE", help="a Python file that adds objectives")
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
    if flags.own:
        load_own(flags.own)
    if flags.child is not None:
        return one_run(flags.child, flags.shots)
    if flags.objective:
        return sweep(flags.objective, flags.seeds, flags.out, others, flags.own, flags.shots, flags.jobs)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if flags.table:
        return tables(flags.table, flags.reference, flags.rows)
    if flags.answer:
        return answer(flags.answer)
    if flags.agree:
        return agree(*flags.agree)
    if flags.compare:
        return compare(flags.compare)
    if flags.gradients:
        return gradients()
    parser.error("say what to do: --objective, --table, --answer, --agree, --compare or --gradients")


if __name__ == "__main__":
    sys.exit(main())
