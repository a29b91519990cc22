"""Embed a folder of pictures with Ray Data, and print what went wrong with the bad ones.

    pip install 'crl-embeddings[cpu,ray]'
    python examples/ray_embed.py PICTURES OUT [--basis FILE …] [--bundle DIR] [--ray ADDRESS]

Without an address, a cluster of this machine is started and ended.
"""

from __future__ import annotations

import argparse

from crl_sdk import Basis, demo_bundle
from crl_sdk.integrations.ray import EmbedImages, connect


def main() -> None:
    """Read pictures, embed them on all processors of the cluster, write Parquet files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures")
    parser.add_argument("out")
    parser.add_argument("--basis", action="append", default=[])
    parser.add_argument("--bundle", default=demo_bundle())
    parser.add_argument("--ray", default="local")
    options = parser.parse_args()
    bases = [Basis.load(path) for path in options.basis]  # every worker gets these versions

    with connect(options.ray) as ray:
        import ray.data

        workers = max(1, int(ray.cluster_resources()["CPU"]) - 1)  # one for reading and writing
        embedded = ray.data.read_binary_files(options.pictures, include_paths=True).map_batches(
            EmbedImages,
            fn_constructor_args=(options.bundle, bases),
            batch_size=64,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
        )
        embedded.write_parquet(options.out)
        written = ray.data.read_parquet(options.out)
        print(f"{written.count()} rows in {options.out}")
        for row in written.filter(lambda row: row["error"] is not None).take(10):
            print(f"{row['path']}: {row['error']}")


if __name__ == "__main__":
    main()
