"""Register the projection kernel with the plugin API of enterprise TensorRT.

The bindings are those of the newest version on PyPI, over empty libraries. No network can be made
with empty libraries, so this script imitates what a network would pass to the plugin.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from tensorrt_bindings import VERSIONS, install_bindings


def main() -> None:
    """Register the plugin, and check what it launches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for library in install_bindings(VERSIONS[-1], folder):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        (folder / "tensorrt").symlink_to(folder / "tensorrt_bindings")
        sys.path.insert(0, str(folder))
        import tensorrt as trt
        from tensorrt import plugin as trtp
        from tensorrt.plugin import _lib

        registered = []
        trt.get_plugin_registry = lambda: SimpleNamespace(
            register_creator=lambda creator, _: registered.append(creator),
            get_creator=lambda *_: None,
        )

        from crl_export.kernels.plugin import PLUGIN, register_plugin

        register_plugin("sm_87", unit=True)
        assert len(registered) == 1
        definition = _lib.QDP_REGISTRY[PLUGIN]
        assert definition.input_tensor_names == ["x", "weight", "bias", "starts", "posts"]
        assert definition.num_outputs == 1
        made = SimpleNamespace(cdiv=[], scalars=[])
        trtp.cdiv = lambda a, b: (made.cdiv.append((a, b)), "blocks")[1]
        trtp.KernelLaunchParams = SimpleNamespace
        trtp.SymIntExprs = lambda length: [None] * length
        trtp.SymInt32 = lambda value: value

        def tensor(dtype, *shape):
            return SimpleNamespace(dtype=dtype, shape_expr=shape)

        entry, ptx, parameters, scalars = definition.aot_impl_func(
            tensor(trt.float16, "n", "d"), tensor(trt.float32, "d", "k"),
            tensor(trt.float32, "k"), tensor(trt.int32, "s+1"), tensor(trt.int32, "s"), (), 0,
        )  # fmt: skip
        assert entry == "project_segments" and list(scalars) == ["n", "d", "k"]
        assert made.cdiv == [("n", 32)] and parameters.grid_x == "blocks"
        assert parameters.grid_y == "s" and parameters.block_x == 256
        print(
            f"TensorRT {trt.__version__}: took {PLUGIN}, {len(ptx)} bytes of PTX, "
            f"{parameters.shared_mem} bytes of shared memory"
        )


if __name__ == "__main__":
    sys.exit(main())
