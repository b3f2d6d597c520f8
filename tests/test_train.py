"""The training command as a user runs it: gradients, schedules, EMA, survival, several ranks, bad input."""
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import objectives
import probe
import synthetic
import train
from model import SIZES, Encoder, Size
from objectives import OBJECTIVES, as_released
from test_probe import foreign

ROOT = Path(__file__).parent.parent
# A run that takes seconds: tiny clips, few steps, no probe.
QUICK = ["--crop", "16", "--patch", "4", "--batch", "4", "--steps", "12", "--log-every", "1", "--save-every", "4",
         "--probe-clips", "0", "--device", "cpu"]


def wait_for_line(path, step):
    """Until metrics.csv holds the line of a step."""
    for _ in range(1200):
        if path.exists() and re.search(rf"^{step},", path.read_text(), re.M):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {path}")


# ------------------------------------------------------------------------------------------- which loss trains what

REACHES = {"pred": {"encoder", "predictor"}, "ctx": {"encoder", "predictor"}, "hw": {"encoder", "predictor"},
           "delta": {"encoder"}, "ld": {"encoder", "heads"}, "fwm_static": {"encoder"}, "fwm_orth": {"encoder"},
           "spectral": {"encoder"}, "ltc": {"encoder"}, "ac": {"encoder", "heads"}, "kinematic": {"encoder"},
           "sigreg": {"encoder"}, "hamiltonian": {"encoder", "heads"}, "velgate": {"encoder"}}


@pytest.fixture(scope="module")
def gradient_table():
    return train.gradient_table()


def test_each_loss_trains_exactly_the_networks_that_its_definition_names(gradient_table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in gradient_table.splitlines()[2:]]
    assert [row[0] for row in rows[:28]] == list(OBJECTIVES)
    for name, *cells in rows:
        found = {part: set(cell.split(", ")) - {"-"} for part, cell in
                 zip(("encoder", "predictor", "heads", "target"), cells)}
        expected = {part: set() for part in found}
        for loss in ["pred", "ctx", *OBJECTIVES[name.split()[0]].terms]:
            # By the released code the latent-dynamics loss under hard weighting trains nothing.
            for part in set() if "as-released" in name and loss == "ld" else REACHES[loss]:
                expected[part].add(loss)
        assert found == expected, name
    assert {row[0] for row in rows[28:]} == {"hw_ld `--as-released`", "fwm_hw_ld `--as-released`"}


def test_the_readme_prints_this_gradient_table(gradient_table):
    assert gradient_table in (ROOT / "README.md").read_text()


