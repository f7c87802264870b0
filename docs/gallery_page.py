"""Runs the examples, and makes docs/gallery.md of what they print and draw.

    python docs/gallery_page.py [NAME ...]

With names only these examples run again. What the others printed and drew is in build/gallery.
"""

import os
import subprocess
import sys
from pathlib import Path

from mlx_welford.bench.environment import environment
from PIL import Image

FOLDER = Path(__file__).parent
PAGE = FOLDER / "gallery.md"
PICTURES = FOLDER / "gallery"
EXAMPLES = FOLDER.parent / "examples"
KEPT = FOLDER.parent / "build" / "gallery"
LARGEST_PICTURE = 60_000  # bytes
WIDTH = 720  # pixels

INTRODUCTION = """\
# Gallery

<!-- Made by `make gallery`. -->

What the [examples](../examples/README.md) draw and print. Their tables repeat the same training
steps with the layers of `mlx.nn`, with those of this package, and with these *fused*: a
normalisation computes the activation behind it, and takes the bias of the convolution before it.
Time is that of loss and gradients. Memory is the peak of MLX's allocations in a step, without the
inputs. The distance is the largest between the losses of a step and those of `mlx.nn`. On a CPU
time and memory are mostly those of the convolutions; [performance](performance.md) measures the
normalisation alone. Nothing here was run on a GPU. The load average says how busy the machine was
with other work: above the number of cores, times scatter, and small differences say nothing.
"""
PARAGRAPHS = {
    "unet3d_volumes": """\
## A 3-D U-Net

Segmentation with the block of nnU-Net: convolution with a bias, InstanceNorm, LeakyReLU. Rows:
slices of noisy volumes that training did not see, the true classes, the predicted ones. Spheres are
blue, ellipsoids orange.
""",
    "dcgan_digits": """\
## A DCGAN

Digits from noise: BatchNorm with ReLU in the generator, with LeakyReLU in the discriminator. Two
rows of real digits are above the line, samples below.
""",
    "keyword_spotting": """\
## Keyword spotting

Tones, chirps and warbles in noise, recognised in log-mel spectrograms by convolutions with
BatchNorm and ReLU. The evaluation runs eagerly and under `mx.compile`.
""",
    "diffusion_digits": """\
## Diffusion

A U-Net with GroupNorm, SiLU and self-attention, conditioned on the class. Two rows of real digits
are above the line, samples of the same classes below.
""",
    "style_transfer": """\
## Style transfer

InstanceNorm removes the contrast of the image, so that the style can set its own: the photograph,
the style, the result.
""",
    "train_digits": """\
## Two trainings

A small ResNet, trained once with `mlx.nn.BatchNorm` and once with `mlx_welford.BatchNorm`, from the
same weights with the same batches.
""",
    "train_distributed": """\
## Two processes

The same network on shards of each batch: with SyncBatchNorm the losses are those of one process, up
to rounding, which training amplifies; with the statistics of each shard they are not. Time and
memory are those of one of the processes, which share the machine.
""",
}


def run(name: str) -> None:
    """Keeps what an example prints and draws, with the machine; stops if the example fails."""
    print(f"==> {name}", flush=True)
    where = machine()
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--output", f"{name}.png"]
    wide = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        command, cwd=KEPT, env=wide, stdout=subprocess.PIPE, text=True, check=True
    )
    (KEPT / f"{name}.txt").write_text(f"{where}\n{done.stdout}", encoding="utf-8")


def machine() -> str:
    found = environment()
    return (
        f"{found['date']}, {found['cpu']}, {found['cores']} cores, {found['system']}, "
        f"{found['device']}, mlx {found['mlx']}, load average {found['load_average']} at the start"
    )


def section(name: str) -> str:
    """The paragraph, picture, printed lines and table of an example."""
    where, *lines = (KEPT / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    text = [line.rstrip() for line in lines if line.strip() and line not in table]
    alt = PARAGRAPHS[name].partition("\n")[0].strip("# ")
    parts = [
        PARAGRAPHS[name],
        f"![{alt}](gallery/{name}.png)\n",
        "\n".join(["```text", *text, "```\n"]),
        "\n".join([*table, ""]),
        f"[`{name}.py`](../examples/{name}.py), {where}.\n",
    ]
    return "\n".join(parts)


def reduce(picture: Path, target: Path) -> None:
    """Writes a picture with fewer pixels and colours, as many as fit into LARGEST_PICTURE."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    for colours in (256, 128, 64, 32, 16):
        reduced = image.quantize(colours, dither=Image.Dither.NONE)
        reduced.save(target, optimize=True)
        if target.stat().st_size < LARGEST_PICTURE:
            return
    raise ValueError(f"{target} has {target.stat().st_size} bytes with {colours} colours.")


def main() -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    chosen = sys.argv[1:] or PARAGRAPHS
    if unknown := set(chosen) - PARAGRAPHS.keys():
        sys.exit(f"no such example: {', '.join(sorted(unknown))}")
    for name in PARAGRAPHS:
        if name in chosen or not (KEPT / f"{name}.txt").exists():
            run(name)
        reduce(KEPT / f"{name}.png", PICTURES / f"{name}.png")
    sections = map(section, PARAGRAPHS)
    PAGE.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
