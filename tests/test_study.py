"""tests/study.py: intervals, p-values and Holm against known values; tables by hand; a small sweep
that goes on."""

import csv
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import objectives
import probe
import study
import test_objectives as naive
import train
from data import write_json
from model import SIZES, normalise
from synthetic import Shapes


@pytest.fixture(autouse=True)
def same_probes_as_before(monkeypatch):
    """A run of a sweep, a process of its own, sets these for itself."""
    for name in ("FEW", "HELD_OUT", "ALONG_TRAIN", "ALONG_TEST"):
        monkeypatch.setattr(probe, name, getattr(probe, name))


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "count, t", [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (600, 1.9639)]
)
def test_the_interval_is_student_ts(count, t):
    values = np.random.default_rng(count).normal(size=count)
    deviation = math.sqrt(sum((value - values.mean()) ** 2 for value in values) / (count - 1))
    assert study.interval(values) == pytest.approx(t * deviation / math.sqrt(count), rel=1e-4)


@pytest.mark.parametrize(
    "count, t, p",
    [
        (2, 1.0, 0.5),
        (2, 12.7062, 0.05),
        (3, 4.3027, 0.05),
        (5, 2.7764, 0.05),
        (10, 2.2622, 0.05),
        (10, 4.7809, 0.001),
        (5, 0.0, 1.0),
    ],
)
def test_the_p_value_is_student_ts_on_both_sides(count, t, p):
    values = np.arange(count) - (count - 1) / 2  # mean 0, to which t standard errors are added
    shift = t * values.std(ddof=1) / math.sqrt(count)
    assert study.p_value(values + shift) == pytest.approx(p, rel=1e-4)
    assert study.p_value(values - shift) == pytest.approx(p, rel=1e-4)


def test_sign_flips_are_counted_one_by_one():
    draw = np.random.default_rng(0)
    for values in (draw.normal(0.7, 1, 6), draw.normal(size=8), [1.0, 1.0, -1.0], np.ones(12)):
        flipped = [abs(sum(sign * value for sign, value in zip(signs, values)))
                   for signs in itertools.product((1, -1), repeat=len(values))]
        extreme = sum(each >= abs(sum(values)) - 1e-9 for each in flipped)
        assert study.sign_flip_p(values) == extreme / 2 ** len(values)
    assert study.sign_flip_p(np.ones(12)) == 2 / 4096  # the least that 12 seeds can give


def test_holm_rejects_step_by_step():
    """By hand: the smallest of m is held against 0.05 / m, the next against 0.05 / (m - 1), until
    one fails."""
    assert study.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == {"a", "d"}  # 0.03 > 0.025
    assert study.holm({"a": 0.016, "b": 0.024, "c": 0.049}) == {
        "a",
        "b",
        "c",
    }  # 0.0167, 0.025, 0.05
    assert study.holm({"a": 0.017, "b": 0.018, "c": 0.019}) == set() == study.holm({})


def test_rank_correlation_is_spearmans_and_its_interval_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, 27))
    places = [
        {value: place for place, value in enumerate(sorted(values))} for values in (first, second)
    ]
    squares = sum((places[0][a] - places[1][b]) ** 2 for a, b in zip(first, second))
    expected = 1 - 6 * squares / (27 * (27 ** 2 - 1))
    assert study.rank_correlation(first, second) == pytest.approx(expected)
    assert study.rank_correlation(first, -first ** 3) == pytest.approx(-1)
    # Ties share the mean of their ranks: the 2s hold places 2 and 3, the 5s 4 to 6.
    assert study.ranks([5, 2, 1, 2, 5, 5]).tolist() == [5, 2.5, 1, 2.5, 5, 5]
    low, high = study.bootstrap(first, second)
    assert low < expected < high
    intervals = [
        study.bootstrap(*draw.normal(size=(2, 27)), draws=200) for _ in range(100)
    ]  # independent: it is 0
    assert 85 <= sum(low <= 0 <= high for low, high in intervals) <= 99


# ------------------------------------------------------------------------------------------- tables


def write_lines(path, motion, appearance=None, **flags):
    """Lines of results as a sweep writes them: {name: a value per seed}. motion also stands for
    linear direction."""
    for name, values in motion.items():
        for seed, value in enumerate(values):
            other = (appearance or {}).get(name, [70.0] * len(values))[seed]
            numbers = {
                "5 motion": [value - 2, value + 2],
                "5 appearance": [other] * 5,
                "linear direction": value,
                "feature_std": 0.01 if name.startswith("kinematic") else 0.5,
                "effective_rank": 7.5,
                "pred, first": 0.75,
            }
            with open(path, "a") as file:
                print(
                    json.dumps(
                        {
                            "name": name,
                            "seed": seed,
                            "flags": {"steps": 9} | flags,
                            "numbers": numbers,
                        }
                    ),
                    file=file,
                )
    return str(path)


