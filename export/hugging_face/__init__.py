"""Exports models in the format of Hugging Face: from a directory, or from the hub."""
