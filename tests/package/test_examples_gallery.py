"""docs/gallery.md shows every example that draws, in pictures that are small."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs import gallery_page as gallery


def test_every_example_that_draws_is_there() -> None:
    drawing = {p.stem for p in gallery.EXAMPLES.glob("*.py") if "--output" in p.read_text("utf-8")}
    assert drawing == set(gallery.PARAGRAPHS)
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert page.startswith(gallery.INTRODUCTION)
    for name, paragraph in gallery.PARAGRAPHS.items():
        shown = page.partition(paragraph)[2].partition("\n## ")[0]
        assert f"(gallery/{name}.png)" in shown
        assert "\n| " in shown


def test_pictures_are_small() -> None:
    sizes = {path.stem: path.stat().st_size for path in gallery.PICTURES.iterdir()}
    assert sizes.keys() == gallery.PARAGRAPHS.keys()
    assert max(sizes.values()) < gallery.LARGEST_PICTURE
    assert sum(sizes.values()) < 400_000


def test_a_section_holds_what_was_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "KEPT", tmp_path)
    kept = "today, a machine\n\nDice: 1 \n    \n| a | b |\n|---|---|\n| 1 | 2 |\n"
    (tmp_path / "unet3d_volumes.txt").write_text(kept)
    made = gallery.section("unet3d_volumes")
    assert made.startswith(gallery.PARAGRAPHS["unet3d_volumes"])
    for text in (
        "\n\n![A 3-D U-Net](gallery/unet3d_volumes.png)\n",
        "\n\n```text\nDice: 1\n```\n",
        "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n",
        "(../examples/unet3d_volumes.py), today, a machine.\n",
    ):
        assert text in made


def test_a_picture_is_reduced_until_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Smooth with a little noise, like a photograph.
    x = np.linspace(0, 255, 1440)[None, :, None] * [1, 0.5, 0.2]
    values = x + np.random.default_rng(0).normal(0, 8, (200, 1440, 3))
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(large)
    assert large.stat().st_size > gallery.LARGEST_PICTURE
    gallery.reduce(large, small)
    assert small.stat().st_size < gallery.LARGEST_PICTURE
    reduced = Image.open(small).convert("RGB")
    assert reduced.size == (720, 100)
    expected = Image.open(large).resize((720, 100))
    assert abs(np.asarray(reduced, np.float64) - np.asarray(expected)).mean() < 12

    monkeypatch.setattr(gallery, "LARGEST_PICTURE", 100)
    with pytest.raises(ValueError, match="bytes with 16 colours"):
        gallery.reduce(large, small)
