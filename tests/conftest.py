"""Tests work on tiny tensors, where a second thread costs more than it brings; and bits depend on their number."""
import torch

torch.set_num_threads(1)
