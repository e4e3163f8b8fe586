"""Tensors on disk."""

import torch
from safetensors.torch import load_file
from torch import nn

from moee.store.tensor_file import write_tensors


def test_modules_that_share_memory_are_written_under_each_name(tmp_path):
    """CoaT's: the same positions in every block."""
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "again": nn.Sequential(shared), "transposed": nn.Linear(3, 3)})
    state = {**model.state_dict(), "part": shared.weight[1:], "turned": shared.weight.T}
    write_tensors(state, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
