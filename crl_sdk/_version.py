"""Version of the distribution. A test compares it with CHANGELOG.md."""

__version__ = "0.1.0"
