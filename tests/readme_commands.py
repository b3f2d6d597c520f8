"""Run every command of the README, shortened, so that none can rot: a command, which .ci/run calls.

    python tests/readme_commands.py

Each line that calls python or torchrun goes through bash, where programs only note what they were asked to run. Then
every noted command runs here, in a folder with what the README takes for granted (datasets, checkpoints, videos of
one's own), with flags behind its own that make it short.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import torch

import data
import probe
import synthetic
import train
from miniature import write_datasets
from model import SIZES, Encoder
from test_probe import foreign

SMALL = ["--model", "tiny", "--frames", "8", "--crop", "32", "--patch", "8", "--batch", "4", "--workers", "0",
         "--device", "cpu"]
NOTE = """#!{python}
import json, sys
with open({notes!r}, "a") as notes:
    notes.write(json.dumps(sys.argv) + "\\n")
"""


def commands_of(text):
    """The shell lines of a Markdown text: indented ones that call python or torchrun or set a variable, then what
    stands in backticks and begins with one of these two."""
    lines = re.findall(r"^    (.*\bpython .*|.*\btorchrun .*|\w+=.*)$", text, re.M)
    return lines + [line for line in re.findall(r"`((?:python|torchrun) [^`]+)`", text) if "<" not in line]


def noted(lines, folder):
    """Every call of python or torchrun that bash makes of these lines: a list of arguments each."""
    notes, programs = folder / "notes", folder / "bin"
    programs.mkdir()
    for name in ("python", "torchrun", "pip", "git"):
        (programs / name).write_text(NOTE.format(python=sys.executable, notes=str(notes)))
        (programs / name).chmod(0o755)
    subprocess.run(["bash", "-e"], input="\n".join(lines), text=True, check=True, cwd=folder,
                   env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"})
    calls = [json.loads(line) for line in notes.read_text().splitlines()]
    unique = {json.dumps(call): call for call in calls if Path(call[0]).name not in ("pip", "git")}
    return list(unique.values())


def run(call):
    """Run one call, shortened. Returns its exit status, or None for what is checked elsewhere."""
    program, *arguments = call
    if arguments[:2] == ["-m", "pytest"] or arguments[0].startswith("tests/"):
        return None
    if Path(program).name == "torchrun":
        arguments = arguments[1:]  # one process in the place of several: test_train.py starts torchrun itself
    if arguments[0] == "-c":
        names = {"short": [*SMALL, "--steps", "2", "--probe-clips", "0"]}
        exec(re.sub(r"train\.main\((.*)\)", r"status = train.main([*\1, *short])", arguments[1]), names)
        return names.get("status", 0)
    script, *flags = arguments
    if script == "synthetic.py":
        return synthetic.main([*flags, "--count", "16"])
    if script == "data.py":
        return data.main(flags)
    if script == "probe.py":
        short = ["--probe-epochs", "1", "--clips", "192", "--workers", "0", "--seeds", "2"]
        short += ["--frames", "8", "--crop", "32"] if "--weights" in flags else []
        if "--episodes" in flags:  # the miniature has three classes
            short += ["--episodes", "2", "--way", "3" if "--root" in flags else "5"]
        if "--compare" in flags:  # of several seeds the sweeps below have the first alone
            paths = flags[1:]
            return probe.main(["--compare", paths[0], paths[len(paths) // 2]])
        return probe.main(flags if "--table" in flags else flags + short)
    short = [*SMALL, "--steps", "2", "--probe-clips", "192" if "--seeds" in flags else "0"]
    if "all" in flags:
        short += ["--objective", "baseline,ld"]
    elif "--seeds" in flags:  # two objectives of the list, one seed
        names = flags[flags.index("--objective") + 1] if "--objective" in flags else "baseline"
        short += ["--objective", ",".join(names.split(",")[:2])]
    if "--seeds" in flags:
        short += ["--seeds", "0"]
    if "--benchmark" in flags or {"--list", "--gradients", "--help"} & set(flags):
        return train.main(flags + short)
    finished = train.main(flags + short)
    if finished == 1 and "--seeds" not in flags:  # an earlier line ran it with the same folder
        finished = train.main([*flags, *short, "--resume"])
    return finished


def main():
    torch.set_num_threads(1)
    readme = (HERE.parent / "README.md").read_text()
    train.WARMUP_STEPS, train.TIMED_ROUNDS, probe.BLOB_CLIPS = 1, 1, [16, 8]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = noted(commands_of(readme), folder)
        os.chdir(folder)
        write_datasets(folder / "DIR", train=5, test=2)
        os.environ["OMP_NUM_THREADS"] = "1"
        for run_folder in ("A", "B"):
            train.main(["--steps", "1", "--probe-clips", "0", "--out", run_folder, *SMALL])
        torch.save({"encoder": foreign(Encoder(SIZES["tiny"], 8, 2))}, "vjepa2_1.pt")
        synthetic.main(["--write", "videos", "--count", "16"])
        for path in ("train.csv", "test.csv"):
            lines = Path("videos/videos.csv").read_text().splitlines()
            Path(path).write_text("".join(f"videos/{line}\n" for line in lines))
        wrong = []
        for call in calls:
            began = time.perf_counter()
            status = run(call)
            line = " ".join([Path(call[0]).name, *call[1:]])
            print(f"=== {status} {time.perf_counter() - began:.1f} s: {line}", flush=True)
            wrong += [line] if status not in (0, None) else []
            if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                break
        os.chdir(HERE)
    if wrong:
        sys.exit("these commands of the README failed, shortened:\n" + "\n".join(wrong))
    print(f"{len(calls)} commands of the README work")


if __name__ == "__main__":
    main()
