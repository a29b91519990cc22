"""Clients: resizing before sending, one version of a basis per result, results, generation."""

from __future__ import annotations

import inspect
import io
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from crl_sdk import AsyncClient, Basis, Client, Embedder
from crl_sdk.client import ClientOptions, ClientSecurity
from crl_sdk.client._messages import stale_parts
from crl_sdk.errors import (
    BasisError,
    BasisExistsError,
    ClosedError,
    ImageBatchError,
    InvalidInputError,
    MissingDependencyError,
    NotOfferedError,
    ServiceError,
    UnknownCriterionError,
)
from crl_sdk.projection import decode_rows
from support import unseen_image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def awkward_images() -> dict[str, object]:
    """Images of all the forms that preprocessing treats differently."""
    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 255, (150, 201, 3), np.uint8))
    rgba = Image.fromarray(random.integers(0, 255, (90, 130, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    deep = Image.fromarray(random.integers(0, 65535, (60, 60), np.uint16))
    return {
        "jpeg": encoded(rgb, "JPEG", quality=80),
        "turned": encoded(rgb, "JPEG", exif=exif),
        "alpha": encoded(rgba, "PNG"),
        "palette": encoded(rgb.convert("P"), "PNG"),
        "grey": encoded(rgb.convert("L"), "PNG"),
        "deep": encoded(deep, "PNG"),
        "wide": encoded(rgb.resize((900, 40)), "PNG"),
        "tall": encoded(rgb.resize((31, 700)), "PNG"),
        "tiny": encoded(rgb.resize((3, 2)), "PNG"),
        "exact": encoded(rgb.resize((96, 96)), "PNG"),
        "pixels": random.integers(0, 255, (33, 77, 3), np.uint8),
        "pil": rgba,
    }


def test_resizing_before_sending_changes_no_bit(server):
    images = awkward_images()
    with Client(server.address) as far, Client(server.address, ClientOptions(resize=True)) as near:
        there = far.embed(list(images.values()), ["color"])
        here = near.embed(list(images.values()), ["color"])
    assert not here.cached.any()  # the cache knows files, and these were pixels
    for i, name in enumerate(images):
        np.testing.assert_array_equal(here.universal[i], there.universal[i], err_msg=name)
    np.testing.assert_array_equal(here["color"], there["color"])


def test_pixels_of_a_model_that_crops_are_not_resized_twice(serve, cropping_bundle):
    """The client sends what is left of the crop, and the server takes it as it is."""
    with Embedder.open(cropping_bundle) as embedder:
        server = serve(embedder)
        images = list(awkward_images().values())
        with (
            Client(server.address) as far,
            Client(server.address, ClientOptions(resize=True)) as near,
        ):
            assert far.model().preprocessing.resize == (110, 121)
            there, here = far.embed(images).universal, near.embed(images).universal
            np.testing.assert_allclose(here, embedder.embed(images).universal, atol=1e-6)
            np.testing.assert_array_equal(here, there)

            # the same pixels as an image of their own are scaled and cropped again
            pixels = np.stack([embedder.load_pixels(image) for image in images])
            again = near.embed(list(pixels)).universal
            np.testing.assert_allclose(again, embedder.embed(list(pixels)).universal, atol=1e-6)
            assert np.abs(again - here).max() > 1e-3
            assert near.embed(images).cached.all()  # not mixed up in the cache


def test_what_cannot_be_resized_fails_alone(server, image_files):
    with Client(server.address, ClientOptions(resize=True)) as client:
        stored = client.embed([image_files[0]]).universal[0]
        with pytest.raises(ImageBatchError) as caught:
            client.embed([image_files[0], b"junk", "missing.jpg", stored], ["color"])
    assert sorted(caught.value.errors) == [1, 2]
    rows = caught.value.result["color"]
    np.testing.assert_allclose(rows[0], rows[3], atol=1e-6)
    assert np.isnan(rows[1:3]).all()


def test_resizing_without_pillow_names_the_extra(server, image_files, monkeypatch):
    monkeypatch.delitem(sys.modules, "crl_sdk.model._preprocess")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with (
        Client(server.address, ClientOptions(resize=True)) as client,
        pytest.raises(MissingDependencyError, match="runtime"),
    ):
        client.embed([image_files[0]])


def test_a_result_holds_one_version_of_a_basis(server, image_files):
    """The basis is replaced between the batches of one call."""
    with Client(server.address, ClientOptions(batch_size=2, max_in_flight=1)) as client:
        before = client.bases()[0].sha256

        def slowly():
            for number, path in enumerate(image_files):
                if number == 5:
                    with Client(server.address) as other:
                        other.create_basis("color", ["red", "blue", "white"])
                yield path if number != 1 else b"junk"

        result = client.embed(slowly(), ["color"], on_error="collect")
        whole = client.embed(image_files, ["color"])
    assert result.basis_sha256 == whole.basis_sha256 != {"color": before}
    good = [0, *range(2, 9)]
    np.testing.assert_allclose(result["color"][good], whole["color"][good], atol=1e-6)
    assert np.isnan(result["color"][1]).all() and list(result.errors) == [1]


def test_results_of_two_models_are_never_joined(client, image_files):
    from dataclasses import replace

    part = client.embed(image_files[:1])
    with pytest.raises(ServiceError, match="model was replaced"):
        stale_parts([part, replace(part, fingerprint="another")])


def test_errors_name_the_file_or_the_position_in_the_whole_list(server, image_files, tmp_path):
    (tmp_path / "notes.txt").write_text("junk")
    images = [*image_files[:3], b"junk", tmp_path / "notes.txt"]
    with Client(server.address, ClientOptions(batch_size=2)) as client:
        result = client.embed(images, on_error="collect")
    assert str(result.errors[3]).startswith("image 3: not a readable image")
    assert str(result.errors[4]).startswith(f"{tmp_path / 'notes.txt'}: not a readable image")


def test_one_batch_is_read_without_copies(client, image_files):
    rows = client.embed([path.read_bytes() for path in image_files], ["color"])["color"]
    assert rows.dtype == np.float32 and rows.shape[0] == 9
    assert not rows.flags.owndata and not rows.flags.writeable  # a view of the message


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("int8", 0.01)])
def test_smaller_dtypes(server, image_files, dtype, tolerance):
    images = [*image_files[:4], b"junk", "missing.jpg"]
    with Client(server.address, ClientOptions(batch_size=4)) as client:
        full = client.embed(images, ["color"], on_error="collect")
        small = client.embed(images, ["color"], on_error="collect", dtype=dtype)
        again = client.embed(list(small.universal[small.ok]), ["color"])  # stored rows, sent back
        (part,) = client.embed_batches(image_files[:2], dtype=dtype)
        with pytest.raises(InvalidInputError, match=r"float32, float16, int8, got 'bits'"):
            client.embed(images, dtype="bits")
    assert part.universal.dtype == dtype
    for rows, expected in ((small.universal, full.universal), (small["color"], full["color"])):
        assert rows.dtype == dtype and rows.shape == expected.shape
        np.testing.assert_allclose(decode_rows(rows), expected, atol=tolerance)  # NaN with NaN
    assert sorted(small.errors) == [4, 5] and np.isnan(decode_rows(small.universal[4:])).all()
    np.testing.assert_allclose(again["color"], full["color"][:4], atol=5 * tolerance)


def test_int8_is_refused_where_the_length_matters(server, image_files):
    with Client(server.address) as client:
        client.create_basis("finish", ["glossy", "matt"], post="none")
        assert client.embed(image_files[:1], ["finish"], dtype="float16")["finish"].shape == (1, 2)
        with pytest.raises(InvalidInputError, match="use float16, or make the basis with --post"):
            client.embed(image_files[:1], ["finish"], dtype="int8")


def test_a_basis_is_fetched_with_its_file(client, embedder, image_files):
    served = client.get_basis("Color")
    assert served.info == next(info for info in client.bases() if info.criterion == "color")
    basis = Basis.from_bytes(served.file)
    assert basis.texts == served.info.texts and basis.method == served.info.method
    rows = client.embed(image_files, ["color"])["color"]
    np.testing.assert_allclose(embedder.embed(image_files, [basis])["color"], rows, atol=1e-5)
    with pytest.raises(UnknownCriterionError, match="known are"):
        client.get_basis("weight")


def test_bases_are_not_replaced_if_told_so(server):
    with Client(server.address) as client:
        served = client.get_basis("color")
        with pytest.raises(BasisExistsError):
            client.put_basis(served.file, replace=False)
        with pytest.raises(BasisExistsError):
            client.create_basis("color", ["red", "blue"], replace=False)
        info = client.create_basis("finish", ["glossy", "matt"], post="none", replace=False)
        assert info.post == "none"


def test_no_public_method_returns_a_message():
    for name, method in inspect.getmembers(AsyncClient, inspect.isfunction):
        if not name.startswith("_"):
            assert "_pb2" not in str(inspect.signature(method)), name


def test_the_blocking_client_has_the_methods_of_the_other_one():
    public = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert public == {name for name in vars(Client) if not name.startswith("_")}
    for name in public - {"embed_batches", "close"}:
        blocking, other = getattr(Client, name), getattr(AsyncClient, name)
        assert inspect.signature(blocking) == inspect.signature(other)
        assert blocking.__doc__ == other.__doc__
        assert not inspect.iscoroutinefunction(blocking)


def test_a_client_that_cannot_be_made_leaves_no_thread():
    before = set(threading.enumerate())
    with pytest.raises(InvalidInputError, match="cannot be read"):
        Client(options=ClientOptions(security=ClientSecurity(authority="nowhere.pem")))
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name == "crl-client"]


