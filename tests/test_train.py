"""The training command as a user runs it: gradients, schedules, EMA, survival, several ranks, bad
input."""

import csv
import errno
import functools
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import data
import objectives
import probe
import synthetic
import train
from model import SIZES, Encoder, Size, normalise
from objectives import OBJECTIVES, Objective, Term, released_form

ROOT = Path(__file__).parent.parent
CPU, TINY = torch.device("cpu"), SIZES["tiny"]
# A run that takes seconds: tiny clips, few steps, no probe.
QUICK = (
    "--crop 16 --patch 4 --batch 4 --steps 12 --log-every 1 --save-every 4 --probe-clips 0 "
    "--probe-every 0 --device cpu"
).split()
# Directions drawn at random at every step, two micro-batches.
SIGREG = [*QUICK, "--patch", "8", "--objective", "sigreg", "--micro-batch", "2"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Runs in this process have smaller networks than the smallest, and sigreg has fewer
    directions."""
    few = functools.partial(objectives.sigreg, directions=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            SIZES, "tiny", Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
        )
        patch.setitem(objectives.TERMS, "sigreg", few)
        yield


@pytest.fixture
def as_shipped(monkeypatch):
    """Not so where a real command is looked at from this process, or on a GPU."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setitem(objectives.TERMS, "sigreg", objectives.sigreg)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(run_folder, name="metrics.csv"):
    """The lines of a table, each a dict of numbers."""
    with open(run_folder / name) as file:
        return [
            {name: float(value or "nan") for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def micro_batch(count):
    """Random clips, pixels and all, with their masks."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(256, (count, 3, 8, 16, 16), dtype=torch.uint8, generator=generator)
    return clips, objectives.draw_masks(
        clips, generator, generator, (4, 4, 4), OBJECTIVES["baseline"].masking
    )


def raising(error):
    def function(*_, **__):
        raise error

    return function


# ----------------------------------------------------------------------------- schedules, EMA, runs


@pytest.mark.parametrize(
    "flags, rates, lambdas",
    [
        (
            "--preset mixed --root .",
            {0: 1e-4 + 5e-4 / 300, 149: 3.5e-4, 298: 6e-4 - 5e-4 / 300, 299: 6e-4, 29_999: 6e-4},
            {0: 0, 15_000: 0, 15_300: 0.01, 22_500: 0.25, 29_999: 0.5 - 0.5 / 15_000},
        ),
        (
            "--preset mixed --root . --steps 3000",
            {14: 3.5e-4, 29: 6e-4, 2999: 6e-4},
            {1500: 0, 1530: 0.01, 2250: 0.25},
        ),
        ("--preset blobs", {24: 3.5e-4, 49: 6e-4}, {0: 0, 2500: 0, 3000: 0, 4999: 0}),
    ],
)
def test_a_step_has_the_studys_learning_rate_and_context_weight(flags, rates, lambdas):
    """METHOD.md, sections 4 and 7: step s, from 0, uses the rate of s + 1; lambda is 0 up to step
    15,000, which the synthetic regime never reaches. Runs of another length have the same values at
    the same share."""
    config, _ = train.parse(
        [*flags.split(), "--model", "tiny", "--frames", "8", "--crop", "16", "--patch", "4"]
    )
    trainer, batch = train.Trainer(config, CPU), micro_batch(2)
    for step in sorted({*rates, *lambdas}):
        losses, h, norm = trainer.step(step, [batch])
        row = trainer.row(step, losses, h, norm)
        if step in rates:
            used = [group["lr"] for group in trainer.optimizer.param_groups]
            assert [row["lr"], *used] == pytest.approx([rates[step]] * 3, rel=1e-12)
        if step in lambdas:
            assert row["ctx_weight"] == pytest.approx(lambdas[step], rel=1e-9)
            assert row["total"] == pytest.approx(row["pred"] + lambdas[step] * row["ctx"], rel=1e-6)


def test_the_presets_are_the_studys_regimes():
    common = {
        "model": "vit_base",
        "patch": 16,
        "tubelet": 2,
        "ema": 0.99925,
        "weight_decay": 0.04,
        "warmup_lr": 1e-4,
        "lr": 6e-4,
        "micro_batch": 8,
        "frames": 16,
        "crop": 224,
        "batch": 32,
        "steps": 30_000,
        "ctx_weight": 0.5,
    }
    own = {
        "ucf101": {"fps": 16},
        "mixed": {"fps": 0, "frame_step": 2},
        "blobs": {"frames": 8, "crop": 128, "fps": 4, "batch": 16, "steps": 5000, "ctx_weight": 0},
    }
    for name, values in own.items():
        regime, _ = train.parse(["--preset", name, *["--root", "."] * (name != "blobs")])
        for field, value in (common | values).items():
            assert getattr(regime, field) == value, (name, field)
    assert (
        train.parse(["--preset", "blobs", "--frame-step", "3"])[0].fps == 0
    )  # else the flag would change nothing


def test_weight_decay_falls_on_matrices_only():
    model = train.build(train.parse(QUICK)[0])
    decayed, free = train.make_optimizer(model, train.parse(QUICK)[0]).param_groups
    assert decayed["weight_decay"] == 0.04 and free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert decayed["betas"] == (0.9, 0.999) and decayed["eps"] == 1e-8
    assert len(decayed["params"]) + len(free["params"]) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_weights_decay_alike_where_the_context_loss_is_left_out():
    """At lambda 0 the layer that predicts visible tokens is not run between lines of metrics.csv.
    Without gradient, AdamW still takes lr * decay of its weights at each step, logged or not."""
    layers = []
    for log_every in ("1", "100"):
        flags = [*QUICK, "--steps", "100", "--weight-decay", "0.5", "--log-every", log_every]
        trainer = train.Trainer(train.parse(flags)[0], CPU)
        layer, kept = trainer.model.predictor.to_visible.weight, 1.0
        start = layer.detach().clone()
        for step in range(1, 4):
            losses, _, _ = trainer.step(step, [micro_batch(2)])
            assert ("ctx" in losses) == (log_every == "1")
            kept *= 1 - trainer.optimizer.param_groups[0]["lr"] * 0.5
        torch.testing.assert_close(layer.detach(), start * kept)
        layers.append(layer.detach())
    assert torch.equal(*layers)


def test_threads_are_those_of_the_flag_and_0_leaves_them(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for flags, expected in (
        ([], [1]),
        (["--threads", "3"], [3]),
        (["--threads", "0"], []),
        (["--preset", "blobs"], []),
    ):
        train.start_ranks(train.parse([*QUICK, *flags])[0])
        assert given == expected
        given.clear()


@pytest.mark.parametrize(
    "objective, released, moves",
    [("baseline", False, True), ("kinematic", False, False), ("kinematic", True, False)],
)
def test_the_target_is_the_closed_form_of_the_moving_average(objective, released, moves):
    """target = m^s start + (1 - m) sum of m^(s-i) encoder_i; without EMA nothing ever touches
    it."""
    config, _ = train.parse(
        [*QUICK, "--objective", objective, "--ema", "0.7", *["--as-released"] * released]
    )
    trainer = train.Trainer(config, CPU)
    encoder, target = trainer.model.encoder, trainer.model.target
    beginning = {name: p.double().clone() for name, p in encoder.named_parameters()}
    expected = dict(beginning)
    for step in range(5):
        trainer.step(step, [micro_batch(4)])
        for name, p in encoder.named_parameters() if moves else ():
            expected[name] = 0.7 * expected[name] + 0.3 * p.double()
    for name, p in target.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(encoder.get_parameter(name).double(), beginning[name])


def test_every_objective_steps_logs_its_terms_and_is_evaluated_on_the_right_encoder():
    generator = torch.Generator().manual_seed(0)
    for name, objective in OBJECTIVES.items():
        trainer = train.Trainer(train.parse(["--objective", name, *QUICK])[0], CPU)
        clips = torch.randint(256, (4, 3, 8, 16, 16), dtype=torch.uint8, generator=generator)
        masks = objectives.draw_masks(clips, generator, generator, (4, 4, 4), objective.masking)
        row = trainer.row(0, *trainer.step(0, [(clips, masks)]))
        terms = ["pred", "ctx", *objective.terms, "total"]
        if "hw" in objective.terms:
            terms.append("hard_share")
        rest = ["grad_norm", "lr", "ema", "ctx_weight", "effective_rank", "feature_std"]
        assert [*row] == ["step", *terms, *rest] and trainer.healthy
        assert trainer.evaluated == ("target" if objective.ema else "encoder")
        assert released_form(objective).evaluated == "target"


@pytest.mark.parametrize(
    "flags, evaluated",
    [
        (["--ema", "1"], "encoder"),
        (["--ema", "0"], "target"),
        (["--objective", "sigreg_no_ema"], "encoder"),
    ],
)
def test_a_target_that_never_learns_is_not_the_one_to_evaluate(tmp_path, flags, evaluated):
    assert train.main([*QUICK, "--steps", "2", *flags, "--out", str(tmp_path / "run")]) == 0
    checkpoint = probe.load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["evaluated"] == evaluated
    equal = all(
        torch.equal(checkpoint["target"][name], p) for name, p in checkpoint["encoder"].items()
    )
    assert equal == (flags == ["--ema", "0"])


def test_the_collapse_meter_counts_directions():
    """Features on r equally strong orthogonal directions have effective rank r; constant ones have
    std 0."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 5, generator=generator))[0].T
    signs = torch.tensor(
        [[(i >> bit) % 2 * 2.0 - 1 for bit in range(5)] for i in range(32)]
    )  # centred, orthogonal
    rank, _ = train.collapse_meter((signs @ basis).unsqueeze(0))
    assert rank.item() == pytest.approx(5, rel=1e-3)
    line = torch.randn(2000, 1, generator=generator) * torch.randn(1, 512, generator=generator)
    assert train.collapse_meter(line.unsqueeze(0))[0].item() == pytest.approx(
        1, abs=1e-3
    )  # rounding is no direction
    rank, deviation = train.collapse_meter(torch.ones(2, 8, 16))
    assert rank.item() == 1 and deviation.item() == 0
    targets = torch.zeros(32, 8 * 14, 14, 4)
    targets[:, :, 1::2, 0], targets[:, :, 0::2, 1] = torch.randn(
        2, 32, 8 * 14, 7, generator=generator
    )
    _, deviation = train.collapse_meter(
        targets.flatten(1, 2)
    )  # more tokens than it looks at: some of every column
    assert deviation.item() == pytest.approx(2 * 0.5**0.5 / 4, rel=0.05)
    # It is told of the last level alone.
    h = torch.randn(2, 64, 4, 24, generator=generator) * torch.tensor([9.0, 9, 9, 2]).view(4, 1)
    row = train.Trainer(train.parse(QUICK)[0], CPU).row(
        0, dict.fromkeys(("pred", "ctx", "total"), torch.zeros(())), h.flatten(2), torch.zeros(())
    )
    assert row["feature_std"] == pytest.approx(
        h[:, :, 3].flatten(0, 1).std(0).mean().item(), rel=1e-5
    )


def test_weights_of_v_jepa_are_where_the_encoder_and_its_target_begin(
    tmp_path, capsys, monkeypatch
):
    """How a file of them is read: test_probe.py."""
    source = Encoder(SIZES["tiny"], 4, 2)
    monkeypatch.setattr(
        train, "load_vjepa", lambda path: (source, {"model": "tiny", "patch": 4, "tubelet": 2})
    )
    model = train.Trainer(train.parse([*QUICK, "--weights", "w.pt"])[0], CPU).model
    for network in (model.encoder, model.target):
        torch.testing.assert_close(network.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert (
        train.main([*QUICK, "--weights", "w.pt", "--patch", "8", "--out", str(tmp_path / "run")])
        == 1
    )
    assert "w.pt needs --patch 4" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("released", [True, False])
def test_as_released_without_ema_the_evaluated_encoder_is_the_untrained_one(
    tmp_path, released, monkeypatch
):
    """The probe's figures are replaced by one that stands for the weights."""

    def weigh(encoder, *_, **__):
        weight = sum(p.double().sum().item() for p in encoder.parameters())
        return {
            "clips": {"learn": 1, "test": 1},
            "5": {name: [weight] * 5 for name in probe.WORLDS["default"].classes},
            "linear": dict.fromkeys(probe.WORLDS["default"].classes, weight),
        }

    monkeypatch.setattr(probe, "probe_clips", weigh)
    flags = [
        *QUICK,
        "--objective",
        "kinematic",
        "--steps",
        "4",
        "--probe-clips",
        "192",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main(flags + ["--as-released"] * released) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (found["untrained"] == found["trained"]) == released


# -------------------------------------------------------------------------------------- it survives


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """metrics.csv of a whole run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*SIGREG, "--out", str(out)]) == 0
    return (out / "metrics.csv").read_bytes()


@contextmanager
def at_step(number, action):
    """Something happens when a run begins a step."""
    whole = train.Trainer.step

    def step(trainer, step, micro_batches):
        if step == number:
            action()
        return whole(trainer, step, micro_batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "step", step)
        yield


def signal_at(step, number):
    return at_step(step, lambda: os.kill(os.getpid(), number))


def resume(flags, uninterrupted):
    """Go on with a run that was cut short: what it had written is the beginning of the whole, and
    the rest follows."""
    metrics = Path(flags[-1]) / "metrics.csv"
    partial = metrics.read_bytes()
    assert (
        uninterrupted.startswith(partial[: partial.rindex(b"\n") + 1]) and partial != uninterrupted
    )
    assert train.main([*flags, "--resume"]) == 0
    assert metrics.read_bytes() == uninterrupted


@pytest.fixture(scope="module")
def killed(tmp_path_factory, exit_status):
    """The folder of a run killed at step 7, between two checkpoints, while two loader processes
    worked for it."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with signal_at(7, signal.SIGKILL):
        assert (
            exit_status(lambda: train.main([*SIGREG, "--workers", "2", "--out", str(out)]))
            == -signal.SIGKILL
        )
    with data.locked(out):  # its loader processes may live a little longer, but hold no lock
        return out


@pytest.fixture
def half(tmp_path, killed):
    """A copy of that folder, and the flags that it was begun with."""
    shutil.copytree(killed, tmp_path / "run")
    return tmp_path / "run", [*SIGREG, "--out", str(tmp_path / "run")]


def test_a_killed_run_goes_on_and_writes_the_same_metrics_to_the_bit(half, uninterrupted):
    folder, flags = half
    assert probe.load_checkpoint(folder / "last.pt")["step"] == 4
    (folder / "last.pt.1.tmp").write_bytes(b"half a checkpoint")
    resume(["--workers", "2", *flags], uninterrupted)
    assert contents(folder).keys() == {
        "config.json",
        "metrics.csv",
        "last.pt",
        "curves.png",
        "result.json",
    }


def test_a_signal_ends_the_run_with_a_checkpoint_of_that_step(
    tmp_path, uninterrupted, exit_status, capfd
):
    """Ctrl-C; and SIGTERM to the whole process group, as a job queue sends it: to the run and its
    loader processes alike. Both between two regular checkpoints."""

    def in_a_group_of_its_own():
        os.setsid()
        with at_step(5, lambda: os.killpg(0, signal.SIGTERM)):
            sys.exit(train.main(["--workers", "2", *flags]))

    for number in (signal.SIGINT, signal.SIGTERM):
        flags = [*SIGREG, "--out", str(tmp_path / number.name)]
        if number == signal.SIGTERM:
            assert exit_status(in_a_group_of_its_own) == 128 + number
        else:
            with signal_at(5, number):
                assert train.main(flags) == 128 + number
        output, errors = capfd.readouterr()
        assert "stopped after step 5; the same command with --resume goes on" in output
        assert not errors
        assert probe.load_checkpoint(tmp_path / number.name / "last.pt")["step"] == 6
        resume(flags, uninterrupted)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    tmp_path, capsys
):
    flags = [
        *QUICK,
        "--lr",
        "1e9",
        "--steps",
        "400",
        "--save-every",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main(flags) == 1
    message = capsys.readouterr().err
    assert "not finite" in message and "last good checkpoint" in message
    checkpoint = probe.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(p.isfinite().all() for p in checkpoint["encoder"].values())


# ----------------------------------------------------------------------------------- the run folder


def saved(change):
    """Damage of last.pt by a change of the dict in it."""

    def damage(path):
        content = torch.load(path)
        change(content)
        torch.save(content, path)

    return damage


def written(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def first(damage):
    """Damage of config.json in a run that was stopped before its first checkpoint."""

    def both(path):
        (path.parent / "last.pt").unlink()
        damage(path)

    return both


DAMAGES = {
    "last.pt: no optimizer": saved(lambda it: it.update(optimizer={})),
    "last.pt: weights of other shapes": saved(
        lambda it: it["encoder"].update(video=torch.zeros(1, 1, 3))
    ),
    "last.pt: a part missing": saved(lambda it: it.pop("target")),
    "last.pt: no metrics": saved(lambda it: it.pop("rows")),
    "last.pt: flipped bits": written(
        lambda old: old[:90_000] + bytes([old[90_000] ^ 255]) + old[90_001:]
    ),
    "last.pt: something else": written(lambda old: b"hello"),
    "config.json: cut short": first(written(lambda old: old[:99])),
    "config.json: another run": first(written(lambda old: old.replace(b'"seed": 0', b'"seed": 1'))),
    "config.json: missing": first(Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_the_beginning_of_this_run_is_named_and_left_as_it_is(half, capsys, damage):
    folder, flags = half
    path = folder / damage.split(":")[0]
    DAMAGES[damage](path)
    before = contents(folder)
    assert train.main([*flags, "--resume"]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("train.py: ") and str(path) in message and contents(folder) == before


METRICS_DAMAGES = {
    "missing": Path.unlink,
    "empty": written(lambda old: b""),
    "a line missing": written(lambda old: re.sub(rb"\n2,.*", b"", old)),
    "half a line": written(lambda old: re.sub(rb"(\n2,\d).*", rb"\1", old)),
    "no text": written(lambda old: bytes(range(256)) * 9),
}


def test_metrics_that_are_damaged_or_missing_are_made_whole_from_the_checkpoint(
    half, uninterrupted
):
    """As soon as the run goes on: its first step is interrupted here."""
    folder, flags = half
    checkpoint = (folder / "last.pt").read_bytes()
    whole = b"".join(uninterrupted.splitlines(keepends=True)[:5])  # heading, steps 0 to 3
    for damage in METRICS_DAMAGES.values():
        damage(folder / "metrics.csv")
        with at_step(4, raising(KeyboardInterrupt())):
            assert train.main([*flags, "--resume"]) == 130
        assert (folder / "metrics.csv").read_bytes() == whole
        assert (folder / "last.pt").read_bytes() == checkpoint


def test_a_folder_that_holds_a_run_is_never_overwritten(half, capsys, monkeypatch):
    folder, flags = half
    before = contents(folder)
    for more, sentence in [
        ([], f"{folder} is not empty; add --resume to go on with the run of {folder}/config.json"),
        (["--lr", "5e-4", "--resume"], "(lr 0.0003 there, 0.0005 here)"),
    ]:
        assert train.main([*flags, *more]) == 1
        assert sentence in capsys.readouterr().err
    with monkeypatch.context() as patch:  # of another version of objectives.py
        patch.setitem(
            OBJECTIVES, "sigreg", replace(OBJECTIVES["sigreg"], terms={"sigreg": Term(0.5)})
        )
        assert train.main([*flags, "--resume"]) == 1
    assert f"{folder}/config.json is of a different run (definition {{" in capsys.readouterr().err
    assert contents(folder) == before
    assert train.main([*flags, "--save-every", "7", "--resume"]) == 0  # changes no number
    (folder.parent / "thesis.tex").write_text("")
    for more in [], ["--resume"]:
        assert train.main([*flags[:-1], str(folder.parent), *more]) == 1
        assert f"{folder.parent} is not empty; add --resume" in capsys.readouterr().err


def test_a_second_process_on_the_same_folder_is_told_and_touches_nothing(half, exit_status, capfd):
    folder, flags = half
    before = contents(folder)
    with data.locked(folder):
        assert exit_status(lambda: sys.exit(train.main([*flags, "--resume"]))) == 1
    (message,) = capfd.readouterr().err.splitlines()
    assert f"another process is at work on {folder}" in message and contents(folder) == before


def test_a_run_that_fails_before_its_first_step_is_not_in_the_way_of_the_next(tmp_path, capsys):
    """Whatever it left: also half a file of one that was killed, and what its loader could not
    read."""
    for left in ("nothing", "config.json.7.tmp", "unreadable.txt"):
        flags = [*QUICK, "--out", str(tmp_path / left)]
        with at_step(0, raising(torch.OutOfMemoryError("CUDA out of memory."))):
            assert train.main([*flags, "--batch", "8"]) == 1
        sentence = "there is too little memory; give a smaller --batch, --model or --crop"
        assert sentence in capsys.readouterr().err
        if left != "nothing":
            (tmp_path / left / left).write_text("0\tvideos\ta.mp4\tcut short\n")
        assert train.main([*flags, "--steps", "1"]) == 0
        assert capsys.readouterr().err == "" and len(rows_of(tmp_path / left)) == 1
        assert not {"config.json.7.tmp", "unreadable.txt"} & contents(tmp_path / left).keys()


@pytest.mark.parametrize("place, name", [(Path, "write_bytes"), (os, "replace")])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(
    tmp_path, monkeypatch, capsys, place, name
):
    """Full from step 5 on."""
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    with at_step(5, lambda: monkeypatch.setattr(place, name, full)):
        assert train.main([*QUICK, "--out", str(tmp_path / "run")]) == 1
    assert (
        capsys.readouterr().err
        == f"train.py: {tmp_path}/run/metrics.csv: No space left on device\n"
    )
    assert contents(tmp_path / "run").keys() == {
        "config.json",
        "metrics.csv",
        "last.pt",
        "curves.png",
    }
    assert probe.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


def test_a_disk_that_is_full_for_the_metrics_is_named_too(tmp_path, exit_status, capfd):
    """The kernel refuses: no file of this process may grow beyond 1,500 bytes."""
    flags = [
        *QUICK,
        "--patch",
        "8",
        "--steps",
        "40",
        "--save-every",
        "1000",
        "--out",
        str(tmp_path / "run"),
    ]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        sys.exit(train.main(flags))

    assert exit_status(limited) == 1
    assert capfd.readouterr().err == f"train.py: {tmp_path}/run/metrics.csv: File too large\n"


# ------------------------------------------------------------------------------------ several ranks


RELEASED = [
    *QUICK,
    "--frames",
    "4",
    "--steps",
    "3",
    "--micro-batch",
    "2",
    "--objective",
    "combo",
    "--as-released",
]


def test_one_two_and_four_ranks_have_the_mean_gradient_of_the_micro_batches_alone(
    exit_status, capfd
):
    """In float64; sigreg spans ranks. The totals are logged in float32."""
    assert exit_status(lambda: runpy.run_path(ROOT / "tests/ranks.py", run_name="__main__")) == 0
    output, differences = capfd.readouterr().out, {}
    for name, values in re.findall(r"^(\w+)((?: \d\.\de[-+]\d+){6})$", output, re.M):
        differences[name] = [float(value) for value in values.split()]
    assert len(differences) == 4
    for name, (*gradients, one, two, four) in differences.items():
        assert max(gradients) < 1e-9 and max(one, two, four) < 1e-6, name
    for rank in (0, 1):  # two processes may write into one line
        assert f"rank {rank} stops by signal {int(signal.SIGTERM)}" in output


def test_a_signal_that_comes_while_ranks_agree_is_obeyed_at_the_next_step(monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        train.dist, "all_reduce", lambda value, op: os.kill(os.getpid(), signal.SIGTERM)
    )
    with train.StopSignal() as stop:
        assert stop.agreed() == 0
        monkeypatch.setattr(train.dist, "all_reduce", lambda value, op: None)
        assert stop.agreed() == signal.SIGTERM


@pytest.mark.command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                     "train.py", *RELEASED, "--out", "OUT/run")
def test_torchrun_trains_as_one_process_does_and_one_rank_writes(finished, tmp_path, as_shipped):
    """As released all micro-batches have the same mask positions, on whichever rank."""
    assert train.main([*RELEASED, "--out", str(tmp_path / "run")]) == 0
    shared, alone = rows_of(finished[1] / "run"), rows_of(tmp_path / "run")
    assert len(shared) == 3 and finished[0].count("step 3 of 3") == 1
    for name in ("pred", "ctx", "hw", "delta", "total", "grad_norm"):
        assert shared[0][name] == pytest.approx(alone[0][name], rel=1e-5), name
    assert probe.load_checkpoint(finished[1] / "run" / "last.pt")["step"] == 3


# -------------------------------------------------------------------- the paper's files, own videos


@pytest.mark.parametrize("preset", ["mixed", "ucf101", "blobs"])
def test_the_presets_train_from_the_publishers_files_or_generated_clips(
    tmp_path, miniature, preset
):
    out = tmp_path / "run"
    assert (
        train.main(
            [
                *QUICK,
                "--preset",
                preset,
                *["--root", str(miniature)] * (preset != "blobs"),
                "--model",
                "tiny",
                "--frames",
                "8",
                "--steps",
                "2",
                "--workers",
                "0",
                "--micro-batch",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert json.loads((out / "config.json").read_text())["frame_step"] == (
        2 if preset == "mixed" else 1
    )
    assert [row["ctx_weight"] for row in rows_of(out)] == [0, 0]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight small videos with a list file, one of them cut short."""
    folder = tmp_path_factory.mktemp("videos") / "clips"
    data.write_dataset(folder, synthetic.Shapes(16, 32, 0), 8, 8)
    (folder / "000003.mp4").write_bytes((folder / "000003.mp4").read_bytes()[:200])
    return folder


def test_your_own_videos_train_and_what_cannot_be_read_is_counted_once(
    tmp_path, videos, monkeypatch, capsys
):
    """Also where the run is stopped between, with later batches prepared already."""
    monkeypatch.setattr(data, "MAX_BROKEN", 0.9)
    found = {}
    for stop in (99, 2):
        flags = [
            *QUICK,
            "--steps",
            "6",
            "--data",
            str(videos / "videos.csv"),
            "--workers",
            "2",
            "--out",
            str(tmp_path / f"run{stop}"),
        ]
        with signal_at(stop, signal.SIGTERM):
            assert train.main(flags) == (128 + signal.SIGTERM if stop == 2 else 0)
        assert stop == 99 or train.main([*flags, "--resume"]) == 0
        output = capsys.readouterr().out
        (found[stop],) = re.findall(r"^step 6 of 6: .*, unreadable=(\d+)$", output, re.M)
    lines = (tmp_path / "run99" / "unreadable.txt").read_text().splitlines()
    assert {line.split("\t")[2] for line in lines} == {str(videos / "000003.mp4")}
    assert found[99] == found[2] == str(len({line for line in lines}))


def test_too_many_files_that_cannot_be_read_stop_the_run(tmp_path, videos, monkeypatch, capsys):
    monkeypatch.setattr(data, "MAX_BROKEN", 0.001)
    assert (
        train.main(
            [
                *QUICK,
                "--patch",
                "8",
                "--batch",
                "8",
                "--steps",
                "15",
                "--data",
                str(videos),
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    sentence = capsys.readouterr().err
    assert "of the clips cannot be read, more than 0%;" in sentence and "unreadable.txt" in sentence


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "lists 0 videos"),
        ("a.mp4 x y\n", "a.mp4 x y"),
        ("gone.mp4 1\n", "gone.mp4"),
        ("text.mp4 1\n", "cannot be read"),
    ],
)
def test_a_list_that_gives_no_clip_is_one_sentence(tmp_path, content, sentence, capsys):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "videos.csv").write_text(content)
    assert (
        train.main([*QUICK, "--data", str(tmp_path / "videos.csv"), "--out", str(tmp_path / "run")])
        == 1
    )
    (message,) = capsys.readouterr().err.splitlines()
    assert sentence in message and not (tmp_path / "run" / "last.pt").exists()


# ---------------------------------------------------------------------------------- what a run says


@pytest.mark.parametrize(
    "flags, sentence",
    {
        "--objective basline": "there is no 'basline'; one of your own",
        "--objectve hw": "unrecognized arguments: --objectve",
        "--steps 1000000000000": "argument --steps: 1000000000000 is not from 1 to 1000000000",
        "--batch 99999999999999999999": "argument --batch: 99999999999999999999 is not from 1 to",
        "--steps many": "'many'",
        "--micro-batch -1": "argument --micro-batch: -1 is not from 0 to",
        "--lr nan": "argument --lr: nan is not from 0 to",
        "--ema 1.5": "argument --ema: 1.5 is not from 0 to 1",
        "--seed 4294967296": "argument --seed: 4294967296 is not from 0 to 4294967295",
        "--world mars": "choose from default",
        "--test-list a.csv": "--test-list needs --data",
        "--frames 2": "2 frames in tubelets of 2 give fewer than 2 time steps",
        "--preset ucf101": "--preset ucf101 needs --root DIR",
    }.items(),
)
def test_a_flag_that_is_wrong_is_named_at_once(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit, match="^2$"):
        train.main(["--out", str(tmp_path / "run"), *flags.split()])
    assert sentence in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    {
        "--crop 30": "a 30x30 crop does not divide into 8x8 patches",
        "--frames 7": "tubelets of 2",
        "--device mps": "torch finds no such device",
        "--batch 6 --micro-batch 4": "a batch of 6 is not a multiple",
    }.items(),
)
def test_settings_that_do_not_fit_are_one_sentence_and_nothing_is_written(
    tmp_path, capsys, flags, sentence
):
    assert train.main(["--out", str(tmp_path / "run"), *flags.split()]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert (
        message.startswith("train.py: ") and sentence in message and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    "flags", [["--data", "nowhere.csv"], ["--preset", "ucf101", "--root", "nowhere"]]
)
def test_a_wrong_path_is_said_before_networks_are_built(tmp_path, capsys, flags, monkeypatch):
    monkeypatch.setattr(train, "build", None)
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 1
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error, sentence",
    [
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "a loader process was killed",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            ),
            "too little memory",
        ),
        (MemoryError(), "there is too little memory; give a smaller --batch, --model or --crop"),
        (
            torch._dynamo.exc.TorchDynamoException("no C++ compiler\nmore"),
            "compile here (no C++ compiler); --no-compile",
        ),
        # What the kernel says to a process too many is also what it says of a held lock.
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            "Resource temporarily unavailable",
        ),
        (KeyboardInterrupt(), "stopped; a run that had begun goes on with --resume"),
    ],
)
def test_what_is_no_bug_is_one_sentence(tmp_path, capsys, error, sentence):
    with at_step(1, raising(error)):
        assert train.main([*QUICK, "--out", str(tmp_path)]) == (
            130 if isinstance(error, KeyboardInterrupt) else 1
        )
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("train.py: ") and sentence in message


@pytest.mark.parametrize(
    "action, words",
    [
        (
            lambda *_: torch.zeros(2) + torch.zeros(3),
            ["Original Traceback", "in __getitem__", "must match the size"],
        ),
        (raising(ValueError("100 files in a row")), ["train.py: 100 files in a row"]),
        (
            lambda *_: os.kill(os.getpid(), signal.SIGKILL),
            ["train.py: a loader process was killed, most likely"],
        ),
    ],
)
def test_what_goes_wrong_in_a_loader_process_is_told_and_ends_the_run(
    tmp_path, exit_status, capfd, action, words
):
    """A bug keeps its traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic.Shapes, "clips", action)
        flags = [*QUICK, "--workers", "2", "--out", str(tmp_path / "run")]
        assert exit_status(lambda: sys.exit(train.main(flags))) == 1
    message = capfd.readouterr().err
    assert all(word in message for word in words) and ("Traceback" in message) == (len(words) > 1)


def test_a_bug_keeps_its_traceback(tmp_path):
    with (
        at_step(0, lambda: torch.zeros(2) + torch.zeros(3)),
        pytest.raises(RuntimeError, match="must match"),
    ):
        train.main([*QUICK, "--out", str(tmp_path / "run")])


def test_the_list_names_every_objective_on_a_line_of_its_own(capsys):
    assert train.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(OBJECTIVES)


FASTER = "import sys, probe, train; probe.FEW = probe.FEW._replace(steps=2); sys.exit(train.main())"
WHOLE = [
    "--objective",
    "fwm_hw_ld",
    "--steps",
    "2",
    "--crop",
    "16",
    "--probe-clips",
    "192",
    "--device",
    "cpu",
]


def test_a_run_ends_with_a_table_of_what_result_json_holds(tmp_path, monkeypatch, as_shipped):
    """Printed by another process to no terminal: lines, no bar. Its few-label heads learn for two
    steps only."""
    done = subprocess.run(
        [sys.executable, "-c", FASTER, *WHOLE, "--out", tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    output, found = done.stdout, json.loads((tmp_path / "run" / "result.json").read_text())
    start, first = output.splitlines()[:2]
    assert start == (
        "fwm_hw_ld on cpu, float32, threads: 1; 1,281,600 parameters; generated clips, "
        f"16 tokens a clip; run folder: {tmp_path}/run"
    )
    assert (
        "\r" not in output
        and first.startswith("step 1 of 2: total=")
        and f"{tmp_path}/run/curves.png" in output
    )
    heading, kinds, columns, *table = output[output.index("Top-1") :].splitlines()[:8]
    assert heading.startswith("Top-1 % on 64 generated clips, held out; ± over")
    assert "linear head: all 192 labels" in kinds
    assert columns.split() == ["direction", "speed", "appearance", "motion"]
    for name in ("untrained", "trained"):
        few, linear = [f"{name}, 5"], [f"{name}, linear"]
        for draws in map(found[name]["5"].get, ("direction", "appearance", "motion")):
            few.append(f"{statistics.mean(draws):.1f} ± {statistics.stdev(draws):.1f}")
        for factor in ("direction", "speed", "appearance"):
            linear.append(f"{found[name]['linear'][factor]:.1f}")
        for expected in (few, linear):
            assert table.pop(0).split() == " ".join(expected).split()
    assert table[0].split() == ["chance", "12.5", "25.0", "12.5", "3.1"]
    # Another process finds the same numbers: of the target that was saved, and of the random
    # weights of the seed.
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    checkpoint = probe.load_checkpoint(tmp_path / "run" / "last.pt")
    for name, state in (("untrained", None), ("trained", checkpoint["target"])):
        encoder = probe.make_encoder(checkpoint["config"], state)
        worlds = probe.held_out(encoder, checkpoint["config"])
        assert probe.probe_clips(encoder, worlds, 192) == found[name]


def test_a_table_of_collapsed_features_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "probe_clips", lambda *_, **__: {})
    monkeypatch.setattr(probe, "show", lambda *_: None)
    for rank, deviation, dead in ((1.5, 1.0, True), (9.0, 0.05, True), (9.0, 0.5, False)):
        meter = torch.tensor(rank), torch.tensor(deviation)
        monkeypatch.setattr(train, "collapse_meter", lambda h: meter)
        out = str(tmp_path / f"{rank} {deviation}")
        assert train.main([*QUICK, "--steps", "1", "--probe-clips", "192", "--out", out]) == 0
        assert ("The features have collapsed: what the" in capsys.readouterr().out) == dead


# ------------------------------------------------------------------ probes, curves, what a run says


@pytest.fixture
def weighed(monkeypatch):
    """The probe along a run is replaced by numbers that depend on the weights alone, to the bit."""

    def weigh(encoder, sources):
        torch.rand(())  # and on no random number that the run draws
        return {"motion": sum(p.double().sum().item() for p in encoder.parameters()) / 10}

    monkeypatch.setattr(probe, "along", weigh)


def test_probes_along_a_run_change_nothing_and_survive_a_signal(tmp_path, uninterrupted, weighed):
    """Steps 0, 5, 10 and the last. Drawn again with curves.png at every checkpoint."""
    found = {}
    for stop in (99, 7):
        flags = [*SIGREG, "--probe-every", "5", "--out", str(tmp_path / str(stop))]
        with signal_at(stop, signal.SIGTERM):
            train.main(flags)
        assert stop == 99 or train.main([*flags, "--resume"]) == 0
        assert (tmp_path / str(stop) / "metrics.csv").read_bytes() == uninterrupted
        found[stop] = (tmp_path / str(stop) / "probes.csv").read_text()
    assert found[7] == found[99]
    header, *lines = found[99].splitlines()
    assert header == "step,motion" and [line.split(",")[0] for line in lines] == [
        "0",
        "5",
        "10",
        "11",
    ]
    curves = [(tmp_path / str(stop) / "curves.png").read_bytes() for stop in found]
    assert curves[0] == curves[1]


def test_the_true_probe_leaves_the_runs_random_numbers_alone():
    trainer = train.Trainer(train.parse(QUICK)[0], CPU)
    before = torch.get_rng_state()
    worlds = probe.held_out(trainer.model.target, vars(trainer.config))
    probe.along(trainer.model.target, worlds)
    assert torch.equal(before, torch.get_rng_state())


def test_curves_show_losses_probes_and_the_threshold_of_collapse(tmp_path, weighed):
    """A strip for each; lines and thresholds lie where their values say."""
    assert train.main([*QUICK, "--probe-every", "1", "--out", str(tmp_path / "run")]) == 0
    image = np.array(Image.open(tmp_path / "run" / "curves.png"))
    rows = rows_of(tmp_path / "run")
    names = ["pred", "ctx", "total", "effective_rank", "feature_std"]
    curves = {name: [row[name] for row in rows] for name in names}
    curves["motion"] = [row["motion"] for row in rows_of(tmp_path / "run", "probes.csv")]
    strips = np.split(image[10:-10], 6)
    for strip, (name, values) in zip(strips, curves.items()):
        assert (strip[:70, 670:] < 128).any()  # its name
        dead = train.COLLAPSED.get(name, 0)
        most = max(*values, dead)
        for step, value in enumerate(values):
            x = 10 + round(650 * step / len(rows))
            column = strip[:72, max(10, x - 1):x + 2]
            dark = np.nonzero((column < 50).any((1, 2)))[0]
            assert abs(dark - 70 * (1 - value / most)).min() < 3
        gray = np.nonzero((strip[:72, 655:660] == 128).any((1, 2)))[0]
        assert len(gray) == 1 and abs(gray[0] - 70 * (1 - dead / most)) < 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_fits_100_columns_counts_steps_and_shows_the_collapse_meter(tmp_path, monkeypatch):
    found = {"direction": 12.5, "motion": 99.9999, "appearance": 100.0}
    monkeypatch.setattr(probe, "along", lambda *_: found)
    monkeypatch.setattr(sys, "stdout", Terminal())
    flags = [
        *QUICK,
        "--objective",
        "fwm_hw_ld",
        "--probe-every",
        "3",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main(flags) == 0
    shown = [line for line in re.split("[\r\n]", sys.stdout.getvalue()) if "/12 [" in line]
    assert "12/12 [" in shown[-1] and max(map(len, shown)) <= 100
    assert all(f" {name}=" in shown[-1] for name in ("total", "rank", "std", *found))


def test_the_command_line_needs_no_torch(tmp_path):
    """As a command: any import of torch or numpy would raise."""
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    for flag, status, words in (
        ("--help", 0, "optimisation:"),
        ("--lr=nan", 2, "argument --lr: nan is not"),
    ):
        done = subprocess.run(
            [sys.executable, "train.py", flag],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == status and words in done.stdout + done.stderr, flag
    assert (
        "example: python train.py"
        in subprocess.run(
            [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
        ).stdout
    )


def test_another_number_of_processes_goes_on_only_with_the_same_micro_batch(tmp_path):
    for flags, fits in (([], False), (["--micro-batch", "2"], True)):
        flags = [*QUICK, *flags, "--steps", "2", "--out", str(tmp_path / str(fits))]
        assert train.main(flags) == 0
        config, _ = train.parse(flags)
        trainer, _ = train.prepare(config, 0, 2, CPU)
        if fits:
            assert train.open_run(config, trainer, True)["step"] == trainer.first_step == 2
        else:
            with pytest.raises(ValueError, match=r"different run \(micro_batch 4 there, 2 here\)"):
                train.open_run(config, trainer, True)


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    results, before = [], signal.getsignal(signal.SIGTERM)
    flags = [*QUICK, "--steps", "2", "--out", str(tmp_path / "run")]
    thread = threading.Thread(target=lambda: results.append(train.main(flags)))
    thread.start()
    thread.join()
    assert results == [0] and signal.getsignal(signal.SIGTERM) is before


def test_labelled_videos_of_your_own_end_with_their_table(tmp_path, videos, monkeypatch, capsys):
    """By --test-list, or with every third clip of a class held out from the heads."""
    paths = [line.split()[0] for line in (videos / "videos.csv").read_text().splitlines()]
    lists = {"train": [0, 1, 2, 4, 5, 6], "test": [7, 2]}
    for name, items in lists.items():
        text = "".join(f"{videos / paths[item]} {item % 2}\n" for item in items)
        (tmp_path / f"{name}.csv").write_text(text)
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    flags = [*QUICK, "--steps", "2", "--probe-clips", "192", "--data", str(tmp_path / "train.csv")]
    for more, count in (
        ([], 1),
        (["--test-list", str(tmp_path / "test.csv"), "--probe-every", "1"], 2),
    ):
        out = tmp_path / f"run{count}"
        assert train.main([*flags, *more, "--out", str(out)]) == 0
        output = capsys.readouterr().out
        assert f"Top-1 % on {count} of your clips" in output and "; 6 videos, 64 tokens" in output
        assert ("Every third clip of a class is held out" in output) == (not more)
        assert ("in both lists: 1 of 2 test clips" in output) == bool(more)
        found = json.loads((out / "result.json").read_text())
        assert [*found["trained"]["5"]] == [*found["untrained"]["linear"]] == ["class"]
        assert (out / "probes.csv").exists() == bool(more)
        if more:
            assert (out / "probes.csv").read_text().startswith("step,class\n0,")


def test_labels_that_cannot_be_used_are_one_sentence_and_without_any_the_table_says_so(
    tmp_path, videos, monkeypatch, capsys
):
    """Never are clips of another kind probed without a word."""
    paths = [line.split()[0] for line in (videos / "videos.csv").read_text().splitlines()][:4]
    for name, labels in {"two": "0011", "one": "0000", "none": "    "}.items():
        lines = [f"{videos / path} {label}".strip() for path, label in zip(paths, labels)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    (tmp_path / "nested").mkdir()
    for i, path in enumerate(paths):
        place = tmp_path / "nested" / ("train", "val")[i % 2] / str(i // 2) / "a.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(videos / path)
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=1))
    monkeypatch.setattr(probe, "LINEAR", probe.LINEAR._replace(epochs=1))
    monkeypatch.setattr(probe, "FEWEST_CLIPS", 64)
    flags = [*QUICK, "--steps", "1", "--probe-clips", "64"]
    learn, exam = (f"each video to {what} needs a label" for what in ("learn from", "be tested on"))
    for lists, sentence in ((["two"], "no class of"), (["one", "none"], exam),
                            (["none", "one"], learn)):
        paths = [str(tmp_path / f"{name}.csv") for name in lists]
        given = [text for pair in zip(("--data", "--test-list"), paths) for text in pair]
        assert train.main([*flags, *given, "--out", str(tmp_path / "run")]) == 1
        message = capsys.readouterr().err
        assert sentence in message and "--probe-every 0" in message
        assert not (tmp_path / "run").exists()
    for name in ("none.csv", "nested"):
        out = ["--data", str(tmp_path / name), "--out", str(tmp_path / f"run {name}")]
        assert train.main([*flags, *out]) == 0
        output = capsys.readouterr().out
        assert "generated clips, held out" in output and "Your videos have no labels" in output
        assert "Every third" not in output
    for few in ("1", "63"):
        with pytest.raises(SystemExit):
            train.main([*flags, "--probe-clips", few])
        assert f"--probe-clips: {few} are too few" in capsys.readouterr().err


# --------------------------------------------------------------------------- the device, the README


def test_a_step_with_every_term_reads_nothing_back_from_the_device(monkeypatch, ema=True):
    """The device "meta" holds no numbers: to ask for one there, or to compute with tensors of the
    host, is an error."""
    options = {"ld": {"hard": True, "dynamics_only": True}}
    terms = {name: Term(1.0, options.get(name, {})) for name in objectives.TERMS}
    monkeypatch.setitem(OBJECTIVES, "everything", Objective("both", "all terms", terms, ema=ema))
    # Two that do not know this device.
    monkeypatch.setattr(torch, "autocast", lambda *where, **how: nullcontext())
    monkeypatch.setattr(
        train, "make_optimizer", lambda model, config: torch.optim.AdamW(model.parameters())
    )
    trainer = train.Trainer(
        train.parse(["--objective", "everything", *QUICK])[0], torch.device("meta")
    )
    trainer.model.checked = True  # a first batch is checked, which reads what the terms give
    values, h, gradient_norm = trainer.step(0, [micro_batch(2), micro_batch(2)])
    assert values.keys() == {"pred", "ctx", *objectives.TERMS, "total", "hard_share"}
    assert all(found.is_meta for found in (*values.values(), h, gradient_norm, trainer.healthy))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name, compiled", [*((name, "--no-compile") for name in OBJECTIVES), ("fwm_hw_ld", "--compile")]
)
def test_on_a_gpu_no_step_waits_for_the_device_and_attention_is_flash(name, compiled, as_shipped):
    trainer = train.Trainer(train.parse(["--objective", name, compiled])[0], torch.device("cuda"))
    generator, masking, steps = torch.Generator().manual_seed(0), trainer.objective.masking, []
    clips = torch.randint(256, (8, 3, 8, 32, 32), dtype=torch.uint8).pin_memory()
    for _ in range(8):
        masks = [
            objectives.draw_masks(clips, generator, generator, (4, 4, 4), masking) for _ in range(2)
        ]
        steps.append(
            [
                (clips, [tuple(tokens.pin_memory() for tokens in mask) for mask in each])
                for each in masks
            ]
        )
    for step, micro_batches in enumerate(steps):  # after these, nothing is compiled again
        trainer.step(step, micro_batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(len(steps), steps[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainer.step(len(steps) + 1, steps[0])
    kernels = " ".join(event.key for event in profiler.key_averages())
    assert (
        "flash_fwd" in kernels
        and "flash_bwd" in kernels
        and "fmha" not in kernels
        and "cudnn" not in kernels
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_run_ends_with_its_probes(tmp_path, as_shipped):
    flags = ["--steps", "2", "--probe-clips", "192", "--no-compile", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert (
        len(json.loads((tmp_path / "run" / "result.json").read_text())["trained"]["5"]["motion"])
        == 5
    )


@pytest.mark.parametrize("has_head", [False, True])
def test_objective_29_as_the_readme_adds_it(tmp_path, exit_status, monkeypatch, has_head):
    """Word for word, as `python mine.py`: without a head, then with the second block before the
    last two lines."""
    section = (
        (ROOT / "README.md")
        .read_text()
        .partition("\n## Your own objective\n")[2]
        .partition("\n## ")[0]
    )
    plain, head = re.findall(r"```python\n(.*?)```", section, re.S)
    assert (plain + head).count("\n") <= 25
    *lines, main, call = plain.splitlines(keepends=True)
    (tmp_path / "mine.py").write_text("".join([*lines, head * has_head, main, call]))
    name, coefficient = re.findall(r'\{"(\w+)": Term\((.*?)\)', head if has_head else plain)[-1]
    flags = [*QUICK, "--steps", "2", "--objective", name, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["mine.py", *flags])
    assert exit_status(lambda: runpy.run_path(tmp_path / "mine.py", run_name="__main__")) == 0
    first, second = rows_of(tmp_path / "run")
    for row in (first, second):
        total = row["pred"] + row["ctx_weight"] * row["ctx"] + float(coefficient) * row[name]
        assert row[name] > 0 and row["total"] == pytest.approx(total, rel=1e-5)
    assert bool(probe.load_checkpoint(tmp_path / "run" / "last.pt")["heads"]) == has_head
