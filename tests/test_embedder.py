"""The in-process API with the demo model: results, bad images, bad criteria, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from crl_export.demo.dataset import TEST_SEED, read_labels, write_dataset
from crl_sdk import AsyncClient, Client, Embedder, ModelBundle, demo_bundle
from crl_sdk.basis import BasisDirectory, GenerationOptions, GenerationProgress, curated_lists
from crl_sdk.basis._build import build_basis
from crl_sdk.errors import (
    BasisMismatchError,
    BundleError,
    CriterionError,
    EngineError,
    GenerationError,
    ImageBatchError,
    InvalidInputError,
    UnknownCriterionError,
)
from crl_sdk.tasks import Index, cluster
from support import Scripted

COLOURS = ["red", "green", "blue", "yellow"]
SHAPES = ["circle", "square", "star"]


@pytest.fixture
def bases(embedder):
    def make(criterion, texts, **options):
        return build_basis(
            criterion,
            texts,
            embedder.embed_text,
            fingerprint=embedder.bundle.fingerprint,
            **options,
        )

    return [make("color", COLOURS), make("shape", SHAPES, method="cosine", post="standardise")]


def test_one_pass_serves_every_criterion(embedder, bases, image_files):
    together = embedder.embed(image_files, bases)
    plain = embedder.embed(image_files)
    assert together.universal.shape == (9, embedder.bundle.embedding_dim)
    assert together["Color"].shape == (9, 3) and together["shape"].shape == (9, 3)
    assert all(a.dtype == np.float32 for a in (together.universal, together["color"]))
    np.testing.assert_allclose(np.linalg.norm(together.universal, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together.universal, plain.universal, atol=1e-6)
    assert plain.conditional == {} and together.ok.all() and not together.errors


def test_fused_projection_equals_numpy_on_the_stored_embeddings(embedder, bases, image_files):
    """The projection in the graph equals `Projection.apply`; tolerance 1e-5."""
    result = embedder.embed(image_files, bases)
    for basis in bases:
        stored = embedder.project(result.universal, basis)
        np.testing.assert_allclose(result[basis.criterion], stored, atol=1e-5, rtol=1e-4)


def test_color_regroups_the_pictures(embedder, bases, image_files):
    rows = embedder.embed(image_files, bases[:1])["color"]
    similarity = rows @ rows.T
    same = np.kron(np.eye(3), np.ones((3, 3))).astype(bool)
    assert similarity[same].min() > similarity[~same].max()


def test_batching_and_kinds_of_input_change_nothing(embedder, bases, image_files):
    expected = embedder.embed(image_files, bases)
    mixed = [
        image_files[0],
        str(image_files[1]),
        image_files[2].read_bytes(),
        Image.open(image_files[3]),
        np.asarray(Image.open(image_files[4])),
        *image_files[5:],
    ]
    seen = []
    for size in (1, 2, 4, 9, 100):
        result = embedder.embed(iter(mixed), bases, batch_size=size, progress=seen.append)
        np.testing.assert_allclose(result["color"], expected["color"], atol=1e-4)
        assert seen[-1] == 9
    stacked = np.stack([np.asarray(Image.open(path)) for path in image_files])
    np.testing.assert_allclose(embedder.embed(stacked).universal, expected.universal, atol=1e-4)


def test_a_long_iterable_is_not_held_in_memory(embedder):
    taken = 0

    def images():
        nonlocal taken
        for _ in range(40):
            taken += 1
            yield np.zeros((8, 8, 3), np.uint8)

    ahead = []
    embedder.embed(images(), batch_size=4, progress=lambda done: ahead.append(taken - done))
    assert taken == 40 and max(ahead) <= 4


def test_no_images(embedder, bases):
    result = embedder.embed([], bases)
    assert result.universal.shape == (0, embedder.bundle.embedding_dim)
    assert result["color"].shape == (0, 3) and result.ok.shape == (0,)


def test_one_bad_image_loses_nothing(embedder, bases, image_files, tmp_path):
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(image_files[0].read_bytes()[:300])
    images = [
        image_files[0],
        truncated,
        image_files[1],
        b"",
        np.zeros((4, 4), np.float32),
        image_files[2],
    ]
    good = [True, False, True, False, False, True]
    expected = embedder.embed(image_files[:3], bases)

    collected = embedder.embed(images, bases, on_error="collect", batch_size=2)
    with pytest.raises(ImageBatchError) as caught:
        embedder.embed(images, bases, batch_size=2)
    for result in (collected, caught.value.result):
        assert result.ok.tolist() == good and sorted(result.errors) == [1, 3, 4]
        np.testing.assert_allclose(result["color"][good], expected["color"], atol=1e-4)
        assert np.isnan(result["color"][1]).all() and np.isnan(result.universal[3]).all()
    message = str(caught.value)
    assert str(truncated) in message and "image 3" in message and "on_error" in message


def test_criteria_that_are_not_there(embedder, bases, image_files):
    with pytest.raises(
        CriterionError, match=r"no basis 'mood' is loaded, the loaded ones are \[\]"
    ):
        embedder.embed(image_files, ["mood"])
    with pytest.raises(CriterionError, match="expected a criterion"):
        embedder.embed(image_files, ["../mood"])
    with pytest.raises(CriterionError, match="no basis 'mood' is loaded"):
        embedder.embed(image_files, "mood")
    with pytest.raises(InvalidInputError, match="each criterion once"):
        embedder.embed(image_files, [bases[0], bases[0]])
    with pytest.raises(CriterionError, match=r"it has \['color'\]"):
        _ = embedder.embed(image_files, bases[:1])["shape"]


def test_named_bases(tmp_path, image_files):
    with Embedder.open(demo_bundle(), threads=1) as own:
        made = own.create_basis("color", COLOURS, prompts=["a photo of {} things"])
        made.save(tmp_path / "color.safetensors")
        first = own.embed(image_files, ["COLOR"])["color"]
    with Embedder.open(demo_bundle()) as other:
        other.add_basis(tmp_path / "color.safetensors")
        assert list(other.bases) == ["color"]
        np.testing.assert_allclose(other.embed(image_files, ["color"])["color"], first, atol=1e-5)


def test_a_basis_of_another_model(embedder, bases, image_files):
    foreign = build_basis("color", COLOURS, embedder.embed_text, fingerprint="00" * 32)
    for use in (
        lambda: embedder.embed(image_files, [foreign]),
        lambda: embedder.add_basis(foreign),
        lambda: embedder.project(np.zeros((1, embedder.bundle.embedding_dim)), foreign),
    ):
        with pytest.raises(BasisMismatchError, match="crl basis create 'color'"):
            use()


def test_bad_arguments(embedder, bases, image_files):
    for single in (image_files[0], str(image_files[0]), b"jpeg", np.zeros((8, 8, 3), np.uint8), 7):
        with pytest.raises(InvalidInputError, match=r"pass \[image\]"):
            embedder.embed(single)
    with pytest.raises(InvalidInputError, match="batch_size"):
        embedder.embed(image_files, batch_size=0)
    with pytest.raises(InvalidInputError, match="on_error"):
        embedder.embed(image_files, on_error="ignore")
    d = embedder.bundle.embedding_dim
    for embeddings, words in [
        (np.full((2, d), np.nan, np.float32), "the first at row 0"),
        (np.zeros((2, d + 1), np.float32), "shape"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            embedder.project(embeddings, bases[0])
    with pytest.raises(InvalidInputError, match="empty list"):
        embedder.embed_text([])


def test_engines_that_are_not_there():
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        Embedder.open(demo_bundle(), engine="onnx/cuda")
    for wrong in ("onnx/tpu", "onnx/cpu/fp8", "onnx/cp", ""):
        with pytest.raises(InvalidInputError, match=r"expected an engine of .*onnx/cpu/fp32"):
            Embedder.open(demo_bundle(), engine=wrong)
    with pytest.raises(InvalidInputError, match="threads"):
        Embedder.open(demo_bundle(), threads=0)
    with pytest.raises(BundleError, match="no readable"):
        Embedder.open("nowhere")


def test_a_failing_engine_is_a_typed_error(embedder):
    d = embedder.bundle.embedding_dim
    with pytest.raises(EngineError, match=r"the run failed on image \(1, 3, 3, 3\)"):
        embedder._image_engine.run(
            np.zeros((1, 3, 3, 3), np.uint8),
            np.zeros((d + 1, 1), np.float32),
            np.zeros(1, np.float32),
        )


def test_threads_share_an_embedder(embedder, bases, image_files):
    expected = embedder.embed(image_files, bases)["color"]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: embedder.embed(image_files, bases)["color"], range(8)))
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_precisions_of_the_bundle_agree(embedder, image_files):
    """Each precision agrees with fp32 within the recorded parity and a margin."""
    reference = embedder.embed(image_files).universal
    for graph in embedder.bundle.manifest.images:
        with Embedder.open(demo_bundle(), engine=f"onnx/cpu/{graph.precision}") as other:
            assert other.engine == f"onnx/cpu/{graph.precision}"
            cosines = (other.embed(image_files).universal * reference).sum(axis=1)
        assert cosines.min() > (0.98 if graph.precision == "int8" else 0.9995)


def test_one_call_from_a_criterion_in_words_to_its_basis(embedder, image_files):
    """The language model has known answers; everything else is real."""
    llm = Scripted(" red, green, blue, yellow, pink\n")
    seen = []
    with Embedder.open(embedder.bundle) as own:
        own.create_basis("shape", SHAPES)
        basis = own.generate_basis(
            "Main  color", llm=llm, options=GenerationOptions(max_answers=3, exclude=("pink",)),
            prompts=["a photo of {} things"], against=["shape"], progress=seen.append,
        )  # fmt: skip
        assert basis.criterion == "main color" and basis.texts == ("red", "green", "blue", "yellow")
        assert basis.method == "contrastive" and basis.provenance["against"] == ["shape"]
        assert basis.provenance["votes"] == dict.fromkeys(basis.texts, 3)
        assert basis.provenance["model"] == {"name": "scripted"}
        assert seen[-1] == GenerationProgress(answers=2, max_answers=3, tokens=3, seconds=0.5)
        assert own.embed(image_files[:2], ["main color"])["main color"].shape == (2, 3)


def test_generated_texts_can_be_seen_and_edited_before_a_basis_is_made(embedder):
    llm = Scripted(" red, green, blue, yellow, pink\n")
    with Embedder.open(embedder.bundle) as own:
        texts = own.generate_texts("color", llm=llm, options=GenerationOptions(max_answers=3))
        assert not own.bases
        basis = own.create_basis("color", texts, load=False, provenance={"checked by": "me"})
        assert not own.bases
        made_with = {"background": 400, "weights": basis.provenance["weights"]}
        assert basis.provenance == {**texts.provenance, "checked by": "me", **made_with}
        edited = own.create_basis("color", [each.text for each in texts.texts[:3]])
        assert edited.texts == ("red", "green", "blue") and own.bases["color"] is edited
        with pytest.raises(UnknownCriterionError, match="no basis 'mood' is loaded"):
            own.generate_basis("color", llm=llm, against=["mood"])
        with pytest.raises(GenerationError, match="no such file"):
            own.generate_basis("color", llm="nowhere.gguf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "expected a method"),
        ({"method": "tangent", "against": ["shape"]}, "'tangent' takes no other criteria"),
        ({"ignore": ["shape"], "criterion": "Shape"}, "got 'shape' itself"),
        ({"merge_threshold": 0}, "merge_threshold"),
        ({"post": "magic"}, "expected post"),
        ({"prompts": ["no place"]}, "exactly one {}"),
        ({"against": ["shape"], "criterion": "Shape"}, "got 'shape' itself"),
    ],
)
def test_bad_options_are_refused_before_the_language_model_is_asked(embedder, options, words):
    llm = Scripted(" red, green, blue, yellow, pink\n")
    with Embedder.open(embedder.bundle) as own:
        own.create_basis("shape", SHAPES)
        with pytest.raises(InvalidInputError, match=words):
            own.generate_basis(**{"criterion": "color", "llm": llm, **options})
    assert not llm.asked


def test_without_a_text_tower_no_language_model_is_asked():
    llm = Scripted(" red, green, blue, yellow, pink\n")
    bundle = ModelBundle.open(demo_bundle())
    images_only = ModelBundle(bundle.path, replace(bundle.manifest, text=None))
    with Embedder.open(images_only) as own, pytest.raises(BundleError, match="no text tower"):
        own.generate_basis("color", llm=llm)
    assert not llm.asked


def test_a_single_prompt_may_be_a_string(embedder):
    llm = Scripted(" red, green, blue, yellow, pink\n")
    options = GenerationOptions(max_answers=3)
    with Embedder.open(embedder.bundle) as own:
        one = own.generate_basis("color", llm=llm, options=options, prompts="a {} thing")
        listed = own.generate_basis("color", llm=llm, options=options, prompts=["a {} thing"])
    assert one.to_bytes() == listed.to_bytes() and one.prompts == ("a {} thing",)


def test_one_criterion_needs_no_list(embedder, bases, image_files):
    listed = embedder.create_basis("color", COLOURS, against=[bases[1]], load=False)
    alone = embedder.create_basis("color", COLOURS, against=bases[1], load=False)
    assert alone.to_bytes() == listed.to_bytes()
    rows = embedder.embed(image_files, alone)["color"]
    np.testing.assert_array_equal(rows, embedder.embed(image_files, [alone])["color"])


def test_from_words_to_named_clusters_with_the_default_language_model(tmp_path):
    """The example of README.md on few scenes, with few answers."""
    files, _ = read_labels(write_dataset(tmp_path, 60, TEST_SEED))
    with Embedder.open(demo_bundle()) as own:
        basis = own.generate_basis("color", options=GenerationOptions(max_answers=4))
        result = own.embed(files, [basis])
    found = cluster(result["color"], 5, basis=basis, universal=result.universal)
    assert {"red", "blue"} & set(basis.texts)
    assert any(group.name.text in basis.texts for group in found.clusters)


def test_objects_print_what_they_are(embedder, bases, image_files):
    assert repr(bases[0]) == (
        "Basis('color', 4 texts: 'red', 'green', 'blue', …; contrastive, 128 → 3, "
        f"model {embedder.bundle.fingerprint[:12]}…)"
    )
    assert repr(bases[0].projection) == "Projection(128 → 3, post 'l2')"
    result = embedder.embed([*image_files, b"junk"], bases[0], on_error="collect")
    assert repr(result) == "Embeddings(10 images, 1 failed; universal 128, color 3; float32)"
    assert repr(embedder).startswith(f"Embedder('crl-demo', {embedder.engine}; criteria: ")
    index = Index({"color": result["color"][result.ok]}, universal=result.universal[result.ok])
    assert repr(index) == "Index(9 images; criteria: 'color', with universal embeddings)"
    assert repr(BasisDirectory("bases")) == "BasisDirectory('bases')"
    with Client("localhost:50051") as client:
        assert repr(client) == "Client('localhost:50051')"
    assert repr(AsyncClient("localhost:50051")) == "AsyncClient('localhost:50051')"


def test_a_curated_list_is_recorded_as_one(embedder):
    basis = embedder.create_basis("season", curated_lists()["season"], load=False)
    assert "spring" in basis.texts
    assert basis.provenance["texts"] == "curated" and basis.provenance["list"] == "season"
