"""Many runs, and what they say together: sweeps, tables, intervals, comparisons. Measures only.

    python tests/study.py --objective all --seeds 0,1,2 --out runs/study
        a sweep; the same command goes on if it was cut off
    python tests/study.py --with mine.py --objective baseline,ahead
        with objectives of your own, 3 seeds
    python tests/study.py --table runs/study/results.jsonl
        what the runs found, and how far they differ from one of them
    python tests/study.py --answer tests/results/study.jsonl
        the primary question, and the trade-off
    python tests/study.py --confirm RESULTS
        the primary comparisons by exact sign flips over seeds, Holm over them
    python tests/study.py --curves RESULTS --picture curves.png
        accuracy over training steps, printed and drawn
    python tests/study.py --agree A.jsonl B.jsonl
        do two sweeps show the same?
    python tests/study.py --compare A.json B.json
        two results-*.json of probe.py, draw by draw
    python tests/study.py --compare A0.json A1.json B0.json B1.json
        runs of A, then as many of B, run by run
    python tests/study.py --gradients
        which loss trains which network

A sweep takes every flag of train.py but --seed and --resume. Each run is a process of its own,
with one thread on a CPU; its line of results.jsonl holds its name, flags, seed, commit, machine,
what the probes found at its end (a list for each draw of few labels) and along it, and what was
logged. The objective `untrained` is random weights.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data
import objectives
import pictures
import probe
import train
from data import command, read_json, write_json
from model import Size
from synthetic import WORLDS

# ------------------------------------------------------------------------------------ a sweep


HEAD_STEPS = probe.FEW.steps


def config_of(flags):
    """The Config of a run; that of `untrained` is the baseline's."""
    named = "--objective=untrained", "--objective=baseline"
    return train.parse([flag.replace(*named) for flag in flags])[0]


def one_run(flags, shots, fresh=False, head_steps=HEAD_STEPS):
    """Train as train.py would, probe the encoder, and write study.json into the run folder.
    Returns the exit status. fresh: the probes' clips and draws of labels are this seed's own, so
    that what varies over seeds includes them. head_steps: of the heads that learn few labels."""
    config, weights, logged, along = config_of(flags), None, {}, []
    folder, settings = Path(config.out), asdict(config)
    probe.FEW = probe.FEW._replace(steps=head_steps)
    probe.ALONG_TRAIN, probe.ALONG_TEST = 2304, 768  # a curve is the mean of few seeds
    if "--objective=untrained" in flags:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        if stopped := train.main([*flags, "--resume", "--probe-clips=0"]):
            return stopped
        checkpoint = probe.load_checkpoint(folder / "last.pt")
        weights = checkpoint[checkpoint["evaluated"]]
        logged = logged_numbers(folder / "metrics.csv")
        if config.probe_every:
            lines = csv.DictReader((folder / "probes.csv").read_text().splitlines())
            along = [{name: float(value) for name, value in line.items()} for line in lines]

    encoder, numbers = probe.make_encoder(settings, weights), {}
    if config.preset == "blobs":
        numbers = probe_blobs(encoder, settings, shots, folder)
    elif config.probe_clips:
        first = 0
        if fresh:
            probe.HELD_OUT += 2 * (1 + config.seed)
            first = probe.DRAWS * config.seed
        found = probe.probe_clips(encoder, train.probed_clips(config, encoder),
                                  config.probe_clips, first, shots)
        del found["clips"]
        for kind, values in found.items():
            numbers |= {f"{kind} {factor}": value for factor, value in values.items()}

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=ROOT).stdout.strip()
    fixed = (*train.NOT_COMPUTED, "objective", "seed")
    changed = {name: value for name, value in settings.items()
               if value != getattr(train.Config, name) and name not in fixed}
    if fresh:
        changed["fresh"] = True
    if head_steps != HEAD_STEPS:
        changed["head_steps"] = head_steps
    name = folder.name.rpartition("-seed")[0]
    write_json(folder / "study.json", {
        "name": name, "seed": config.seed, "flags": changed, "commit": commit,
        "machine": machine(), "numbers": numbers | logged, "along": along})
    return 0


