"""ONNX Runtime sessions compute what their graphs say, whatever the processor."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from crl_sdk import demo_bundle
from crl_sdk.engines import _onnx_sessions
from crl_sdk.engines._onnx_sessions import needs_wide_sums, open_session


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
    (sums,) = session.run(["sums"], {"bytes": np.full((3, 64), 255, np.uint8)})
    assert np.array_equal(sums, np.full((3, 32), 64 * 255 * 127, np.float32))


@pytest.mark.parametrize(
    ("machine", "features", "wide"),
    [("x86_64", ("avx2",), True), ("AMD64", (), True), ("x86_64", ("avx2", "avx512f"), True),
     ("x86_64", ("avx2", "avx_vnni"), False), ("x86_64", ("avx512_vnni",), False),
     ("x86_64", ("amx_int8",), False), ("aarch64", ("asimddp",), False), ("arm64", (), False)],
)  # fmt: skip
def test_sums_are_made_wider_where_they_would_be_cut_and_nowhere_else(
    monkeypatch, machine, features, wide
):
    """Where it is not needed, the setting makes int8 half as fast."""
    assert needs_wide_sums(machine, features) == wide
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(_onnx_sessions, "find_features", lambda: features)
    session = open_session(demo_bundle() / "image.fp32.onnx")
    options = session.get_session_options()
    if wide:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")
