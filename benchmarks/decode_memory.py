"""Memory of a server under a flood of the images that take most, with and without the budget.

`python -m crl_benchmarks.decode_memory` sends PNG and WebP files of 7,999 × 7,999 pixels, which
compress to some hundred kilobytes or less, to one server after the other, and prints how much
each has grown.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
from PIL import Image

from crl_sdk.client import Client, ClientOptions

_SIDE = 7999
_IMAGES = (("I;16", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("RGB", "PNG"), ("RGBA", "WEBP"))
_UNLIMITED = 1 << 20  # MiB


def make_images() -> list[bytes]:
    """Return one encoded image of each mode and format."""
    made = []
    for mode, form in _IMAGES:
        data = io.BytesIO()
        options = {"compress_level": 9} if form == "PNG" else {"lossless": True}
        Image.new(mode, (_SIDE, _SIDE)).save(data, form, **options)
        made.append(data.getvalue())
    return made


def measure_growth(images: list[bytes], max_decode_mb: int, callers: int) -> tuple[int, int]:
    """Return the growth of a server's peak memory in MiB, and the number of embedded images.

    Args:
        images: Encoded images. Each caller sends all of them in one call.
        max_decode_mb: Option of the server.
        callers: Number of calls at once.
    """
    command = [sys.executable, "-m", "crl_sdk", "serve", "--address", "127.0.0.1:0"]
    options = ["--max-decode-mb", str(max_decode_mb), "--cache-mb", "0"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            address = json.loads(server.stdout.readline())["address"]
            with Client(address, ClientOptions(timeout=600)) as client:
                small = io.BytesIO()
                Image.new("RGB", (300, 300)).save(small, "PNG")
                client.embed([small.getvalue()] * 8)
                before = _peak(server.pid)

                def send(_: int) -> int:
                    return int(client.embed(images, on_error="collect").ok.sum())

                with ThreadPoolExecutor(callers) as pool:
                    embedded = sum(pool.map(send, range(callers)))
                return (_peak(server.pid) - before) >> 20, embedded
        finally:
            server.terminate()


def _peak(pid: int) -> int:
    """Return the largest memory that a process has had, in bytes (Linux)."""
    with open(f"/proc/{psutil.Process(pid).pid}/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print a table of both servers."""
    images = make_images()
    files = zip(_IMAGES, images, strict=True)
    sizes = ", ".join(f"{form} {mode} {-(-len(data) >> 10)} KiB" for (mode, form), data in files)
    print(f"{_SIDE} × {_SIDE} pixels: {sizes}; four calls at once\n")
    print("| --max-decode-mb | growth of the peak, MiB | images embedded |")
    print("|---|---|---|")
    for limit in (600, 1024, _UNLIMITED):
        growth, embedded = measure_growth(images, limit, callers=4)
        name = str(limit) if limit != _UNLIMITED else "none"
        print(f"| {name} | {growth:,} | {embedded} of {4 * len(images)} |", flush=True)


if __name__ == "__main__":
    main()
