"""Names of engines, `runtime/device/precision`, and patterns that select among them."""

from __future__ import annotations

from dataclasses import dataclass

from crl_sdk.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class EngineName:
    """Name of an engine: what runs a model, where, and how exactly it computes.

    `str()` gives the form that users see and type:

    >>> name = EngineName.parse("onnx/cpu/int8")
    >>> name.device
    'cpu'
    >>> str(name)
    'onnx/cpu/int8'

    Attributes:
        runtime: Library that runs the model, such as `onnx` or `tensorrt-rtx`.
        device: Where the model runs, such as `cpu` or `cuda`.
        precision: Number format of the computation, such as `fp32` or `int8`.
    """

    runtime: str
    device: str
    precision: str

    @classmethod
    def parse(cls, text: str) -> EngineName:
        """Read a complete engine name.

        Raises:
            InvalidInputError: If the text does not have exactly three parts.
        """
        pattern = EnginePattern.parse(text)
        if pattern.device is None or pattern.precision is None:
            raise InvalidInputError(
                f"expected an engine name runtime/device/precision, such as onnx/cpu/fp32, got "
                f"{text!r}"
            )
        return cls(pattern.runtime, pattern.device, pattern.precision)

    def __str__(self) -> str:
        """Return `runtime/device/precision`."""
        return f"{self.runtime}/{self.device}/{self.precision}"


@dataclass(frozen=True, slots=True)
class EnginePattern:
    """Engine name or its beginning. It selects all engines whose names begin with it.

    Only whole parts match, so `tensorrt` does not select `tensorrt-rtx`:

    >>> EnginePattern.parse("onnx/cpu").matches(EngineName("onnx", "cpu", "int8"))
    True
    >>> EnginePattern.parse("tensorrt").matches(EngineName("tensorrt-rtx", "cuda", "fp16"))
    False

    Attributes:
        runtime: Required runtime.
        device: Required device, or None for any.
        precision: Required precision, or None for any.
    """

    runtime: str
    device: str | None = None
    precision: str | None = None

    @classmethod
    def parse(cls, text: str) -> EnginePattern:
        """Read one to three parts, separated by slashes.

        Raises:
            InvalidInputError: If a part is empty or there are more than three.
        """
        parts = text.split("/")
        if len(parts) > 3 or not all(parts):
            raise InvalidInputError(
                f"expected an engine name runtime/device/precision or its beginning, such as "
                f"onnx/cpu/fp32 or onnx/cuda, got {text!r}"
            )
        return cls(*parts)

    def matches(self, name: EngineName) -> bool:
        """Return whether an engine's name starts with this pattern."""
        return (
            self.runtime == name.runtime
            and self.device in (None, name.device)
            and self.precision in (None, name.precision)
        )
