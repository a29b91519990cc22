"""Save what our own client gets, for the Triton client to compare with.

Arguments: ADDRESS of the server, DIRECTORY for images and embeddings.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from crl_sdk import Client


def main(address: str, directory: Path) -> None:
    random = np.random.default_rng(0)
    files = []
    for number in range(8):
        image = Image.fromarray(random.integers(0, 255, (120, 160 + number, 3), np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        files.append(buffer.getvalue())
        (directory / f"{number}.jpg").write_bytes(buffer.getvalue())
    pixels = random.integers(0, 255, (4, 70, 90, 3), np.uint8)
    with Client(address) as client:
        client.create_basis("color", ["red", "green", "blue", "yellow"])
        client.create_basis("animal habitat", ["forest", "desert", "sea"])
        both = client.embed(files, ["color", "animal habitat"])
        drawn = client.embed(list(pixels), ["color"])
    np.savez(
        directory / "expected.npz",
        universal=both.universal, color=both["color"], habitat=both["animal habitat"],
        pixels=pixels, pixels_color=drawn["color"],
    )  # fmt: skip
    contents = [{"b64": base64.b64encode(data).decode()} for data in files]
    data = [{"IMAGE": {"content": content, "shape": [1]}} for content in contents]
    (directory / "jpeg.json").write_text(json.dumps({"data": data}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
