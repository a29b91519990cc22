"""`inference.GRPCInferenceService` (KServe v2) on top of the pipeline, for Triton's clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from crl_sdk._version import __version__
from crl_sdk.errors import InvalidInputError, NotOfferedError, UnknownCriterionError
from crl_sdk.pb.inference import kserve_pb2 as pb
from crl_sdk.pb.inference import kserve_pb2_grpc
from crl_sdk.serving._bases import StoredBasis
from crl_sdk.serving._call_interceptor import caller, typed_error
from crl_sdk.serving._embedding_service import STREAM_WINDOW
from crl_sdk.serving._kserve_statistics import ModelStatistics
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
from crl_sdk.serving._models import Models
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._responses import Context, respond
from crl_sdk.serving._results import EmbedResult
from crl_sdk.serving._shared_memory import SharedMemory

MODELS = {"crl": IMAGE, "crl-pixels": PIXELS, "crl-embedding": EMBEDDING}
"""KServe models of universal embeddings, each with the name of its input.

`crl.CRITERION`, `crl-pixels.CRITERION` and `crl-embedding.CRITERION` return the conditional
embeddings of a criterion as well. One model with optional inputs would be simpler, but
perf_analyzer refuses optional inputs with shared memory.
"""

_VERSION = "1"
_PLATFORM = "crl_onnx"
_DATA_TYPES: dict[str, pb.DataType.ValueType] = {
    "BYTES": pb.TYPE_STRING, "UINT8": pb.TYPE_UINT8, "FP32": pb.TYPE_FP32,
}  # fmt: skip


class InferenceService(kserve_pb2_grpc.GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService`; each call is described in proto/inference/kserve.proto."""

    def __init__(
        self,
        models: Models | Pipeline,
        *,
        ready: Callable[[], bool],
        shared_memory: bool = False,
    ) -> None:
        """Store the parts.

        Args:
            models: Models whose pipelines have been started, or the only one.
            ready: Function that returns whether the server serves.
            shared_memory: Whether clients may register shared memory.
        """
        self._served = models if isinstance(models, Models) else Models(models)
        self._ready = ready
        self._memory = SharedMemory(shared_memory)
        self._statistics: dict[str, ModelStatistics] = {}

    def close(self) -> None:
        """Close all shared memory regions."""
        self._memory.unregister("")

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """Confirm that the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Return whether the server serves: warmed up, engine working, not draining."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Return whether a model exists and the server serves."""
        try:
            await self._model(request.name, request.version)
        except InvalidInputError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Return the name, version and extensions of this server."""
        extensions = ["model_repository", "model_configuration", "statistics", "binary_tensor_data"]
        if self._memory.enabled:
            extensions.append("system_shared_memory")
        return pb.ServerMetadataResponse(name="crl", version=__version__, extensions=extensions)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Return the inputs and outputs of a model, with the batch dimension."""

        async def work() -> pb.ModelMetadataResponse:
            name, dims, outputs = await self._tensors(request.name, request.version)
            tensor = pb.ModelMetadataResponse.TensorMetadata
            return pb.ModelMetadataResponse(
                name=request.name, versions=[_VERSION], platform=_PLATFORM,
                inputs=[tensor(name=name, datatype=DATATYPES[name], shape=[-1, *dims])],
                outputs=[
                    tensor(name=output, datatype="FP32", shape=[-1, dim])
                    for output, dim in outputs.items()
                ],
            )  # fmt: skip

        return await respond(context, work)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """Return the inputs and outputs of a model as a configuration, without batch dimension."""

        async def work() -> pb.ModelConfigResponse:
            name, dims, outputs = await self._tensors(request.name, request.version)
            _, model, _ = _split(request.name)
            return pb.ModelConfigResponse(
                config=pb.ModelConfig(
                    name=request.name, platform=_PLATFORM, backend="crl",
                    max_batch_size=self._served.find(model).limits.max_images,
                    input=[
                        pb.ModelInput(
                            name=name, data_type=_DATA_TYPES[DATATYPES[name]], dims=dims
                        )
                    ],
                    output=[
                        pb.ModelOutput(name=output, data_type=pb.TYPE_FP32, dims=[dim])
                        for output, dim in outputs.items()
                    ],
                    dynamic_batching=pb.ModelDynamicBatching(),
                    model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
                )
            )  # fmt: skip

        return await respond(context, work)

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Return the statistics of one model or of all models."""

        async def work() -> pb.ModelStatisticsResponse:
            if request.name:
                await self._tensors(request.name, request.version)
            names = [request.name] if request.name else self._models()
            return pb.ModelStatisticsResponse(
                model_stats=[
                    self._statistics.get(name, ModelStatistics()).to_message(name, _VERSION)
                    for name in names
                ]
            )

        return await respond(context, work)

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """Return the names of all models."""
        state = "READY" if self._ready() else "UNAVAILABLE"
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[index(name=name, version=_VERSION, state=state) for name in self._models()]
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Embed the images of a request."""
        return await respond(context, lambda: self._infer(request, context))

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Embed the images of each request, and reply in the order of the requests."""
        tasks: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None]
        tasks = asyncio.Queue(STREAM_WINDOW - 1)  # one more is taken out, and its reply awaited

        async def read() -> None:
            try:
                async for request in request_iterator:
                    task = asyncio.create_task(self._infer_in_stream(request, context))
                    try:
                        await tasks.put(task)
                    except asyncio.CancelledError:
                        task.cancel()
                        raise
            except Exception:
                await tasks.put(None)
                raise
            await tasks.put(None)

        reader = asyncio.create_task(read())
        task = None
        try:
            while (task := await tasks.get()) is not None:
                yield await task
            await reader
        finally:
            reader.cancel()
            while task is not None:
                task.cancel()
                task = None if tasks.empty() else tasks.get_nowait()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        """Return all regions, or the one of that name."""
        reply = pb.SystemSharedMemoryStatusResponse()
        for name, region in self._memory.regions.items():
            if request.name in ("", name):
                status = reply.regions[name]
                status.name, status.key = name, region.key
                status.offset, status.byte_size = region.offset, region.byte_size
        return reply

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Register a region."""

        async def work() -> pb.SystemSharedMemoryRegisterResponse:
            self._memory.register(request.name, request.key, request.offset, request.byte_size)
            return pb.SystemSharedMemoryRegisterResponse()

        return await respond(context, work)

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Unregister a region, or all regions."""
        self._memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        """Return no regions, since none can be registered."""
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Refuse; CUDA shared memory is not offered."""

        async def work() -> pb.CudaSharedMemoryRegisterResponse:
            raise NotOfferedError(
                "this server does not use CUDA shared memory; use system shared memory"
            )

        return await respond(context, work)

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Do nothing. Clients unregister all regions of both kinds before they start."""
        return pb.CudaSharedMemoryUnregisterResponse()

    def _models(self) -> list[str]:
        names = []
        for model, pipeline in self._served.pipelines.items():
            suffix = "" if model == self._served.default else f"@{model}"
            names += [f"{family}{suffix}" for family in MODELS]
            names += [
                f"{family}{suffix}.{criterion}"
                for family in MODELS
                for criterion in sorted(pipeline.bases.snapshot)
            ]
        return names

    async def _model(
        self, name: str, version: str, criterion: str = ""
    ) -> tuple[Pipeline, str, StoredBasis | None]:
        """Return a model's pipeline, its input, and the basis that is named, if any.

        Args:
            name: Name of the model, with or without a criterion.
            version: Version of the model, or empty for any.
            criterion: Criterion in the parameters of the request, or empty.
        """
        family, model, suffix = _split(name)
        known = family in MODELS and (not model or model in self._served.pipelines)
        if not known or version not in ("", _VERSION) or name.endswith((".", "@")):
            raise UnknownCriterionError(
                f"no model {name[:80]!r} of version {version[:20]!r}; known are {self._models()}, "
                f"all of version {_VERSION!r}"
            )
        if suffix and criterion and suffix != criterion:
            raise InvalidInputError(
                f"the model {name!r} belongs to one criterion, but the parameter names "
                f"{criterion!r}; use the model {name.removesuffix(f'.{suffix}')!r}"
            )
        wanted = suffix or criterion
        pipeline = self._served.find(model)
        basis = (await pipeline.bases.find([wanted]))[0] if wanted else None
        return pipeline, MODELS[family], basis

    async def _tensors(self, name: str, version: str) -> tuple[str, list[int], dict[str, int]]:
        """Return a model's input, its dimensions, and its outputs (name → number of columns)."""
        pipeline, input_name, basis = await self._model(name, version)
        dim = pipeline.embedder.bundle.embedding_dim
        dims = {IMAGE: [1], PIXELS: [-1, -1, 3], EMBEDDING: [dim]}
        outputs = {} if basis is None else {CONDITIONAL: basis.basis.projection.output_dim}
        return input_name, dims[input_name], {**outputs, UNIVERSAL: dim}

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        started = time.monotonic()
        has_criterion = "criterion" in request.parameters
        criterion = request.parameters["criterion"].string_param if has_criterion else ""
        pipeline, input_name, basis = await self._model(
            request.model_name, request.model_version, criterion
        )
        statistics = self._statistics.setdefault(request.model_name, ModelStatistics())
        try:
            check_outputs(request, [UNIVERSAL] if basis is None else [CONDITIONAL, UNIVERSAL])
            images = read_images(request, input_name, self._memory)
            result = await pipeline.embed(
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
            statistics.add_failure(time.monotonic() - started)
            raise
        reply.parameters["fingerprint"].string_param = pipeline.embedder.bundle.fingerprint
        reply.parameters["cached_images"].int64_param = sum(i.cached for i in result.images)
        statistics.add_success(result)
        return reply

    async def _infer_in_stream(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelStreamInferResponse:
        try:
            reply = await self._infer(request, context)
        except Exception as error:  # only this request fails; the stream goes on
            message = str(typed_error("/inference.GRPCInferenceService/ModelStreamInfer", error))
            failed = pb.ModelInferResponse(
                model_name=request.model_name, model_version=_VERSION, id=request.id
            )
            return pb.ModelStreamInferResponse(error_message=message, infer_response=failed)
        reply.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=reply)


def _split(name: str) -> tuple[str, str, str]:
    """Return the family, the model and the criterion in a name; the latter two may be empty."""
    rest, _, criterion = name.partition(".")
    family, _, model = rest.partition("@")
    return family, model, criterion


def _deadline(parameters: Parameters, context: Any) -> float | None:
    """Return the earlier of the call's deadline and the request's `timeout`, or None."""
    remaining = context.time_remaining()
    seconds = [] if remaining is None else [remaining]
    if "timeout" in parameters:
        timeout = parameters["timeout"]
        micros = timeout.uint64_param if timeout.HasField("uint64_param") else timeout.int64_param
        if micros > 0:
            seconds.append(micros / 1e6)
    return time.monotonic() + min(seconds) if seconds else None


def _raise_failures(result: EmbedResult) -> None:
    """Raise an error if an image failed, since this protocol has no status per image.

    The embeddings of the other images are in the cache. A second request without the failed images
    therefore costs little.
    """
    bad = [(i, image.error) for i, image in enumerate(result.images) if image.error is not None]
    if bad:
        shown = "; ".join(f"image {i}: {error.reason}" for i, error in bad[:3])
        raise InvalidInputError(
            f"{len(bad)} of {len(result.images)} images failed ({shown}): send the others again"
        )