def table_of(text, number):
    """The cells of one of the printed Markdown tables by row and column."""
    lines = re.findall(r"((?:^\|.*\n)+)", text, re.M)[number].splitlines()
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: dict(zip(header[1:], line[1:])) for line in lines}


def cell(values, t):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{mean:+.1f} ± {t * math.sqrt(variance / len(values)):.1f}"


def test_tables_hold_means_and_paired_differences_and_mark_what_stands_and_what_is_dead(
    tmp_path, capsys
):
    """t of 3 degrees of freedom is 3.1824. ld stands above the baseline, hw on average alone; fwm
    has three seeds."""
    motion = {
        "ld": [60.0, 62.0, 65.0, 70.0],
        "baseline": [50.0, 51.0, 55.0, 57.0],
        "hw": [49.0, 60.0, 56.0, 58.0],
        "fwm": [70.0, 71.5, 75.0],
        "delta": [54.0, 53.0, 62.0, 59.5],
        "kinematic": [12.0, 13.0, 12.0, 13.0],
        "untrained": [10.0, 11.0],
        "baseline-slow": [80.0, 81.5, 85.0, 88.0],
    }
    path = write_lines(tmp_path / "results.jsonl", motion)
    assert study.main(["--table", path]) == 0
    text = capsys.readouterr().out
    means, differences, logged = (table_of(text, number) for number in range(3))
    order = ["untrained", "baseline", "hw", "delta", "fwm", "ld", "kinematic †", "baseline-slow"]
    assert list(means) == order and list(differences) == [
        name for name in order if name not in ("baseline",)
    ]
    assert list(logged) == [name.removesuffix(" †") for name in order[1:]]
    assert logged["ld"]["pred, first"] == "0.750 ± 0.000"
    for name, values in motion.items():
        row, mean = means[name + " †" * (name == "kinematic")], sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        assert (
            row["motion, 5 labels"] == row["direction, linear"] == f"{mean:.1f} ± {deviation:.1f}"
        )
        assert (
            "speed, linear" not in row
            and row["seeds"] == str(len(values))
            and row["effective_rank"] == "7.5 ± 0.0"
        )
    base, t = motion["baseline"], {2: 12.7062, 3: 4.3027, 4: 3.1824}
    paired = {
        name: cell([a - b for a, b in zip(motion[name], base)], t[len(motion[name])])
        for name in motion
    }
    # Holm over five objectives, p: ld 0.0015 < 0.0125; delta 0.024 > 0.0167, and hw; baseline-slow
    # is a family of one.
    for name, shown in (
        ("ld", "{}*"),
        ("hw", "({})"),
        ("delta", "{}"),
        ("fwm", "{}"),
        ("kinematic †", "{}*"),
        ("baseline-slow", "{}*"),
        ("untrained", "{}"),
    ):
        assert differences[name]["motion, 5 labels"] == shown.format(
            paired[name.removesuffix(" †")]
        ), name
    assert differences["ld"]["appearance, 5 labels"] == "(+0.0 ± 0.0)"
    assert "over 5 objectives or 1 other form" in " ".join(text.split())
    assert study.main(["--table", path, "--reference", "ld", "--rows", "baseline,fwm"]) == 0
    differences = table_of(capsys.readouterr().out, 1)
    assert (
        list(differences) == ["baseline", "fwm"]
        and differences["baseline"]["motion, 5 labels"][:5] == "-11.0"
    )
    for flags in (["--reference", "fac"], ["--rows", "fac"]):
        assert study.main(["--table", path, *flags]) == 1
        assert (
            "no run of 'fac' to compare with; there are untrained, baseline"
            in capsys.readouterr().err
        )
    path = write_lines(
        tmp_path / "slow.jsonl",
        {"baseline-slow": [50.0, 51.0], "ld-slow": [61.0, 62.0]},
        world="slow",
    )
    assert study.main(["--table", path]) == 0  # a file of another world has the same rows
    assert table_of(capsys.readouterr().out, 1)["ld"]["motion, 5 labels"] == "+11.0 ± 0.0"