def test_a_token_is_not_shown():
    assert "secret" not in repr(ClientOptions(security=ClientSecurity(token="secret")))


def test_generation_where_it_is_not_offered(client):
    with pytest.raises(NotOfferedError, match="--generate"):
        client.generate_basis("mood")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda client: client.embed_text("color"), "texts"),
        (lambda client: client.create_basis("hue", "color"), "texts"),
        (lambda client: client.create_basis("hue", ["a", "b"], prompts="color"), "prompts"),
        (lambda client: client.generate_basis("hue", include="color"), "include"),
        (lambda client: client.generate_basis("hue", exclude="color"), "exclude"),
    ],
)
def test_a_string_is_no_list_of_strings(client, call, word):
    """Protobuf would take it for the list of its letters."""
    with pytest.raises(InvalidInputError, match=rf"list of {word}, got one string.*\['color'\]"):
        call(client)


def test_one_criterion_may_be_a_string(client, image_files):
    alone = client.embed(image_files, "color")
    np.testing.assert_array_equal(alone["color"], client.embed(image_files, ["color"])["color"])
    (part,) = client.embed_batches(image_files, "color")
    assert list(part.conditional) == ["color"]
    texts = ["one", "two", "three"]
    assert client.create_basis("count", texts, against="shape").sha256 == (
        client.create_basis("count", texts, against=["shape"]).sha256
    )
    with pytest.raises(UnknownCriterionError, match="no basis 'mood'"):
        client.embed(image_files, "mood")


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"max_in_flight": 0}, {"retries": -1}, {"timeout": 0.0}],
)
def test_options_that_could_not_work_are_refused(options):
    (name,) = options
    with pytest.raises(InvalidInputError, match=f"expected {name} "):
        ClientOptions(**options)


