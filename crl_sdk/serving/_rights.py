"""The right that each RPC of the server needs. An RPC that is not declared here is refused."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Right: TypeAlias = Literal["embed", "bases"]
"""What a token may do: `embed` reads and computes, `bases` changes the server's bases."""

RIGHTS: tuple[Right, ...] = get_args(Right)

Access: TypeAlias = Right | Literal["public"]
"""What an RPC needs: a right, or `public` for no token at all."""

# One line per RPC. A new RPC needs a line here: without it the server refuses its calls when
# tokens are in force, and tests/serving/test_security.py fails.
RPC_ACCESS: dict[str, Access] = {
    "/crl.v1.EmbeddingService/Embed": "embed",
    "/crl.v1.EmbeddingService/EmbedStream": "embed",
    "/crl.v1.EmbeddingService/EmbedText": "embed",
    "/crl.v1.EmbeddingService/GetModel": "embed",
    "/crl.v1.BasisService/ListBases": "embed",
    "/crl.v1.BasisService/GetBasis": "embed",
    "/crl.v1.BasisService/PutBasis": "bases",
    "/crl.v1.BasisService/DeleteBasis": "bases",
    "/crl.v1.BasisService/GenerateBasis": "bases",
    # Orchestrators probe health and readiness without a token.
    "/inference.GRPCInferenceService/ServerLive": "public",
    "/inference.GRPCInferenceService/ServerReady": "public",
    "/inference.GRPCInferenceService/ModelReady": "embed",
    "/inference.GRPCInferenceService/ServerMetadata": "embed",
    "/inference.GRPCInferenceService/ModelMetadata": "embed",
    "/inference.GRPCInferenceService/ModelConfig": "embed",
    "/inference.GRPCInferenceService/ModelStatistics": "embed",
    "/inference.GRPCInferenceService/RepositoryIndex": "embed",
    "/inference.GRPCInferenceService/ModelInfer": "embed",
    "/inference.GRPCInferenceService/ModelStreamInfer": "embed",
    "/inference.GRPCInferenceService/SystemSharedMemoryStatus": "embed",
    "/inference.GRPCInferenceService/SystemSharedMemoryRegister": "embed",
    "/inference.GRPCInferenceService/SystemSharedMemoryUnregister": "embed",
    "/inference.GRPCInferenceService/CudaSharedMemoryStatus": "embed",
    "/inference.GRPCInferenceService/CudaSharedMemoryRegister": "embed",
    "/inference.GRPCInferenceService/CudaSharedMemoryUnregister": "embed",
    "/grpc.health.v1.Health/Check": "public",
    "/grpc.health.v1.Health/Watch": "public",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "embed",
}
