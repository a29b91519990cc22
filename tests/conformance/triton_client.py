"""Make every call that tritonclient[grpc] has against our server.

Arguments: ADDRESS of the server, DIRECTORY that `reference.py` wrote. Runs in an environment
without crl_sdk, because its stubs and those of tritonclient cannot be loaded in one process.
"""

from __future__ import annotations

import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

TOLERANCE = 1e-5


def image_input(files: list[bytes]) -> triton.InferInput:
    given = triton.InferInput("IMAGE", [len(files), 1], "BYTES")
    given.set_data_from_numpy(np.array(files, dtype=object).reshape(-1, 1))
    return given


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got is not None and got.shape == expected.shape, (got, expected.shape)
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() < TOLERANCE


def fails(call, *words: str) -> None:
    try:
        call()
    except InferenceServerException as error:
        for word in words:
            assert word in str(error), (word, str(error))
    else:
        raise AssertionError(f"expected an error with {words}")


def describes_itself(client: triton.InferenceServerClient, rows) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("crl") and client.is_model_ready("crl.color", "1")
    assert not client.is_model_ready("resnet50")
    assert "system_shared_memory" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("crl.animal habitat")
    columns = rows["habitat"].shape[1]
    outputs = {output.name: list(output.shape) for output in metadata.outputs}
    assert outputs == {"CONDITIONAL": [-1, columns], "UNIVERSAL": [-1, 128]}, outputs
    config = client.get_model_config("crl-pixels.color").config
    assert config.max_batch_size == 256 and list(config.input[0].dims) == [-1, -1, 3]
    names = {model.name for model in client.get_model_repository_index().models}
    assert {"crl", "crl-pixels", "crl-embedding", "crl.color", "crl.animal habitat"} <= names
    fails(lambda: client.get_model_metadata("resnet50"), "NOT_FOUND", "crl.color")


def infers(client: triton.InferenceServerClient, files: list[bytes], rows) -> None:
    reply = client.infer("crl.color", [image_input(files)], request_id="seven")
    assert reply.get_response().id == "seven"
    close(reply.as_numpy("CONDITIONAL"), rows["color"])
    close(reply.as_numpy("UNIVERSAL"), rows["universal"])
    parameters = {"criterion": "animal habitat", "priority_of_mine": "high"}
    reply = client.infer("crl", [image_input(files)], parameters=parameters)
    close(reply.as_numpy("CONDITIONAL"), rows["habitat"])
    only = [triton.InferRequestedOutput("UNIVERSAL")]
    reply = client.infer("crl.color", [image_input(files[:1])], outputs=only)
    assert reply.as_numpy("CONDITIONAL") is None
    close(reply.as_numpy("UNIVERSAL"), rows["universal"][:1])
    drawn = triton.InferInput("PIXELS", list(rows["pixels"].shape), "UINT8")
    drawn.set_data_from_numpy(rows["pixels"])
    reply = client.infer("crl-pixels.color", [drawn])
    close(reply.as_numpy("CONDITIONAL"), rows["pixels_color"])
    stored = triton.InferInput("EMBEDDING", list(rows["universal"].shape), "FP32")
    stored.set_data_from_numpy(rows["universal"])
    reply = client.infer("crl-embedding", [stored], parameters={"criterion": "color"})
    close(reply.as_numpy("CONDITIONAL"), rows["color"])


def refuses(client: triton.InferenceServerClient, files: list[bytes]) -> None:
    one = image_input(files[:1])
    fails(lambda: client.infer("crl.colour", [one]), "NOT_FOUND", "color")
    fails(lambda: client.infer("crl", [one], parameters={"criterion": "../../x"}), "INVALID")
    cut = image_input([files[0], files[1][:2000]])
    fails(lambda: client.infer("crl.color", [cut]), "INVALID", "image 1", "truncated")
    wrong = [triton.InferRequestedOutput("LOGITS")]
    fails(lambda: client.infer("crl.color", [one], outputs=wrong), "LOGITS", "CONDITIONAL")
    fails(lambda: client.infer("crl.color", [one], timeout=1), "DEADLINE_EXCEEDED")
    fails(lambda: client.load_model("crl"), "UNIMPLEMENTED")


def streams(client: triton.InferenceServerClient, files: list[bytes], rows) -> None:
    replies: queue.Queue = queue.Queue()
    client.start_stream(callback=lambda result, error: replies.put((result, error)))
    for number, data in enumerate([*files, b"not an image", files[0]]):
        client.async_stream_infer("crl.color", [image_input([data])], request_id=str(number))
    for number in range(len(files) + 2):
        result, error = replies.get(timeout=30)
        if number == len(files):
            assert "not a readable image" in str(error), error
            continue
        assert error is None, error
        response = result.get_response()
        assert response.id == str(number)
        assert response.parameters["triton_final_response"].bool_param
        expected = rows["color"][number % (len(files) + 1)]
        close(result.as_numpy("CONDITIONAL"), expected[None])
    client.stop_stream()


def shares_memory(client: triton.InferenceServerClient, rows) -> None:
    pixels, expected = rows["pixels"], rows["pixels_color"]
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    given = shm.create_shared_memory_region("given", "/crl_conformance_in", pixels.nbytes)
    taken = shm.create_shared_memory_region("taken", "/crl_conformance_out", expected.nbytes)
    try:
        shm.set_shared_memory_region(given, [pixels])
        client.register_system_shared_memory("given", "/crl_conformance_in", pixels.nbytes)
        client.register_system_shared_memory("taken", "/crl_conformance_out", expected.nbytes)
        assert set(client.get_system_shared_memory_status().regions) == {"given", "taken"}
        tensor = triton.InferInput("PIXELS", list(pixels.shape), "UINT8")
        tensor.set_shared_memory("given", pixels.nbytes)
        output = triton.InferRequestedOutput("CONDITIONAL")
        output.set_shared_memory("taken", expected.nbytes)
        other = triton.InferRequestedOutput("UNIVERSAL")
        reply = client.infer("crl-pixels.color", [tensor], outputs=[output, other])
        close(shm.get_contents_as_numpy(taken, np.float32, expected.shape), expected)
        assert reply.as_numpy("UNIVERSAL").shape == (4, 128)  # one is shared, one is in the message
        tensor.set_shared_memory("nowhere", pixels.nbytes)
        fails(lambda: client.infer("crl-pixels.color", [tensor]), "nowhere", "given")
        tensor.set_shared_memory("given", pixels.nbytes, offset=64)
        fails(lambda: client.infer("crl-pixels.color", [tensor]), "within")
        register = client.register_system_shared_memory
        fails(lambda: register("x", "/../etc/passwd", 10), "key")
        fails(lambda: register("x", "/crl_conformance_in", 10**9), "at least")
        client.unregister_system_shared_memory()
        assert not client.get_system_shared_memory_status().regions
    finally:
        shm.destroy_shared_memory_region(given)
        shm.destroy_shared_memory_region(taken)


def main(address: str, directory: Path) -> None:
    rows = dict(np.load(directory / "expected.npz"))
    files = [(directory / f"{number}.jpg").read_bytes() for number in range(8)]
    with triton.InferenceServerClient(address) as client:
        describes_itself(client, rows)
        infers(client, files, rows)
        refuses(client, files)
        streams(client, files, rows)
        shares_memory(client, rows)
        statistics = client.get_inference_statistics("crl.color").model_stats[0]
        assert statistics.inference_count > 8 and statistics.inference_stats.fail.count > 0
        assert statistics.execution_count > 0
    print("tritonclient: metadata, infer, errors, stream, shared memory, statistics passed")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
