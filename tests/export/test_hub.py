"""Models of the hub of Hugging Face: what is requested, downloaded, checked and kept."""

from __future__ import annotations

import json
import re

import onnx
import pytest

pytest.importorskip("huggingface_hub")

import tiny_text_towers as towers
from fake_hub import FakeHub, Repository

import tiny_exports as exports
import tiny_hugging_face as tiny

pytestmark = pytest.mark.filterwarnings("ignore")

USER_AGENT = r"unknown/None; hf_hub/[\w.]+; python/[\d.]+"
"""The library's own, without what telemetry would add to it."""

FIND = (
    "-c",
    "import sys; from crl_sdk.errors import CrlError\n"
    "from crl_export.hugging_face.hub import find_directory\n"
    "try: print(find_directory(sys.argv[1], print))\n"
    "except CrlError as error: sys.exit(f'{type(error).__name__}: {error}')\n"
    "assert 'torch' not in sys.modules and 'transformers' not in sys.modules",
)
"""Downloads the files of a model alone."""

SMALL = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "tokenizer.json": b'{"model": {}}',
}
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub():
    with FakeHub() as running:
        running.repositories["o/r"] = Repository({**SMALL, "model.safetensors": WEIGHTS})
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "clip"
    tiny.clip(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def test_export_downloads_what_it_needs_and_says_so(hub, clip, tmp_path):
    other = {"pytorch_model.bin": b"x", "tf_model.h5": b"x", "onnx/model.onnx": b"x", "a.py": b"x"}
    hub.repositories["o/clip"] = Repository.of(clip, **other)
    commit = hub.repositories["o/clip"].commit
    command = ("-m", "crl_sdk", "export", "hf:o/clip@v1", "--json", "--out")
    made = hub.run(tmp_path / "home", *command, str(tmp_path / "b"), HF_TOKEN="hf_secret")
    assert made.returncode == 0, made.stdout + made.stderr
    manifest = json.loads(made.stdout)
    assert manifest["source"]["pretrained"] == f"o/clip@{commit}"
    assert (manifest["source"]["license"], manifest["name"]) == ("apache-2.0", "clip")
    assert re.search(rf"downloading \d+ files, [\d.]+ MB, of o/clip at {commit[:12]}", made.stderr)
    assert "%|" not in made.stderr  # no bar of the library

    files = sorted(each.relative_to(clip).as_posix() for each in clip.rglob("*"))
    assert hub.downloaded() == files
    resolved = {f"/o/clip/resolve/{commit}/{file}" for file in files}
    described = {"/api/models/o/clip/revision/v1?blobs=true"}
    of_hub = [each for each in hub.requests if each.server == "hub"]
    of_storage = [each for each in hub.requests if each.server == "storage"]
    assert {each.path for each in of_hub} == resolved | described
    assert {each.path for each in of_storage} == {"/o/clip/model.safetensors"}
    assert {each.headers.get("authorization") for each in of_hub} == {"Bearer hf_secret"}
    assert all("authorization" not in each.headers for each in of_storage)
    for each in hub.requests:
        assert re.fullmatch(USER_AGENT, each.headers["user-agent"]), each.headers
        assert not {"cookie", "referer", "from"} & each.headers.keys()

    hub.close()  # from here on there is no network
    again = hub.run(tmp_path / "home", *command, str(tmp_path / "c"))
    assert again.returncode == 0, again.stderr
    assert "the hub cannot be reached; taking what was downloaded before" in again.stderr
    assert json.loads(again.stdout)["fingerprint"] == manifest["fingerprint"]


def test_random_weights_need_no_download_of_weights(hub, clip, tmp_path):
    hub.repositories["o/clip"] = Repository.of(clip)
    made = hub.run(
        tmp_path / "home", "-m", "crl_sdk", "export", "hf:o/clip", "--pretrained", "none",
        "--no-text", "--out", str(tmp_path / "b"),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "model.safetensors" not in hub.downloaded() and "config.json" in hub.downloaded()


def test_files_are_downloaded_once(hub, tmp_path):
    first = hub.run(tmp_path, *FIND, "hf:o/r")
    assert first.returncode == 0, first.stderr
    assert hub.downloaded() == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert "downloading model.safetensors" in first.stdout
    hub.requests.clear()
    second = hub.run(tmp_path, *FIND, "hf:o/r@main")
    assert second.stdout.splitlines() == first.stdout.splitlines()[-1:]
    assert [each.path for each in hub.requests] == ["/api/models/o/r/revision/main?blobs=true"]
    hub.close()
    third = hub.run(tmp_path, *FIND, "hf:o/r", HF_HUB_OFFLINE="1")
    assert third.stdout == second.stdout


def refused(hub, home, name: str, *messages: str, **environment: str) -> None:
    """Assert that a model is refused with an `ExportError`."""
    said = hub.run(home, *FIND, name, **environment)
    assert said.returncode == 1, said.stdout
    assert said.stderr.startswith("ExportError: "), said.stderr
    for message in messages:
        assert message in said.stderr


@pytest.mark.parametrize(
    "name", ["hf:", "hf:clip", "hf:a/b/c", "hf:a/b@", "hf:../x", "hf:a/b@../../c"]
)
def test_wrong_names(name, hub, tmp_path):
    refused(hub, tmp_path, name, "expected hf:OWNER/REPO or hf:OWNER/REPO@REVISION, got")
    assert not hub.requests


def test_repositories_and_revisions_that_do_not_exist(hub, tmp_path):
    refused(hub, tmp_path, "hf:o/none", "no such repository, or it is private", "HF_TOKEN")
    refused(hub, tmp_path, "hf:o/r@v9", "hf:o/r@v9", "no such revision")
    assert not (tmp_path / "hub").exists() or not list((tmp_path / "hub").rglob("blobs/*"))


def test_a_hub_that_names_no_commit(hub, tmp_path):
    hub.repositories["o/r"].commit = "../../x"
    refused(hub, tmp_path, "hf:o/r", "names the commit '../../x', expected 40 hex digits")


def test_private_and_gated_repositories(hub, tmp_path):
    hub.repositories["o/private"] = Repository({"model.safetensors": b"x"}, token="hf_mine")
    refused(hub, tmp_path, "hf:o/private", "private", "HF_TOKEN", HF_TOKEN="hf_other")
    found = hub.run(tmp_path, *FIND, "hf:o/private", HF_TOKEN="hf_mine")
    assert found.returncode == 0, found.stderr
    hub.repositories["o/gated"] = Repository({"model.safetensors": b"x"}, gated=True)
    refused(
        hub, tmp_path, "hf:o/gated", "gated", f"accept its terms at {hub.endpoint}/o/gated",
        "HF_TOKEN",
    )  # fmt: skip


def test_a_download_that_breaks_off(hub, tmp_path):
    hub.repositories["o/r"].cut.add("model.safetensors")
    refused(hub, tmp_path, "hf:o/r", "model.safetensors", "broke off", "run the command again")
    hub.repositories["o/r"].cut.clear()
    hub.requests.clear()
    found = hub.run(tmp_path, *FIND, "hf:o/r")
    assert found.returncode == 0, found.stderr
    assert hub.downloaded() == ["model.safetensors"]  # the other files are kept


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_file_with_other_bytes_is_refused(file, hub, tmp_path):
    hub.repositories["o/r"].wrong.add(file)
    refused(hub, tmp_path, "hf:o/r", file, "is damaged", "delete ")
    refused(hub, tmp_path, "hf:o/r", file, "is damaged")
    hub.repositories["o/r"].wrong.clear()
    for blob in (tmp_path / "hub").rglob("blobs/*"):
        if blob.read_bytes().count(0) == blob.stat().st_size:
            blob.unlink()
    assert hub.run(tmp_path, *FIND, "hf:o/r").returncode == 0


def test_no_network_and_nothing_in_the_cache(hub, tmp_path):
    hub.close()
    refused(hub, tmp_path, "hf:o/r", "cannot be reached", "was not downloaded before")
    refused(hub, tmp_path, "hf:o/r", "was not downloaded before", HF_HUB_OFFLINE="1")


def test_repositories_without_weights(hub, tmp_path):
    hub.repositories["o/onnx"] = Repository({**SMALL, "onnx/model.onnx": b"x"})
    refused(hub, tmp_path, "hf:o/onnx", "crl import hf:o/onnx --out")
    hub.repositories["o/llm"] = Repository({**SMALL, "model.gguf": b"x"})
    refused(hub, tmp_path, "hf:o/llm", "has no model.safetensors", "it has README.md, config.json")
    assert hub.downloaded() == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": b'[{"type": "custom_st.X", "path": ""}]'}, "crl import hf:o/r --out"),
        ({"config.json": b'{"model_type": "jina_clip"}'}, "runs code of its repository"),
        ({"config.json": b'{"model_type": "llama"}'}, "expected one of align"),
    ],
)
def test_models_that_cannot_be_exported_are_not_downloaded(files, message, hub, tmp_path):
    hub.repositories["o/r"].files.update(files)
    said = hub.run(tmp_path, "-m", "crl_sdk", "export", "hf:o/r", "--out", str(tmp_path / "b"))
    assert said.returncode == 1
    assert message in said.stderr.replace("\n", " ")
    assert "model.safetensors" not in hub.downloaded()


