"""PyTriton: Triton with a Python callable that decodes JPEGs and runs the ONNX graph."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pillow_pixels
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

DIM = 512


def main() -> None:
    """Serve until the process receives a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--onnx", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--grpc-port", type=int, required=True)
    parser.add_argument("--http-port", type=int, required=True)
    arguments = parser.parse_args()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = arguments.threads, 1
    session = onnxruntime.InferenceSession(
        arguments.onnx, options, providers=["CPUExecutionProvider"]
    )
    pool = ThreadPoolExecutor(arguments.threads)
    none = {"weight": np.zeros((DIM, 0), np.float32), "bias": np.zeros(0, np.float32)}

    @batch
    def embed(IMAGE: np.ndarray) -> dict[str, np.ndarray]:
        pixels = np.stack(list(pool.map(pillow_pixels.decode, IMAGE[:, 0])))
        return {"embedding": session.run(["embedding"], {"image": pixels, **none})[0]}

    config = TritonConfig(
        grpc_port=arguments.grpc_port, http_port=arguments.http_port, allow_metrics=False,
        grpc_address="127.0.0.1", http_address="127.0.0.1",
    )  # fmt: skip
    with Triton(config=config) as triton:
        triton.bind(
            model_name="clip",
            infer_func=embed,
            inputs=[Tensor(name="IMAGE", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="embedding", dtype=np.float32, shape=(DIM,))],
            config=ModelConfig(max_batch_size=32, batcher=DynamicBatcher()),
        )
        triton.serve()


if __name__ == "__main__":
    main()
