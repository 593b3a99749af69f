"""Forget the class "sneaker" of Fashion-MNIST (60,000 images) with SSD and audit it.

The files come from Debian's package dataset-fashion-mnist or any torchvision root:
    python examples/fashion_mnist.py [--root FOLDER] [--method ssd] [--epochs 3]
"""

from __future__ import annotations

import argparse

import palimpsest as pal
from palimpsest.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=None, help="folder of the idx files; Debian's by default")
    parser.add_argument("--forget", default="sneaker", help="name of the class to forget")
    parser.add_argument("--method", default="ssd")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=None, help="only the first so many images")
    parser.add_argument("--out", default="runs/fashion-mnist.html")
    settings = parser.parse_args()

    runtime = pal.Runtime(seed=0, progress=True)
    records = pal.load_data("fashion-mnist", root=settings.root, limit=settings.limit)
    parts = pal.split(records, forget=pal.by_column("class", settings.forget), test=0.1, holdout=0.1)
    task = pal.tasks.Classification()
    network = build_model("small_cnn", (1, 28, 28), 10, seed=0)
    model = pal.train(network, parts.train, task=task, epochs=settings.epochs, runtime=runtime)
    unlearned = pal.forget(model, parts, method=settings.method, task=task, runtime=runtime)
    retrained = [
        pal.forget(model, parts, method="retrain", task=task, runtime=runtime.with_seed(seed))
        for seed in (1, 2)
    ]
    report = pal.audit(
        original=model, unlearned=unlearned, retrained=retrained, split=parts, task=task, runtime=runtime
    )
    print(f"{settings.method} on '{settings.forget}': {report.verdict}")
    print("\n".join(f"  {reason}" for reason in report.reasons))
    print(f"report: {report.save(settings.out)}")


if __name__ == "__main__":
    main()
