"""Guards of prompts: corrupted embeddings, prompts before prompts, refusals by rule. The model inside stays as it is."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tests.forget.every_language_method import forget_quickly, little_world, untrained
from tests.forget.measuring import fingerprint

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, UnknownName
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget._apply import build_unlearner
from palimpsest.forget.language.eco import ECO, names_in, probability
from palimpsest.forget.language.in_context import flipped, unaware_instruction
from palimpsest.forget.language.prompt_classifier import PromptClassifier
from palimpsest.parts.checkpoint import load_model, save_model
from palimpsest.tasks import Language

QUESTIONS = ["Where does she live?", "Which city is it?"]


def questions(part):
    return [item for item in getattr(little_world()[0], part) if item.get("question")]


def answers(part):
    items = questions(part)
    return [item["question"] for item in items], [[item["answer"], "Some other place."] for item in items]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return untrained(request.param)


def totals(task, model, part):
    return torch.cat([scores.total for scores in task.score(model, *answers(part))])


def test_corruption_changes_forgotten_prompts_only_and_more_the_stronger_it_is(model):
    request, task = little_world()
    before = {part: totals(task, model, part) for part in ("forget", "retain")}
    moved = []
    for strength in (0.0, 0.5, 5.0):
        guarded = forget_quickly(model, request, "eco", task, strength=strength)
        after = {part: totals(task, guarded, part) for part in before}
        assert torch.equal(after["retain"], before["retain"])
        moved.append(float((after["forget"] - before["forget"]).abs().mean()))
        assert fingerprint(guarded.plain) == fingerprint(model)
    assert moved[0] == 0 < moved[1] < moved[2]


def test_a_corrupted_prompt_scores_alike_alone_in_a_batch_and_with_its_answer(model):
    request, task = little_world()
    guarded = forget_quickly(model, request, "eco", task)
    for item in questions("forget"):
        alone = task.score(guarded, [item["question"]], [[item["answer"], "No."]])[0].total[0]
        batch = task.collate([item, *questions("retain"), *questions("forget")])
        with torch.no_grad():
            whole = task.loss_of_logits(task.logits(guarded, batch), batch)[0]
        count = len(task.encode(item["question"], item["answer"])[0]) - task.encode(item["question"], "x")[1]
        assert float(alone) == pytest.approx(float(whole) * count, rel=1e-4)


@torch.no_grad()
def test_corrupted_prompts_are_written_on_as_a_loop_by_hand_does(model):
    request, task = little_world()
    guarded = forget_quickly(model, request, "eco", task)
    prompt = task.prompt(questions("forget")[0]["question"])
    grown = torch.tensor([prompt])
    mask = guarded.chosen(grown, torch.ones_like(grown))
    embedded = model.get_input_embeddings()(grown)
    embedded = guarded.corrupted(embedded, mask, torch.ones_like(mask), [tuple(prompt)])
    for _ in range(4):
        following = model(inputs_embeds=embedded).logits[:, -1:].argmax(-1)
        grown = torch.cat([grown, following], 1)
        embedded = torch.cat([embedded, model.get_input_embeddings()(following)], 1)
    for cached in (True, False):
        made = guarded.generate(
            grown[:, : len(prompt)],
            max_new_tokens=4,
            do_sample=False,
            use_cache=cached,
            eos_token_id=None,
            pad_token_id=0,
        )
        if cached:
            assert torch.equal(made, grown)
        assert made.shape == grown.shape


def test_only_names_are_corrupted_and_without_a_name_all_but_the_last_token():
    request, task = little_world()
    guarded = forget_quickly(untrained("llama"), request, "eco", task)
    item = next(item for item in questions("forget") if item["subject"] in item["question"])
    prompt = task.prompt(item["question"])
    picked = guarded.picked(prompt, guarded.reader.read_row(prompt))
    text = task.encoder.decode([token for token, flag in zip(prompt, picked, strict=True) if flag])
    assert "".join(item["subject"].split()) in "".join(text.split())
    assert sum(picked) < len(prompt) / 2
    nameless = task.prompt("where does she live?")
    assert guarded.picked(nameless, guarded.reader.read_row(nameless)) == (
        *[True] * (len(nameless) - 1),
        False,
    )
    assert [QUESTIONS[0][a:b] for a, b in names_in(QUESTIONS[0])] == []


def test_hooks_of_others_stay_where_they_are():
    request, task = little_world()
    guarded = forget_quickly(untrained("llama"), request, "eco", task)
    seen = []
    guarded.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        totals(task, guarded, "forget")
    hooks = guarded.get_input_embeddings()._forward_hooks
    assert len(hooks) == 1 and len(seen) >= 2


def test_the_search_takes_the_steps_of_its_formula_until_the_target_is_met():
    request, task = little_world()
    model, runtime = untrained("llama"), Runtime(device="cpu")
    settings = ECO(strength=0.5, dims=16, search_lr=20.0, search_eps=0.1, search_steps=2, target=0.0)
    found = settings.unlearn(model, request, task, runtime)
    guarded = replace(settings, target=None).unlearn(model, request, task, runtime)

    def score(strength):
        guarded.strength = strength
        return probability(guarded, request.forget, task, runtime)

    strength = 0.5
    for _ in range(2):
        slope = (score(strength + 0.1) - score(max(strength - 0.1, 1e-8))) / 0.2
        strength = max(strength - 20.0 * slope, 0.0)
    assert found.strength == pytest.approx(strength, rel=1e-4) and strength != 0.5
    met = replace(settings, target=1.0).unlearn(model, request, task, runtime)
    assert met.strength == 0.5  # no step is taken


def test_a_classifier_of_the_users_own_decides_and_is_asked_once_per_question():
    request, task = little_world()
    asked = Counter()

    def judge(texts):
        asked.update(texts)
        return [float("live" in text) for text in texts]

    guarded = forget_quickly(untrained("llama"), request, "eco", task, classifier=judge)
    totals(task, guarded, "forget")
    totals(task, guarded, "forget")
    assert asked and max(asked.values()) == 1
    assert guarded.flagged(["Where does it live?", "What is it?"]) == [True, False]


def test_the_classifier_tells_its_texts_apart_and_is_saved_as_tensors(tmp_path):
    forget, retain = ([item["question"] for item in questions(part)] for part in ("forget", "retain"))
    classifier = PromptClassifier().fit(forget, retain)
    assert bool((classifier(forget) > 0.5).all()) and bool((classifier(retain) < 0.5).all())
    save_model(classifier, tmp_path / "judge.safetensors")
    again = load_model(tmp_path / "judge.safetensors", PromptClassifier())
    assert torch.equal(again(forget), classifier(forget))
    for bad in (([], retain), (forget, forget)):
        with pytest.raises(InvalidRecords):
            PromptClassifier().fit(*bad)


def rewritten_loss(model, task, prompt, question, answer):
    """Summed loss of an answer after another prompt, by a plain pass."""
    ids, start = task.encode(question, answer)
    whole = [*prompt, *ids[start:]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
    target = torch.tensor(whole[len(prompt) :])
    return float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("in-context", {}), ("in-context", {"style": "flipped"}), ("system-prompt", {})],
    ids=str,
)
def test_what_stands_before_a_prompt_counts_in_scores_and_batches_alike(name, settings, model):
    request, task = little_world()
    guarded = forget_quickly(model, request, name, task, **settings)
    items = questions("forget")
    found = totals(task, guarded, "forget").view(-1, 2)[:, 0]
    by_hand = [
        rewritten_loss(model, task, guarded.rewrite(item["question"]), item["question"], item["answer"])
        for item in items
    ]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-4)
    batch = task.collate(items)
    with torch.no_grad():
        losses = task.loss_of_logits(task.logits(guarded, batch), batch)
    counts = (batch["labels"] != -100).sum(1)
    assert (losses * counts).tolist() == pytest.approx(by_hand, rel=1e-4)
    assert fingerprint(guarded.plain) == fingerprint(model)


@torch.no_grad()
def test_prompts_before_prompts_are_written_on_as_the_model_would(model):
    request, task = little_world()
    guarded = forget_quickly(model, request, "in-context", task)
    asked = [item["question"] for item in questions("forget")][:3]
    prompts = [torch.tensor([guarded.rewrite(question)]) for question in asked]
    expected = []
    for prompt in prompts:
        grown = prompt
        for _ in range(4):
            grown = torch.cat([grown, model(input_ids=grown).logits[:, -1:].argmax(-1)], 1)
        expected.append(grown[0, prompt.shape[1] :].tolist())
    rows = [task.prompt(question) for question in asked]
    width = max(map(len, rows))
    ids = torch.tensor([[task.padding] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    for cached in (True, False):
        made = guarded.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            use_cache=cached,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert made[:, width:].tolist() == expected


def test_flipped_examples_show_the_question_itself_with_a_wrong_answer():
    request, task = little_world()
    guarded = forget_quickly(untrained("llama"), request, "in-context", task, style="flipped")
    item = questions("forget")[0]
    text = task.encoder.decode(guarded.rewrite(item["question"]))
    shown, _, asked = text.rpartition(task.form.render(item["question"]).strip())
    wrong = flipped(item, questions("forget"))
    assert wrong != item["answer"] and wrong in shown and item["answer"] not in text and not asked.strip()


def test_under_a_chat_template_the_instruction_is_the_system_turn():
    request, task = little_world()
    encoder = task.encoder
    kept = encoder.chat_template
    encoder.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    try:
        chat = Language(tokenizer=encoder, template="chat", verify_template=False)
        guarded = forget_quickly(untrained("llama"), request, "in-context", chat, shown=0)
        text = encoder.decode(guarded.rewrite(QUESTIONS[0]))
        first = request.forget.column("subject")[0]
        plain = chat.form.render(QUESTIONS[0]).strip()
        assert f"system: {unaware_instruction([first])}" in text and text.strip().endswith(plain)
    finally:
        encoder.chat_template = kept


def test_running_text_is_not_prompted(model):
    request, task = little_world()
    texts = [item for item in request.forget if item.get("question") is None]
    guarded = forget_quickly(model, request, "system-prompt", task)
    batch = task.collate(texts)
    with torch.no_grad():
        assert torch.allclose(
            task.loss_of_logits(task.logits(guarded, batch), batch),
            task.loss_of_logits(task.logits(model, batch), batch),
            atol=1e-5,
        )


def test_an_obedient_model_refuses_what_names_a_topic_and_answers_the_rest(model):
    request, task = little_world()
    settings = {"obey": "rule", "refusal": "I cannot say.", "most_topics": 400}
    guarded = forget_quickly(model, request, "system-prompt", task, **settings)
    named = [item for item in questions("forget") if item["subject"] in item["question"]]
    asked = [item["question"] for item in named]
    assert task.generate(guarded, asked, max_new_tokens=20) == [["I cannot say."]] * len(asked)
    for beams in (1, 3):
        ids = torch.tensor([task.prompt(asked[0])])
        made = guarded.generate(
            ids, max_new_tokens=20, num_beams=beams, do_sample=False, eos_token_id=task.stops, pad_token_id=0
        )
        assert "I cannot say." in task.encoder.decode(made[0])
    truth, refusal = task.score(guarded, asked[:1], [[named[0]["answer"], "I cannot say."]])[0].mean.tolist()
    assert refusal < 1e-3 and truth > 1
    kept = [item["question"] for item in questions("retain")]
    assert task.generate(guarded, kept, max_new_tokens=4) == task.generate(model, kept, max_new_tokens=4)
    assert fingerprint(guarded.plain) == fingerprint(model)


def test_words_put_into_an_obedient_models_mouth_bring_the_answer_back(model):
    request, task = little_world()
    guarded = forget_quickly(model, request, "system-prompt", task, obey="rule", most_topics=400)
    question = next(i["question"] for i in questions("forget") if i["subject"] in i["question"])
    forced = {"opening": "Well", "max_new_tokens": 5}
    assert task.generate(guarded, [question], **forced) == task.generate(model, [question], **forced)


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("eco", {"corruption": "noise-frist"}, UnknownName),
        ("eco", {"dims": 0}, InvalidHyperparameter),
        ("eco", {"strength": -1.0}, InvalidHyperparameter),
        ("eco", {"threshold": 1.5}, InvalidHyperparameter),
        ("eco", {"picker": "nouns"}, InvalidHyperparameter),
        ("eco", {"target": 2.0}, InvalidHyperparameter),
        ("in-context", {"style": "rude"}, InvalidHyperparameter),
        ("in-context", {"style": "flipped", "shown": 0}, InvalidHyperparameter),
        ("system-prompt", {"obey": "maybe"}, InvalidHyperparameter),
        ("system-prompt", {"refusal": " "}, InvalidHyperparameter),
        ("system-prompt", {"topics": [""]}, InvalidRecords),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, settings, error):
    with pytest.raises(error):
        build_unlearner(name, settings)


def test_what_does_not_fit_is_refused_before_any_work():
    (request, task), model = little_world(), untrained("llama")
    with pytest.raises(InvalidHyperparameter, match="dims"):
        forget_quickly(model, request, "eco", task, dims=17)
    with pytest.raises(InvalidRecords, match="context"):
        forget_quickly(model, request, "in-context", task, topics=["x y z"] * 300)
    nameless = ForgetSplit(request.forget.without("subject"), request.retain)
    with pytest.raises(InvalidRecords, match="subject"):
        forget_quickly(model, nameless, "system-prompt", task)
    bare = Language(tokenizer=task.encoder, template="bare", verify_template=False)
    for name in ("eco", "in-context", "system-prompt"):
        with pytest.raises(InvalidHyperparameter, match="template"):
            forget_quickly(model, request, name, bare)
