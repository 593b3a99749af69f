"""The ten lines of the documentation, as a user would type them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def test_the_ten_lines_work_on_the_users_own_model_and_data(tmp_path):
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    ids = [f"scan-{index}" for index in range(len(labels))]
    people = [f"p{index % 40}" for index in range(len(labels))]
    torch.manual_seed(0)
    own_model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    import palimpsest as pal

    records = pal.Records(dataset, ids=ids, columns={"label": labels, "subject": people})
    parts = pal.split(records, forget=pal.by_column("subject", "p17"), test=0.2, holdout=0.2, seed=0)
    task = pal.tasks.Classification()
    model = pal.train(own_model, parts.train, task=task, epochs=20, seed=0)
    unlearned = pal.forget(model, parts, method="ssd", task=task, seed=0, alpha=10.0)
    retrained = pal.forget(model, parts, method="retrain", task=task, seed=0)
    report = pal.audit(
        original=model, unlearned=unlearned, retrained=[retrained], split=parts, task=task, seed=0
    )
    assert report.verdict in {
        "removed", "suppressed", "incomplete", "intact", "over-forgotten", "damaged", "inconclusive",
    }  # fmt: skip
    assert report.reasons and len(report.findings) > 20
    frame = report.to_frame()
    assert {"audit", "name", "value", "low", "high", "n", "k"} <= set(frame.columns)
    assert len(frame) == len(report.findings)
    page = report.save(tmp_path / "report.html")
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    stored = json.loads(report.save(tmp_path / "report.json").read_text())
    assert stored["verdict"] == report.verdict


def test_importing_palimpsest_imports_no_torch():
    code = "import sys, palimpsest; assert 'torch' not in sys.modules; print(palimpsest.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_every_public_name_can_be_reached():
    import palimpsest as pal

    for name in pal.__all__:
        assert getattr(pal, name) is not None
    assert callable(pal.forget) and callable(pal.audit)
    with pytest.raises(AttributeError, match="no attribute 'unlearn'"):
        pal.unlearn  # noqa: B018


def test_packages_and_verbs_of_one_name_live_together():
    import palimpsest as pal
    from palimpsest.forget.classifier.ssd import SSD

    assert pal.forget.classifier.ssd.SSD is SSD and callable(pal.forget)
