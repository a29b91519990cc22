"""Benchmarks, importable as `crl_benchmarks`; each asserts correctness in the run it times."""