BLOB_CLIPS = 800, 400  # to learn from, and to be tested on: other clips than those of any run


def probe_blobs(encoder, config, shots, folder):
    """Few labels of the paper's blobs: {"5 direction": top-1 % of each draw, ...}."""
    flags = probe.parse(["--untrained=tiny", "--benchmark=blobs", "--workers=0",
                         f"--shots={','.join(map(str, shots))}"])
    learn, exam = BLOB_CLIPS
    sources = [data.BlobClips(8, 160, items=items, first=data.CLEAN_BLOBS, directions=True)
               for items in (range(learn), range(learn, learn + exam))]
    name = f"blobs-{learn}-{exam}"
    frozen = probe.Frozen(encoder, config, "the encoder", folder)
    probe.evaluate(frozen, name, sources, flags)
    results = folder / f"results-{name}.json"
    found = read_json(results)["measurements"]
    return {f"{k} direction": found[f"{k} labels, attentive head"]["values"] for k in shots}


def machine():
    """The processor, its vector instructions, threads and torch: all that rounding depends on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [*re.findall("^model name\\s*: (.*)", info, re.M), sys.platform]
    vectors = "AVX-512" if "avx512f" in info else "no AVX-512"
    return f"{names[0]}, {vectors}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def logged_numbers(path):
    """Of a metrics.csv: the last feature_std and effective_rank, and where they are there first,
    mean and last `pred` and `hard_share`."""
    lines = list(csv.DictReader(path.read_text().splitlines()))
    found = {name: float(lines[-1][name]) for name in ("feature_std", "effective_rank")}
    for name in ("pred", "hard_share"):
        if name in lines[0]:
            values = [float(line[name]) for line in lines]
            found[f"{name}, first"] = values[0]
            found[f"{name}, mean"] = statistics.mean(values)
            found[f"{name}, last"] = values[-1]
    return found


def planned_runs(flags, train_flags):
    """Of each run of a sweep its folder and its flags: {folder: flags}."""
    known = [*objectives.OBJECTIVES, "untrained"]
    names = known if flags.objective == "all" else flags.objective.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown objective '{name}'; known are {', '.join(known)}")
    runs = {}
    for seed, name in itertools.product(flags.seeds, names):
        run_flags = [f"--objective={name}", f"--seed={seed}", *train_flags]
        config = config_of(run_flags)
        folder = Path(config.out).name.removeprefix(f"{config.preset}-")
        run = flags.out / folder.replace(config.objective, name, 1)
        runs[run] = [*run_flags, f"--out={run}"]
    return runs


def doing(run):
    """What a run does now, for the bar."""
    try:
        step = (run / "metrics.csv").read_text().rstrip().rpartition("\n")[2].split(",")[0]
    except OSError:
        step = "starts"
    return f"{run.name} {step}"


def sweep(flags, train_flags):
    """Every objective with every seed, some at a time. What is finished is left alone, what was
    begun goes on."""
    runs, out = planned_runs(flags, train_flags), flags.out
    on_cpu = not torch.cuda.is_available()
    jobs = flags.jobs or (os.cpu_count() if on_cpu else 1)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if on_cpu else {})
    child = [sys.executable, __file__, f"--with={flags.own}",
             f"--shots={','.join(map(str, flags.shots))}"]
    child.append(f"--head-steps={flags.head_steps}")
    if flags.fresh:
        child.append("--fresh")
    child.append("--child")
    out.mkdir(parents=True, exist_ok=True)
    finished = [run for run in runs if (run / "study.json").exists()]
    for run in finished:
        note_result(out, run)

    waiting, running, failed = [run for run in runs if run not in finished], {}, []
    bar = tqdm(total=len(runs), initial=len(finished), unit="run", ncols=100)
    with train.StopSignal() as stop, bar:
        try:
            while (running or waiting) and not stop.received:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    with open(f"{run}.log", "a") as log:
                        running[run] = subprocess.Popen([*child, *runs[run]], stdout=log,
                                                        stderr=log, env=environment)
                time.sleep(0.2)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    if status := running.pop(run).returncode:
                        failed.append(failure(run, status))
                    else:
                        note_result(out, run)
                    bar.update()
                now = ", ".join(map(doing, running))
                if bar.postfix != now:
                    bar.set_postfix_str(now)
        finally:
            for process in running.values():
                process.terminate()  # a run that gets a signal saves and ends
            for process in running.values():
                process.wait()

    for sentence in failed:
        print(sentence, file=sys.stderr)
    if stop.received:
        print("stopped; the same command goes on from there")
        return 128 + stop.received
    print(f"{len(runs) - len(failed)} of {len(runs)} runs finished; "
          f"`python tests/study.py --table {out}/results.jsonl` shows them")
    return int(bool(failed))


def failure(run, status):
    """One sentence on a run that failed, with the last line of its log."""
    last = (Path(f"{run}.log").read_text().strip().splitlines() or [""])[-1]
    return f"{run} failed with exit status {status}; the end of {run}.log: {last}"


def note_result(out, run):
    """Add a run's line to results.jsonl, once."""
    line = json.dumps(read_json(run / "study.json"))
    with (out / "results.jsonl").open("a+") as file:
        file.seek(0)
        if line not in file.read().splitlines():
            file.write(line + "\n")


