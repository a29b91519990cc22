"""ONNX Runtime sessions compute what their graphs say, whatever the processor."""

from __future__ import annotations

import numpy as np
import onnx

from crl_sdk.engines._onnx_sessions import open_session


def test_products_of_bytes_are_exact(tmp_path):
    """Two products of large bytes exceed 16 bits, the width of a sum without VNNI."""
    weights = np.full((64, 32), 127, np.int8)
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("MatMulInteger", ["bytes", "weights"], ["whole"]),
            helper.make_node("Cast", ["whole"], ["sums"], to=onnx.TensorProto.FLOAT),
        ],
        "product",
        [helper.make_tensor_value_info("bytes", onnx.TensorProto.UINT8, ["n", 64])],
        [helper.make_tensor_value_info("sums", onnx.TensorProto.FLOAT, ["n", 32])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "product.onnx")
    session = open_session(tmp_path / "product.onnx")
    options = session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    (sums,) = session.run(["sums"], {"bytes": np.full((3, 64), 255, np.uint8)})
    assert np.array_equal(sums, np.full((3, 32), 64 * 255 * 127, np.float32))
