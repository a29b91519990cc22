"""Tests with real Ray clusters and vector stores: `make test-scale` installs what they need.

Elsewhere their modules skip, by `pytest.importorskip`.
"""