# --------------------------------------------------------------------------------- statistics


@functools.cache
def t_distribution(freedom):
    """Angles a, and the share of |t| below sqrt(freedom) tan(a): SciPy is no dependency."""
    # With t = sqrt(freedom) tan(a) the density of t becomes cos(a)^(freedom - 1), which is easily
    # summed. Of n values the freedom is n - 1, and tan(a) their mean in units of np.std, which
    # divides by n.
    angle = np.linspace(0, math.pi / 2, 400_001)
    share = np.cos((angle[1:] + angle[:-1]) / 2) ** (freedom - 1)
    return angle, np.concatenate(([0], share.cumsum())) / share.sum()


def interval(values):
    """Half the width of the 95 % confidence interval of the mean of values [n], n >= 2, by
    Student's t."""
    angle, share = t_distribution(len(values) - 1)
    return math.tan(np.interp(0.95, share, angle)) * np.std(values)


def p_value(values):
    """Of a two-sided t-test that the mean of values [n], n >= 2, is zero."""
    angle = math.atan2(abs(np.mean(values)), np.std(values))
    return 1 - float(np.interp(angle, *t_distribution(len(values) - 1)))


def sign_flip_p(values):
    """Of an exact two-sided test that values [n] are symmetric about zero: the share of all 2^n
    ways to flip their signs whose mean lies at least as far from zero as that of the values."""
    values = np.asarray(values, float)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums + value, sums - value))
    rounding = 1e-9 * np.abs(values).sum()
    return float((np.abs(sums) >= abs(values.sum()) - rounding).mean())


def holm(p_values):
    """Which of several hypotheses, {name: p}, Holm's procedure rejects, so that all stand together
    at 5 %."""
    ordered = sorted(p_values, key=p_values.get)
    for i, name in enumerate(ordered):
        if p_values[name] > 0.05 / (len(ordered) - i):
            return {*ordered[:i]}
    return {*ordered}


def ranks(values):
    """1 for the smallest of values [..., n] to n for the largest; equal ones share the mean of
    their ranks."""
    values = np.asarray(values)
    smaller = (values[..., None, :] < values[..., None]).sum(-1)
    return smaller + ((values[..., None, :] == values[..., None]).sum(-1) + 1) / 2


def rank_correlation(first, second):
    """Spearman's, the correlation of the ranks: first, second [..., n] -> [...]."""
    a, b = (rank - rank.mean(-1, keepdims=True) for rank in (ranks(first), ranks(second)))
    with np.errstate(invalid="ignore"):  # all equal: not a number
        return (a * b).sum(-1) / np.sqrt((a ** 2).sum(-1) * (b ** 2).sum(-1))


def bootstrap(first, second, draws=10_000, seed=0):
    """The 95 % interval of `rank_correlation`, from drawing the n pairs of two arrays anew with
    replacement."""
    picked = np.random.default_rng(seed).integers(len(first), size=(draws, len(first)))
    return np.nanquantile(rank_correlation(first[picked], second[picked]), [0.025, 0.975]).tolist()