def test_names_that_lead_out_of_the_directory_are_not_downloaded(hub, tmp_path):
    for name in ("../evil.json", "a/../../evil.json", "/evil.json"):
        hub.repositories["o/r"].files[name] = b"{}"
    assert hub.run(tmp_path / "home", *FIND, "hf:o/r").returncode == 0
    assert not [each for each in hub.requests if "evil" in each.path]


def test_open_clip_with_the_text_tower_and_tokenizer_of_another_repository(hub, tmp_path):
    import open_clip
    import transformers
    from safetensors.torch import save_file

    base = tmp_path / "base"
    words = towers.sentence_pieces(base)
    transformers.XLMRobertaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=50, type_vocab_size=1, pad_token_id=1,
    ).save_pretrained(base)  # fmt: skip
    text = {
        "hf_model_name": "o/base", "hf_tokenizer_name": "o/base", "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler", "context_length": 48,
    }  # fmt: skip
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    local = {**config, "text_cfg": {**text, "hf_model_name": str(base)}}
    local["text_cfg"]["hf_model_pretrained"] = False
    model = open_clip.CustomTextCLIP(**local)
    folder = tmp_path / "open"
    towers.write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")

    hub.repositories["o/open"] = Repository.of(folder, **{"README.md": SMALL["README.md"]})
    hub.repositories["o/base"] = Repository.of(base, **{"model.safetensors": b"not needed"})
    command = ("-m", "crl_sdk", "export", "hf:o/open", "--json", "--out")
    made = hub.run(tmp_path / "home", *command, str(tmp_path / "b"))
    assert made.returncode == 0, made.stdout + made.stderr
    manifest = json.loads(made.stdout)
    assert manifest["source"]["license"] == "mit"
    assert manifest["text"]["context_length"] == 48
    assert hub.downloaded().count("open_clip_model.safetensors") == 1
    assert "model.safetensors" not in hub.downloaded()
    for each in hub.requests:
        assert re.fullmatch(USER_AGENT, each.headers["user-agent"]), each.headers

    # the same files in a directory do not cause a download
    requests = len(hub.requests)
    local = hub.run(tmp_path / "home", "-m", "crl_sdk", "export", str(folder), "--out", "c")
    assert local.returncode == 1
    assert "its tokenizer is that of o/base: copy tokenizer.json" in local.stderr.replace("\n", " ")
    assert not [each for each in hub.requests[requests:] if "tokenizer" in each.path]