@pytest.mark.parametrize("token", ["a-secret-of-some-length\n", "schlüssel-mit-umlaut", "a\tb"])
def test_tokens_that_cannot_be_sent_are_refused(token):
    with pytest.raises(InvalidInputError, match="printable ASCII") as caught:
        ClientSecurity(token=token)
    assert token.strip() not in str(caught.value)


def test_a_closed_client_says_so(server):
    client = Client(server.address)
    batches = client.embed_batches([np.full((9, 9, 3), i, np.uint8) for i in range(99)])
    next(batches)
    client.close()
    with pytest.raises(ClosedError, match="the client is closed"):
        client.model()
    with pytest.raises(ClosedError, match="the client is closed"):
        next(batches)


@pytest.mark.parametrize("state", ["waits for the server", "pauses before a retry"])
def test_closing_a_client_ends_the_calls_of_other_threads(serve, faked, engine, state):
    server = serve(faked, drain_seconds=0.1)
    engine.gate.clear()
    address = server.address if state == "waits for the server" else "127.0.0.1:1"
    client = Client(address, ClientOptions(retries=100))
    with ThreadPoolExecutor(1) as callers:
        call = callers.submit(client.embed, [unseen_image()])
        time.sleep(0.5)
        client.close()
        with pytest.raises(ClosedError, match="closed during the call"):
            call.result(timeout=10)
    engine.gate.set()


def test_a_message_over_the_size_limit_is_not_sent_again(server):
    options = ClientOptions(max_message_bytes=1000, timeout=20)
    with (
        Client(server.address, options) as client,
        pytest.raises(InvalidInputError, match=r"larger than max.*max_message_bytes"),
    ):
        client.embed([np.zeros((99, 99, 3), np.uint8)])


def test_which_criteria_a_result_has(client):
    result = client.embed([np.zeros((9, 9, 3), np.uint8)], ["color"])
    assert "color" in result and " Color" in result
    assert "shape" not in result and "" not in result and 0 not in result


def test_a_basis_file_that_cannot_be_read(client, tmp_path):
    with pytest.raises(BasisError, match=r"missing\.safetensors: cannot be read"):
        client.put_basis(tmp_path / "missing.safetensors")