# --------------------------------------------------------------------- tables and comparisons

LOGGED = ("pred, first", "pred, last",
          "hard_share, first", "hard_share, mean", "hard_share, last")


def read_results(*paths):
    """Lines of results as {name: {seed: numbers}}, lists of draws as their means; the objectives
    in order, then others. Names leave out a world and a momentum that all runs share. Raises
    ValueError where there is no line, where runs of one name differ in settings, or a line is
    damaged."""
    table, settings = {}, {}
    for path in paths:
        for i, text in enumerate(Path(path).read_text().splitlines(), start=1):
            try:
                line = json.loads(text)
                numbers = {name: float(np.mean(value)) for name, value in line["numbers"].items()}
                name, seed, flags = line["name"], line["seed"], dict(line["flags"])
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f"line {i} of {path} is not a line of results") from None
            if settings.setdefault(name, flags) != flags:
                raise ValueError(f"line {i} of {path}: this run of {name} has other settings than "
                                 "those before it")
            table.setdefault(name, {})[seed] = numbers
    if not table:
        raise ValueError(f"{', '.join(map(str, paths))} hold no results; a sweep makes them")

    def ending(name):
        shared = [re.escape(str(settings[name].get("world"))), r"ema-[\d.]+"]
        return re.search(rf"(-({'|'.join(shared)}))*$", name)[0]
    endings = {ending(name) for name in table}
    if len(endings) == 1:
        table = {name.removesuffix(*endings): runs for name, runs in table.items()}
    order = ("untrained", *objectives.OBJECTIVES)
    return {name: table[name] for name in order if name in table} | table


def columns_of(table):
    """What the probes of some run measured, {column: its title}, as {"5 motion": "motion, 5
    labels", "linear speed": "speed, linear"}; factors in the order of their worlds."""
    there = {column for runs in table.values() for numbers in runs.values() for column in numbers}
    few, linear = ({factor: None for source in (*WORLDS.values(), data.Clips)
                    for factor in getattr(source, kind)} for kind in ("few", "linear"))
    labels = sorted({int(k) for k in re.findall(r"\b(\d+) \w", " ".join(there))})
    titles = {f"{k} {factor}": f"{factor}, {k} labels" for k in labels for factor in few}
    titles |= {f"linear {factor}": f"{factor}, linear" for factor in linear}
    return {column: title for column, title in titles.items() if column in there}


def chances(columns):
    """What guessing gives for the factors of generated clips in columns, as words."""
    classes = {name: count for world in WORLDS.values() for name, count in world.classes.items()}
    factors = {column.split()[1]: None for column in columns}
    return ", ".join(f"{factor} {100 / classes[factor]:.1f}" for factor in factors
                     if factor in classes) or "by the number of classes"


def is_dead(runs):
    """Whether features have collapsed in every run, {seed: numbers}."""
    return all("feature_std" in numbers and train.collapsed(numbers) for numbers in runs.values())


def mean_cell(runs, column, digits=1):
    """Mean ± standard deviation over runs, {seed: numbers}, of one column; "-" where it was not
    measured."""
    values = [numbers[column] for numbers in runs.values() if column in numbers]
    if not values:
        return "-"
    cell = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        cell += f" ± {np.std(values, ddof=1):.{digits}f}"
    return cell


def differences(table, reference, columns, *needed):
    """What runs have more than the reference run of the same seed: {(name, column): a list, over
    seeds that both have}. Raises ValueError where the reference, or a name that is needed, has no
    run."""
    for name in (reference, *needed):
        if name not in table:
            raise ValueError(f"there is no run of '{name}' to compare with; there are "
                             f"{', '.join(table)}")
    base = table[reference]
    found = {}
    for name, column in itertools.product(table, columns):
        if name != reference:
            found[name, column] = [
                numbers[column] - base[seed][column] for seed, numbers in table[name].items()
                if column in numbers and column in base.get(seed, {})]
    return found


def difference_cell(values, marked=False):
    """Mean of differences ± half its 95 % interval; in brackets where that includes 0; * where
    Holm lets it stand."""
    if len(values) < 2:
        return "-"
    half = interval(values)
    cell = f"{np.mean(values):+.1f} ± {half:.1f}"
    if marked:
        return f"{cell}*"
    return cell if abs(np.mean(values)) > half else f"({cell})"


