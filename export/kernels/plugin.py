"""The projection kernel as an ahead-of-time plugin of enterprise TensorRT, 10.9 and later.

With the plugin, a user's own network can compute conditional embeddings with row normalisation
inside the engine. TensorRT-RTX has no plugins. **It has not been run on hardware**: `make
conformance` registers it with the real bindings on top of empty libraries.
"""

# no `from __future__ import annotations`: TensorRT reads the types of these functions

import re
from typing import Any

from crl_export.kernels.ahead import BLOCKS, WARPS, compile_kernel
from crl_sdk.engines._kernels import ENTRY
from crl_sdk.errors import ExportError, MissingDependencyError

PLUGIN = "crl::project_segments"


def register_plugin(architecture: str, *, unit: bool = False, single: bool = False) -> str:
    """Register the plugin. Call it once in a process, before building or loading an engine with it.

    The plugin's inputs are those of `crl_export.kernels.projection.project_segments`: x, weight,
    bias, starts and posts. Here x may be float32 or float16 and weight is float32. The output is
    the array `out`, float32.

    Args:
        architecture: Compute capability of the GPU, such as `sm_87`.
        unit: Whether to divide each row of x by its L2 norm first.
        single: Whether no segment has more columns than a block.

    Returns:
        Name of the plugin, for `trt.plugin.op`.

    Raises:
        InvalidInputError: If the architecture is unknown.
        MissingDependencyError: If enterprise TensorRT is not installed or has no such plugins.
    """
    try:
        import tensorrt as trt
        from tensorrt import plugin as trtp
    except ImportError as error:
        raise MissingDependencyError("tensorrt", "tensorrt", "plugins") from error
    kernels = {
        dtype: compile_kernel(architecture, x_dtype=dtype, unit=unit, single=single)
        for dtype in ("fp32", "fp16")
    }

    @trtp.register(PLUGIN)
    def describe(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        starts: trtp.TensorDesc,
        posts: trtp.TensorDesc,
    ) -> trtp.TensorDesc:
        out = x.like()
        out.shape_expr = trtp.ShapeExprs.from_tuple((x.shape_expr[0], weight.shape_expr[1]))
        out.dtype = trt.float32
        return out

    @trtp.aot_impl(PLUGIN)
    def launch(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        starts: trtp.TensorDesc,
        posts: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        kernel = kernels["fp16" if x.dtype == trt.float16 else "fp32"]
        n, d = x.shape_expr[0], x.shape_expr[1]
        parameters = trtp.KernelLaunchParams()
        parameters.grid_x = trtp.cdiv(n, BLOCKS["BLOCK_N"])
        parameters.grid_y = posts.shape_expr[0]
        parameters.block_x = 32 * WARPS
        parameters.shared_mem = kernel.shared
        scalars = trtp.SymIntExprs(3)
        for i, value in enumerate((n, d, weight.shape_expr[1])):
            scalars[i] = trtp.SymInt32(value)
        return ENTRY, plugin_ptx(kernel.ptx), parameters, scalars

    return PLUGIN


def plugin_ptx(ptx: str) -> str:
    """Return PTX without the two parameters for scratch memory, which Triton adds.

    TensorRT does not pass such parameters.

    Raises:
        ExportError: If the code uses the parameters.
    """
    listed: Any = re.search(rf"(\.entry\s+{ENTRY}\()(.*?)\n\)", ptx, re.DOTALL)
    parameters = listed[2].split(",") if listed else []
    if len(parameters) != 11 or re.search(rf"\[{ENTRY}_param_(9|10)[\]+]", ptx):
        raise ExportError(
            "expected a kernel of 9 parameters and 2 unused ones for scratch memory, got "
            f"{len(parameters)}: Triton changed; see export/kernels/plugin.py"
        )
    return ptx.replace(listed[0], f"{listed[1]}{','.join(parameters[:9])}\n)", 1)
