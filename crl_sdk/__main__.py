"""Entry point of `crl` and `python -m crl_sdk`."""

from __future__ import annotations

import os
import sys

from crl_sdk._processors import limit_libraries


def main() -> None:
    """Run the command line, or exit with the command that installs its packages."""
    # The C core of gRPC would write lines of its own between ours. It reads this when imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Threads of OpenMP (llama.cpp, scikit-learn) wait for each other asleep. Spinning, they would
    # take the processors from whatever else runs. OpenMP reads this when its library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    limit_libraries(os.environ)
    try:
        from crl_sdk.cli import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("crl_sdk"):
            raise
        sys.exit(
            f"crl: the package {error.name!r} is not installed. "
            "Install the command line with: pip install 'crl-embeddings[cpu]'"
        )
    run()


if __name__ == "__main__":
    main()