def markdown(columns, rows):
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def tables(paths, reference, only):
    """Print the table of means, and the table of differences from a reference run."""
    table = read_results(*paths)
    titles = columns_of(table)
    shown = {name: runs for name, runs in table.items() if not only or name in only}
    label = {name: f"{name} †" if is_dead(runs) else name for name, runs in table.items()}
    print("Top-1 %, mean ± standard deviation over training seeds. Chance: "
          f"{chances(titles)}.\nn labels: per class, attentive head, mean over draws of labels. "
          "linear: linear head on\nall labels. †: features have collapsed in every seed, so "
          "probes mean nothing.\n")
    rows = {}
    for name, runs in shown.items():
        cells = [mean_cell(runs, column) for column in (*titles, "effective_rank")]
        rows[label[name]] = [*cells, mean_cell(runs, "feature_std", 3), str(len(runs))]
    markdown([*titles.values(), "effective_rank", "feature_std", "seeds"], rows)

    if reference or "baseline" in table:
        difference_table(table, reference or "baseline", titles, label, only)
    else:
        print("\nNo run of baseline, so no differences from it; --reference names another run.")
    print("\nLogged while training, mean ± standard deviation over seeds\n")
    markdown(LOGGED, {name: [mean_cell(runs, column, 3) for column in LOGGED]
                      for name, runs in shown.items() if name != "untrained"})


def difference_table(table, reference, titles, label, only):
    """Print how far runs differ from the reference. Objectives are one family for Holm, and their
    other forms, whose names say what was changed, as baseline-ema-0, another."""
    changes = differences(table, reference, titles, *(only or ()))
    trained = [name for name in table if name not in (reference, "untrained")]
    families = {"objectives": [name for name in trained if "-" not in name],
                "other forms": [name for name in trained if "-" in name]}
    stands, marks = set(), []
    for about, names in families.items():
        for column in titles:
            stands |= holm({(name, column): p_value(changes[name, column]) for name in names
                            if len(changes[name, column]) > 3})
        if names:
            marks.append(f"{len(names)} {about if len(names) > 1 else about[:-1]}")
    print(f"\nDifference from {reference} in points, paired by seed: mean ± half the 95 % "
          "interval over\ntraining seeds (Student's t, not corrected). In brackets: not "
          "significant (the interval includes 0).")
    if marks:
        print(f"*: stands after Holm's correction within its column over {' or '.join(marks)}; "
              f"rows of three seeds or\nfewer carry no mark. {len(titles) * len(trained)} "
              "comparisons.")
    print()
    rows = {}
    for name in table:
        if name != reference and (not only or name in only):
            rows[label[name]] = [difference_cell(changes[name, column], (name, column) in stands)
                                 for column in titles]
    markdown(titles.values(), rows)


# The primary comparisons, and the secondary ones; controls are those of tests/controls.py.
PRIMARY = (("fwm_hw_ld", "hw_ld"), ("fwm_hw_ld", "baseline"))
SECONDARY = (("fwm_hw_ld", "hw_ld_deep"), ("fwm_ld", "ld"), ("fwm_ld", "ld_deep"), ("fac", "ac"),
             ("ld", "baseline"), ("ld", "ld_other_clip"), ("baseline", "untrained"))


