"""The page about models names architectures, tags, sizes and costs that open_clip has."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, commands

PAGE = ROOT / "docs" / "MODELS.md"
ROW = re.compile(
    r"\| `crl export (?P<name>\S+) --pretrained (?P<tag>\S+)` "
    r"\| (?P<image>[\d.]+) \+ (?P<text>[\d.]+) "
    r"\| (?P<gflops>[\d.]+) \| (?P<pixels>\d+) \| (?P<dim>\d+) \|"
)
ROWS = [match.groupdict() for match in ROW.finditer(PAGE.read_text())]


def test_every_command_names_an_architecture_and_a_tag_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    found = [words[2:] for _, words in commands(PAGE) if words[:2] == ["crl", "export"]]
    named = [words for words in found if "--pretrained" in words]
    assert len(named) > 12
    for name, *options in named:
        if not name[0].isupper() or name.isupper():
            continue  # a word that stands for a name, a directory or a repository
        weights = options[options.index("--pretrained") + 1]
        assert name in open_clip.list_models(), name
        if not weights.endswith((".pt", ".pth")) and weights != "FILE":
            assert (name, weights) in open_clip.list_pretrained(), (name, weights)
            tag = open_clip.get_pretrained_cfg(name, weights)
            assert tag.get("quick_gelu") or not name.endswith("-quickgelu"), (name, weights)


def test_the_table_is_read():
    assert len(ROWS) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_sizes_and_costs_are_those_of_the_model(row):
    """Counted on a model without memory; the costs with torch's own counter."""
    torch = pytest.importorskip("torch")
    open_clip = pytest.importorskip("open_clip")
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = open_clip.create_model(row["name"], pretrained_text=False, device="meta")
    model = model.to("meta").eval()
    image = sum(parameter.numel() for parameter in model.visual.parameters()) / 1e6
    every = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    size = int(row["pixels"])
    assert open_clip.get_model_config(row["name"])["vision_cfg"]["image_size"] == size
    with FlopCounterMode(display=False) as counter:
        embedding = model.encode_image(torch.zeros(1, 3, size, size, device="meta"))
    assert embedding.shape == (1, int(row["dim"]))
    assert float(row["image"]) == pytest.approx(image, abs=0.06)
    assert float(row["text"]) == pytest.approx(every - image, abs=0.06)
    assert float(row["gflops"]) == pytest.approx(counter.get_total_flops() / 1e9, abs=0.06)
