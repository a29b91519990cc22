"""Triton's own server: `make test-triton` runs these tests in an environment of their own.

They are run without tests/conftest.py (`--confcutdir`): the server of the SDK and tritonclient
describe the same protobuf package, and one process cannot import both.
"""
