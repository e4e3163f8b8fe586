"""PyTorch's fused attention is exported at any rank: windows make it five dimensions, other code three."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from exporter.graph.trace import to_onnx
from exporter.runners import OnnxRunner
from moee.errors import UserError

SHAPES = {3: (5, 8), 4: (2, 5, 8), 5: (2, 3, 5, 8), 6: (2, 2, 3, 5, 8)}  # of an image's queries
MASKS = {"none": None, "float": torch.randn(5, 5), "bool": torch.eye(5, dtype=torch.bool)}


class Attention(nn.Module):
    """Attention of tensors of a shape among themselves."""

    def __init__(self, mask=None, **options):
        super().__init__()
        self.register_buffer("mask", mask)
        self.options = options

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, 2 * x, x + 1, attn_mask=self.mask, **self.options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rank", SHAPES)
def test_the_graph_gives_what_torch_gives(rank, mask, tmp_path):
    model = Attention(MASKS[mask], scale=0.7 if rank % 2 else None)
    x = torch.randn(3, *SHAPES[rank])
    graph = to_onnx(model, x[:2])
    ir.save(graph, tmp_path / "attention.onnx")
    with OnnxRunner(tmp_path / "attention.onnx") as runner:
        for count in (1, 3):
            np.testing.assert_allclose(runner.run(x[:count].numpy())[0], model(x[:count]), rtol=1e-5, atol=1e-5)


def test_what_is_not_plain_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="cannot express this model in ONNX .*have not four dimensions"):
        to_onnx(Attention(is_causal=True), torch.randn(2, *SHAPES[5]))
