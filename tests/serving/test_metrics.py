"""Metrics for Prometheus: calls, images, stages and the queue, with few labels."""

from __future__ import annotations

import time
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from crl_sdk import Client
from crl_sdk.errors import ServiceError, UnknownCriterionError
from crl_sdk.serving._security import Token


def scrape(server) -> dict[tuple[str, ...], float]:
    """Return the value of each sample, by its name and label values in order of label names."""
    with urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as page:
        text = page.read().decode()
    return {
        (sample.name, *dict(sorted(sample.labels.items())).values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_calls_images_and_stages_are_counted(serve, embedder, image_files, tmp_path):
    server = serve(embedder, metrics_address="127.0.0.1:0")
    embed = "/crl.v1.EmbeddingService/Embed"
    with Client(server.address) as client:
        client.create_basis("color", ["red", "green", "blue"])
        client.embed([*image_files[:4], b"junk"], criteria=["color"], on_error="collect")
        client.embed(image_files[:3], criteria=["color"])
        for i in range(50):
            with pytest.raises(UnknownCriterionError):
                client.embed(image_files[:1], criteria=[f"no {i}"])
    with grpc.insecure_channel(server.address) as channel:
        for i in range(50):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/invented.Service/Method{i}")(b"")
    samples = scrape(server)
    assert samples["crl_calls_total", "OK", embed] == 2
    assert samples["crl_calls_total", "NOT_FOUND", embed] == 50
    assert samples["crl_calls_total", "UNIMPLEMENTED", "other"] == 50
    assert samples["crl_call_seconds_count", embed] == 52
    assert samples["crl_images_total", "embedded"] == 4
    assert samples["crl_images_total", "cached"] == 3
    assert samples["crl_images_total", "failed"] == 1
    assert samples["crl_criterion_images_total", "color"] == 8
    assert samples["crl_stage_seconds_count", "infer"] == 1
    assert samples["crl_cache_lookups_total", "hit"] == 3
    assert samples["crl_cache_entries",] == 4 and samples["crl_bases",] == 1
    assert samples["crl_queue_depth",] == 0 and samples["crl_engine_up",] == 1
    assert samples["crl_batch_size_sum",] == 4 + 1  # one image is the warm-up
    assert len(samples) < 250  # neither unknown criteria nor invented methods became labels


def test_refused_calls_count(serve, embedder):
    token = Token("camera", "a-secret-of-some-length", frozenset({"embed"}))
    server = serve(embedder, metrics_address="127.0.0.1:0", tokens=(token,))
    with grpc.insecure_channel(server.address) as channel:
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary("/crl.v1.EmbeddingService/GetModel")(b"")
    key = ("crl_calls_total", "UNAUTHENTICATED", "/crl.v1.EmbeddingService/GetModel")
    ends = time.monotonic() + 10  # a call is counted just after its client receives the status
    while scrape(server)[key] < 3:
        assert time.monotonic() < ends
    assert scrape(server)[key] == 3


def test_an_address_it_cannot_use(serve, embedder):
    with pytest.raises(ServiceError, match=r"cannot serve metrics there.*with --metrics"):
        serve(embedder, metrics_address="256.0.0.1:0")