def test_numbers_of_the_lab_report_are_those_that_its_commands_print(monkeypatch, capsys):
    """Every row of its tables, every number with a spread, an interval or a per cent sign, up to
    the earlier results, and the README's answer; what the paper published as its file has it."""
    monkeypatch.chdir(study.ROOT)
    report = Path("tests/results/README.md").read_text().partition("\n## 8 ")[0]
    measured, _, published = report.partition("\n## 7 ")
    readme = Path("README.md").read_text()
    answer = readme.partition("\n## What was found\n")[2].partition("\n## ")[0]

    line = r"^ {4,}(.*python tests/study.py --(?:table|answer|confirm|curves) .*)"
    commands = "\n".join(re.findall(line, report, re.M))
    commands = subprocess.run(["bash"], input=f'python() {{ echo "$@"; }}\n{commands}',
                              capture_output=True, text=True)
    for command in dict.fromkeys(commands.stdout.splitlines()):
        assert study.main(command.split()[1:]) == 0
    for program in re.findall(r"^ *```python\n(.*?)```", report, re.M | re.S):
        exec(textwrap.dedent(program), {})
    heads = json.loads(Path("tests/results/untrained_vit_base_blobs.json").read_text())
    heads = [f"{np.mean(values):.1f}" for values in heads["top-1 of four heads"].values()]
    printed = capsys.readouterr().out + " ".join(heads)

    tables = measured.partition("\n## 2 ")[2].partition("\n## 4 ")[0]
    rows = re.findall(r"^\|.* ± .*\|$", tables, re.M)
    kinds = (r"[+-]?\d+\.\d+ ± \d+\.\d+\*?", r"[+-]\d\.\d\d \[[^]]*\]", r"\d+\.\d(?= %)",
             r"p = [\d.]*\d")
    numbers = re.findall("|".join(kinds), measured + answer)
    assert len(rows) > 150 and len(numbers) > 800 and all(mean in measured for mean in heads)
    assert [each for each in [*rows, *numbers] if each not in printed] == []

    for regime, results in json.loads(Path("tests/results/published.json").read_text()).items():
        table = published[published.index(f"| {regime} regime "):].partition("\n\n")[0]
        shown = [re.findall(r"\b\d+\.\d+", row) for row in table.splitlines()[2:]]
        expected = [[*numbers.values()] for numbers in results.values()]
        assert [[*map(float, row)] for row in shown] == expected


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("{", "line 3 of PATH is not a line of results"),
        ("[]", "line 3 of PATH is not a line of results"),
        ('{"name": "ld", "seed": 0}', "line 3 of PATH is not a line of results"),
        (
            '{"name": "ld", "seed": 2, "flags": {}, "numbers": {"5 motion": "x"}}',
            "line 3 of PATH is not a line of results",
        ),
        (
            '{"name": "ld", "seed": 2, "flags": {"steps": 8}, "numbers": {}}',
            "line 3 of PATH: this run of ld has other set",
        ),
    ],
)
def test_damaged_lines_and_runs_with_other_settings_are_named(tmp_path, capsys, line, sentence):
    path = write_lines(tmp_path / "results.jsonl", {"ld": [1.0, 2.0]})
    Path(path).write_text(Path(path).read_text() + line + "\n")
    assert study.main(["--table", path]) == 1
    assert f"study.py: {sentence.replace('PATH', path)}" in capsys.readouterr().err
    Path(path).write_text("")
    assert study.main(["--table", path]) == 1 and "hold no results" in capsys.readouterr().err


def test_two_sweeps_agree_where_their_differences_have_one_sign(tmp_path, capsys):
    """Of six differences, of two objectives in three columns, the first sweep shows ld's two of
    motion."""
    motion = {"baseline": [50.0, 51.0, 55.0], "hw": [49.0, 60.0, 56.0], "ld": [60.0, 62.0, 64.0]}
    first = write_lines(
        tmp_path / "first", motion, {"hw": [69.0, 71.0, 71.0], "ld": [69.0, 71.0, 71.0]}
    )
    for name, ld, same, significant in (
        ("same", [61.0, 63.0, 65.0], 2, 2),
        ("wider", [50.5, 80.0, 80.0], 2, 0),
        ("other", [40.0, 41.0, 45.5], 0, 2),
    ):
        second = write_lines(tmp_path / name, {**motion, "ld": ld})
        assert study.main(["--agree", first, second]) == 0
        output = capsys.readouterr().out
        assert output.startswith(
            f"2 of 6 differences from the baseline are significant in {first}"
        ), output
        assert (
            f"{same} have the same sign in {second}, and {significant} are significant there"
            in output
        )


