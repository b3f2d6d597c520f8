"""The benchmark in every mode, on tiny settings; the operations that it counts beside a formula."""
import io
import math
import re
import sys
from functools import partial

import pytest
import torch

import benchmark
import beside
import miniature
import probe
import train
from model import LEVELS, SIZES

QUICK = ["--crop", "16", "--patch", "4", "--batch", "4", "--device", "cpu"]
benchmark.WARM_UP, benchmark.ROUND = 1, 2


def run(capsys, *flags):
    """What a call of the benchmark prints: text, and the ratios in it by name."""
    assert benchmark.main([*flags, *QUICK, "--rounds", "1"]) == 0
    output = capsys.readouterr().out
    return output, {
        name: float(ratio)
        for name, ratio in re.findall(r"(.+): [\d.]+ ms, ([\d.]+) x ours\n", output)
    }


def test_a_table_has_a_row_for_each_objective(capsys, miniature):
    flags = ("--preset mixed --model tiny --frames 4 --micro-batch 2 --workers 1 "
             "--objective baseline,fwm_hw_ld").split()
    output, _ = run(capsys, *flags, "--data", str(miniature / "UCF-101"))
    header, first, second = (
        line[2:-2].split(" | ") for line in output.splitlines() if line.startswith("| ")
    )
    assert (first[0], second[0], first[header.index("x first")]) == (
        "baseline",
        "fwm_hw_ld",
        "1.00",
    )
    for row in (dict(zip(header, each, strict=True)) for each in (first, second)):
        assert float(row["ms/step"]) * float(row["clips/s"]) == pytest.approx(4 * 1000, rel=0.05)
        assert (
            min(float(row[name]) for name in ("x first", "x plain", "TFLOP/s", "loader, clips/s"))
            > 0
        )
        assert [row[name] for name in header[6:10]] == ["unknown", "-", "-", "-"]


def some_steps(objective, *flags):
    config, _ = train.parse(["--objective", objective, *QUICK, *flags])
    trainer = train.Trainer(config, torch.device("cpu"))
    return (
        config,
        trainer,
        benchmark.draw_steps(config, trainer.objective.masking, 4, trainer.device),
    )


def hand_count(config, masks, ema):
    """Operations of a step for each clip. A backward pass is two forward ones, but pixels get no
    gradient."""
    width, depth, _, narrow, predictor_depth, _ = SIZES[config.model]

    def blocks(depth, tokens, width):  # matrices of 12 width^2 weights, and attention
        return depth * (2 * tokens * 12 * width ** 2 + 4 * tokens ** 2 * width)

    def encoder(tokens, times):  # times: of a forward pass
        embedding = 2 * tokens * width * 3 * config.tubelet * config.patch ** 2
        return times * blocks(depth, tokens, width) + min(times, 2) * embedding
    total = encoder(math.prod(config.grid), 1 if ema else 3)
    for n, both in (
        (visible.shape[1], visible.shape[1] + masked.shape[1]) for visible, masked in masks
    ):
        linear = (
            2 * n * (LEVELS * width * width + width * narrow) + 2 * both * narrow * LEVELS * width
        )
        total += encoder(n, 3) + 3 * (linear + blocks(predictor_depth, both, narrow))
    return total


def test_operations_are_those_of_a_formula():
    config, trainer, steps = some_steps("kinematic", "--micro-batch", "2")
    expected = sum(
        hand_count(config, masks, trainer.objective.ema) for step in steps for _, masks in step
    ) / len(steps)
    assert benchmark.plain_costs(trainer, steps)[0] == pytest.approx(expected, rel=0.01)


def memory_for(clips_at_most, monkeypatch):
    """A device whose memory holds a step of so many clips. Returns the list of what was tried."""
    step, tried = train.Trainer.step, []

    def limited(trainer, number, micro_batches):
        tried.append(len(micro_batches[0][0]))
        if tried[-1] <= clips_at_most:
            return step(trainer, number, micro_batches)
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(train.Trainer, "step", limited)
    return tried


