"""Scripts that run in the environments of the peers, and so cannot import `crl_benchmarks`."""