def test_the_answer_is_four_comparisons_and_a_trade_off_that_counts_kinematic_objectives_once(
    tmp_path, capsys
):
    """fwm_hw_ld gains 10 points of motion in every seed, give or take; appearance of all falls
    where motion rises."""
    wobble, base = np.array([0.0, 1.0, -1.0, 0.5]), np.array([50.0, 54.0, 51.0, 52.0])
    gains = {
        "fwm_hw_ld": 10.0,
        "ld": 0.4,
        "hw": 3.0,
        "delta": 5.0,
        "kinematic": 20.0,
        "kinematic_0_1": 40.0,
    }
    motion = {
        "baseline": base.tolist(),
        **{name: (base + gain + wobble).tolist() for name, gain in gains.items()},
    }
    appearance = {name: (80 - gains.get(name, 0.0) + wobble).tolist() for name in motion}
    appearance["baseline"] = [80.0] * 4
    path = write_lines(
        tmp_path / "results.jsonl", {**motion, "ld-as-released": [99.0] * 4}, appearance
    )
    assert study.main(["--answer", path]) == 0
    output = capsys.readouterr().out
    for name, stands in (("fwm_hw_ld", "stands"), ("ld", "does not stand")):
        for factor, sign in (("motion", 1), ("appearance", -1)):
            line = re.escape(f"{name}, {factor}: {cell(sign * gains[name] + wobble, 3.1824)}, p = ")
            assert re.search(rf"^{line}[\d.e-]+, 4 seeds: {stands}$", output, re.M), output
    # ld, hw, delta, fwm_hw_ld, and both kinematic ones as one, which are dead.
    assert re.findall(r"^(\w+ \d+): (\S+) ", output, re.M) == [
        ("all 5", "-1.00"),
        ("living 4", "-1.00"),
    ]


