"""What the claims of geometric disentanglement measure, on curves and models where it is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import palimpsest as pal
from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.study.claims.gu import (
    _tiny_ratios,
    left_along_retain,
    left_along_retain_off,
    rise_at,
    token_measures,
)
from palimpsest.study.claims.measuring import Setting
from palimpsest.tasks.language import Language

ROWS = [{"question": f"Who is number {at}?", "answer": f"someone {at * 7} of {at * 3}"} for at in range(8)]


@pytest.fixture(scope="module")
def setting() -> Setting:
    """An untrained model: gradients of forgotten and retained answers are alike, so that they conflict."""
    task = Language(byte_pair_tokenizer([row["question"] + row["answer"] for row in ROWS], 300))
    records = Records(ROWS)
    split = ForgetSplit(records.select(range(4)), records.select(range(4, 8)))
    model = small_llama(len(task.encoder), width=16, layers=1, heads=2)
    return Setting(model, split, task, pal.Runtime(device="cpu"))


def test_the_rise_is_read_off_between_the_last_two_looks():
    curve = [(0.9, 0.5), (0.4, 1.0), (0.1, 2.5)]
    assert rise_at(curve, 0.2) == pytest.approx(1.0 + 2 / 3 * 1.5 - 0.5)
    assert rise_at([(0.9, 0.5), (0.2, 1.5)], 0.2) == pytest.approx(1.0)
    assert rise_at([(0.1, 0.5)], 0.2) == 0


def test_token_measures_are_means_over_answer_tokens(setting: Setting):
    task: Any = setting.task
    right = losses = count = 0.0
    for row in ROWS[:4]:
        ids, start = task.encode(row["question"], row["answer"])
        with torch.no_grad():
            log_p = setting.original(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(start, len(ids)):
            right += float(log_p[at - 1].argmax() == ids[at])
            losses -= float(log_p[at - 1, ids[at]])
            count += 1
    found = token_measures(setting.original, setting.split.forget, task, setting.runtime)
    assert found == pytest.approx((right / count, losses / count), rel=1e-5)


def test_gu_takes_out_what_is_there_without_it(setting: Setting):
    assert left_along_retain(setting) <= 1e-5 < 1e-2 < left_along_retain_off(setting)


def test_a_tiny_step_of_first_order_spares_the_retained_batch_and_not_the_forgotten(setting: Setting):
    forget, retain = _tiny_ratios(setting, 1e-5)
    assert retain <= 0.05 and 0 < forget <= 1 + 1e-6 and not math.isnan(forget)