def confirm(paths):
    """Print the comparisons of a confirmation, as far as both arms are there: in all motion together
    and in appearance. Primary are those of `PRIMARY` at 5 labels, by exact sign flips over seeds,
    Holm over all; everything else is secondary, and uncorrected. An arm's name ends before its
    settings."""
    table = {name.partition("-")[0]: runs for name, runs in read_results(*paths).items()}
    there = columns_of(table)
    factors = [*([*world.classes][-1] for world in WORLDS.values()), "appearance"]
    asked, rest = [], []
    for kind, pairs in itertools.product(("5", "20", "linear"), (PRIMARY, SECONDARY)):
        rows = asked if kind == "5" and pairs == PRIMARY else rest
        columns = [f"{kind} {factor}" for factor in factors if f"{kind} {factor}" in there]
        rows += [(*pair, column) for pair in pairs for column in columns if {*pair} <= {*table}]
    if not asked:
        raise ValueError(f"there is no run of fwm_hw_ld and of what it is compared with; there are "
                         f"{', '.join(table)}")

    print("Difference in points: mean ± half the 95 % interval over training seeds (Student's t, "
          "not\ncorrected); p: exact sign flips over seeds\n")
    for about, rows in (("primary", asked), ("secondary", rest)):
        changes = {(name, reference, column):
                   differences(table, reference, [column], name)[name, column]
                   for name, reference, column in rows}
        p_values = {row: sign_flip_p(values) for row, values in changes.items()}
        for row, values in changes.items():
            verdict = "not corrected"
            if rows is asked:
                holds = "stands" if row in holm(p_values) else "does not stand"
                verdict = f"{holds} (Holm over {len(rows)})"
            name, reference, column = row
            print(f"{about}: {name} - {reference}, {there[column]}: {np.mean(values):+.1f} ± "
                  f"{interval(values):.1f}, p = {p_values[row]:.2g}, {len(values)} seeds: {verdict}")


def answer(paths):
    """Print the primary comparisons, fixed before the runs, and the trade-off of motion with
    appearance."""
    table, columns = read_results(*paths), ("5 motion", "5 appearance")
    changes = differences(table, "baseline", columns, "fwm_hw_ld", "ld")
    asked = [*itertools.product(("fwm_hw_ld", "ld"), columns)]
    p_values = {key: p_value(changes[key]) for key in asked}
    print("Difference from baseline in points at 5 labels per class: mean ± half the 95 % "
          "interval over\nseeds (not corrected), p; four comparisons, Holm over them\n")
    for name, column in asked:
        values = changes[name, column]
        verdict = "stands" if (name, column) in holm(p_values) else "does not stand"
        print(f"{name}, {column.split()[1]}: {np.mean(values):+.1f} ± {interval(values):.1f}, "
              f"p = {p_values[name, column]:.2g}, {len(values)} seeds: {verdict}")

    points = {name: [np.mean(changes[name, column]) for column in columns]
              for name in table if name in objectives.OBJECTIVES and name != "baseline"}
    together = [points.pop(name) for name in [*points] if name.startswith("kinematic")]
    if together:
        points["kinematic"] = np.mean(together, axis=0)
    print("\nRank correlation over objectives of the change in motion with the change in "
          "appearance, the\nkinematic ones counted once; 95 % interval by bootstrap over "
          "objectives")
    living = [name for name in points if not is_dead(table.get(name, {}))]
    for about, chosen in (("all", [*points]), ("living", living)):
        pairs = np.array([points[name] for name in chosen]).T
        low, high = bootstrap(*pairs)
        print(f"{about} {len(chosen)}: {rank_correlation(*pairs):+.2f} [{low:+.2f}, {high:+.2f}]")


def curves(path, picture=None):
    """Print how the few-label accuracy of each run's encoder goes over its steps, the mean over
    seeds, and draw it into a PNG file, the picture. Raises ValueError where no run was probed along
    the way."""
    found = {}  # {factor: {name: {step: [of each seed]}}}
    for text in Path(path).read_text().splitlines():
        line = json.loads(text)
        for probed in line.get("along", []):
            step = int(probed.pop("step"))
            for factor, value in probed.items():
                name = line["name"].partition("-")[0]
                steps = found.setdefault(factor, {}).setdefault(name, {})
                steps.setdefault(step, []).append(value)
    if not found:
        raise ValueError(f"{path} holds no accuracies along runs; a sweep with --probe-every "
                         "makes them")

    panels = {}
    for factor, names in found.items():
        means = {name: {step: np.mean(values) for step, values in steps.items()}
                 for name, steps in names.items()}
        together = [value for steps in means.values() for value in steps.values()]
        last = max(max(steps) for steps in means.values())
        title = (f"{factor}, top-1 % from {min(together):.1f} to {max(together):.1f}, over steps 0 "
                 f"to {last}")
        panels[title] = {name: ([*steps], [*steps.values()]) for name, steps in means.items()}
        print(f"\n{factor}, top-1 % from {probe.LABELS} labels per class, mean over seeds\n")
        shown = [step for step in next(iter(means.values())) if step % 500 == 0 or step == last]
        markdown([f"step {step}" for step in shown],
                 {name: [f"{steps[step]:.1f}" for step in shown] for name, steps in means.items()})
    if picture:
        pictures.save_image(Path(picture), pictures.plot_points(panels, joined=True))


