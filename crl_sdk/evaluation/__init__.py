"""The paper's benchmarks: data sets read in their official layouts, and its protocols on arrays.

Conditional Representation Learning, arXiv 2510.04564. The protocols are told by the authors' code
(github.com/XLearning-SCU/2025-NeurIPS-CRL, read November 2026); `docs/EVAL.md` says what is theirs.
"""
