"""What all tests share: one thread, the paper's datasets, processes that may be killed, and
commands that run beside the tests until one of them asks for the outcome."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from miniature import write_datasets

ROOT = Path(__file__).parent.parent
STARTED = {}

# Tests work on tiny tensors, where a second thread costs more than it brings; and bits depend on
# the number of threads.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "command(*arguments): a Python command, started before the "
                            "first test; OUT in an argument is a folder of its own; the fixture "
                            "`finished` waits for it")


def pytest_collection_modifyitems(items):
    # Commands end while others are tested.
    items.sort(key=lambda item: item.get_closest_marker("command") is not None)


def pytest_collection_finish(session):
    for item in session.items:
        for marker in item.iter_markers("command"):
            folder = tempfile.TemporaryDirectory()
            arguments = [argument.replace("OUT", folder.name) for argument in marker.args]
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.nice(10),
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
            STARTED[item.nodeid] = process, folder


@pytest.fixture
def finished(request):
    """The test's command after its successful end: its output, and the folder that OUT was."""
    process, folder = STARTED[request.node.nodeid]
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    yield output, Path(folder.name)
    folder.cleanup()


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The folder of the paper's four datasets, in a few clips."""
    root = tmp_path_factory.mktemp("four datasets")
    write_datasets(root)
    return root


@pytest.fixture(scope="session")
def exit_status():
    """Runs a function in a process of its own, a fork of this one, which may be killed; gives how
    it ended."""
    def run(function):
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
        while process.exitcode is None:  # join would wait for its children, too
            time.sleep(0.01)
        return process.exitcode
    return run