def test_where_memory_runs_out_the_plain_step_has_fewer_clips(monkeypatch):
    config, trainer, steps = some_steps("baseline", "--batch", "8")
    tried = memory_for(2, monkeypatch)
    operations, seconds, count = benchmark.plain_costs(trainer, steps)
    assert count == 2 and seconds > 0 and tried == [8, 4, *[2] * 8]  # four to count, four to time
    assert operations == pytest.approx(
        sum(hand_count(config, masks, True) for (_, masks), in steps) / 4, rel=0.01
    )


def test_a_batch_that_memory_does_not_hold_is_one_sentence(monkeypatch, capsys):
    memory_for(0, monkeypatch)
    assert benchmark.main(QUICK) == 1
    error = capsys.readouterr().err
    assert (
        error
        == "benchmark.py: there is too little memory; give a smaller --batch, --micro-batch or "
        "--model\n"
    )


def test_the_largest_kernels_come_first_with_their_share():
    _, trainer, steps = some_steps("ld")
    found = benchmark.largest_kernels(trainer, steps[:2], "CPU", "self_cpu_time_total")
    shares = [int(share) for share in re.findall(r" (\d+)%(?:, |$)", found)]
    assert len(shares) == 3 and 0 < sum(shares) <= 100 and shares == sorted(shares, reverse=True)


@pytest.mark.command(
    "tests/benchmark.py", "--graphs", "--objective", "hamiltonian", "--steps", "44")
def test_token_counts_that_change_every_step_compile_no_graph_after_the_warm_up(finished):
    output, _ = finished
    row = r"^\| hamiltonian \| (\d+) \| (\d+) \| 0 \| 0 \|$"
    (counts, graphs), = re.findall(row, output, re.M)
    # One for the blocks of each of three networks and one for the losses; two where sizes were not
    # yet known to change.
    assert int(counts) > 20 and 4 <= int(graphs) <= 6


@pytest.mark.parametrize("there", [True, False])
def test_decoding_stands_beside_decord_where_there_is_one(capsys, monkeypatch, there):
    monkeypatch.setattr(benchmark, "FRAMES", 40)
    pytest.importorskip("decord") if there else monkeypatch.setitem(sys.modules, "decord", None)
    output, found = run(capsys, "--decode")
    assert ("pip install decord" in output) != there and len(found) == 2 * (1 + there)


# ------------------------------------------------------------------------ one commit beside another


def test_a_row_has_medians_and_the_median_and_range_of_ratios(capsys):
    """The first round warms up; then old takes 4, 6, 8 and new 2, 2, 4 seconds, in turns."""
    asked, times = [], [iter([100.0, 4.0, 6.0, 8.0]), iter([1.0, 2.0, 2.0, 4.0])]

    def way(i):
        asked.append(i)
        return next(times[i])
    beside.take_turns("work", [partial(way, 0), partial(way, 1)], 3)
    assert capsys.readouterr().out == "| work | 6 s | 2 s | 2.00 (2.00 to 3.00) |\n"
    assert asked == [1, 0, 0, 1, 1, 0, 0, 1]


def test_each_kind_of_work_runs_and_answers_a_line_for_each_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(beside, "TINY", beside.STEP + "--batch 4 --crop 16 --patch 8")
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    monkeypatch.setattr(beside, "heads", lambda recipe, shape, tested, *how, heads=beside.heads:
                        heads(recipe, (32, 2, 64), 16, *how))
    monkeypatch.setattr(sys, "path", [*sys.path])
    miniature.write_video(tmp_path / "12.mp4", 40)
    others = "step, ViT-B|second|250|avi|B frames"
    rows = [name for name in beside.jobs(tmp_path) if not re.search(others, name)]
    for name in rows:
        monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
        beside.serve(name, tmp_path)
        lines = [[float(each) for each in line.split()]
                 for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == 2 and all(spent > 0 and 10 < memory for spent, memory, *_ in lines)
        assert len(lines[0]) == 2 + (15 if "15" in name else 5 if "5 heads" in name else 0), name
    assert len(rows) == 4
    assert beside.command_seconds("-c pass", tmp_path) > 0
