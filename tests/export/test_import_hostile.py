"""`crl import` of files that are damaged or made to do harm: an error in time, and nothing left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import (
    make_function,
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)
from typer.testing import CliRunner

import tiny_exports as tiny
from crl_export.imported import importer, reading
from crl_export.imported.importer import Given, import_model
from crl_sdk.cli import app
from crl_sdk.errors import ExportError
from crl_sdk.model import ModelBundle

TERA = 1 << 40


@pytest.fixture
def source(tmp_path):
    return tiny.transformers_js(tmp_path / "xenova")


def tower(source: Path) -> Path:
    return source / "onnx" / "vision_model.onnx"


def refused(source: Path, message: str, **options) -> None:
    """Check that an import fails with a message and leaves nothing."""
    before = sorted(each.name for each in source.parent.iterdir())
    with pytest.raises(ExportError, match=message):
        import_model(source, out=source.parent / "b", **options)
    assert sorted(each.name for each in source.parent.iterdir()) == before


def edited(path: Path, nodes: list[onnx.NodeProto], **arrays: np.ndarray) -> None:
    """Add nodes to a tower that make its output larger by `extra`, a scalar."""
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "before"
    for name, values in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    model.graph.node.extend(nodes)
    model.graph.node.append(make_node("Add", ["before", "extra"], ["image_embeds"]))
    onnx.save(model, path)


def test_a_constant_larger_than_memory(source):
    """The runtime would fill it while it loads the graph."""
    edited(
        tower(source),
        [make_node("ConstantOfShape", ["size"], ["huge"]),
         make_node("ReduceSum", ["huge"], ["extra"], keepdims=0)],
        size=np.array([TERA]),
    )  # fmt: skip
    refused(source, "vision_model.onnx")


@pytest.mark.parametrize("operator", ["Expand", "Tile"])
def test_a_run_that_needs_more_than_memory(source, operator):
    """The size follows from the input, so that it is not known before the graph runs."""
    edited(
        tower(source),
        [make_node("ReduceMax", ["pixel_values"], ["largest"], keepdims=0),
         make_node("Mul", ["largest", "none"], ["zero"]),
         make_node("Cast", ["zero"], ["whole"], to=TensorProto.INT64),
         make_node("Add", ["whole", "size"], ["wanted"]),
         make_node("Reshape", ["zero", "one"], ["row"]),
         make_node(operator, ["row", "wanted"], ["huge"]),
         make_node("ReduceSum", ["huge"], ["extra"], keepdims=0)],
        none=np.float32(0), size=np.array([TERA]), one=np.array([1]),
    )  # fmt: skip
    refused(source, "vision_model.onnx")


def endless(path: Path) -> None:
    """Add a loop that runs 2^62 times."""
    body = make_graph(
        [make_node("Identity", ["going"], ["goes_on"]), make_node("Add", ["sum", "sum"], ["next"])],
        "body",
        [make_tensor_value_info("at", TensorProto.INT64, []),
         make_tensor_value_info("going", TensorProto.BOOL, []),
         make_tensor_value_info("sum", TensorProto.FLOAT, [])],
        [make_tensor_value_info("goes_on", TensorProto.BOOL, []),
         make_tensor_value_info("next", TensorProto.FLOAT, [])],
    )  # fmt: skip
    edited(
        path,
        [make_node("ReduceMax", ["pixel_values"], ["largest"], keepdims=0),
         make_node("Loop", ["times", "yes", "largest"], ["extra"], body=body)],
        times=np.array(1 << 62), yes=np.array(True),
    )  # fmt: skip


def test_a_loop_without_end(source):
    endless(tower(source))
    refused(source, "took more than 3 s .* --time-limit", time_limit=3)


def test_weights_that_the_file_does_not_hold(source):
    model = tiny.image_model()
    tensor = next(each for each in model.graph.initializer if each.name == "first")
    tensor.dims[0] = TERA
    onnx.save(model, tower(source))
    refused(source, r"the weights 'first' is \[1099511627776, 24\], the file holds")
    tensor.ClearField("raw_data")
    onnx.save(model, tower(source))
    refused(source, "the file holds 0 bytes")
    tensor.dims[0] = -5
    onnx.save(model, tower(source))
    refused(source, r"is \[-5, 24\]")


def with_functions(source: Path, calls: list[tuple[str, list[str]]]) -> None:
    """Give a tower local functions, each of which calls others."""
    model = onnx.load(tower(source))
    opset = make_opsetid("", 17)
    own = make_opsetid("own", 1)
    for name, inner in calls:
        values = ["x", *(f"v{at}" for at in range(len(inner) - 1)), "y"]
        nodes = [
            make_node(each, [a], [b], domain="own" if each != "Neg" else "")
            for each, a, b in zip(inner, values[:-1], values[1:], strict=True)
        ]
        model.functions.append(make_function("own", name, ["x"], ["y"], nodes, [opset, own]))
    model.opset_import.append(own)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(make_node(calls[0][0], ["before"], ["image_embeds"], domain="own"))
    onnx.save(model, tower(source))


def test_local_functions(source):
    with_functions(source, [("Twice", ["Neg", "Neg"])])
    import_model(source, out=source.parent / "b")
    assert ModelBundle.open(source.parent / "b").embedding_dim == tiny.DIM


def test_local_functions_that_grow_without_bounds(source):
    doubling = [(f"F{at}", [f"F{at + 1}", f"F{at + 1}"]) for at in range(40)]
    with_functions(source, [*doubling, ("F40", ["Neg"])])
    refused(source, "more than 500,000 operators")


def test_local_functions_that_call_themselves(source):
    with_functions(source, [("F", ["G"]), ("G", ["F"])])
    refused(source, "calls itself")


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def test_files_larger_than_memory(source):
    """Sparse files, which take no place on the disk."""
    sparse(tower(source), TERA)
    refused(source, "has 1024 GiB; an ONNX file has at most 2")
    model = tiny.image_model()
    tensor = next(each for each in model.graph.initializer if each.name == "first")
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="data")
    tensor.external_data.add(key="length", value=str(size))
    onnx.save(model, tower(source))
    sparse(source / "onnx" / "data", TERA)
    refused(source, "its external data has 1024 GiB, expected at most 64")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_large_texts(source, name):
    sparse(source / name, TERA)
    refused(source, f"{name}: .*64 MiB")


def test_a_tokenizer_that_is_nested_deeply(source):
    (source / "tokenizer.json").write_text('{"model": ' + '{"a": ' * 100_000)
    refused(source, "tokenizer.json")


@pytest.mark.parametrize(
    "name",
    ["onnx/vision_model.onnx", "config.json", "preprocessor_config.json", "tokenizer_config.json"],
)
def test_pipes_are_not_waited_for(source, name):
    (source / name).unlink()
    os.mkfifo(source / name)
    refused(source, "a device or a pipe|expected visual/model.onnx")


def test_a_pipe_or_device_as_the_source(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path / "pipe.onnx", Path("/dev/zero")):
        with pytest.raises(ExportError, match="a device or a pipe"):
            import_model(path, out=tmp_path / "b")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "preprocessor_config.json", "onnx/vision_model.onnx"]
)
def test_links_out_of_the_directory(source, tmp_path, name):
    (source / name).rename(tmp_path / "secret")
    (source / name).symlink_to(tmp_path / "secret")
    refused(source, "a link that leads out of the directory")


def test_links_inside_the_directory(source, tmp_path):
    (source / "onnx" / "vision_model.onnx").rename(source / "tower.onnx")
    (source / "onnx" / "vision_model.onnx").symlink_to("../tower.onnx")
    (tmp_path / "link").symlink_to(source)
    import_model(tmp_path / "link", out=tmp_path / "b")


def test_external_data_through_a_folder_that_is_a_link(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = tower(source)
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="data", size_threshold=0)
    (source / "onnx" / "data").rename(tmp_path / "elsewhere" / "data")
    (source / "onnx" / "folder").symlink_to(tmp_path / "elsewhere")
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "folder/data"
    file.write_bytes(model.SerializeToString())
    refused(source, "a link that leads out of the directory")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/vision_model.onnx"])
def test_files_that_may_not_be_read(source, name):
    (source / name).chmod(0)
    refused(source, name.split("/")[-1])


def test_a_file_that_cannot_be_read(source, monkeypatch):
    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reading, "sha256_file", fail)
    refused(source, "vision_model.onnx: cannot be read .*Input/output error")


def test_a_place_that_cannot_be_written(source):
    with pytest.raises(ExportError, match="cannot be created"):
        import_model(source, out=Path("/proc/crl/b"))


def test_a_full_disk(source, tmp_path):
    """A limit on the size of files stands in for it."""
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from crl_sdk.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "import", str(source), "--out", str(tmp_path / "b")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be written (File too large)" in " ".join(done.stderr.split())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["xenova"]


def test_a_directory_that_may_not_be_read(source, monkeypatch):
    is_dir = Path.is_dir

    def fail(self: Path) -> bool:
        if self == source:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", fail)
    refused(source, r"xenova: cannot be read .*check its permissions")


def test_a_disk_that_fills_up_while_the_graph_runs(source, monkeypatch):
    from crl_export.imported import bounded_run

    answer = json.dumps({"errno": errno.ENOSPC})
    done = subprocess.CompletedProcess([], 0, stdout=answer, stderr="")
    monkeypatch.setattr(bounded_run.subprocess, "run", lambda *_, **__: done)
    refused(source, "cannot be written .*No space left on device")


def test_a_failed_import_keeps_the_old_bundle(source, tmp_path):
    import_model(source, out=tmp_path / "b")
    before = {each.name: each.read_bytes() for each in (tmp_path / "b").iterdir()}
    (source / "tokenizer.json").write_text("{}")
    refused(source, "tokenizer.json", overwrite=True)
    assert {each.name: each.read_bytes() for each in (tmp_path / "b").iterdir()} == before


def living(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = each.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(each.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_an_interrupted_import_leaves_nothing(source, tmp_path):
    """Ctrl-C while the imported graph runs in its own process: both end, the old bundle stays."""
    import_model(source, out=tmp_path / "b")
    before = {each.name: each.read_bytes() for each in (tmp_path / "b").iterdir()}
    endless(tower(source))
    words = ["import", str(source), "--out", str(tmp_path / "b"), "--overwrite"]
    with subprocess.Popen(
        [sys.executable, "-m", "crl_sdk", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as running:  # fmt: skip
        while not list(tmp_path.glob(".b.*/run.*")):
            assert running.poll() is None
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        running.communicate()
    assert running.returncode == 130
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b", "xenova"]
    assert {each.name: each.read_bytes() for each in (tmp_path / "b").iterdir()} == before
    assert not living(running.pid)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"logits": ["batch", 1000]}, "'logits' has scores of classes and no embeddings"),
        ({"output0": ["batch", 84, 8400]}, "not the image tower of a CLIP model"),
        ({"boxes": ["batch", 100, 4], "scores": ["batch", 100]}, "not the image tower"),
        ({f"present.{at}": ["batch", 2, 3, 4] for at in range(60)}, "and 54 more"),
        ({"last_hidden_state": ["batch", 197, 768]}, "without CLIP's projection"),
    ],
    ids=["classifier", "detector", "detector with boxes", "language model", "nomic-embed-vision"],
)
def test_image_models_that_are_no_clip(source, outputs, message):
    model = tiny.image_model(output=next(iter(outputs)))
    del model.graph.output[:]
    for name, shape in outputs.items():
        model.graph.output.append(make_tensor_value_info(name, TensorProto.FLOAT, shape))
        if not any(name in node.output for node in model.graph.node):
            model.graph.node.append(make_node("Identity", ["bent"], [name]))
    onnx.save(model, tower(source))
    refused(source, message)


def test_an_image_tower_in_place_of_the_text_tower(source):
    onnx.save(tiny.image_model(output="text_embeds"), source / "onnx" / "text_model.onnx")
    refused(source, "not the text tower of a CLIP model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 10**6, "crop_size": 10**6}, "expected 1 to 4096; pass --size"),
        ({"size": 0, "crop_size": 0}, "a size of 0×0 pixels.*--size"),
        ({"image_std": [0, 1, 1]}, "pass .*--mean and --std"),
        ({"image_mean": [1e999, 0, 0]}, "pass .*--mean and --std|not readable as JSON"),
    ],
)
def test_preprocessing_that_is_impossible(tmp_path, changes, message):
    image = tiny.image_model()
    shape = image.graph.input[0].type.tensor_type.shape.dim
    shape[2].dim_param, shape[3].dim_param = "height", "width"
    source = tiny.transformers_js(tmp_path / "xenova", image=image, **changes)
    refused(source, message)


def test_a_context_length_without_bounds(source):
    refused(source, "context length of 1,000,000", given=Given(context_length=1_000_000))


def test_a_tokenizer_with_few_of_the_tokens_of_the_tower(source, tmp_path):
    onnx.save(tiny.text_model(words=5000), source / "onnx" / "text_model.onnx")
    with pytest.warns(UserWarning, match="has embeddings of 5,000 tokens, its tokenizer"):
        import_model(source, out=tmp_path / "b")


@pytest.mark.filterwarnings("always")  # not the error that pytest makes of it
def test_the_command_prints_the_warning_about_the_tokenizer(source, tmp_path):
    onnx.save(tiny.text_model(words=5000), source / "onnx" / "text_model.onnx")
    words = ["import", str(source), "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert "warning:" in result.stderr and "its tokenizer" in result.stderr


def test_a_configuration_with_more_tokens_than_the_tokenizer(source, tmp_path):
    """Where the table is not found in the graph, as behind a quantised one."""
    model = tiny.text_model()
    model.graph.node[0].input[0] = "copied"
    model.graph.node.insert(0, make_node("Mul", ["table", "one"], ["copied"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1), "one"))
    onnx.save(model, source / "onnx" / "text_model.onnx")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["vocab_size"] = 30_522
    tiny.write_json(source / "config.json", config)
    with pytest.warns(UserWarning, match="has embeddings of 30,522 tokens"):
        import_model(source, out=tmp_path / "b")


def test_a_graph_that_ends_its_process(source, monkeypatch):
    """A runtime that crashes must not take the caller with it."""
    from crl_export.imported import bounded_run

    monkeypatch.setattr(bounded_run, "_MEMORY", 1 << 20)  # too little for the runtime itself
    refused(source, "vision_model.onnx")


def test_a_model_of_no_graph(source):
    onnx.save(
        make_model(make_graph([], "none", [], []), opset_imports=[make_opsetid("", 17)]),
        tower(source),
    )
    refused(source, "without operators")


def changed(value, rng: random.Random):
    """Return a JSON value of which a part is gone or is something else."""
    others = (None, True, -1, 10**30, 0.5, "", "x", [], [1], {}, {"a": 1}, {"height": [1]})
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {each: value[each] for each in value if each != key}
        return rest if rng.random() < 0.3 else {**rest, key: changed(value[key], rng)}
    return rng.choice(others)


def test_configurations_of_any_content(tmp_path, monkeypatch):
    """Whatever the files say, the importer accepts it or raises an error of its own."""

    class StoppedError(Exception):
        """The configuration was accepted, and the graph would run."""

    def stop(*_, **__):
        raise StoppedError

    monkeypatch.setattr(importer, "take_weights", stop)
    monkeypatch.setattr(importer.warnings, "warn", lambda *_, **__: None)
    rng = random.Random(0)
    sources = {
        tiny.transformers_js(tmp_path / "xenova"): (
            "config.json", "preprocessor_config.json", "tokenizer_config.json",
        ),
        tiny.immich(tmp_path / "immich"): ("config.json", "visual/preprocess_cfg.json"),
    }  # fmt: skip
    ends = set()
    for _ in range(300):
        source = rng.choice(list(sources))
        path = source / rng.choice(sources[source])
        old = path.read_text()
        path.write_text(json.dumps(changed(changed(json.loads(old), rng), rng)))
        try:
            import_model(source, out=tmp_path / "b")
        except (ExportError, StoppedError) as error:
            ends.add(type(error))
        path.write_text(old)
    assert ends == {ExportError, StoppedError}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["immich", "xenova"]


def test_names_that_are_no_text(source):
    content = tower(source).read_bytes()
    tower(source).write_bytes(content.replace(b"image_embeds", b"image_embed\xff"))
    refused(source, "names that are not UTF-8")
