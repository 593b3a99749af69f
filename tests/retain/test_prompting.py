"""L2P, DualPrompt and CODA-Prompt: what they show the network, what trains, and what stays as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidStream, ModelMismatch
from palimpsest.models import build_model
from palimpsest.retain import Run, Training, build_learner, parse_stream
from palimpsest.retain.methods.coda_prompt import component_weights, fresh_rows, off_orthonormal
from palimpsest.retain.methods.dual_prompt import default_blocks
from palimpsest.retain.methods.l2p import nearest
from palimpsest.retain.prompting import anneal, cosines, new_class_loss

SETTINGS = {
    "l2p": {},
    "l2p++": {"pool": 12, "length": 4, "form": "prefix", "blocks": (0, 1), "read": "class"},
    "dual-prompt": {"tasks": 3, "general": 2, "expert": 4},
    "coda-prompt": {"tasks": 3, "pool": 12, "length": 4, "orthogonality": 0.1},
}
ADAM = Training(epochs=1, lr=0.01, batch_size=16, optimizer="adam")


@pytest.fixture(scope="session")
def stream(few_digits):
    return parse_stream("class:3x2", few_digits)


@pytest.fixture
def run_of(stream, tiny_vit, cpu):
    def made(name, model=None, training=ADAM, **changes):
        learner = build_learner(name.rstrip("+"), {**SETTINGS[name], **changes})
        return Run(learner, stream, model or tiny_vit(6), training=training, runtime=cpu())

    return made


each = pytest.mark.parametrize("name", SETTINGS)


@each
def test_the_encoder_stays_to_the_bit_and_in_evaluation_mode_and_loses_every_hook(name, run_of):
    run = run_of(name, training=Training(1, 0.05, 16, weight_decay=0.1, momentum=0.9))
    model = run.learner.student.model
    before = copy.deepcopy(model.state_dict())
    modes, step = [], run.learner.student.step

    def spy(loss):
        modes.append(any(module.training for module in model.modules()))
        hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]  # fmt: skip
        assert not hooks  # so that an evaluation after the step sees the network itself
        step(loss)

    run.learner.student.step = spy
    while not run.finished:
        run.advance()
    assert modes and not any(modes)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"head.weight", "head.bias"}
    assert list(model.state_dict()) == list(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each
def test_dropout_of_the_encoder_does_nothing_while_learning(name, run_of, tiny_vit):
    model = build_model("small_vit", (1, 8, 8), 6, width=16, layers=2, heads=2, patch=2, dropout=0.5)
    model.load_state_dict(tiny_vit(6).state_dict())
    with_dropout, without = run_of(name, model), run_of(name)
    for run in (with_dropout, without):
        run.advance()
    for one, other in zip(
        with_dropout.learner.student.parameters(), without.learner.student.parameters(), strict=True
    ):
        assert torch.equal(one, other)


@each
def test_networks_of_the_user_can_be_prompted(name, run_of):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=4, num_channels=1, num_labels=6,
    )  # fmt: skip
    run = run_of(name, ViTForImageClassification(config))
    prompts = next(iter(run.learner.student.attached.values()))
    before = [part.detach().clone() for part in prompts.parameters()]
    run.advance()
    assert not all(map(torch.equal, before, prompts.parameters()))


@each
def test_other_networks_are_refused(name, run_of):
    with pytest.raises(ModelMismatch, match="vision transformer"):
        run_of(name, build_model("small_cnn", (1, 8, 8), 6, width=4, hidden=8))


@each
def test_old_rows_of_the_head_do_not_move(name, run_of):
    run = run_of(name)
    run.advance()
    head = run.learner.student.model.head
    old, future = head.weight[:2].clone(), head.weight[4:].clone()
    run.advance()
    assert torch.equal(head.weight[:2], old) and torch.equal(head.weight[4:], future)
    assert not torch.equal(head.weight[2:4], run_of(name).learner.student.model.head.weight[2:4])


def test_the_loss_is_cross_entropy_among_the_new_classes_alone():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 3, 3, 2, 2])
    expected = F.cross_entropy(logits[:, 2:4], labels - 2)
    torch.testing.assert_close(new_class_loss(logits, labels, (2, 3)), expected)


def test_the_schedule_is_a_cosine_that_starts_again(run_of):
    student = run_of("l2p", training=Training(epochs=4, lr=0.2)).learner.student
    student.optimizer = student.training.build_optimizer(student.parameters())
    for epoch, share in ((0, 1.0), (1, (1 + math.sqrt(0.5)) / 2), (2, 0.5), (0, 1.0)):
        anneal(student, epoch)
        assert student.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * share)
    anneal(student, 3, annealed=False)
    assert student.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


# --- L2P


def test_every_record_picks_the_prompts_of_nearest_keys_or_the_batch_the_most_popular():
    queries = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.1]])
    keys = torch.tensor([[5.0, 0.0], [1.0, 1.0], [0.0, 0.1], [-4.0, 0.0]])
    similar = cosines(queries, keys)
    root = math.sqrt(0.5)
    torch.testing.assert_close(similar[:2], torch.tensor([[1, root, 0, -1], [0, root, 1, 0]]))
    assert nearest(similar, 2).tolist() == [[0, 1], [2, 1], [3, 2]]
    assert nearest(similar, 2, batchwise=True).tolist() == [[1, 2]] * 3  # picked twice each


def test_only_picked_prompts_and_keys_move_and_keys_move_towards_queries(run_of, stream):
    run = run_of("l2p", top=2, pool=10, batchwise=True)
    learner = run.learner
    keys, prompts = learner.keys.detach().clone(), learner.prompts.detach().clone()
    picked, shown = set(), learner.shown

    def spy(chosen):
        picked.update(chosen.flatten().tolist())
        return shown(chosen)

    learner.shown = spy
    learner.observe(stream[0])
    for number in range(10):
        moved = not torch.equal(learner.keys[number], keys[number])
        assert (
            moved == (number in picked) == (not torch.equal(learner.prompts[:, number], prompts[:, number]))
        )
    assert 2 <= len(picked) < 10
    inputs = torch.stack([stream[0].records[i]["input"] for i in range(len(stream[0].records))])
    queries = learner.student.features({"input": inputs})
    rows = sorted(picked)
    assert cosines(queries, learner.keys[rows]).mean() > cosines(queries, keys[rows]).mean()


def test_l2p_shows_picked_prompts_behind_the_class_token_and_reads_their_mean(run_of, stream):
    run = run_of("l2p")
    learner, model = run.learner, run.learner.student.model
    run.advance()
    x = stream[1].test.tensors["input"][:7]
    encoder = model.encoder
    with torch.no_grad():
        query = model.features(x)
        picked = (F.normalize(query, dim=1) @ F.normalize(learner.keys, dim=1).T).topk(5).indices
        hidden = encoder.embeddings(x)
        prompts = torch.stack([torch.cat([learner.prompts[0, n] for n in row]) for row in picked])
        hidden = torch.cat([hidden[:, :1], prompts, hidden[:, 1:]], 1)
        for layer in [module for module in encoder.modules() if type(module).__name__ == "ViTLayer"]:
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        logits = model.head(encoder.layernorm(hidden)[:, 1:26].mean(1))
        with learner.shown(picked):
            torch.testing.assert_close(model(x), logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(learner.predict({"input": x}), logits[:, :2].argmax(1))


# --- DualPrompt


def test_prompts_stand_where_they_were_published_or_in_the_same_ratio():
    assert default_blocks(12) == default_blocks(5) == ((0, 1), (2, 3, 4))
    assert [default_blocks(depth) for depth in (1, 2, 3, 4)] == [
        ((), (0,)), ((0,), (1,)), ((0,), (1, 2)), ((0, 1), (2, 3)),
    ]  # fmt: skip


def test_an_experience_moves_its_own_prompt_and_key_the_general_one_and_no_other(run_of):
    run = run_of("dual-prompt", training=Training(1, 0.05, 16, weight_decay=0.1))
    learner = run.learner
    for index in range(3):
        shared = learner.shared.detach().clone()
        before = [part.detach().clone() for part in (*learner.experts, *learner.keys)]
        run.advance()
        after = [*learner.experts, *learner.keys]
        moved = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]
        assert moved == [index, 3 + index]
        assert not torch.equal(shared, learner.shared)


def test_the_key_of_an_experience_turns_to_its_queries(run_of, stream):
    run = run_of("dual-prompt", training=Training(30, 0.05, 16, optimizer="adam"))
    learner, student = run.learner, run.learner.student
    run.advance()
    batch = {"input": torch.stack([item["input"] for item in stream[0].records])}
    queries = F.normalize(student.features(batch), dim=1)
    best = F.normalize(queries.mean(0), dim=0)  # the direction of largest mean cosine
    assert cosines(best[None], learner.keys[0][None]).item() > 0.99


def test_the_nearest_key_among_experiences_met_decides_when_predicting(run_of, stream):
    run = run_of("dual-prompt")
    learner, student = run.learner, run.learner.student
    run.advance()
    run.advance()
    inputs = stream[0].test.tensors["input"]
    queries = student.features({"input": inputs}).detach()
    one, other = next(
        (a, b) for a in range(12) for b in range(a) if cosines(queries[:a], queries[a : a + 1])[b] < 0.99
    )
    batch = {"input": inputs[[one, other, one]]}
    with torch.no_grad():
        learner.keys[0].copy_(queries[other])
        learner.keys[1].copy_(queries[one] * 3)
        learner.keys[2].copy_(queries[other] * 2)  # as near, but not met yet
    assert learner.chosen(batch).tolist() == [1, 0, 1]
    with torch.no_grad(), learner.shown(torch.tensor([1, 0, 1])):
        expected = student.logits(batch)[:, :4].argmax(1)
    assert torch.equal(learner.predict(batch), expected)
    told = {**batch, "task": torch.zeros(20, dtype=torch.long)}
    assert torch.equal(learner.predict(told), expected)


# --- CODA-Prompt


def test_components_are_weighed_by_attended_cosines():
    random = torch.Generator().manual_seed(0)
    q, a, k = (torch.randn(size, 5, generator=random) for size in (3, 4, 4))
    for row in range(3):
        for part in range(4):
            expected = F.cosine_similarity(q[row] * a[part], k[part], dim=0)
            torch.testing.assert_close(component_weights(q, a, k)[row, part], expected)


def test_new_rows_are_orthonormal_and_orthogonal_to_old_ones_that_are_not():
    random = torch.Generator().manual_seed(0)
    old = torch.randn(4, 12, dtype=torch.float64, generator=random)
    old[3] = old[0] - 2 * old[1]  # spanned by others
    new = fresh_rows(old, 5, random)
    torch.testing.assert_close(new @ new.T, torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (new @ old.T).abs().max() < 1e-12
    assert fresh_rows(old[:0], 12, random).shape == (12, 12)


def test_the_penalty_is_zero_for_orthonormal_rows_and_else_the_mean_of_squares():
    assert off_orthonormal(torch.eye(6)[None, :4]) == 0
    rows = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    assert off_orthonormal(rows) == pytest.approx((0 + 1 + 1 + 1) / 4)
    assert off_orthonormal(rows.repeat(3, 1, 1)) == pytest.approx(3 * 0.75)


def test_shares_begin_orthonormal_then_train_then_never_move(run_of):
    run = run_of("coda-prompt", training=Training(1, 0.05, 16, weight_decay=0.1))
    learner, seen = run.learner, []
    for index in range(3):
        begun, learning = {}, learner.student.learning

        def spy(experience, begun=begun, learning=learning, index=index):
            for name, parts in learner.parts.items():
                begun[name] = [part.detach().clone() for part in parts]
                fresh = parts[index][0].flatten(1).double()
                old = torch.cat([part[0].flatten(1) for part in list(parts)[:index]] or [fresh[:0].float()])
                torch.testing.assert_close(fresh @ fresh.T, torch.eye(4).double(), atol=1e-5, rtol=0)
                assert not len(old) or (fresh @ old.double().T).abs().max() < 1e-5 * old.norm()
            return learning(experience)

        learner.student.learning = spy
        run.advance()
        del learner.student.learning
        for name, parts in learner.parts.items():
            moved = [not torch.equal(a, b) for a, b in zip(begun[name], parts, strict=True)]
            assert moved == [number == index for number in range(3)], name
        seen.append(learner.so_far("components").shape[1])
    assert seen == [4, 8, 12]


# --- bad input


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("l2p", {"top": 11}, "top"),
        ("l2p", {"length": 0}, "length"),
        ("l2p", {"form": "suffix"}, "form"),
        ("l2p", {"form": "prefix", "length": 4}, "read='class'"),
        ("l2p", {"form": "prefix", "length": 5, "read": "class"}, "even"),
        ("l2p", {"key_weight": -1.0}, "key_weight"),
        ("l2p", {"spread": 0.0}, "spread"),
        ("dual-prompt", {"tasks": 0}, "tasks"),
        ("dual-prompt", {"general": 5}, "even"),
        ("dual-prompt", {"expert": 0}, "even"),
        ("dual-prompt", {"expert_blocks": ()}, "expert_blocks"),
        ("dual-prompt", {"key_weight": float("nan")}, "key_weight"),
        ("coda-prompt", {"tasks": 11, "pool": 10}, "component"),
        ("coda-prompt", {"length": 3}, "even"),
        ("coda-prompt", {"orthogonality": float("inf")}, "orthogonality"),
        ("coda-prompt", {"blocks": ()}, "blocks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings, message):
    with pytest.raises(InvalidHyperparameter, match=message):
        build_learner(name, settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("l2p++", {"blocks": (2,)}, "block 2; the network has 2"),
        ("l2p++", {"blocks": (1, 1)}, "twice"),
        ("dual-prompt", {"expert_blocks": (2, 3, 4)}, "block 2; the network has 2"),
        ("dual-prompt", {"general_blocks": (0, 1)}, "both"),
        ("coda-prompt", {"blocks": (0, 4)}, "block 4"),
        ("coda-prompt", {"pool": 100}, "99 components cannot be orthogonal in 16"),
    ],
)
def test_settings_that_the_network_cannot_have_are_refused_before_any_work(name, settings, message, run_of):
    with pytest.raises(InvalidHyperparameter, match=message):
        run_of(name, **settings)


@pytest.mark.parametrize("name", ["dual-prompt", "coda-prompt"])
def test_more_experiences_than_prompts_are_refused_and_so_is_a_kept_optimizer(name, run_of):
    run = run_of(name, tasks=1)
    run.advance()
    before = [part.clone() for part in run.learner.student.parameters()]
    with pytest.raises(InvalidStream, match="tasks=1"):
        run.advance()
    assert all(map(torch.equal, before, run.learner.student.parameters()))
    with pytest.raises(InvalidHyperparameter, match="keep_optimizer"):
        run_of(name, training=Training(keep_optimizer=True))


def test_reading_prompts_needs_a_norm_behind_the_blocks(run_of, tiny_vit):
    model = tiny_vit(6)
    model.encoder.layernorm = nn.Identity()
    with pytest.raises(ModelMismatch, match="read='class'"):
        run_of("l2p", model)
    run_of("l2p", model, read="class").advance()
