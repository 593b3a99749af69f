"""Forget one class of your own image folder with a torchvision ResNet-18.

The folder holds one subfolder per class:
    python examples/resnet18_image_folder.py photos --forget cat [--method ssd]

Without a folder a small one is drawn (coloured shapes), so that the example runs anywhere.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import palimpsest as pal
from palimpsest.models import build_model


def draw_shapes(folder: Path, per_class: int = 60, size: int = 32) -> Path:
    """Images of circles, squares and triangles in random colours and places."""
    random = np.random.default_rng(0)
    for name in ("circle", "square", "triangle"):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            image = Image.new("RGB", (size, size), tuple(random.integers(0, 90, 3).tolist()))
            draw, colour = ImageDraw.Draw(image), tuple(random.integers(150, 256, 3).tolist())
            x, y, r = random.integers(10, size - 10), random.integers(10, size - 10), random.integers(6, 9)
            if name == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            elif name == "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
            else:
                draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
            image.save(folder / name / f"{index:03d}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="image folder, one subfolder per class")
    parser.add_argument("--forget", default="circle", help="name of the class to forget")
    parser.add_argument("--method", default="ssd")
    parser.add_argument("--size", type=int, default=32, help="images are resized to this")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--controls", type=int, default=2, help="retrained models to compare with")
    parser.add_argument("--out", default="runs/resnet18.html")
    settings = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        folder = settings.folder or draw_shapes(Path(place) / "shapes")
        records = pal.load_data("image-folder", root=folder, size=settings.size, preload=True)
    classes = len(set(records.column("label").tolist()))
    parts = pal.split(records, forget=pal.by_column("class", settings.forget), test=0.2, holdout=0.2)
    task = pal.tasks.Classification()
    runtime = pal.Runtime(seed=0, progress=True)
    network = build_model("torchvision:resnet18", (3, settings.size, settings.size), classes)
    model = pal.train(network, parts.train, task=task, epochs=settings.epochs, runtime=runtime)
    unlearned = pal.forget(model, parts, method=settings.method, task=task, runtime=runtime)
    retrained = [
        pal.forget(model, parts, method="retrain", task=task, runtime=runtime.with_seed(1 + index))
        for index in range(settings.controls)
    ]
    report = pal.audit(
        original=model, unlearned=unlearned, retrained=retrained, split=parts, task=task, runtime=runtime
    )
    print(f"{settings.method} on '{settings.forget}': {report.verdict}")
    print("\n".join(f"  {reason}" for reason in report.reasons))
    print(f"report: {report.save(settings.out)}")


if __name__ == "__main__":
    main()
