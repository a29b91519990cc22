"""Language models behind an HTTP endpoint: llama.cpp's real server, and servers that misbehave."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from crl_sdk import Embedder, demo_bundle
from crl_sdk.basis import LanguageModel
from crl_sdk.basis import _endpoint as endpoint_module
from crl_sdk.basis._endpoint import Endpoint
from crl_sdk.basis._generate import generate_texts
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._llm_backend import Sampling
from crl_sdk.basis._llm_files import find_model
from crl_sdk.errors import GenerationError

ONE_MODEL = json.dumps({"object": "list", "data": [{"id": "qwen3"}]})


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers with what the server holds: a status, a type and a body or a function that writes."""

    def do_GET(self):
        self.answer(*self.server.models)

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.requests.append((dict(self.headers), json.loads(self.rfile.read(length))))
        self.answer(*self.server.completion)

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        with contextlib.suppress(OSError):
            if callable(body):
                body(self.wfile)
            else:
                self.wfile.write(body.encode())

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    made.daemon_threads = True
    made.models = 200, "application/json", ONE_MODEL
    made.completion = 200, "text/event-stream", stream("red", ", Blue", ", green")
    made.requests = []
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def event(choice):
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def stream(*pieces):
    events = [event({"delta": {"role": "assistant"}})]
    events += [event({"delta": {"content": piece}}) for piece in pieces]
    events += [event({"delta": {}, "finish_reason": "stop"}), "data: [DONE]\n\n"]
    return "".join(events)


def ask(url, message="colors"):
    parts = []
    endpoint = Endpoint(url)
    try:
        endpoint.chat(message, "", Sampling(0.5, 0), parts.append)
    finally:
        endpoint.close()
    return "".join(parts)


def test_texts_from_an_endpoint(server):
    with LanguageModel.open(server.url) as llm:
        found = generate_texts("color", llm, GenerationOptions(max_answers=1, form="list"))
    assert [each.text for each in found.texts] == ["red", "blue", "green"]
    assert found.provenance["model"] == {
        "name": "qwen3", "backend": "OpenAI API", "backend_version": "v1", "endpoint": server.url,
    }  # fmt: skip
    ((headers, request),) = server.requests
    assert "Authorization" not in headers
    assert request["model"] == "qwen3" and request["stream"] is True and "grammar" not in request
    assert request["messages"][0]["content"].startswith("Generate common expressions")


def test_a_token_and_a_named_model(server):
    server.models = 500, "text/plain", "not asked"
    with LanguageModel.open(f"{server.url}#llama", token="secret") as llm:
        generate_texts("color", llm, GenerationOptions(max_answers=1, form="list"))
    ((headers, request),) = server.requests
    assert headers["Authorization"] == "Bearer secret" and request["model"] == "llama"


def test_an_endpoint_that_does_not_stream(server):
    whole = {"choices": [{"message": {"content": "red, blue"}, "finish_reason": "stop"}]}
    server.completion = 200, "application/json", json.dumps(whole, indent=1)
    assert ask(server.url) == "red, blue\n"


def test_reasoning_is_left_out_and_statistics_are_ignored(server):
    said = stream("<think>perhaps red, or ", "pink</think>", "blue, green, gray")
    usage = f"data: {json.dumps({'choices': [], 'usage': {'total_tokens': 9}})}\n\n"
    server.completion = (
        200,
        "text/event-stream",
        said.replace("data: [DONE]", f"{usage}data: [DONE]"),
    )
    with LanguageModel.open(server.url) as llm:
        found = generate_texts("color", llm, GenerationOptions(max_answers=1, form="list"))
    assert [each.text for each in found.texts] == ["blue", "green", "gray"]


def flood(file):
    for _ in range(200):
        file.write(event({"delta": {"content": "x" * 60_000}}).encode())


def break_off(file):
    file.write(stream("red")[:40].encode())


def stay_silent(file):
    file.flush()
    time.sleep(30)


@pytest.mark.parametrize(
    ("completion", "words"),
    [((200, "text/html", "<html>Welcome</html>"), "expected JSON of OpenAI's API, got '<html>"),
     ((404, "text/html", "<h1>No</h1>"), r"status 404 \(<h1>No</h1>\): check the URL"),
     ((401, "application/json", "{}"), "status 401 .*CRL_LLM_TOKEN"),
     ((302, "text/plain", ""), "status 302"),
     ((200, "application/json", '{"error": {"message": "out of memory"}}'), "out of memory"),
     ((200, "application/json", "[1, 2]"), "an answer with `choices`"),
     ((200, "application/json", '{"choices": 3}'), "an answer with `choices`"),
     ((200, "application/json", "[" * 100_000), "expected JSON"),
     ((200, "text/event-stream", flood), "sent more than 1 MiB"),
     ((200, "text/event-stream", break_off), "expected JSON"),
     ((200, "text/event-stream", stay_silent), "cannot be reached or broke off")],
)  # fmt: skip
def test_an_endpoint_that_misbehaves(server, monkeypatch, completion, words):
    monkeypatch.setattr(endpoint_module, "SILENT_SECONDS", 1.0)
    server.completion = completion
    with pytest.raises(GenerationError, match=words):
        ask(server.url)


