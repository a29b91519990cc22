"""What `crl bench --metrics` reads from a Prometheus page, and what it makes of it."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from crl_benchmarks.metrics_page import MetricsPage, _find_parser, summarise
from crl_sdk.errors import InvalidInputError, MissingDependencyError, ServiceError

PAGE = """
# TYPE calls_total counter
calls_total{{code="OK"}} {calls}
# TYPE depth gauge
depth {depth}
# TYPE bases gauge
bases 2
# TYPE size histogram
size_bucket{{le="1.0"}} {ones}
size_bucket{{le="8.0"}} {sizes}
size_bucket{{le="+Inf"}} {sizes}
size_count {sizes}
size_sum {total}
# TYPE size_created gauge
size_created {calls}
"""


def scrape(**values):
    filled = {"calls": 0, "depth": 0, "ones": 0, "sizes": 0, "total": 0, **values}
    return _find_parser()(PAGE.format(**filled))


@contextmanager
def served(answer):
    """Serve a page on a free port; `answer` returns status and text of each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, text = answer(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def test_what_changed_is_told_by_name():
    told = summarise(
        [
            scrape(calls=10, ones=2, sizes=2, total=2),
            scrape(calls=15, depth=9, ones=3, sizes=7, total=35),
            scrape(calls=40, depth=3, ones=3, sizes=12, total=75),
        ]
    )
    assert (told.scrapes, told.failed_scrapes, told.problem, told.restarted) == (3, 0, "", False)
    assert told.changed.keys() == {'calls_total{code="OK"}', "depth", "size"}
    assert told.changed['calls_total{code="OK"}'].change == 30
    depth = told.changed["depth"]
    assert (depth.kind, depth.low, depth.high, depth.mean) == ("gauge", 0, 9, 4)
    size = told.changed["size"]
    assert (size.change, size.mean, size.buckets) == (10, 7.3, {"1.0": 1, "8.0": 9})


def test_a_label_that_appears_during_the_run_began_at_zero():
    page = '# TYPE calls_total counter\ncalls_total{code="OK"} 1\n'
    more = page + 'calls_total{code="RESOURCE_EXHAUSTED"} 4\n'
    parse = _find_parser()
    told = summarise([parse(page), parse(more)])
    assert told.changed['calls_total{code="RESOURCE_EXHAUSTED"}'].change == 4


def test_a_server_that_starts_again_is_told():
    told = summarise([scrape(calls=100), scrape(calls=103), scrape(calls=5), scrape(calls=6)])
    assert told.restarted and told.changed['calls_total{code="OK"}'].change == 3 + 5 + 1


def test_without_a_scrape_nothing_changed():
    told = summarise([])
    assert told.changed == {} and told.scrapes == told.failed_scrapes == 0


@pytest.mark.parametrize(
    "address", ["", "9464", "host", "host:x", "ftp://host:1", "http://", "h:0"]
)
def test_an_address_of_another_form(address):
    with pytest.raises(InvalidInputError, match=r"such as 127\.0\.0\.1:9464"):
        MetricsPage(address)


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [(404, b"none", "404"), (200, b"<html>", "invalid metric name"), (200, b"", "no metrics"),
     (200, b"\xff\xfe", "decode")],
)  # fmt: skip
def test_a_page_that_is_none(status, text, words):
    with (
        served(lambda path: (status, text)) as address,
        pytest.raises(ServiceError, match=f"{words}.*crl serve --metrics"),
    ):
        MetricsPage(address)


def test_nothing_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServiceError, match="refused"):
        MetricsPage(address)


def test_a_url_is_taken_as_it_is():
    asked = []

    def answer(path):
        asked.append(path)
        return 200, b"up 1\n"

    with served(answer) as address:
        for given in (address, f"http://{address}", f"http://{address}/a/b"):
            MetricsPage(given)
    assert asked == ["/metrics", "/metrics", "/a/b"]


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
    with pytest.raises(MissingDependencyError, match=r"crl-embeddings\[serve\]"):
        MetricsPage("127.0.0.1:1")