def imported(hub, home, *arguments: str) -> dict:
    """Run `crl import --json` and return what it prints."""
    made = hub.run(home, "-m", "crl_sdk", "import", *arguments, "--json")
    return {**json.loads(made.stdout), "stderr": made.stderr}


def test_import_downloads_the_files_of_the_variant(hub, tmp_path):
    folder = exports.transformers_js(tmp_path / "x")
    others = {
        f"onnx/{tower}{variant}.onnx": b"x"
        for tower in ("vision_model", "text_model", "model")
        for variant in ("_fp16", "_int8", "_quantized")
    }
    others |= {"onnx/model.onnx": b"x", "model.safetensors": b"x", "onnx/notes.json": b"{}"}
    hub.repositories["o/x"] = Repository.of(folder, **others, **{"README.md": SMALL["README.md"]})
    found = imported(hub, tmp_path / "home", "hf:o/x", "--out", str(tmp_path / "b"))
    assert "source" in found, found
    commit = hub.repositories["o/x"].commit
    assert found["source"]["pretrained"] == f"transformers.js export o/x@{commit}"
    assert (found["name"], found["source"]["license"]) == ("x", "mit")
    assert hub.downloaded() == [
        "README.md", "config.json", "onnx/text_model.onnx", "onnx/vision_model.onnx",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "of o/x at 0123456789ab" in found["stderr"]
    local = imported(hub, tmp_path / "home", str(folder), "--out", str(tmp_path / "c"))
    assert local["fingerprint"] == found["fingerprint"]
    hub.close()
    again = imported(hub, tmp_path / "home", "hf:o/x", "--out", str(tmp_path / "d"), "--no-text")
    assert again["text"] is None and again["source"]["license"] == "mit"


def test_import_downloads_external_data_and_the_text_tower_of_another_repository(hub, tmp_path):
    folder = exports.transformers_js(tmp_path / "x")
    onnx.save(
        exports.image_model(), folder / "onnx" / "vision_model.onnx", save_as_external_data=True,
        location="vision_model.onnx_data", size_threshold=0,
    )  # fmt: skip
    (folder / "onnx" / "other.onnx_data").write_bytes(b"x")
    text = exports.transformers_js(tmp_path / "y")
    hub.repositories["o/x"] = Repository.of(folder)
    hub.repositories["o/y"] = Repository.of(text, **{"README.md": SMALL["README.md"]})
    found = imported(
        hub, tmp_path / "home", "hf:o/x", "--text-model", "hf:o/y", "--out", str(tmp_path / "b")
    )
    assert "source" in found, found
    commit = hub.repositories["o/x"].commit
    label = f"transformers.js export o/x@{commit}, texts o/y@{commit}"
    assert found["source"]["pretrained"] == label
    got = {each.path for each in hub.requests if each.method == "GET"}
    stored = {path for path in got if path.startswith("/o/") and "/resolve/" not in path}
    assert stored == {
        "/o/x/onnx/vision_model.onnx", "/o/x/onnx/vision_model.onnx_data",
        "/o/y/onnx/text_model.onnx",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hf:o/none",), "no such repository"),
        (("hf:o/r",), "hf:o/r: expected visual/model.onnx.*model.safetensors, a checkpoint"),
        (("hf:o/x", "--variant", "int8"), "hf:o/x/onnx/vision_model_int8.onnx: no such file"),
        (("hf:o/x", "--text-model", "hf:o/r"), "hf:o/r/model.onnx: no such file"),
        (("hf:o/cut",), "onnx/vision_model.onnx cannot be downloaded.*broke off"),
        (("hf:o/html",), "vision_model.onnx: not a complete ONNX file"),
    ],
)
def test_imports_that_are_refused(arguments, message, hub, tmp_path):
    folder = exports.transformers_js(tmp_path / "x")
    for name in ("o/x", "o/cut", "o/html"):
        hub.repositories[name] = Repository.of(folder)
    hub.repositories["o/cut"].cut.add("onnx/vision_model.onnx")
    hub.repositories["o/html"].files["onnx/vision_model.onnx"] = b"<html>"
    found = imported(hub, tmp_path / "home", *arguments, "--out", str(tmp_path / "b"))
    assert found["error"]["type"] == "ExportError"
    assert re.search(message, found["error"]["message"]), found
    assert not (tmp_path / "b").exists()
