"""The client needs numpy, grpcio and protobuf alone."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys

for name in ("msgspec", "PIL", "tokenizers", "safetensors", "onnxruntime", "typer", "rich", "ftfy"):
    sys.modules[name] = None
from crl_sdk import Client, ClientOptions, Embeddings
from crl_sdk.client import *
from crl_sdk.errors import ServiceError

with Client("127.0.0.1:1", ClientOptions(timeout=1, retries=0)) as client:
    try:
        client.embed([b"an image"], ["color"])
    except ServiceError as error:
        print(error)
"""


def test_the_client_runs_without_the_packages_of_the_runtime():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UNAVAILABLE:")
