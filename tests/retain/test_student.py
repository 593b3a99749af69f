from __future__ import annotations

import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFiniteLoss, UnreadableCheckpoint
from palimpsest.core.records import Records
from palimpsest.models import build_model
from palimpsest.retain import Student, Training, build_learner, learn, parse_stream
from palimpsest.retain.augmentation import AUGMENTATIONS, crop, flip, jitter, view
from palimpsest.retain.evaluation import TestSet
from palimpsest.retain.heads import masked, outputs_of, resize_head
from palimpsest.retain.state import load_state, save_state
from palimpsest.tasks.classification import Classification


def student_of(model, cpu, classes, training=None, scenario="class"):
    return Student(model, Classification(), cpu(), training or Training(), scenario, classes)


def test_a_head_that_grows_keeps_its_rows_and_answers(small_mlp):
    model, inputs = small_mlp(4), torch.rand(5, 1, 8, 8)
    before = model(inputs)
    resize_head(model, 7)
    assert outputs_of(model) == 7 and model.head.out_features == 7
    torch.testing.assert_close(model(inputs)[:, :4], before, atol=0, rtol=0)
    assert (model.head.weight[4:].abs().sum(1) > 0).all()
    resize_head(model, 2)
    torch.testing.assert_close(model(inputs), before[:, :2])


def test_a_head_without_bias_grows_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    resize_head(model, 5)
    assert model[2].weight.shape == (5, 4) and model[2].bias is None


def test_masks_may_be_for_all_rows_or_one_per_row():
    logits = torch.zeros(2, 3)
    assert masked(logits, torch.tensor([True, False, True])).isinf().sum(0).tolist() == [0, 2, 0]
    rows = torch.tensor([[True, False, False], [False, True, True]])
    assert masked(logits, rows).isinf().tolist() == (~rows).tolist()


def test_a_model_with_other_outputs_than_the_stream_has_classes_is_refused(small_mlp, cpu):
    with pytest.raises(ModelMismatch, match="5 outputs, the stream 6 classes"):
        student_of(small_mlp(5), cpu, 6)


def test_a_diverging_loss_is_refused_before_it_does_harm(small_mlp, cpu, few_digits):
    student = student_of(small_mlp(6), cpu, 6)
    stream = parse_stream("class:1x6", few_digits)
    with student.learning(stream[0]), pytest.raises(NonFiniteLoss, match="smaller lr"):
        student.step(student.logits({"input": torch.rand(2, 1, 8, 8)}).sum() * float("nan"))


