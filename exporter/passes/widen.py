"""Turn a bfloat16 graph into a float32 one that holds the same (rounded) weights, for runtimes without bfloat16 kernels.

1. Initialisers and constants of type bfloat16 become float32, value for value.
2. Casts to bfloat16 become casts to float32.
3. Types of inner values are forgotten; the runtime infers them again.

The result checks weights, structure and routing of the typed graph, not the rounding of bfloat16 arithmetic.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def widen_bfloat16(model: ir.Model) -> int:
    """Widen in place; returns the number of tensors and casts that changed."""
    changed = 0
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
            value.const_value = ir.tensor(_float32(value.const_value), name=value.name)  # rule 1
            value.dtype = ir.DataType.FLOAT
            changed += 1
    for node in model.graph.all_nodes():  # branches too
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(_float32(attribute.as_tensor())))
                changed += 1
        if node.op_type == "Cast" and node.attributes["to"].as_int() == int(ir.DataType.BFLOAT16):  # rule 2
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            changed += 1
        for value in node.outputs:  # rule 3
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
    return changed


def _float32(tensor: ir.TensorProtocol) -> np.ndarray:
    return tensor.numpy().astype(np.float32)
