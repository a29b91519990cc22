"""Coverage-guided fuzzing of one target with atheris.

`python tests/fuzz/fuzz.py image --seconds 60` fuzzes the decoders of images for a minute.

`make fuzz` does it for all targets, twenty minutes each. New inputs are kept in build/fuzz/TARGET;
those of tests/fuzz/corpus are where it begins. An input that fails is written to the working
directory: copy it to the corpus with its fix.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["crl_sdk", "PIL", "msgspec", "safetensors"]):
    from targets import TARGETS

HERE = Path(__file__).parent


def main() -> None:
    """Fuzz for some seconds; the exit status is not 0 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=1200)
    arguments = parser.parse_args()
    kept = Path("build/fuzz", arguments.target)
    kept.mkdir(parents=True, exist_ok=True)
    options = [
        sys.argv[0], str(kept), str(HERE / "corpus" / arguments.target),
        f"-max_total_time={arguments.seconds}", "-max_len=65536", "-rss_limit_mb=4096",
        "-timeout=60", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup(options, TARGETS[arguments.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
