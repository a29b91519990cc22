"""Every error of the SDK reaches a client as the class that the server raised."""

from __future__ import annotations

import inspect

import grpc
import pytest

from crl_sdk import errors
from crl_sdk.rpc import error_from_status, error_trailers, status_code
from crl_sdk.rpc._status import _CODES

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__
]
SPECIAL = {
    errors.ImageBatchError: errors.InvalidInputError,
    errors.MissingDependencyError: errors.ServiceError,
    errors.CrlError: errors.ServiceError,
}
"""Classes that a client raises as another one."""


def example(kind: type[errors.CrlError]) -> errors.CrlError:
    if kind is errors.ImageBatchError:
        return kind({0: errors.ImageError("is damaged")}, None)
    if kind is errors.MissingDependencyError:
        return kind("onnxruntime", "cpu", "Embedder")
    return kind("what happened")


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_is_documented(kind):
    assert issubclass(kind, errors.CrlError)
    assert kind.__doc__ and kind.__doc__ != kind.__mro__[1].__doc__
    documented = " ".join(inspect.cleandoc(parent.__doc__ or "") for parent in kind.__mro__)
    assert all(f"    {name}: " in documented for name in vars(example(kind)))


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_has_a_status_and_comes_back(kind):
    error = example(kind)
    code = status_code(error)
    assert kind in _CODES or kind.__mro__[1] in _CODES or kind.__mro__[2] in _CODES
    assert code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    again = error_from_status(code, str(error), error_trailers(error))
    assert type(again) is SPECIAL.get(kind, kind)
    assert str(error) in str(again)


def test_only_our_own_failures_are_internal():
    internal = {kind for kind in CLASSES if status_code(example(kind)) is grpc.StatusCode.INTERNAL}
    assert internal == {
        errors.CrlError, errors.BasisError, errors.ServiceError, errors.ExportError,
        errors.ParityError,
        errors.VectorStoreError, errors.StoreMismatchError,  # no service raises them
    }  # fmt: skip


def test_the_time_to_wait_comes_back():
    error = errors.OverloadedError("the queue is full", retry_after=0.25)
    again = error_from_status(status_code(error), str(error), error_trailers(error))
    assert again.retry_after == 0.25


@pytest.mark.parametrize("sent", ["soon", "", "-5", "1e3", "nan"])
def test_a_malformed_time_to_wait_is_ignored(sent):
    trailers = (("crl-error", "OverloadedError"), ("retry-after-ms", sent))
    again = error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", trailers)
    assert type(again) is errors.OverloadedError and again.retry_after == 0.1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, errors.AccessError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.UNAVAILABLE, errors.ServiceError),
    ],
)
def test_statuses_of_others(code, kind):
    """A proxy, or gRPC itself, sends no trailer with the class."""
    error = error_from_status(code, "no luck", None)
    assert type(error) is kind
    assert ("check the address" in str(error)) == (code is grpc.StatusCode.UNAVAILABLE)
