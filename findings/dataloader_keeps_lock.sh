#!/usr/bin/env bash
# A lock that a training process held on its folder outlives a kill: torch's DataLoader workers
# inherited it. Of the two kinds of file lock only one does this.
#
# Versions: torch 2.14.1, Linux, workers started by fork (Python's default on Linux up to 3.13).
#
# One would expect that fcntl.flock is given back when the process that took it dies, by whatever
# signal: that is why it is used for "one run per folder", rather than a file that stays behind.
#
# What happens: flock belongs to the open file, and a forked worker holds that file open, too.
#   - after SIGKILL of the main process, as by a cluster's scheduler or for lack of memory, another
#     process is told that the folder is locked, though nobody works on it.
#   - the worker looks for its parent every few seconds, and only when it has ended is the lock
#     free. A worker that is stuck in a decoder or on a network drive keeps it as long.
#   - fcntl.lockf (a POSIX lock) belongs to the process: it is free at once.
#   - O_CLOEXEC, which Python sets on every file, does not help: a fork is no exec.
#
# Why it matters: a job that was killed for lack of memory and is started again at once fails with
# "another process is at work", and a loop that restarts jobs gives up.
#
# What to do instead: close the lock's file in worker_init_fn (closing a copy does not unlock), or
# take fcntl.lockf, which in turn is lost as soon as the process closes any file of that path.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.14.1 numpy==2.4.6
cd "$work"
cat > job.py <<'EOF'
import fcntl
import os
import sys

from torch.utils.data import DataLoader

kind, closed = getattr(fcntl, sys.argv[1]), sys.argv[2] == "closed"
handle = os.open("lock", os.O_RDWR | os.O_CREAT)
kind(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Items:
    """Each item is the number of the process that read it."""

    def __len__(self):
        return 10 ** 9

    def __getitem__(self, item):
        return os.getpid()


def start(worker):
    if closed:
        os.close(handle)


loader = DataLoader(Items(), batch_size=None, num_workers=1, multiprocessing_context="fork",
                    worker_init_fn=start)
reading = iter(loader)
print(next(reading), flush=True)
sys.stdin.read()
EOF
cat > look.py <<'EOF'
import fcntl
import os
import signal
import subprocess
import sys
import time


def is_free(kind):
    """Whether a process of its own gets the lock."""
    code = f"import fcntl; fcntl.{kind}(open('lock', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def is_alive(process):
    try:
        return open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


for kind, closed, expected in (("flock", "open", False), ("flock", "closed", True),
                               ("lockf", "open", True)):
    job = subprocess.Popen([sys.executable, "job.py", kind, closed], stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, text=True)
    worker = int(job.stdout.readline())
    assert not is_free(kind)
    os.kill(worker, signal.SIGSTOP)  # as if it were busy, so that no clock decides what is seen
    job.kill()
    job.wait()
    free = is_free(kind)
    print(f"{kind}, its file {closed} in the worker: free after the kill: {free}")
    assert is_alive(worker) and free == expected
    os.kill(worker, signal.SIGCONT)
    while is_alive(worker):
        time.sleep(0.1)
    assert is_free(kind)
print("as described")
EOF
venv/bin/python look.py
