"""Fixtures of the tests of engines."""

from __future__ import annotations

from gpu_fixtures import bundle, compiled, gpu, reference  # noqa: F401