def test_foreign_weights_are_where_the_encoder_and_its_target_begin(tmp_path, capsys):
    config, _ = train.parse(QUICK)
    torch.manual_seed(5)
    source = Encoder(SIZES["tiny"], 4, 2)
    torch.save({"ema_encoder": foreign(source)}, tmp_path / "weights.pt")
    config.weights = str(tmp_path / "weights.pt")
    model = train.Trainer(config, torch.device("cpu")).model
    for network in (model.encoder, model.target):
        torch.testing.assert_close(network.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert train.main([*QUICK, "--patch", "8", "--weights", config.weights, "--out", str(tmp_path / "run")]) == 1
    assert "--patch 4" in capsys.readouterr().err and not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------- schedules, EMA, runs


@pytest.mark.parametrize("step, rate", [(0, 1e-4), (150, 3.5e-4), (300, 6e-4), (15_000, 6e-4), (22_500, 6e-4),
                                        (30_000, 6e-4)])
def test_the_learning_rate_has_the_studys_values_at_the_same_share_of_any_run(step, rate):
    study, _ = train.parse(["--preset", "mixed", "--root", "."])
    assert study.steps == 30_000 and train.learning_rate(study, step) == pytest.approx(rate, rel=1e-12)
    short, _ = train.parse(["--preset", "mixed", "--root", ".", "--steps", "3000"])
    assert train.learning_rate(short, step // 10) == pytest.approx(rate, rel=1e-12)


def test_the_presets_are_the_studys_regimes():
    regimes = {name: train.parse(["--preset", name])[0] for name in ("ucf101", "mixed", "blobs")}
    common = {"model": "vit_base", "patch": 16, "tubelet": 2, "ema": 0.99925, "weight_decay": 0.04, "warmup_lr": 1e-4,
              "lr": 6e-4}
    own = {"ucf101": {"frames": 16, "crop": 224, "fps": 16, "batch": 32, "steps": 30_000},
           "mixed": {"frames": 16, "crop": 224, "fps": 0, "frame_step": 2, "batch": 32, "steps": 30_000},
           "blobs": {"frames": 8, "crop": 128, "fps": 4, "batch": 16, "steps": 5000}}
    for name, regime in regimes.items():
        for field, value in (common | own[name]).items():
            assert getattr(regime, field) == value, (name, field)


def test_weight_decay_falls_on_matrices_only():
    config, _ = train.parse(QUICK)
    model = train.build(config)
    decayed, free = train.make_optimizer(model, config).param_groups
    assert decayed["weight_decay"] == 0.04 and free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert decayed["betas"] == (0.9, 0.999) and decayed["eps"] == 1e-8
    assert len(decayed["params"]) + len(free["params"]) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("objective, released, moves", [("baseline", False, True), ("kinematic", False, False),
                                                        ("kinematic", True, False)])
def test_the_target_is_the_closed_form_of_the_moving_average(tmp_path, objective, released, moves):
    """target = m^s start + (1 - m) sum of m^(s-i) encoder_i; without EMA nothing ever touches it."""
    flags = [*QUICK, "--objective", objective, "--ema", "0.7", "--steps", "5", "--save-every", "1",
             "--out", str(tmp_path / "run")]
    flags += ["--as-released"] if released else []
    config, _ = train.parse(flags)
    beginning = {name: p.double() for name, p in train.build(config).encoder.state_dict().items()}
    encoders = []
    save = train.Trainer.save

    def remember(trainer, *rest):
        encoders.append({name: p.double().clone() for name, p in trainer.model.encoder.state_dict().items()})
        save(trainer, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "save", remember)
        assert train.main(flags) == 0
    target = probe.load_checkpoint(tmp_path / "run" / "last.pt")["target"]
    assert len(encoders) == 5
    for name in target:
        expected = beginning[name] * (0.7 ** 5 if moves else 1)
        for i, encoder in enumerate(encoders, start=1):
            expected = expected + (0.3 * 0.7 ** (5 - i) if moves else 0) * encoder[name]
        torch.testing.assert_close(target[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(encoders[-1]["embed.weight"], beginning["embed.weight"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_and_is_evaluated_on_the_right_encoder(tmp_path, name, monkeypatch):
    small = Size(24, 4, 2, predictor_width=16, predictor_depth=1, predictor_heads=2)
    monkeypatch.setitem(SIZES, "tiny", small)
    flags = ["--objective", name, *QUICK, "--steps", "2", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    checkpoint = probe.load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["evaluated"] == ("target" if OBJECTIVES[name].ema else "encoder")
    assert as_released(OBJECTIVES[name]).evaluated == "target"
    header, *lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    terms = ["pred", "ctx", *OBJECTIVES[name].terms, "total"] + ["hard_share"] * ("hw" in OBJECTIVES[name].terms)
    rest = ["grad_norm", "lr", "ema", "ctx_weight", "effective_rank", "feature_std"]
    assert header.split(",") == ["step", *terms, *rest]
    assert [line.split(",")[0] for line in lines] == ["0", "1"]


def test_the_collapse_meter_counts_directions():
    """Features on r equally strong orthogonal directions have effective rank r; constant ones have std 0."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 5, generator=generator))[0].T
    signs = torch.tensor([[(i >> bit) % 2 * 2.0 - 1 for bit in range(5)] for i in range(32)])  # centred, orthogonal
    rank, _ = train.collapse_meter((signs @ basis).unsqueeze(0))
    assert rank.item() == pytest.approx(5, rel=0.02)
    line = torch.randn(2000, 1, generator=generator) * torch.randn(1, 512, generator=generator)
    assert train.collapse_meter(line.unsqueeze(0))[0].item() == pytest.approx(1, abs=1e-3)  # rounding is no direction
    rank, deviation = train.collapse_meter(torch.ones(2, 8, 16))
    assert rank.item() == 1 and deviation.item() == 0
    targets = torch.zeros(32, 8 * 14, 14, 4)
    targets[:, :, 1::2, 0], targets[:, :, 0::2, 1] = torch.randn(2, 32, 8 * 14, 7, generator=generator)
    _, deviation = train.collapse_meter(targets.flatten(1, 2))  # more tokens than it looks at: some of every column
    assert deviation.item() == pytest.approx(2 * 0.5 ** 0.5 / 4, rel=0.05)


# ------------------------------------------------------------------------------------------------------- it survives


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """metrics.csv of a whole run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*QUICK, "--patch", "8", "--objective", "sigreg", "--out", str(out)]) == 0
    return (out / "metrics.csv").read_bytes()


def resume(flags, uninterrupted):
    """Go on with a run that was cut short: what it had written is the beginning of the whole, and the rest follows."""
    metrics = Path(flags[-1]) / "metrics.csv"
    partial = metrics.read_bytes()
    assert uninterrupted.startswith(partial[:partial.rindex(b"\n") + 1]) and partial != uninterrupted
    assert train.main([*flags, "--resume"]) == 0
    assert metrics.read_bytes() == uninterrupted


@contextmanager
def signal_at(step, number):
    """This process gets a signal when a run in it begins a step."""
    whole = train.Trainer.step

    def interrupted(trainer, number_of_step, *batch):
        if number_of_step == step:
            os.kill(os.getpid(), number)
        return whole(trainer, number_of_step, *batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted)
        yield


def test_a_killed_run_goes_on_and_writes_the_same_metrics_to_the_bit(tmp_path, uninterrupted, exit_status):
    flags = [*QUICK, "--patch", "8", "--objective", "sigreg", "--out", str(tmp_path / "run")]
    with signal_at(7, signal.SIGKILL):  # between two checkpoints
        assert exit_status(lambda: train.main(flags)) == -signal.SIGKILL
    assert probe.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    resume(flags, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_of_that_step(tmp_path, uninterrupted, number):
    flags = [*QUICK, "--patch", "8", "--objective", "sigreg", "--out", str(tmp_path / "run")]
    with signal_at(5, number):  # between two regular checkpoints
        assert train.main(flags) == 128 + number
    assert probe.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 6
    resume(flags, uninterrupted)


@pytest.mark.parametrize("left", ["", "step,", "step,total\n0,1.0\n1,2", "step,total\n0,1.0\n1,2.0\n2,3.0\n3,4.0\n"])
def test_whatever_a_kill_leaves_in_the_metrics_is_cut_back_to_the_checkpoint(tmp_path, left):
    """Also an empty file, half a header, half a line, lines after the checkpoint (here: of step 2)."""
    path = tmp_path / "metrics.csv"
    path.write_text(left)
    metrics = train.Metrics(path, first_step=2 if left.count("\n") > 2 else 0)
    for step in range(2 if left.count("\n") > 2 else 0, 3):
        metrics.write({"step": step, "total": step + 1.0})
    metrics.file.close()
    assert path.read_text() == "step,total\n0,1.0\n1,2.0\n2,3.0\n"


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path, capsys):
    flags = [*QUICK, "--lr", "1e30", "--steps", "400", "--save-every", "1", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 1
    message = capsys.readouterr().err
    assert "not finite" in message and "last good checkpoint" in message
    checkpoint = probe.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(p.isfinite().all() for p in checkpoint["encoder"].values())


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "missing"])
def test_a_file_that_is_not_a_checkpoint_gives_one_sentence(tmp_path, damage, capsys):
    path = tmp_path / "last.pt"
    if damage == "cut":
        torch.save({"config": {}, "encoder": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    assert probe.main(["--checkpoint", str(path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("probe.py: ") and str(path) in message and message.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ several ranks


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.command("tests/two_ranks.py")
def test_two_ranks_with_half_the_batch_each_have_the_gradients_of_one_with_all(finished):
    """Except where a term takes its statistics per rank: the covariance of fwm_orth, the softmax of hard ld."""
    difference = {name: float(value) for name, value in re.findall(r"^(\w+) (\d\S+)$", finished[0], re.M)}
    assert difference.keys() == OBJECTIVES.keys()
    for name, objective in OBJECTIVES.items():
        per_rank = "fwm_orth" in objective.terms or any(term.options.get("hard") for term in objective.terms.values())
        assert (difference[name] < 1e-5) != per_rank, (name, difference[name])
    # Each rank meets one file of its own that cannot be read, and both a third one; a rank draws 10 clips.
    assert "unreadable: 4 of videos, share 0.17, both.mp4 rank0.mp4 rank1.mp4" in finished[0].splitlines()
    for rank in (0, 1):  # two processes may write into one line
        assert f"rank {rank} stops by signal {int(signal.SIGTERM)}" in finished[0]


def test_a_signal_that_comes_while_ranks_agree_is_obeyed_at_the_next_step(monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "all_reduce", lambda value, op: os.kill(os.getpid(), signal.SIGTERM))
    with train.StopSignal() as stop:
        assert stop.agreed() == 0
        monkeypatch.setattr(train.dist, "all_reduce", lambda value, op: None)
        assert stop.agreed() == signal.SIGTERM


@pytest.mark.command(*TORCHRUN, "train.py", *QUICK, "--objective", "hw_ld", "--as-released", "--out", "OUT/run")
def test_torchrun_trains_and_one_rank_writes(finished):
    run_folder = finished[1] / "run"
    assert (run_folder / "metrics.csv").read_text().count("\n") == 13
    assert probe.load_checkpoint(run_folder / "last.pt")["step"] == 12


# ------------------------------------------------------------------------------------ the study's files, own videos


@pytest.mark.parametrize("preset", ["mixed", "ucf101"])
def test_the_presets_train_from_the_publishers_files(tmp_path, miniature, preset):
    out = tmp_path / "run"
    assert train.main([*QUICK, "--preset", preset, "--root", str(miniature), "--model", "tiny", "--frames", "8",
                       "--steps", "2", "--workers", "0", "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["frame_step"] == (2 if preset == "mixed" else 1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight small videos with a list file, one of them cut short."""
    folder = tmp_path_factory.mktemp("videos") / "clips"
    synthetic.write_dataset(folder, synthetic.Shapes(16, 32, 0), 8, 8)
    (folder / "000003.mp4").write_bytes((folder / "000003.mp4").read_bytes()[:200])
    return folder


@pytest.mark.parametrize("given", ["folder", "list"])
def test_training_on_ones_own_videos_skips_counts_and_names_what_cannot_be_read(tmp_path, videos, given, capsys):
    flags = [*QUICK, "--steps", "4", "--data", str(videos if given == "folder" else videos / "videos.csv"),
             "--max-broken", "0.9", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert "unreadable: " in capsys.readouterr().out
    assert "000003.mp4" in (tmp_path / "run" / "unreadable.txt").read_text()


def test_too_many_files_that_cannot_be_read_stop_the_run(tmp_path, videos, capsys):
    assert train.main([*QUICK, "--patch", "8", "--batch", "8", "--steps", "15", "--data", str(videos),
                       "--max-broken", "0.001", "--out", str(tmp_path / "run")]) == 1
    assert "--max-broken" in capsys.readouterr().err


@pytest.mark.parametrize("content, sentence", [("", "no video"), ("a.mp4 x y\n", "line 1"),
                                               ("gone.mp4 1\n", "gone.mp4"), ("text.mp4 1\n" * 4, "cannot be read")])
def test_a_list_that_gives_no_clip_is_one_sentence(tmp_path, content, sentence, capsys):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "videos.csv").write_text(content)
    assert train.main([*QUICK, "--data", str(tmp_path / "videos.csv"), "--out", str(tmp_path / "run")]) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path, videos, capsys):
    assert train.main([*QUICK, "--batch", "16", "--data", str(videos), "--out", str(tmp_path / "run")]) == 1
    assert "larger than the data" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, sentence", [
    (["--objective", "basline"], "did you mean 'baseline'"),
    (["--preset", "ucf10"], "did you mean 'ucf101'"),
    (["--objectve", "hw"], "did you mean '--objective'"),
    (["--model", "vit_bas"], "did you mean 'vit_base'"),
    (["--steps", "0"], "--steps is 0"),
    (["--batch", "0"], "--batch is 0"),
    (["--patch", "0"], "--patch is 0"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--workers", "-1"], "--workers is -1"),
    (["--seed", "-1"], "--seed is -1"),
    (["--seeds", "0,-1"], "--seed is -1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--ema", "1.5"], "--ema is 1.5"),
    (["--crop", "30"], "does not divide into 8x8 patches"),
    (["--frames", "7"], "tubelets of 2"),
    (["--frames", "2"], "at least 2"),
    (["--data", "nowhere.csv"], "nowhere.csv"),
    (["--preset", "ucf101"], "--root"),
    (["--crop", "8"], "no mask of"),
    (["--probe-clips", "20"], "at least 192"),
    (["--ablate", "l2"], "did you mean 'l1'"),
    (["--seed", str(2 ** 32)], "must be less than 2 ** 32"),
    (["--objective", "all"], "names several; add --seeds 0,1,2"),
    (["--objective", "hw,ld"], "names several; add --seeds 0,1,2"),
    (["--objective", ""], "unknown objective ''. Known: baseline"),
    (["--jobs", "2"], "--jobs is for a sweep"),
    (["--root", "somewhere"], "--root is for --preset mixed or ucf101"),
    (["--preset", "mixed", "--root", "a", "--data", "b"], "--root is for --preset mixed or ucf101, without --data"),
    (["--device", "mps"], "torch finds no such device"),
    (["--fwm-split", "level"], "fwm_hw_ld"),
    (["--seeds", "0,x"], "whole numbers"),
    (["--seeds", "0", "--jobs", "0"], "--jobs is 0"),
    (["--seeds", "0", "--objective", "hw,fmw"], "did you mean 'fwm'"),
])
def test_bad_input_gives_one_sentence_and_writes_nothing(tmp_path, capsys, flags, sentence):
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 1
    message, = capsys.readouterr().err.splitlines()
    assert message.startswith("train.py: ") and sentence in message
    assert not (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize("flags", [["--data", "nowhere.csv"], ["--preset", "ucf101", "--root", "nowhere"]])
def test_a_wrong_path_is_said_before_networks_are_built(tmp_path, capsys, flags, monkeypatch):
    monkeypatch.setattr(train, "build", None)
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 1
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_never_overwritten(tmp_path, capsys):
    flags = [*QUICK, "--steps", "2", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for more, sentence in [([], "--resume"), (["--lr", "5e-4"], "lr"), (["--lr", "5e-4", "--resume"], "lr")]:
        assert train.main([*flags, *more]) == 1
        assert sentence in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert train.main([*flags, "--save-every", "7", "--max-broken", "0.5", "--resume"]) == 0  # changes no number
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert train.main([*flags[:-1], str(tmp_path / "other")]) == 1


def test_the_list_names_every_objective_on_a_line_of_its_own(capsys):
    assert train.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(OBJECTIVES) and len(lines) == 28
    assert "\n".join(lines) in (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------------------- the first command, whole


FIRST = ("--objective", "fwm_hw_ld", "--steps", "2", "--probe-clips", "192", "--device", "cpu",
         "--out", "OUT/fwm_hw_ld-seed0")


@pytest.mark.command("train.py", *FIRST)
def test_the_default_command_ends_with_the_table_and_the_probe_reads_what_it_wrote(finished, capsys):
    output, run_folder = finished[0], finished[1] / "fwm_hw_ld-seed0"
    table = dict(re.findall(r"^(\w+: \w+) +(.*)$", output, re.M))
    found = json.loads((run_folder / "result.json").read_text())
    for name, values in table.items():
        encoder, kind = name.split(": ")
        assert [float(value) for value in values.split()] == [round(found[encoder][kind][factor], 1)
                                                              for factor in ("direction", "speed", "appearance")]
    assert list(table) == [f"{encoder}: {head}" for encoder in ("untrained", "trained")
                           for head in ("linear", "attentive")]
    assert len(found["untrained"]) == 4 and len(found["trained"]) == 8  # halves of the channels: of the trained alone
    assert str(run_folder) in output
    assert json.loads((run_folder / "config.json").read_text())["objective"] == "fwm_hw_ld"
    checkpoint = probe.load_checkpoint(run_folder / "last.pt")
    trained = probe.make_encoder(checkpoint["config"], checkpoint["target"])
    assert probe.synthetic_results(trained, 8, 32, 192) == found["trained"]  # another process, the same numbers
    untrained = probe.make_encoder(checkpoint["config"])
    beginning = train.build(train.parse(FIRST)[0]).encoder
    torch.testing.assert_close(untrained.state_dict(), beginning.state_dict(), rtol=0, atol=0)
    assert probe.main(["--table", str(finished[1])]) == 0  # four tables have a row of it
    assert re.findall(r"^\| (\w+) \|", capsys.readouterr().out, re.M) == ["untrained", *4 * ["fwm_hw_ld"]]


@pytest.mark.parametrize("name", ["baseline", "kinematic"])
def test_the_operations_of_a_step_are_what_torchs_own_counter_finds(name):
    size, grid, objective = Size(48, 4, 4, predictor_width=32, predictor_depth=2), (4, 3, 5), OBJECTIVES[name]
    model = train.JEPA(objective, size, patch=4, tubelet=2)
    clips = torch.randint(256, (3, 3, 8, 12, 20), dtype=torch.uint8)
    masks = train.draw_masks(clips, torch.Generator().manual_seed(0), grid, objective.masking)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(clips, masks, dict.fromkeys(("pred", "ctx"), 1.0) | {"kinematic": 0.0})[0]["total"].backward()
    counts = [(visible.shape[1], masked.shape[1]) for visible, masked in masks]
    assert counter.get_total_flops() == 3 * train.step_flops(size, 4, 2, grid, counts, objective.ema)


@pytest.mark.command("tests/recompilations.py")
def test_token_counts_that_change_every_step_compile_no_graph_after_the_warm_up(finished):
    """20 steps of warm-up, then 200 more."""
    found = dict(re.findall(r"(\w+) (\d+)", finished[0]))
    assert int(found["counts"]) > 20 and found["warm"] == found["end"] and found["breaks"] == "0"
    # One for the blocks of each of three networks and one for the losses; two where sizes were not yet known to change.
    assert 4 <= int(found["end"]) <= 6


def test_the_benchmark_prints_a_row_for_each_objective(capsys, monkeypatch):
    monkeypatch.setattr(train, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(train, "WARMUP_STEPS", 1)
    assert train.main(["--benchmark", "--objective", "baseline,fwm_hw_ld", *QUICK]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["objective", "baseline", "fwm_hw_ld"]
    assert all(row[rows[0].index("MFU")] == "unknown" and float(row[rows[0].index("x plain")]) > 0 for row in rows[1:])
    for row in rows[1:]:  # ms per step and clips per second say the same
        assert float(row[1]) * float(row[3]) == pytest.approx(4 * 1000, rel=0.05)


def small_step_parts(batch):
    """Settings of a small step on the CPU, clips, and masks for each of a round's steps."""
    config, _ = train.parse(["--objective", "ld", *QUICK])
    clips = torch.randint(256, (batch, 3, config.frames, config.crop, config.crop), dtype=torch.uint8)
    grid = train.token_grid(config.frames, config.crop, config.crop, config.patch, config.tubelet)
    generator, masking = torch.Generator().manual_seed(0), train.OBJECTIVES["ld"].masking
    return config, clips, [train.draw_masks(clips, generator, grid, masking) for _ in range(train.ROUND)]


def test_the_largest_kernels_come_first_with_their_share():
    config, clips, masks = small_step_parts(4)
    found = train.largest_kernels(train.Trainer(config, torch.device("cpu")), clips, masks[:1], count=3)
    shares = [int(share) for share in re.findall(r" (\d+)%(?:, |$)", found)]
    assert len(shares) == 3 and 0 < sum(shares) <= 100 and shares == sorted(shares, reverse=True)


def memory_for(clips_at_most, monkeypatch):
    """A device whose memory holds a step of so many clips. Returns the list of what was tried."""
    step, tried = train.Trainer.step, []

    def limited(trainer, number, clips, masks):
        tried.append(len(clips))
        if len(clips) > clips_at_most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(trainer, number, clips, masks)
    monkeypatch.setattr(train.Trainer, "step", limited)
    return tried


def test_where_memory_runs_out_the_plain_step_is_timed_on_fewer_clips(monkeypatch):
    config, clips, masks = small_step_parts(8)
    tried = memory_for(2, monkeypatch)
    seconds, count = train.time_plain_step(config, torch.device("cpu"), 1, clips, masks)
    assert count == 2 and seconds > 0 and tried == [8, 4, *[2] * (1 + train.ROUND)]


@pytest.mark.parametrize("benchmark", [[], ["--benchmark"]])
def test_a_batch_that_memory_does_not_hold_is_one_sentence(tmp_path, monkeypatch, capsys, benchmark):
    memory_for(0, monkeypatch)
    assert train.main([*QUICK, *benchmark, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "train.py: there is too little memory; give a smaller --batch, --model or --crop"


@pytest.mark.parametrize("error, sentence", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "a loader process was killed"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "too little memory"),
    (torch._dynamo.exc.TorchDynamoException("no C++ compiler\nmore"), "compile here (no C++ compiler); --compile no"),
    (KeyboardInterrupt(), "stopped; a run that had begun goes on with --resume"),
])
def test_what_is_no_bug_is_one_sentence(monkeypatch, capsys, error, sentence):
    monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(error))
    assert train.main([]) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert sentence in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match"):
        train.main([])


@pytest.mark.parametrize("released", [True, False])
def test_as_released_without_ema_the_evaluated_encoder_is_the_untrained_one(tmp_path, released, monkeypatch):
    """The probe's figures are replaced by one that stands for the weights."""
    monkeypatch.setattr(probe, "synthetic_results", lambda encoder, *sizes, **parts: {
        "linear": dict.fromkeys(probe.FACTORS, sum(p.double().sum().item() for p in encoder.parameters()))})
    flags = [*QUICK, "--objective", "kinematic", "--steps", "4", "--probe-clips", "192", "--out", str(tmp_path / "run")]
    assert train.main(flags + ["--as-released"] * released) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (found["untrained"] == found["trained"]) == released


# -------------------------------------------------------------------------------- one ingredient taken away, a sweep


def first_step(*flags):
    """A model after `build`, its input, and what a forward pass gives."""
    config, _ = train.parse([*QUICK, *flags])
    model = train.build(config)
    clips = torch.randint(256, (4, 3, 8, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = train.draw_masks(clips, torch.Generator().manual_seed(0), (4, 4, 4), model.objective.masking)
    return model, clips, masks, *model(clips, masks, dict.fromkeys(("pred", "ctx"), 1.0))


@pytest.mark.parametrize("ablate", ["stop_gradient", "level_norm", "l1", "predictor"])
def test_an_ablation_takes_away_what_it_names_and_nothing_else(ablate):
    whole, clips, masks, losses, h = first_step()
    model, _, _, without, targets = first_step("--ablate", ablate)
    torch.testing.assert_close(model.encoder.state_dict(), whole.encoder.state_dict(), rtol=0, atol=0)
    raw = whole.target(train.data.normalise(clips))
    torch.testing.assert_close(targets, raw if ablate == "level_norm" else h)
    assert (without["pred"] != losses["pred"]) == (ablate != "stop_gradient")
    with_gradient = model.targets(train.data.normalise(clips)).requires_grad
    assert with_gradient == (ablate == "stop_gradient") and model.objective.ema != with_gradient
    if ablate == "l1":
        views = [model.view(train.data.normalise(clips), *mask, (4, 4, 4)) for mask in masks]
        errors = [torch.stack([view.p[i] - h[i, view.masked[i]] for i in range(4)]) for view in views]
        torch.testing.assert_close(without["pred"], sum(error.square().mean() for error in errors) / 2)
    visible, masked = masks[0]
    z = torch.randn(4, visible.shape[1], 512, requires_grad=True)
    model.predictor.mask_token.data.normal_()
    p, c = model.predictor(z, visible, masked, (4, 4, 4))
    blind = not torch.autograd.grad(p.sum(), z, allow_unused=True, materialize_grads=True)[0].any()
    assert blind == (ablate == "predictor")


def test_as_released_evaluates_the_target_at_any_momentum():
    config, _ = train.parse([*QUICK, "--objective", "kinematic", "--as-released", "--ema", "1"])
    assert train.Trainer(config, torch.device("cpu")).evaluated == "target"


@pytest.mark.parametrize("flags, evaluated", [(["--ema", "1"], "encoder"), (["--ema", "0"], "target"),
                                              (["--ablate", "stop_gradient"], "encoder")])
def test_a_target_that_never_learns_is_not_the_one_to_evaluate(tmp_path, flags, evaluated):
    assert train.main([*QUICK, "--steps", "2", *flags, "--out", str(tmp_path / "run")]) == 0
    checkpoint = probe.load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["evaluated"] == evaluated
    equal = all(torch.equal(checkpoint["target"][name], p) for name, p in checkpoint["encoder"].items())
    assert equal == (flags == ["--ema", "0"])


def test_a_sweep_makes_each_run_once_as_it_would_be_alone_and_names_one_that_failed(tmp_path, capfd):
    """Of four, two are there already, and one meets a folder that is not its own."""
    study, quick = tmp_path / "study", [*QUICK, "--steps", "3"]
    for seed in ("0", "1"):
        flags = ["--objective", "kinematic", "--seed", seed, "--out", str(study / f"kinematic-seed{seed}")]
        assert train.main([*quick, *flags]) == 0
    kept = {path: path.stat().st_mtime_ns for path in study.rglob("*.*")}
    foreign_folder = study / "baseline-seed0"
    foreign_folder.mkdir()
    (foreign_folder / "notes.txt").write_text("mine")

    flags = [*quick, "--objective", "baseline,kinematic", "--seeds", "0,1", "--out", str(study)]
    assert train.main(flags) == 1
    output, errors = capfd.readouterr()
    assert "3 of 4 runs finished" in output and f"{foreign_folder} holds something that is not a run" in errors
    names = {f"{name}-seed{seed}" for name in ("baseline", "kinematic") for seed in (0, 1)}
    assert {path.name for path in study.iterdir() if path.is_dir()} == names
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    alone = tmp_path / "alone"
    assert train.main([*quick, "--objective", "baseline", "--seed", "1", "--out", str(alone)]) == 0
    for file in ("metrics.csv", "result.json"):
        one, other = ((each / file).read_text() for each in (alone, study / "baseline-seed1"))
        assert one.replace(str(alone), str(study / "baseline-seed1")) == other
    # Other settings are refused.
    assert train.main([*flags, "--lr", "1"]) == 1
    assert "holds a different run" in capfd.readouterr().err


def test_a_signal_ends_a_sweep_and_its_runs_and_they_go_on(tmp_path, capsys):
    run_folder = tmp_path / "study" / "baseline-seed0"
    flags = [*QUICK, "--objective", "baseline", "--steps", "60"]

    def stop():
        wait_for_line(run_folder / "metrics.csv", 3)
        os.kill(os.getpid(), signal.SIGTERM)
    stopper = threading.Thread(target=stop)
    stopper.start()
    assert train.main([*flags, "--seeds", "0", "--out", str(tmp_path / "study")]) == 128 + signal.SIGTERM
    stopper.join()
    assert "goes on from there" in capsys.readouterr().out and not (run_folder / "result.json").exists()
    assert 3 < probe.load_checkpoint(run_folder / "last.pt")["step"] < 60
    assert train.main([*flags, "--seed", "0", "--resume", "--out", str(run_folder)]) == 0
    steps = [int(line.split(",")[0]) for line in (run_folder / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == list(range(60)) and (run_folder / "result.json").exists()


@pytest.mark.parametrize("ema", [True, False])
def test_a_step_with_every_term_reads_nothing_back_from_the_device(monkeypatch, ema):
    """The device "meta" holds no numbers: to ask for one there, or to compute with tensors of the host, is an error."""
    options = {"ld": {"hard": True, "dynamics_only": True}}
    terms = {name: objectives.Term(1.0, options.get(name, {})) for name in objectives.TERMS}
    monkeypatch.setitem(OBJECTIVES, "everything", objectives.Objective("both", "all terms", terms, ema=ema))
    # Two that do not know this device.
    monkeypatch.setattr(torch, "autocast", lambda *where, **how: nullcontext())
    monkeypatch.setattr(train, "make_optimizer", lambda model, config: torch.optim.AdamW(model.parameters()))
    config, _ = train.parse(["--objective", "everything", *QUICK])
    trainer = train.Trainer(config, torch.device("meta"))
    clips = torch.zeros(4, 3, 8, 16, 16, dtype=torch.uint8)
    masks = train.draw_masks(clips, torch.Generator().manual_seed(0), (4, 4, 4), trainer.objective.masking)
    values, h, gradient_norm = trainer.step(0, clips, masks)
    assert values.keys() == {"pred", "ctx", *objectives.TERMS, "total", "hard_share"}
    assert all(found.is_meta for found in (*values.values(), h, gradient_norm, trainer.healthy))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name, compiled", [(name, "no") for name in OBJECTIVES] + [("fwm_hw_ld", "yes")])
def test_on_a_gpu_no_step_waits_for_the_device_and_attention_is_flash(name, compiled):
    config, _ = train.parse(["--objective", name, "--compile", compiled])
    trainer, generator = train.Trainer(config, torch.device("cuda")), torch.Generator().manual_seed(0)
    clips = torch.randint(256, (8, 3, 8, 32, 32), dtype=torch.uint8).pin_memory()
    batches = [train.draw_masks(clips, generator, (4, 4, 4), trainer.objective.masking) for _ in range(8)]
    batches = [[tuple(tokens.pin_memory() for tokens in mask) for mask in masks] for masks in batches]
    for step, masks in enumerate(batches):  # after these, nothing is compiled again
        trainer.step(step, clips, masks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(len(batches), clips, batches[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainer.step(len(batches) + 1, clips, batches[0])
    kernels = " ".join(event.key for event in profiler.key_averages())
    assert "flash_fwd" in kernels and "flash_bwd" in kernels and "fmha" not in kernels and "cudnn" not in kernels


# ------------------------------------------------------------------------------------------------ what the README says


def test_the_readmes_walk_through_quotes_lines_that_are_there():
    table = (ROOT / "README.md").read_text().split("## One training step")[1].split("## ")[0]
    rows = re.findall(r"^\| [^|]+ \| `([^|]+)` \| `(\w+\.py)`, `([\w.]+)` \|", table, re.M)
    assert len(rows) == 15
    for line, file, place in rows:
        source = (ROOT / file).read_text()
        for name in place.split("."):
            source = re.split(rf"^ *(?:def|class) {name}\b", source, maxsplit=1, flags=re.M)[1]
        source = re.split(r"^(?:def|class) ", source, maxsplit=1, flags=re.M)[0]
        assert line in source, (line, place)


def test_objective_29_as_the_readme_adds_it(tmp_path, monkeypatch):
    """Its lines, word for word, with flags behind its own."""
    code = re.search(r"## Objective 29.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    lines = [line for line in code.splitlines() if line and "import" not in line]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    for module, table in ((train, "OBJECTIVES"), (objectives, "OBJECTIVES"), (objectives, "TERMS")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))  # what is added goes with the copy
    monkeypatch.setattr(train, "OBJECTIVES", objectives.OBJECTIVES)
    monkeypatch.setattr(sys, "argv", ["mine.py", *QUICK, "--steps", "2", "--out", "run"])
    with pytest.raises(SystemExit, match="^0$"):
        exec(code, {"__name__": "__main__"})
    header, *lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), map(float, line.split(",")))) for line in lines]
    assert len(rows) == 2 and all(row["smooth"] > 0 for row in rows)
    for row in rows:
        total = row["pred"] + row["ctx_weight"] * row["ctx"] + 0.1 * row["smooth"]
        assert row["total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_run_ends_with_its_probes(tmp_path):
    flags = ["--steps", "2", "--probe-clips", "192", "--compile", "no", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["trained"]["attentive"]
