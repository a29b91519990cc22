"""What the wheel contains of `benchmarks/`: the modules that `crl bench` and `crl tune` import.

The other benchmarks run from a clone of the repository. An editable install has all of them, since
it maps `crl_benchmarks` to the directory.
"""

from __future__ import annotations

from setuptools.command.build_py import build_py

BENCH_MODULES = {
    "__init__", "arrivals", "bench", "bench_compare", "bench_objective", "bench_report",
    "call_records", "calls", "images", "load", "machine", "metrics_page", "mlperf",
    "mlperf_report", "plot", "quantiles", "report_head", "sampling", "sensors", "targets", "tune",
    "tune_report",
}  # fmt: skip


class BuildPy(build_py):
    """The command `build_py` without the benchmarks that do not ship."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return package, name and path of each module of a package."""
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if m[0] != "crl_benchmarks" or m[1] in BENCH_MODULES]