def test_an_online_stream_is_seen_once_whatever_the_epochs(few_digits, small_mlp, cpu):
    stream = parse_stream("class:3x2:online", few_digits)
    outcome = learn(
        "finetune", stream, small_mlp(6), training=Training(epochs=9, batch_size=16), runtime=cpu()
    )
    assert outcome.steps == sum(-(-len(experience.records) // 16) for experience in stream)


def test_the_optimizer_may_live_on_over_experiences(few_digits, small_mlp, cpu, weights):
    stream = parse_stream("domain:permuted:2", few_digits)
    kept, fresh = (
        learn(
            "finetune", stream, small_mlp(6), runtime=cpu(),
            training=Training(epochs=2, lr=0.01, optimizer="adam", keep_optimizer=keep),
        )
        for keep in (True, False)
    )  # fmt: skip
    assert not torch.equal(weights(kept.learner), weights(fresh.learner))


def test_a_kept_optimizer_is_resumed(few_digits, small_mlp, cpu, weights, tmp_path):
    from palimpsest.retain import Run

    stream = parse_stream("domain:permuted:2", few_digits)
    training = Training(epochs=2, lr=0.01, optimizer="adam", keep_optimizer=True)

    def run():
        return Run(build_learner("finetune"), stream, small_mlp(6), training=training, runtime=cpu())

    whole, first, second = run(), run(), run()
    whole.advance(), whole.advance(), first.advance()
    save_state(first.state_dict(), tmp_path / "state")
    second.load_state_dict(load_state(tmp_path / "state"))
    second.advance()
    assert torch.equal(weights(whole.learner), weights(second.learner))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_views_have_the_shape_of_the_images_and_come_from_their_generator(augmentation):
    images = torch.rand(6, 2, 8, 10)
    one, again = (view(images, augmentation, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == images.shape and torch.equal(one, again)
    assert torch.equal(one, images) == (augmentation == "none")


def test_each_view_is_what_it_says():
    images = torch.arange(1.0, 65).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    flipped = flip(images, torch.Generator().manual_seed(0))
    turned = [torch.equal(one, image.flip(-1)) for one, image in zip(flipped, images, strict=True)]
    same = [torch.equal(one, image) for one, image in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(turned, same, strict=True)) and 10 < sum(turned) < 40
    shifts = {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    padded = torch.zeros(10, 10)
    padded[1:9, 1:9] = images[0, 0]
    windows = [padded[1 + dy : 9 + dy, 1 + dx : 9 + dx] for dy, dx in shifts]
    for cropped in crop(images, torch.Generator().manual_seed(0)):
        assert any(torch.equal(cropped[0], window) for window in windows)
    assert (jitter(images, torch.Generator().manual_seed(0)) - images).abs().mean() > 0.1


def test_images_are_needed_for_views_of_images():
    with pytest.raises(ModelMismatch, match="needs images"):
        view(torch.rand(4, 7), "flip", torch.Generator())
    with pytest.raises(InvalidHyperparameter, match="augmentation must be one of"):
        Training(augmentation="mixup")


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"lr": -1.0}, {"batch_size": 0}, {"momentum": 1.0}, {"clip": 0.0}, {"optimizer": "lion"}],
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        Training(**settings)


def test_evaluation_sets_are_drawn_once_and_mixed(few_digits, cpu):
    stream = parse_stream("class:3x2", few_digits)
    one, two = (TestSet(stream.experiences, Classification(), cpu(), False, subset=7) for _ in range(2))
    assert one.sizes == (7, 7, 7) and torch.equal(one.labels, two.labels)
    assert one.places.tolist() != sorted(one.places.tolist())

    class Oracle:
        def predict(self, batch):
            assert set(batch) == {"input"}
            return one.labels

    assert one.accuracies(Oracle()) == [1.0, 1.0, 1.0]


def test_a_state_of_any_nesting_comes_back_and_a_damaged_file_is_refused(tmp_path):
    state = {"a": torch.arange(3), "b": {0: [1, 2.5, None, "x", {"c": torch.ones(2, 2)}], "1": True}, "d": []}
    save_state(state, tmp_path / "state")
    found = load_state(tmp_path / "state")
    assert torch.equal(found["a"], state["a"]) and torch.equal(found["b"][0][4]["c"], torch.ones(2, 2))
    assert found["b"][0][:4] == [1, 2.5, None, "x"] and found["b"]["1"] is True and found["d"] == []
    data = (tmp_path / "state").read_bytes()
    for cut in (0, 7, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(UnreadableCheckpoint, match="cut short"):
            load_state(tmp_path / "cut")
    with pytest.raises(UnreadableCheckpoint):
        load_state(tmp_path / "absent")


def test_texts_are_learned_class_by_class(cpu):
    import palimpsest as pal

    texts = pal.load_data("intents")
    from palimpsest.data.intents import vocabulary

    stream = parse_stream("task:2x2", texts)
    model = build_model("text_transformer", (20,), 4, seed=0, vocabulary=len(vocabulary()), depth=0)
    training = Training(epochs=6, lr=0.01, optimizer="adam")
    outcome = learn("er", stream, model, training=training, runtime=cpu(), memory=40)
    assert outcome.matrix.average > 0.8


def test_tables_are_learned_class_by_class(cpu):
    from sklearn.datasets import load_wine
    from torch.utils.data import TensorDataset

    rows, labels = load_wine(return_X_y=True)
    rows = (rows - rows.mean(0)) / rows.std(0)
    table = Records(TensorDataset(torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)))
    model = build_model("mlp", (13,), 3, seed=0, width=32)
    training = Training(epochs=10, lr=0.05)
    outcome = learn(
        "er", parse_stream("class:3x1", table), model, training=training, runtime=cpu(), memory=30
    )
    assert outcome.matrix.average > 0.85


def test_joint_training_is_said_to_keep_all_earlier_records(few_digits, small_mlp, cpu):
    stream = parse_stream("class:3x2", few_digits)
    outcome = learn("joint", stream, small_mlp(6), training=Training(batch_size=32), runtime=cpu())
    sizes = [len(experience.records) for experience in stream]
    one = 64 * 4 + 8  # an image of float32 and a label of int64
    assert outcome.kept_bytes == (0, one * sizes[0], one * (sizes[0] + sizes[1]))