@pytest.mark.parametrize(
    ("models", "words"),
    [((200, "text/html", "<html>"), "expected a list of models"),
     ((200, "application/json", '{"data": []}'), r"has 0 models \(none\): name one"),
     ((200, "application/json", '{"data": [{"id": "a"}, {"id": "b"}]}'), r"2 models \(a, b\)"),
     ((200, "application/json", '{"data": [{}]}'), "expected a list of models")],
)  # fmt: skip
def test_which_model(server, models, words):
    server.models = models
    with pytest.raises(GenerationError, match=words):
        Endpoint(server.url)


@pytest.mark.parametrize(
    ("url", "words"),
    [("http://", "got no host"), ("http://[::1", "not a URL"), ("http://127.0.0.1:1/v1", "reached"),
     ("http://127.0.0.1:99999/v1", "not a URL|cannot be reached"),
     ("http://a b/v1", "cannot be reached|not a URL")],
)  # fmt: skip
def test_an_endpoint_that_is_away(url, words):
    with pytest.raises(GenerationError, match=words):
        LanguageModel.open(url)


def test_an_endpoint_continues_few_shot_lines(server):
    """Small models are no match for messages behind an endpoint either."""
    said = event({"text": " red, blue"}) + event({"text": ", green", "finish_reason": "stop"})
    server.completion = 200, "text/event-stream", said
    with LanguageModel.open(server.url) as llm:
        found = generate_texts("color", llm, GenerationOptions(form="completion", max_answers=3))
    assert {each.text: each.votes for each in found.texts} == {"red": 3, "blue": 3, "green": 3}
    request = server.requests[0][1]
    assert request["prompt"].endswith("\ncolor:") and request["stop"] == ["\n"]
    with (
        LanguageModel.open(server.url) as llm,
        pytest.raises(GenerationError, match="likely texts"),
    ):
        llm.log_likelihoods("Examples of color:", ["red"])


def test_an_endpoint_without_completions_is_asked_for_lists(server):
    answer = Answering.do_POST

    def only_messages(self):
        if self.path.endswith("/v1/completions"):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(404, "text/plain", "no such path")
        else:
            answer(self)

    with pytest.MonkeyPatch.context() as patch, LanguageModel.open(server.url) as llm:
        patch.setattr(Answering, "do_POST", only_messages)
        found = generate_texts("color", llm)
    assert found.provenance["form"] == "list" and found.provenance["probe"] == {"list": 0}


def test_no_proxy_for_this_machine_and_no_password_in_the_basis(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with LanguageModel.open(server.url.replace("http://", "http://user:secret@")) as llm:
        assert "secret" not in json.dumps(llm.describe()) and llm.source == server.url


@pytest.fixture(scope="module")
def llama_server():
    """llama.cpp's own server, with the default model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(find_model(None))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "2048"]
    command += ["--model_alias", "smollm2", "--n_threads", "1", "--verbose", "False"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < ends
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("form", ["list", "chat"])
def test_messages_through_the_server_of_llama_cpp(llama_server, form):
    options = GenerationOptions(form=form, max_answers=2, accept_unsure=True)
    with LanguageModel.open(llama_server) as llm, Embedder.open(demo_bundle()) as embedder:
        assert llm.name == "smollm2" and llm.chats and not llm.tells_likelihoods
        try:
            found = embedder.generate_texts("color", llm=llm, options=options)
        except GenerationError as error:  # a model of this size is no match for messages
            assert "does not seem to know 'color'" in str(error)
        else:
            assert len(found.texts) >= 3
        assert llm.tokens > 10


def test_completions_through_the_server_of_llama_cpp(llama_server):
    with LanguageModel.open(llama_server) as llm, Embedder.open(demo_bundle()) as embedder:
        basis = embedder.generate_basis("color", llm=llm, options=GenerationOptions(max_answers=8))
    assert basis.provenance["form"] == "completion" and {"red", "blue"} & set(basis.texts)
    assert basis.provenance["model"]["endpoint"] == llama_server
