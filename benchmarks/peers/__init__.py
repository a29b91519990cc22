"""Comparison with peers: the same weights and the same JPEGs in one run (`make bench-peers`).

This package runs from a clone of the repository; it is not part of the installed wheel.
"""