def agree(first, second):
    """Print how many of the differences that one sweep shows the other shows as well."""
    one, other = (read_results(path) for path in (first, second))
    a, b = (differences(table, "baseline", columns_of(table)) for table in (one, other))
    both = [(a[key], b[key]) for key in a.keys() & b.keys() if key[0] != "untrained"]
    both = [(x, y) for x, y in both if min(len(x), len(y)) > 1]
    shown = [(x, y) for x, y in both if abs(np.mean(x)) > interval(x)]
    same = sum(np.mean(x) * np.mean(y) > 0 for x, y in shown)
    significant = sum(abs(np.mean(y)) > interval(y) for _, y in shown)
    print(f"{len(shown)} of {len(both)} differences from the baseline are significant in {first} "
          f"(95 %, not corrected): {same} have the same sign in {second}, and {significant} are "
          "significant there, too")


def compare(paths):
    """Print B - A of every measurement that all results of probe.py hold; A is the first half of
    them, B the second. Two results are paired draw by draw; several runs, of other training seeds,
    run by run in the order given, each by its mean over draws. Raises ValueError where results are
    of different clips. A measurement whose draws do not match is named in the place of a
    difference."""
    if len(paths) % 2:
        raise ValueError(f"--compare has {len(paths)} results; give as many of A as of B, first "
                         "those of A")
    results, half = [read_json(Path(path)) for path in paths], len(paths) // 2
    for path, result in zip(paths, results):
        if "measurements" not in result:
            raise ValueError(f"{path} is missing, or is no result of probe.py")
        for split in ("train", "test"):
            mine, first = (each.get(split, {}).get("source") for each in (result, results[0]))
            if mine is None or mine != first:
                raise ValueError(f"{paths[0]} and {path} do not say that their {split} clips are "
                                 "the same, so they are no pair; evaluate both on the same clips")
    found = [result["measurements"] for result in results]
    names = [name for name in found[0] if all(name in each for each in found)]
    if not names:
        raise ValueError(f"{' and '.join(paths)} have no measurement in common")

    for a, b in zip(paths[:half], paths[half:]):
        print(f"A = {a}\nB = {b}")
    how = "draw by draw" if half == 1 else "run by run"
    print(f"B - A in points of top-1, paired {how}: mean ± half the 95 % interval")
    for name in names:
        print(f"{name:<36} {compare_one([each[name] for each in found])}")


def compare_one(found):
    """One measurement of several results, those of A first: B - A, as words."""
    first, half = found[0]["how"], len(found) // 2
    odd = [key for key, value in first.items()
           if any(each["how"].get(key) != value for each in found)]
    if odd:
        return f"not comparable: its {', '.join(odd)} differ between results"
    a, b = (np.array([each["values"] for each in part]) for part in (found[:half], found[half:]))
    values = (b - a)[0] if half == 1 else (b - a).mean(1)  # a, b: (runs, draws)
    spread = f"± {interval(values):.2f}" if len(values) > 1 else "(one value each: no interval)"
    return f"{values.mean():+6.2f} {spread}   A {a.mean():.2f}, B {b.mean():.2f}"


# ------------------------------------------------------------------------ which loss trains what

SMALL = Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)


def gradient_reach(objective, size=SMALL):
    """Which losses of an objective, taken alone, reach which networks: {"encoder": [names], ...}.
    """
    torch.manual_seed(0)
    model = train.JEPA(objective, size, patch=4, tubelet=2)
    clips = torch.randint(256, (4, 3, 8, 16, 16), dtype=torch.uint8)
    masks = objectives.draw_masks(clips, torch.Generator(), torch.Generator(), (4, 4, 4),
                                  objective.masking)
    losses, _ = model(clips, masks, objectives.coefficients(objective, 0, 1))
    reached = {part: [] for part in ("encoder", "predictor", "heads", "target")}
    for name in [name for name in losses if name not in ("total", "hard_share")]:
        model.zero_grad()
        if losses[name].requires_grad:
            losses[name].backward(retain_graph=True)
        for part in reached:
            parameters = getattr(model, part).parameters()
            if any(p.grad is not None and p.grad.any() for p in parameters):
                reached[part].append(name)
    return reached


