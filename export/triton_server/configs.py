"""The configurations (`config.pbtxt`) of the models of a Triton repository."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from crl_export.triton_server.graphs import CONDITIONAL, EMBEDDING, IMAGE, SHA256, UNIT
from crl_sdk.model._manifest import Precision
from crl_sdk.model._preprocess import PreprocessSpec

Backend: TypeAlias = Literal["onnxruntime", "tensorrt", "python"]
"""What runs the tower. `python` runs ONNX Runtime in a `model.py`, also for the bases."""

Accelerator: TypeAlias = Literal["tensorrt", "openvino"]
"""What ONNX Runtime accelerates the tower with, in Triton's `execution_accelerators`."""

Device: TypeAlias = Literal["cpu", "gpu"]

DECODE, TOWER = "crl_decode", "crl_tower"
"""Names of the models that all criteria share."""

PIXELS, UNIVERSAL = "PIXELS", "UNIVERSAL"

Message: TypeAlias = "Mapping[str, Any]"
"""Fields of a protobuf message: strings, numbers, bools, `Name`s, messages, or lists of these."""


class Name(str):
    """A value of an enum, which protobuf's text format writes without quotes."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """What the configuration of every model depends on, besides the bases.

    Attributes:
        backend: What runs the tower.
        precision: Precision of the tower.
        device: Device of the tower. Decoding and bases run on the CPU.
        accelerator: Execution accelerator of the tower, for the backend `onnxruntime`.
        instances: Number of instances of the tower, on each device.
        threads: Threads of a run of the tower on a CPU; None leaves it to ONNX Runtime.
        max_batch: Largest batch that Triton forms.
        preprocess: Preprocessing of the model, which sets the size of its input.
        dim: Length of the universal embedding.
        described: Parameters that every configuration repeats, such as the fingerprint.
    """

    backend: Backend
    precision: Precision
    device: Device
    accelerator: Accelerator | None
    instances: int
    threads: int | None
    max_batch: int
    preprocess: PreprocessSpec
    dim: int
    described: Mapping[str, str]

    @property
    def pixels(self) -> tuple[int, int, int]:
        """Shape of an image of the tower: height, width and 3."""
        return self.preprocess.height, self.preprocess.width, 3


def basis_model(name: str) -> str:
    """Return the name of the model of a basis."""
    return f"crl_basis_{name}"


def ensembles(name: str) -> tuple[str, str]:
    """Return the names of the ensembles of a criterion: from encoded images, and from pixels."""
    return f"crl_{name}", f"crl_pixels_{name}"


def decode_config(tower: Tower) -> Message:
    """Return the configuration of the model that decodes images."""
    return {
        **_head(DECODE, tower, {}),
        "backend": "python",
        "input": [_tensor("IMAGE", "TYPE_STRING", (1,))],
        "output": [_tensor(PIXELS, "TYPE_UINT8", tower.pixels)],
        "instance_group": [{"count": 1, "kind": Name("KIND_CPU")}],
        "dynamic_batching": {},
    }


def tower_config(
    tower: Tower, parameters: Mapping[str, str], columns: int | None = None
) -> Message:
    """Return the configuration of the tower.

    Args:
        tower: The options of the repository.
        parameters: Further parameters, such as the plan.
        columns: Columns of the basis in a plan, whose projection is an output too; else None.
    """
    outputs = [_tensor(UNIT, "TYPE_FP32", (tower.dim,))]
    if columns is not None:  # Triton wants all outputs of a plan, also those that nobody uses
        outputs.append(_tensor("projected", "TYPE_FP32", (columns,)))
    threads = {} if tower.threads is None else {"intra_op_thread_count": str(tower.threads)}
    kind = Name("KIND_GPU" if tower.device == "gpu" else "KIND_CPU")
    config = {
        **_head(TOWER, tower, {**parameters, **threads}),
        **_runtime(tower.backend),
        "input": [_tensor(IMAGE, "TYPE_UINT8", tower.pixels)],
        "output": outputs,
        "instance_group": [{"count": tower.instances, "kind": kind}],
        "dynamic_batching": {},
        "model_warmup": [
            _warmup(size, IMAGE, "TYPE_UINT8", tower.pixels)
            for size in sorted({1, tower.max_batch})
        ],
    }
    if tower.accelerator is not None:
        config["optimization"] = {"execution_accelerators": _accelerators(tower)}
    return config


def basis_config(name: str, columns: int, tower: Tower, parameters: Mapping[str, str]) -> Message:
    """Return the configuration of the model of a basis.

    Args:
        name: Name of the criterion in the names of models.
        columns: Length of a conditional embedding.
        tower: The options of the repository.
        parameters: Further parameters, such as the criterion.
    """
    return {
        **_head(basis_model(name), tower, {**parameters, "intra_op_thread_count": "1"}),
        **_runtime("python" if tower.backend == "python" else "onnxruntime"),
        "input": [_tensor(EMBEDDING, "TYPE_FP32", (tower.dim,))],
        "output": _conditional(columns),
        "instance_group": [{"count": 1, "kind": Name("KIND_CPU")}],
        "dynamic_batching": {},
        "model_warmup": [_warmup(1, EMBEDDING, "TYPE_FP32", (tower.dim,))],
    }


def ensemble_configs(
    name: str, columns: int, tower: Tower, parameters: Mapping[str, str]
) -> dict[str, Message]:
    """Return the configurations of the ensembles of a criterion, by name; see `basis_config`."""
    encoded, pixels = ensembles(name)
    projected = (CONDITIONAL, SHA256)
    embed = _step(TOWER, {IMAGE: PIXELS}, {UNIT: UNIVERSAL})
    project = _step(basis_model(name), {EMBEDDING: UNIVERSAL}, {each: each for each in projected})
    decode = _step(DECODE, {"IMAGE": "IMAGE"}, {PIXELS: PIXELS})
    inner = _step(pixels, {PIXELS: PIXELS}, {each: each for each in (UNIVERSAL, *projected)})
    found: dict[str, Message] = {}
    for each, given, steps in (
        (pixels, _tensor(PIXELS, "TYPE_UINT8", tower.pixels), [embed, project]),
        (encoded, _tensor("IMAGE", "TYPE_STRING", (1,)), [decode, inner]),
    ):
        found[each] = {
            **_head(each, tower, parameters),
            "platform": "ensemble",
            "input": [given],
            "output": [_tensor(UNIVERSAL, "TYPE_FP32", (tower.dim,)), *_conditional(columns)],
            "ensemble_scheduling": {"step": steps},
        }
    return found


def to_text(message: Message, indent: str = "") -> str:
    """Return a message in protobuf's text format."""
    lines = []
    for key, value in message.items():
        repeated = isinstance(value, Sequence) and not isinstance(value, str)
        for each in value if repeated else [value]:
            if isinstance(each, Mapping):
                lines.append(f"{indent}{key} {{\n{to_text(each, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(each)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    return value if isinstance(value, Name) else json.dumps(value, ensure_ascii=False)


def _head(name: str, tower: Tower, parameters: Mapping[str, str]) -> dict[str, Any]:
    described = {**tower.described, **parameters}
    return {
        "name": name,
        "max_batch_size": tower.max_batch,
        "parameters": [
            {"key": key, "value": {"string_value": value}} for key, value in described.items()
        ],
    }


def _runtime(backend: Backend) -> Message:
    if backend == "tensorrt":
        return {"platform": "tensorrt_plan", "default_model_filename": "model.plan"}
    if backend == "onnxruntime":
        return {"backend": "onnxruntime", "default_model_filename": "model.onnx"}
    return {"backend": "python"}


def _tensor(name: str, kind: str, dims: Sequence[int]) -> Message:
    return {"name": name, "data_type": Name(kind), "dims": list(dims)}


def _conditional(columns: int) -> list[Message]:
    return [
        _tensor(CONDITIONAL, "TYPE_FP32", (columns,)), _tensor(SHA256, "TYPE_STRING", (1,)),
    ]  # fmt: skip


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Message:
    """Return a step of an ensemble, which uses the newest version of its model."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }


def _warmup(size: int, name: str, kind: str, dims: Sequence[int]) -> Message:
    data = {"data_type": Name(kind), "dims": list(dims), "zero_data": True}
    return {
        "name": f"batch of {size}",
        "batch_size": size,
        "inputs": [{"key": name, "value": data}],
    }


def _accelerators(tower: Tower) -> Message:
    if tower.accelerator == "openvino":
        return {"cpu_execution_accelerator": [{"name": "openvino"}]}
    precision = "FP16" if tower.precision == "fp16" else "FP32"
    shape = "x".join(map(str, tower.pixels))
    bounds = {"min": 1, "opt": tower.max_batch, "max": tower.max_batch}
    options = {"precision_mode": precision}  # and one engine for all sizes of batches:
    options |= {f"trt_profile_{each}_shapes": f"{IMAGE}:{n}x{shape}" for each, n in bounds.items()}
    parameters = [{"key": key, "value": value} for key, value in options.items()]
    return {"gpu_execution_accelerator": [{"name": "tensorrt", "parameters": parameters}]}
