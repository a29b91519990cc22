"""The one place of the version; CHANGELOG.md is checked against it."""

__version__ = "0.1.0"