def gradients():
    """Print as Markdown which networks each loss of each objective, taken alone, trains."""
    rows = dict(objectives.OBJECTIVES)
    for name, objective in objectives.OBJECTIVES.items():
        if any(term.options.get("hard") for term in objective.terms.values()):
            rows[f"{name} --as-released"] = objectives.released_form(objective)
    cells = {}
    for name, objective in rows.items():
        cells[name] = [", ".join(names) or "-" for names in gradient_reach(objective).values()]
    markdown(["encoder", "predictor", "its own head", "target"], cells)


# ------------------------------------------------------------------------------- the command line


def parse(arguments):
    """The command line: its flags, and those of train.py that a sweep hands on."""
    def numbers(lowest):
        return lambda text: [probe.whole(lowest)(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--with", dest="own", metavar="FILE", default="", help="a Python file that adds objectives")
    add("--objective", metavar="A,B,...", help="a sweep of these, or of all")
    add("--seeds", type=numbers(0), default=[0, 1, 2])
    add("--out", type=Path, default=Path("runs/study"), help="the folder of a sweep's runs")
    add("--jobs", type=probe.whole(1), help="runs side by side [one per CPU core; on a GPU 1]")
    add("--shots", type=numbers(1), default=[probe.LABELS],
        help="labels per class of the few-label probes")
    add("--fresh", action="store_true",
        help="each seed is probed on clips and draws of labels of its own")
    add("--head-steps", type=probe.whole(1), default=HEAD_STEPS,
        help="of the few-label heads [%(default)s]")
    add("--table", nargs="+", metavar="RESULTS")
    add("--reference", help="what the table's differences are from [baseline]")
    add("--rows", type=lambda text: text.split(","), help="of the table; all by default")
    add("--answer", nargs="+", metavar="RESULTS")
    add("--confirm", nargs="+", metavar="RESULTS")
    add("--curves", metavar="RESULTS")
    add("--picture", metavar="PNG", help="draw --curves into this file")
    add("--agree", nargs=2, metavar="RESULTS")
    add("--compare", nargs="+", metavar="RESULT")
    add("--gradients", action="store_true")
    add("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    flags, others = parser.parse_known_args(arguments)
    if flags.own and not flags.own.endswith(".py"):
        parser.error(f"--with takes a Python file, NAME.py, not {flags.own}")
    asked = (flags.objective, flags.table, flags.answer, flags.confirm, flags.curves,
             flags.agree, flags.compare, flags.gradients, flags.child)
    if not any(asked):
        parser.error("say what to do: --objective, --table, --answer, --confirm, --curves, "
                     "--agree, --compare or --gradients")
    if others and not flags.objective:
        parser.error(f"these go with --objective alone: {' '.join(others)}")
    return flags, others


@command("study.py", smaller="--jobs", stopped="stopped; the same command goes on from there")
def main(arguments=None):
    flags, train_flags = parse(arguments)
    if flags.own:  # adds to `TERMS`, `HEADS` and `OBJECTIVES`
        spec = importlib.util.spec_from_file_location(Path(flags.own).stem, flags.own)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    if flags.child:
        return one_run(flags.child, flags.shots, flags.fresh, flags.head_steps)
    if flags.objective:
        return sweep(flags, train_flags)
    if flags.table:
        return tables(flags.table, flags.reference, flags.rows)
    if flags.answer:
        return answer(flags.answer)
    if flags.confirm:
        return confirm(flags.confirm)
    if flags.curves:
        return curves(flags.curves, flags.picture)
    if flags.agree:
        return agree(*flags.agree)
    if flags.compare:
        return compare(flags.compare)
    return gradients()


if __name__ == "__main__":
    sys.exit(main())