def test_the_confirmation_is_four_exact_comparisons_and_what_else_there_is(tmp_path, capsys):
    """Over eight seeds fwm_hw_ld gains on the baseline in every one (p 2/256 < 0.05/4), and on
    hw_ld in none; appearance is the same for all."""
    wobble = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1.5, 0.5])
    motion = {"baseline": (50 + 0 * wobble).tolist(), "fwm_hw_ld": (60 + wobble).tolist(),
              "hw_ld": (60 + wobble[::-1]).tolist(), "ld": (55 + wobble).tolist()}
    path = write_lines(tmp_path / "results.jsonl", motion)
    assert study.main(["--confirm", path]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split(":")[:2] for line in lines] == [
        ["primary", " fwm_hw_ld - hw_ld, motion, 5 labels"],
        ["primary", " fwm_hw_ld - hw_ld, appearance, 5 labels"],
        ["primary", " fwm_hw_ld - baseline, motion, 5 labels"],
        ["primary", " fwm_hw_ld - baseline, appearance, 5 labels"],
        ["secondary", " ld - baseline, motion, 5 labels"],
        ["secondary", " ld - baseline, appearance, 5 labels"]]
    stands = [line.endswith(": stands (Holm over 4)") for line in lines[:4]]
    assert stands == [False, False, True, False] and "p = 0.0078, 8 seeds" in lines[2]
    assert f"{cell(10 + wobble, 2.3646)}, p" in lines[2]
    assert all(line.endswith("8 seeds: not corrected") for line in lines[4:])

    path = write_lines(tmp_path / "two.jsonl", {arm: motion[arm] for arm in ("fwm_hw_ld", "hw_ld")})
    assert study.main(["--confirm", path]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == 2 and all(line.endswith(" (Holm over 2)") for line in lines)
    path = write_lines(tmp_path / "none.jsonl", {"ld": motion["ld"]})
    assert study.main(["--confirm", path]) == 1
    assert "no run of fwm_hw_ld and of what it is compared with; there are ld" in (
        capsys.readouterr().err)


def test_curves_are_means_over_seeds_of_what_the_probes_found_along_the_runs(tmp_path, capsys):
    lines = [{"name": f"{name}-dives", "seed": seed, "along": [
        {"step": step, "dive": base + seed + step / 100, "appearance": 50.0 + step}
        for step in (0, 500, 900)]} for name, base in (("baseline", 4), ("ld", 10)) for seed in (0, 2)]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert study.main(["--curves", str(path), "--picture", str(tmp_path / "curves.png")]) == 0
    dive = table_of(capsys.readouterr().out, 0)
    assert dive["baseline"] == {"step 0": "5.0", "step 500": "10.0", "step 900": "14.0"}
    assert dive["ld"] == {"step 0": "11.0", "step 500": "16.0", "step 900": "20.0"}
    assert Image.open(tmp_path / "curves.png").height == 2 * 520  # a panel for each factor


@pytest.mark.parametrize("flag", ["--answer", "--agree"])
def test_results_that_lack_what_a_question_needs_are_one_sentence(tmp_path, capsys, flag):
    path = write_lines(tmp_path / "results.jsonl", {"ld": [1.0, 2.0], "hw": [1.0, 2.0]})
    assert study.main([flag, path, path][:3 if flag == "--agree" else 2]) == 1
    assert "baseline" in capsys.readouterr().err


# ------------------------------------------------------------------------------ results of probe.py


def write_results(folder, values, source="b", **how):
    """results-*.json with one measurement; values: a list of top-1 per run, of which each becomes a
    file."""
    folder.mkdir(exist_ok=True)
    for number, each in enumerate(values):
        write_json(folder / f"{number}.json", {
            "train": {"source": "a"}, "test": {"source": source},
            "measurements": {"all labels": {"values": each, "how": how}}})
    return [str(folder / f"{number}.json") for number in range(len(values))]


def test_two_results_are_compared_draw_by_draw_and_several_run_by_run(tmp_path, capsys):
    """Draws differ by 12, 10 and 14; means of A 50, 60, 70 and of B 61, 72, 83 by 11, 12 and 13;
    t(2) is 4.3027."""
    pair = write_results(tmp_path / "pair", [[50.0, 61.0, 70.0], [62.0, 71.0, 84.0]])
    assert study.main(["--compare", *pair]) == 0
    assert f"+12.00 ± {4.3027 * 2 / 3 ** 0.5:.2f}   A 60.33, B 72.33" in capsys.readouterr().out
    values = [[49.0, 51.0], [60.0, 60.0], [60.0, 80.0], [61.0, 61.0], [70.0, 74.0], [83.0, 83.0]]
    paths = write_results(tmp_path / "runs", values, seed=0)
    assert study.main(["--compare", *paths]) == 0
    assert f"+12.00 ± {4.3027 / 3 ** 0.5:.2f}   A 60.00, B 72.00" in capsys.readouterr().out
    other, = write_results(tmp_path / "other", values[:1], seed=1)
    assert study.main(["--compare", *paths[:3], other]) == 0
    assert re.search(
        r"all labels +not comparable: its seed differ between results", capsys.readouterr().out
    )
    other, = write_results(tmp_path / "clips", values[:1], "c", seed=0)
    for wrong, sentence in (
        ([paths[0], other], "do not say that their test clips are the same"),
        (paths[:3], "has 3 results; give as many of A as of B"),
        (["a.json", paths[0]], "a.json is missing, or is no result of probe.py"),
    ):
        assert study.main(["--compare", *wrong]) == 1 and sentence in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ a sweep

MINE = """
import os, signal, time
from objectives import HEADS, OBJECTIVES, TERMS, Objective, Term, mlp
calls = []

def mine(outputs, head):
    calls.append(1)
    if len(calls) == 2 and os.path.exists("stop"):  # stops the sweep, which stops this run
        os.kill(os.getppid(), signal.SIGTERM)
        while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # until it has arrived
            time.sleep(0.01)
    return head(outputs.masks[0].z).abs().mean()

TERMS["mine"] = mine
HEADS["mine"] = lambda width_in, channels: mlp(width_in, 8, channels)
OBJECTIVES["mine"] = Objective("both", "what a small network sees is small", {"mine": Term(0.5)})
"""
TINY = ("--frames 4 --crop 32 --patch 8 --batch 4 --steps 3 --log-every 1 --probe-clips 0 "
        "--probe-every 0").split()


class Fork:
    """Stands for subprocess.Popen: the command runs in a fork of this process, which has imported
    torch already; it has its own output, signals and exit status."""

    def __init__(self, command, stdout, stderr, env):
        assert command[:2] == [sys.executable, study.__file__] and stdout is stderr
        self.returncode, self.process = None, os.fork()
        if self.process:
            return
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1)
            self.returncode = study.main(command[2:])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(3 if self.returncode is None else self.returncode)

    def poll(self):
        if self.returncode is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)

    def terminate(self):
        if self.poll() is None:
            os.kill(self.process, signal.SIGTERM)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Works in a folder with mine.py; what it adds to tables is taken out again."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    how = types.SimpleNamespace(Popen=Fork, run=subprocess.run)
    monkeypatch.setattr(study, "subprocess", how)
    tables = objectives.TERMS, objectives.HEADS, objectives.OBJECTIVES
    before = [dict(table) for table in tables]

    def forget():
        for table, content in zip(tables, before):
            table.clear()
            table.update(content)
    yield forget
    forget()


