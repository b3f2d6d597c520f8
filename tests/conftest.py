"""What all tests share: one thread, the paper's datasets, processes that may be killed."""
import multiprocessing
import time

import pytest
import torch

from miniature import write_datasets

# Tests work on tiny tensors, where a second thread costs more than it brings; and bits depend on
# the number of threads.
torch.set_num_threads(1)


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
