"""Benchmarks, imported as `crl_benchmarks`. Each checks the results of the runs that it times."""
