"""Run every command of README and lab report, shortened, so that none can rot; .ci/run calls this.

    python tests/readme_commands.py

Each line that calls python or torchrun goes through bash, where programs only note what they were
asked to run. Then every noted command runs here, in a folder with what the texts take for granted
(datasets, checkpoints, your own videos), with more flags that make it short. Programs in fenced
blocks run in test_train.py and test_study.py.
"""
import importlib
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

import probe
import train
from miniature import write_datasets
from model import SIZES, Encoder
from test_probe import foreign

SMALL = ["--model", "tiny", "--frames", "8", "--crop", "32", "--patch", "8", "--batch", "4",
         "--micro-batch", "4", "--workers", "0", "--device", "cpu"]
STEPS = [*SMALL, "--steps", "2", "--probe-clips", "0"]
BENCHMARK = [*SMALL, "--rounds", "1"]
NOTE = """#!{python}
import json, sys
with open({notes!r}, "a") as notes:
    notes.write(json.dumps(sys.argv) + "\\n")
"""


def commands_of(text):
    """The shell lines of a Markdown text: indented ones that call python or torchrun or set a
    variable, then what stands in backticks and begins with one of these two."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    lines = re.findall(r"^    (.*\bpython .*|.*\btorchrun .*|\w+=.*)$", text, re.M)
    inline = re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    return lines + [line for line in inline if "<" not in line and "mine.py" not in line]


def noted(lines, folder):
    """Every call of python or torchrun that bash makes of these lines: a list of arguments each."""
    notes, programs = folder / "notes", folder / "bin"
    programs.mkdir()
    for name in ("python", "torchrun", "pip", "git", "head", "tail"):
        (programs / name).write_text(NOTE.format(python=sys.executable, notes=str(notes)))
        (programs / name).chmod(0o755)
    # of several seeds or ingredients, the first
    script = re.sub(r" in (0|stop_gradient) [^;]+;", r" in \1;", "\n".join(lines))
    subprocess.run(["bash", "-e"], input=script, text=True, check=True, cwd=folder,
                   env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"})
    calls = [json.loads(line) for line in notes.read_text().splitlines()]
    calls = [call for call in calls if Path(call[0]).name in ("python", "torchrun")]
    return list({json.dumps(call): call for call in calls}.values())


def run(call):
    """Run one call, shortened. Returns its exit status, or None for what is checked elsewhere."""
    program, *arguments = call
    if arguments[:2] == ["-m", "pytest"]:
        return None
    if Path(program).name == "torchrun":
        arguments = arguments[1:]  # one process instead of several: test_train.py starts torchrun
    script, *flags = arguments
    module = importlib.import_module(Path(script).stem)
    flags = [str(HERE.parent) if flag == "OTHER" else flag for flag in flags]
    short = {"data": ["--count", "16"] if "--write" in flags else [],
             "beside": ["--only", "wrong flag", "--rounds", "1"],
             "pictures": ["--clips", "600"], "benchmark": BENCHMARK,
             "probe": ["--probe-epochs", "1", "--clips", "192", "--workers", "0", "--seeds", "2"],
             "train": STEPS,
             "study": [*STEPS, "--seeds", "0"] if "--objective" in flags else []}[module.__name__]
    if "--train-list" in flags:
        lines = Path("clips/videos.csv").read_text().splitlines(keepends=True)
        Path("clips/train.csv").write_text("".join(lines[:12]))
        Path("clips/test.csv").write_text("".join(lines[12:]))
    if module is probe:
        short += ["--untrained", "tiny"] if "--untrained" in flags else []
    if "all" in flags:
        short += ["--objective", "baseline,ld"]
    if "--with" in flags:
        line = [sys.executable, str(HERE.parent / script), *flags, *short, "--probe-every", "0"]
        return subprocess.run(line).returncode
    prints = {"--list", "--help", "--gradients", "--table", "--answer", "--agree", "--compare",
              "--confirm", "--curves"}
    if prints & {*flags}:
        short = []
    status = module.main(flags + short)
    if status == 1 and module is train:  # an earlier line ran it with the same folder
        status = train.main([*flags, *short, "--resume"])
    return status


def main():
    torch.set_num_threads(1)
    readme = (HERE.parent / "README.md").read_text()
    probe.FEW = probe.FEW._replace(steps=2)
    load = probe.load_vjepa

    def load_small(path):
        encoder, found = load(path)
        return encoder, {**found, "frames": 8, "crop": 32}

    probe.load_vjepa = load_small
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = (HERE / "results/README.md").read_text()
        calls = noted(commands_of(readme) + commands_of(report), folder)
        os.chdir(folder)
        (folder / "tests").symlink_to(HERE)
        write_datasets(folder / "DIR", train=5, test=2)
        os.environ["OMP_NUM_THREADS"] = "1"
        for run_folder in ("A", "B"):
            train.main([*STEPS, "--out", run_folder])
        torch.save({"encoder": foreign(Encoder(SIZES["tiny"], 8, 2))}, "vjepa2_1.pt")
        first, = re.findall(r"```python\n(import sys.*?)```", readme, re.S)
        second, = re.findall(r"```python\n(TERMS.*?)```", readme, re.S)
        first = first.replace("if __name__", "if False and __name__")
        (folder / "mine.py").write_text(first + second)
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
        sys.exit("these commands failed, shortened:\n" + "\n".join(wrong))
    print(f"{len(calls)} commands of README and lab report work")


if __name__ == "__main__":
    main()
