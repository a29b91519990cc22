"""`inference.GRPCInferenceService` over the pipeline, for Triton's clients (KServe v2)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from crl_sdk._version import __version__
from crl_sdk.errors import CrlError, InvalidInputError, NotOfferedError, UnknownCriterionError
from crl_sdk.pb.inference import kserve_pb2 as pb
from crl_sdk.pb.inference import kserve_pb2_grpc
from crl_sdk.serving._bases import StoredBasis
from crl_sdk.serving._call_interceptor import caller, log_unexpected_error
from crl_sdk.serving._kserve_tensors import (
    CONDITIONAL,
    DATATYPES,
    EMBEDDING,
    IMAGE,
    PIXELS,
    UNIVERSAL,
    Parameters,
    check_outputs,
    read_images,
    write_outputs,
)
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._results import EmbedResult
from crl_sdk.serving._service import STREAM_WINDOW, Context, answer
from crl_sdk.serving._shared_memory import SharedMemory

MODELS = {"crl": IMAGE, "crl-pixels": PIXELS, "crl-embedding": EMBEDDING}
"""Models that give universal embeddings, one per kind of input; `crl.CRITERION` and so on are those
of a basis. (One model with optional inputs would do, but perf_analyzer refuses these with shared
memory.)"""

_VERSION = "1"
_PLATFORM = "crl_onnx"
_TYPES: dict[str, pb.DataType.ValueType] = {
    "BYTES": pb.TYPE_STRING, "UINT8": pb.TYPE_UINT8, "FP32": pb.TYPE_FP32,
}  # fmt: skip


@dataclass(slots=True)
class _Statistics:
    """What `ModelStatistics` tells of a model; times in nanoseconds."""

    last_ms: int = 0
    images: int = 0
    executions: float = 0.0
    success: int = 0
    success_ns: int = 0
    fail: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    hits: int = 0
    misses: int = 0

    def served(self, result: EmbedResult) -> None:
        """Count a request that was answered."""
        timing = result.timing
        self.last_ms = time.time_ns() // 1_000_000
        self.images += len(result.images)
        self.executions += timing.engine_runs
        self.success += 1
        self.success_ns += round(timing.total_seconds * 1e9)
        self.queue_ns += round(timing.queue_seconds * 1e9)
        self.input_ns += round(timing.preprocess_seconds * 1e9)
        self.infer_ns += round(timing.infer_seconds * 1e9)
        self.output_ns += round(timing.project_seconds * 1e9)
        hits = sum(image.cached for image in result.images)
        self.hits += hits
        self.misses += len(result.images) - hits

    def failed(self, seconds: float) -> None:
        """Count a request that was not."""
        self.fail += 1
        self.fail_ns += round(seconds * 1e9)

    def message(self, name: str) -> pb.ModelStatistics:
        """Write it down."""

        def part(count: int, ns: int = 0) -> pb.StatisticDuration:
            return pb.StatisticDuration(count=count, ns=ns)

        return pb.ModelStatistics(
            name=name, version=_VERSION, last_inference=self.last_ms,
            inference_count=self.images, execution_count=round(self.executions),
            inference_stats=pb.InferStatistics(
                success=part(self.success, self.success_ns),
                fail=part(self.fail, self.fail_ns),
                queue=part(self.success, self.queue_ns),
                compute_input=part(self.success, self.input_ns),
                compute_infer=part(self.success, self.infer_ns),
                compute_output=part(self.success, self.output_ns),
                cache_hit=part(self.hits), cache_miss=part(self.misses),
            ),
        )  # fmt: skip


class InferenceService(kserve_pb2_grpc.GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService`; each call is described in proto/inference/kserve.proto."""

    def __init__(
        self, pipeline: Pipeline, *, ready: Callable[[], bool], shared_memory: bool = False
    ) -> None:
        """Store the pipeline, what tells whether the server serves, and what clients may use."""
        self._pipeline = pipeline
        self._ready = ready
        self._memory = SharedMemory(shared_memory)
        self._statistics: dict[str, _Statistics] = {}

    def close(self) -> None:
        """Let go of all shared memory."""
        self._memory.unregister("")

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """Tell that the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Tell whether it serves: warmed up, the engine alive, not draining."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Tell whether a model is there and served."""
        known = request.name in self._models() and request.version in ("", _VERSION)
        return pb.ModelReadyResponse(ready=known and self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Tell what this server is and can do."""
        extensions = ["model_repository", "model_configuration", "statistics", "binary_tensor_data"]
        if self._memory.enabled:
            extensions.append("system_shared_memory")
        return pb.ServerMetadataResponse(name="crl", version=__version__, extensions=extensions)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Tell the inputs and outputs of a model, with the batch dimension."""

        async def work() -> pb.ModelMetadataResponse:
            name, dims, outputs = self._tensors(request.name, request.version)
            tensor = pb.ModelMetadataResponse.TensorMetadata
            return pb.ModelMetadataResponse(
                name=request.name, versions=[_VERSION], platform=_PLATFORM,
                inputs=[tensor(name=name, datatype=DATATYPES[name], shape=[-1, *dims])],
                outputs=[
                    tensor(name=output, datatype="FP32", shape=[-1, dim])
                    for output, dim in outputs.items()
                ],
            )  # fmt: skip

        return await answer(context, work)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """Tell the same as a configuration, without the batch dimension."""

        async def work() -> pb.ModelConfigResponse:
            name, dims, outputs = self._tensors(request.name, request.version)
            return pb.ModelConfigResponse(
                config=pb.ModelConfig(
                    name=request.name, platform=_PLATFORM, backend="crl",
                    max_batch_size=self._pipeline.limits.max_images,
                    input=[pb.ModelInput(name=name, data_type=_TYPES[DATATYPES[name]], dims=dims)],
                    output=[
                        pb.ModelOutput(name=output, data_type=pb.TYPE_FP32, dims=[dim])
                        for output, dim in outputs.items()
                    ],
                    dynamic_batching=pb.ModelDynamicBatching(),
                    model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
                )
            )  # fmt: skip

        return await answer(context, work)

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Tell what a model has done since the start, or all of them."""

        async def work() -> pb.ModelStatisticsResponse:
            if request.name:
                self._tensors(request.name, request.version)
            names = [request.name] if request.name else self._models()
            return pb.ModelStatisticsResponse(
                model_stats=[
                    self._statistics.get(name, _Statistics()).message(name) for name in names
                ]
            )

        return await answer(context, work)

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """List the models."""
        state = "READY" if self._ready() else "UNAVAILABLE"
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[index(name=name, version=_VERSION, state=state) for name in self._models()]
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Embed the images of a request."""
        return await answer(context, lambda: self._infer(request, context))

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Embed the images of each request; replies in the order of the requests."""
        works: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None]
        works = asyncio.Queue(STREAM_WINDOW - 1)  # beside the one whose reply is awaited

        async def read() -> None:
            try:
                async for request in request_iterator:
                    task = asyncio.create_task(self._infer_in_stream(request, context))
                    try:
                        await works.put(task)
                    except asyncio.CancelledError:
                        task.cancel()
                        raise
            except Exception:
                await works.put(None)
                raise
            await works.put(None)

        reader = asyncio.create_task(read())
        task = None
        try:
            while (task := await works.get()) is not None:
                yield await task
            await reader
        finally:
            reader.cancel()
            while task is not None:
                task.cancel()
                task = None if works.empty() else works.get_nowait()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        """List the regions, or tell of one."""
        reply = pb.SystemSharedMemoryStatusResponse()
        for name, region in self._memory.regions.items():
            if request.name in ("", name):
                told = reply.regions[name]
                told.name, told.key = name, region.key
                told.offset, told.byte_size = region.offset, region.byte_size
        return reply

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Open a region."""

        async def work() -> pb.SystemSharedMemoryRegisterResponse:
            self._memory.register(request.name, request.key, request.offset, request.byte_size)
            return pb.SystemSharedMemoryRegisterResponse()

        return await answer(context, work)

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forget a region, or all."""
        self._memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        """Tell that there is none."""
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Refuse."""

        async def work() -> pb.CudaSharedMemoryRegisterResponse:
            raise NotOfferedError("this server takes no CUDA shared memory; use system memory")

        return await answer(context, work)

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Forget what was never there: clients clear both kinds before they start."""
        return pb.CudaSharedMemoryUnregisterResponse()

    def _models(self) -> list[str]:
        criteria = sorted(self._pipeline.bases.snapshot)
        return [
            *MODELS,
            *(f"{family}.{criterion}" for family in MODELS for criterion in criteria),
        ]

    def _model(
        self, name: str, version: str, criterion: str = ""
    ) -> tuple[str, StoredBasis | None]:
        """Give the input of a model, and the basis that it or a parameter names, if any."""
        family, dot, own = name.partition(".")
        if family not in MODELS or version not in ("", _VERSION) or (dot and not own):
            raise UnknownCriterionError(
                f"no model {name[:80]!r} of version {version[:20]!r}; there are {self._models()}, "
                f"all of version {_VERSION!r}"
            )
        if own and criterion and own != criterion:
            raise InvalidInputError(
                f"the model {name!r} is that of one criterion, the parameter says {criterion!r}; "
                f"use the model {family!r}"
            )
        wanted = own or criterion
        return MODELS[family], self._pipeline.bases.select([wanted])[0] if wanted else None

    def _tensors(self, name: str, version: str) -> tuple[str, list[int], dict[str, int]]:
        """Give the input of a model, its dimensions, and the outputs (name → columns)."""
        given, basis = self._model(name, version)
        dim = self._pipeline.embedder.bundle.embedding_dim
        dims = {IMAGE: [1], PIXELS: [-1, -1, 3], EMBEDDING: [dim]}
        outputs = {} if basis is None else {CONDITIONAL: basis.basis.projection.output_dim}
        return given, dims[given], {**outputs, UNIVERSAL: dim}

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        started = time.monotonic()
        named = "criterion" in request.parameters
        criterion = request.parameters["criterion"].string_param if named else ""
        given, basis = self._model(request.model_name, request.model_version, criterion)
        statistics = self._statistics.setdefault(request.model_name, _Statistics())
        try:
            check_outputs(request, [UNIVERSAL] if basis is None else [CONDITIONAL, UNIVERSAL])
            images = read_images(request, given, self._memory)
            result = await self._pipeline.embed(
                images,
                [] if basis is None else [basis.basis.criterion],
                deadline=_deadline(request.parameters, context),
                client=caller.get(),
            )
            _raise_failures(result)
            reply = pb.ModelInferResponse(
                model_name=request.model_name, model_version=_VERSION, id=request.id
            )
            rows = {UNIVERSAL: result.universal}
            if result.bases:
                rows = {CONDITIONAL: result.conditional[0], **rows}
                reply.parameters["basis_sha256"].string_param = result.bases[0].sha256
            write_outputs(request, rows, self._memory, reply)
        except BaseException:
            statistics.failed(time.monotonic() - started)
            raise
        reply.parameters["fingerprint"].string_param = self._pipeline.embedder.bundle.fingerprint
        reply.parameters["cached_images"].int64_param = sum(i.cached for i in result.images)
        statistics.served(result)
        return reply

    async def _infer_in_stream(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelStreamInferResponse:
        try:
            reply = await self._infer(request, context)
        except Exception as error:  # of one request: the others are answered
            told = str(error)
            if not isinstance(error, CrlError):
                told = log_unexpected_error(
                    "/inference.GRPCInferenceService/ModelStreamInfer", error
                )
            failed = pb.ModelInferResponse(
                model_name=request.model_name, model_version=_VERSION, id=request.id
            )
            return pb.ModelStreamInferResponse(error_message=told, infer_response=failed)
        reply.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=reply)


def _deadline(parameters: Parameters, context: Any) -> float | None:
    """Give the earlier of the call's deadline and the request's own `timeout`, if any."""
    remaining = context.time_remaining()
    seconds = [] if remaining is None else [remaining]
    if "timeout" in parameters:
        given = parameters["timeout"]
        micros = given.uint64_param if given.HasField("uint64_param") else given.int64_param
        if micros > 0:
            seconds.append(micros / 1e6)
    return time.monotonic() + min(seconds) if seconds else None


def _raise_failures(result: EmbedResult) -> None:
    """Fail the whole request for a bad image: this protocol has no status per image.

    The embeddings of the others are in the cache, so that a second try without it costs little.
    """
    bad = [(i, image.error) for i, image in enumerate(result.images) if image.error is not None]
    if bad:
        shown = "; ".join(f"image {i}: {error.reason}" for i, error in bad[:3])
        raise InvalidInputError(f"{len(bad)} of {len(result.images)} images failed: {shown}")
