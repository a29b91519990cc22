"""What the service says about its model and its bases."""

from __future__ import annotations

from dataclasses import dataclass

from crl_sdk._progress import GenerationProgress
from crl_sdk.pb.crl.v1 import basis_pb2, embedding_pb2


@dataclass(frozen=True, slots=True)
class ServedPreprocessing:
    """How the service turns images into the pixels of its model.

    Attributes:
        height: Height of the pixels.
        width: Width of the pixels.
        interpolation: `bicubic` or `bilinear`, always antialiased.
        resize_mode: `shortest`, `longest` or `squash`.
        fill: Grey level of the padding, 0 to 255. Used by `longest`.
        mean: Mean of each channel, subtracted inside the graph.
        std: Standard deviation of each channel, divided by inside the graph.
        resize: Height and width that images are scaled to, before the centre is cropped to the size
            of the pixels. None for that size itself.
    """

    height: int
    width: int
    interpolation: str
    resize_mode: str
    fill: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that a service runs.

    Attributes:
        name: Name of the bundle.
        fingerprint: Fingerprint of the model. Embeddings can be compared only if their
            fingerprints are equal.
        embedding_dim: Length d of the universal embeddings.
        engine: Runtime, device and precision, such as `onnx/cpu/fp32`.
        preprocessing: How images become pixels.
        context_length: Maximum number of tokens of a text. 0 if the model has no text tower.
        max_images: Maximum number of images in one call.
        server_version: Version of the server.
        prompt: Prompt that the model recommends for the texts of a basis, with one `{}`.
        models: Names of the server's models, the default one first.
    """

    name: str
    fingerprint: str
    embedding_dim: int
    engine: str
    preprocessing: ServedPreprocessing
    context_length: int
    max_images: int
    server_version: str
    prompt: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BasisInfo:
    """Description of a basis on the server.

    Attributes:
        criterion: Name of the criterion.
        sha256: SHA-256 of the basis, in hex. It is the version of the basis.
        texts: Texts of the criterion.
        prompts: Prompts that the texts were embedded under.
        method: Projection method, see docs/PROJECTIONS.md.
        post: Row normalisation after the projection: `l2`, `standardise` or `none`.
        output_dim: Length m of the conditional embeddings.
    """

    criterion: str
    sha256: str
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    method: str
    post: str
    output_dim: int


@dataclass(frozen=True, slots=True)
class ServedBasis:
    """A basis of the server, with its file.

    Attributes:
        info: Description of the basis.
        file: Content of the basis file, as `crl basis create` writes it. `Basis.from_bytes` reads
            it, and `Client.put_basis` sends it to another server of the same model.
    """

    info: BasisInfo
    file: bytes


def read_model(message: embedding_pb2.GetModelResponse) -> ServedModel:
    """Return the model that a message describes."""
    preprocessing = message.preprocessing
    resize = (preprocessing.resize_height, preprocessing.resize_width)
    return ServedModel(
        name=message.name,
        fingerprint=message.fingerprint,
        embedding_dim=message.embedding_dim,
        engine=message.engine,
        preprocessing=ServedPreprocessing(
            height=preprocessing.height,
            width=preprocessing.width,
            interpolation=preprocessing.interpolation,
            resize_mode=preprocessing.resize_mode,
            fill=preprocessing.fill,
            mean=tuple(preprocessing.mean),
            std=tuple(preprocessing.std),
            resize=resize if any(resize) else None,
        ),
        context_length=message.context_length,
        max_images=message.max_images,
        server_version=message.server_version,
        prompt=message.prompt,
        models=tuple(message.models),
    )


def read_basis_info(message: basis_pb2.BasisInfo) -> BasisInfo:
    """Return the basis that a message describes."""
    return BasisInfo(
        criterion=message.criterion,
        sha256=message.sha256,
        texts=tuple(message.texts),
        prompts=tuple(message.prompts),
        method=message.method,
        post=message.post,
        output_dim=message.output_dim,
    )


def read_progress(message: basis_pb2.GenerationProgress) -> GenerationProgress:
    """Return the progress that a message describes."""
    speed = message.tokens_per_second
    return GenerationProgress(
        answers=message.answers,
        max_answers=message.max_answers,
        tokens=message.tokens,
        seconds=message.tokens / speed if speed > 0 else 0.0,
    )