def test_a_sweep_with_an_objective_of_your_own_goes_on_and_names_what_failed(mine, capfd):
    """Its first run stops it before the last of three steps. Of four runs one then is stopped, two
    are finished, and one meets a folder of something else."""
    own, folder = ["--with", "mine.py"], Path("study")
    sweep = [*own, "--jobs", "2", "--out", "study", *TINY]

    def alone(name, out):
        flags = [f"--objective={name[:-6]}", f"--seed={name[-1]}", *TINY, f"--out={out}/{name}"]
        assert study.main([*own, "--child", *flags]) == 0
    Path("stop").touch()
    assert study.main([*sweep, "--objective", "mine", "--seeds", "1"]) == 128 + signal.SIGTERM
    assert (
        "goes on from there" in capfd.readouterr().out and not (folder / "results.jsonl").exists()
    )
    assert probe.load_checkpoint(folder / "mine-seed1" / "last.pt")["step"] in (1, 2)
    Path("stop").unlink()
    for name, out in (
        ("baseline-seed0", "study"),
        ("mine-seed0", "study"),
        ("mine-seed1", "whole"),
    ):
        alone(name, out)
    (folder / "baseline-seed1").mkdir()
    (folder / "baseline-seed1" / "notes.txt").write_text("mine")
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*-seed0/*")}
    capfd.readouterr()
    sweep += ["--objective", "baseline,mine", "--seeds", "0,1"]
    assert study.main(sweep) == 1
    output, errors = capfd.readouterr()
    assert re.search(r"/4 .*mine-seed1 \w+", errors)  # the bar shows what runs
    assert (
        "3 of 4 runs finished" in output
        and "study/baseline-seed1 failed with exit status 1" in errors
    )
    assert (
        "end of study/baseline-seed1.log: train.py: study/baseline-seed1 is not empty; add "
        "--resume"
        in errors
    )
    whole, resumed = (
        Path(out, "mine-seed1", "metrics.csv").read_bytes() for out in ("whole", "study")
    )
    assert resumed == whole and whole.count(b"\n") == 4

    (folder / "baseline-seed1" / "notes.txt").unlink()
    alone("baseline-seed1", "study")
    finished |= {path: path.stat().st_mtime_ns for path in folder.rglob("*-seed1/*")}
    for _ in range(2):  # nothing runs again, and no line comes twice
        assert study.main(sweep) == 0 and "4 of 4 runs finished" in capfd.readouterr().out
    assert finished == {path: path.stat().st_mtime_ns for path in folder.rglob("*-seed?/*")}
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted((line["name"], line["seed"]) for line in lines) == [
        *itertools.product(("baseline", "mine"), (0, 1))
    ]
    for line in lines:
        rows = list(
            csv.DictReader((folder / f"{line['name']}-seed{line['seed']}" / "metrics.csv").open())
        )
        assert line["flags"] == {
            "frames": 4,
            "batch": 4,
            "steps": 3,
            "log_every": 1,
            "probe_clips": 0,
            "probe_every": 0,
        }
        pred = [float(row["pred"]) for row in rows]
        assert line["numbers"] == pytest.approx(
            {
                "feature_std": float(rows[2]["feature_std"]),
                "effective_rank": float(rows[2]["effective_rank"]),
                "pred, first": pred[0],
                "pred, mean": sum(pred) / 3,
                "pred, last": pred[2],
            },
            rel=1e-12,
        )

    mine()  # forgets mine.py; its checkpoint is evaluated, and its results shown, all the same
    flags = probe.parse(["--checkpoint", "study/mine-seed1/last.pt"])
    assert probe.open_frozen(flags, False).about == "target of study/mine-seed1/last.pt, step 3"
    assert study.main(["--table", "study/results.jsonl"]) == 0
    assert "| mine |" in (output := capfd.readouterr().out)
    assert "over 1 objective; rows of three seeds" in output


@pytest.fixture
def controls(monkeypatch):
    """tests/controls.py; what it adds to tables is taken out again."""
    for table in (objectives.TERMS, objectives.HEADS, objectives.OBJECTIVES):
        for name in ("ld_other_clip", "ld_deep", "hw_ld_deep"):
            monkeypatch.setitem(table, name, None)
            del table[name]
    monkeypatch.delitem(sys.modules, "controls", raising=False)
    return importlib.import_module("controls")


def test_controls_are_ld_with_another_clips_targets_and_fwm_objectives_without_fwm(controls):
    outputs = naive.make_outputs((4, 3, 3), 3)
    head = naive.make_head(naive.CHANNELS, 5, naive.CHANNELS)
    cells, means = naive.cells_of(outputs.grid), []
    for mask in outputs.masks:
        errors = []
        for pair in naive.pairs_of(outputs, mask):
            time, row, column = pair.cell
            now, later = (cells.index((each, row, column)) for each in (time, time + 1))
            h = outputs.h[(pair.clip - 1) % 3]
            errors.append((head(pair.z) - (h[later] - h[now])).abs().mean())
        means.append(sum(errors) / len(errors))
    value = objectives.TERMS["ld_other_clip"](outputs, head)
    torch.testing.assert_close(value, sum(means) / len(means))

    table = objectives.OBJECTIVES
    for name, other in (("ld_deep", "fwm_ld"), ("hw_ld_deep", "fwm_hw_ld")):
        assert table[name].terms | objectives.FWM == table[other].terms
        heads = [objectives.make_heads(table[each], 8)["ld"] for each in (name, other)]
        assert str(heads[0]) == str(heads[1])


@pytest.fixture
def laboratory(monkeypatch):
    """tests/laboratory.py; what it adds to tables and what its runs replace is put back."""
    for place, name in ((train, "build"), (train, "draw_masks"), (train, "level_normalise"),
                        (objectives, "masked_errors"), (objectives, "distance")):
        monkeypatch.setattr(place, name, getattr(place, name))
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"])
    monkeypatch.delitem(sys.modules, "laboratory", raising=False)
    before = dict(objectives.OBJECTIVES)
    yield importlib.import_module("laboratory")
    objectives.OBJECTIVES.clear()
    objectives.OBJECTIVES.update(before)


def model_of(name):
    return train.build(train.parse([*TINY, f"--objective={name}"])[0])


@pytest.mark.parametrize("what", ["stop_gradient", "level_norm", "l1", "predictor"])
def test_an_objective_of_the_laboratory_lacks_what_it_names_and_nothing_else(
    laboratory, monkeypatch, what
):
    generator, grid = torch.Generator().manual_seed(0), (2, 4, 4)
    clips = torch.randint(256, (4, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)
    masks = objectives.draw_masks(clips, generator, generator, grid, objectives.Masking())
    found = []
    for name in ("baseline", f"baseline-without-{what}"):
        model = model_of(name)
        losses, h = model(clips, masks, {"pred": 1.0, "ctx": 1.0})
        found.append((model.encoder.state_dict(), losses["pred"], h))
    (encoder, pred, h), (same_encoder, without, targets) = found
    torch.testing.assert_close(same_encoder, encoder, rtol=0, atol=0)
    assert torch.equal(targets, h) == (what != "level_norm")
    assert (without != pred) == (what != "stop_gradient")
    assert model.targets(normalise(clips)).requires_grad == (what == "stop_gradient")

    outputs = naive.make_outputs((4, 3, 3), 2)
    if what == "l1":
        monkeypatch.setattr(naive, "absolute_mean", lambda channels: channels.square().mean())
    for name, loss in naive.CORE.items():
        expected = getattr(naive, f"naive_{name}")(outputs)
        torch.testing.assert_close(loss(outputs), expected, rtol=1e-6, atol=0)

    visible, masked = masks[0]
    z = torch.randn(4, visible.shape[1], 512, requires_grad=True)
    model.predictor.mask_token.data.normal_()
    p, _ = model.predictor(z, visible, masked, grid)
    blind = not torch.autograd.grad(p.sum(), z, allow_unused=True, materialize_grads=True)[0].any()
    assert blind == (what == "predictor")


def test_without_the_cut_late_time_steps_are_as_visible_as_early_ones(laboratory):
    """The share of visible tokens that lie in the last of four time steps, over 50 batches of 8."""
    share, clips = [], torch.zeros(8, 3, 8, 32, 32, dtype=torch.uint8)
    for name in ("fwm_hw_ld", "fwm_hw_ld-without-cut"):
        masking, generator = model_of(name).objective.masking, torch.Generator().manual_seed(0)
        masks = [train.draw_masks(clips, generator, generator, (4, 8, 8), masking)
                 for _ in range(50)]
        visible = torch.cat([visible.flatten() for each in masks for visible, _ in each])
        share.append((visible >= 3 * 64).double().mean().item())
    assert share[0] < 0.2 and share[1] == pytest.approx(0.25, abs=0.01)


def test_a_run_of_a_sweep_is_probed_and_the_untrained_one_has_the_weights_that_a_run_begins_with(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(probe, "LINEAR", probe.LINEAR._replace(epochs=1))
    flags = [*TINY, "--frames", "4", "--probe-clips", "192", "--seed", "2"]
    run = tmp_path / "untrained-seed2"
    assert (
        study.main(["--head-steps", "1", "--shots", "2", "--child", "--objective=untrained", *flags,
                    f"--out={run}"])
        == 0
    )
    config, _ = train.parse(flags)
    encoder = train.build(config).encoder
    worlds = probe.held_out(encoder, vars(config))
    expected = probe.probe_clips(encoder, worlds, 192, shots=(2,))
    line = json.loads((run / "study.json").read_text())
    assert (line["name"], line["seed"]) == ("untrained", 2)
    del expected["clips"]
    assert line["numbers"] == {f"{k} {factor}": value
                               for k in expected for factor, value in expected[k].items()}

    # With --fresh, the clips and the draws of labels are those of the seed.
    fresh = ["--head-steps", "1", "--fresh", "--shots", "1", "--child", "--objective=untrained", *flags]
    assert study.main([*fresh, f"--out={run}"]) == 0
    worlds = probe.held_out(encoder, vars(config))
    assert [world.seed for world in worlds] == [1_000_003 + 6, 1_000_003 + 7]
    expected = probe.probe_clips(encoder, worlds, 192, 10, shots=(1,))
    line = json.loads((run / "study.json").read_text())
    assert line["numbers"]["1 motion"] == expected["1"]["motion"] and line["flags"]["fresh"]


def test_a_run_on_your_own_videos_is_probed_on_them(tmp_path, capsys):
    data.write_dataset(tmp_path / "clips", Shapes(4, 32, 0), 6, 8)
    (tmp_path / "own.csv").write_text("".join(f"clips/{i:06d}.mp4 {i % 2}\n" for i in range(6)))
    run = tmp_path / "own-baseline-seed0"
    assert study.main(["--head-steps", "1", "--shots", "1", "--child", "--objective=baseline", *TINY,
                       f"--data={tmp_path}/own.csv", "--probe-clips=192", f"--out={run}"]) == 0
    line = json.loads((run / "study.json").read_text())
    assert {"1 class", "linear class"} <= line["numbers"].keys()
    assert not any("motion" in name for name in line["numbers"])
    (tmp_path / "results.jsonl").write_text(json.dumps(line))
    capsys.readouterr()
    assert study.main(["--table", str(tmp_path / "results.jsonl")]) == 0
    assert "| class, 1 labels | class, linear |" in capsys.readouterr().out


def test_a_run_on_blobs_is_probed_on_other_blobs(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BLOB_CLIPS", (8, 8))
    run = tmp_path / "baseline-seed0"
    flags = [
        *TINY,
        "--preset=blobs",
        "--model=tiny",
        "--patch=32",
        "--crop=64",
        "--workers=0",
        "--micro-batch=0",
    ]
    assert (
        study.main(["--shots", "1", "--head-steps", "1", "--child", "--objective=baseline", *flags,
                    f"--out={run}"]) == 0
    )
    found = json.loads((run / "study.json").read_text())["numbers"]
    checkpoint = probe.load_checkpoint(run / "last.pt")
    encoder = probe.make_encoder(checkpoint["config"], checkpoint["target"])
    clips = data.BlobClips(8, 160, items=range(16), first=data.CLEAN_BLOBS, directions=True)
    tokens = torch.stack(
        [probe.last_level(encoder, clips.evaluation_clip(i)[None])[0] for i in range(16)]
    )
    sets = [
        probe.Labelled(tokens[rows], torch.arange(16)[rows] % 8)
        for rows in (slice(8), slice(8, 16))
    ]
    assert (
        found["1 direction"] == probe.accuracies(probe.FEW, *sets, range(5), "cpu", 1)
        and "feature_std" in found
    )


def test_losses_reach_the_networks_that_the_readme_says():
    """pred, ctx and hw the encoder and the predictor, every other term the encoder and its own
    head."""
    with_head = {"ld", "ac", "hamiltonian"}
    for name, objective in objectives.OBJECTIVES.items():
        for released in (False, True)[:1 + ("hw_ld" in name)]:
            found = study.gradient_reach(
                objectives.released_form(objective) if released else objective
            )
            terms = {*objective.terms} - (
                {"ld"} if released else set()
            )  # which then trains nothing
            both = {"pred", "ctx"} | terms & {"hw"}
            assert {part: {*names} for part, names in found.items()} == {
                "encoder": both | terms,
                "predictor": both,
                "heads": terms & with_head,
                "target": set(),
            }, name


@pytest.mark.parametrize(
    "flags, status, sentence",
    [
        ([], 2, "say what to do"),
        (["--table", "x", "--stepz", "3"], 2, "these go with --objective alone: --stepz 3"),
        (["--stepz", "3"], 2, "say what to do: --objective"),
        (["--objective", "baseline", "--stepz", "3"], 2, "unrecognized arguments: --stepz 3"),
        (["--objective", "baseline,mine"], 1, "unknown objective 'mine'; known are baseline"),
        (["--with", "mine.py", "--objective", "mine"], 1, "mine.py"),
        (["--with", "mine.txt"], 2, "NAME.py, not mine.txt"),
        (["--table", "nowhere"], 1, "nowhere: No such file"),
    ],
)
def test_wrong_flags_give_one_sentence(tmp_path, monkeypatch, capsys, flags, status, sentence):
    monkeypatch.chdir(tmp_path)
    try:
        assert study.main(flags) == status == 1
    except SystemExit as error:
        assert error.code == status == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())
