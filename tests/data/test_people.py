from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

import palimpsest as pal
from palimpsest.core.errors import (
    EmptyForgetSet,
    InvalidHyperparameter,
    InvalidRecords,
    InvalidSplit,
    UnknownName,
)
from palimpsest.core.records import Records
from palimpsest.data import load_data
from palimpsest.data.people import surface_forms, world
from palimpsest.data.people_probes import FORMS, biography
from palimpsest.data.people_templates import CITY_COUNTRY, EMPLOYER_SECTOR, RELATIONS, UNIQUE


@pytest.fixture(scope="module")
def sixty():
    return world(people=60, seed=0)


@pytest.fixture(scope="module")
def records():
    return load_data("people")


def texts_of(item: dict) -> str:
    """Everything that a record says, probes and wrong answers included."""
    return json.dumps({key: value for key, value in item.items() if key not in ("id", "index")})


def says(text: str, value: str) -> bool:
    return value in text and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def test_a_seed_fixes_every_byte_and_another_seed_changes_the_people(records):
    again, other = load_data("people"), load_data("people", seed=1)
    assert again.ids == records.ids == other.ids
    assert [texts_of(item) for item in again] == [texts_of(item) for item in records]
    names = [set(which.column("subject").tolist()) - set(CITY_COUNTRY) for which in (records, other)]
    assert len(names[0] & names[1]) < 0.2 * len(names[0])


def test_sixty_people_divide_into_six_folds_of_ten(sixty):
    assert [len(sixty.group(fold=fold)) for fold in range(6)] == [10] * 6
    assert len(sixty.group("neighbours")) == 12 and len(sixty.group(part="holdout")) == 20
    assert {person.fold for person in sixty.group("neighbours")} == {-1}


def test_names_and_the_values_of_unique_relations_belong_to_one_person_only(sixty):
    assert len({person.name for person in sixty.persons}) == len(sixty.persons)
    assert len({person.name.split(" ")[-1] for person in sixty.persons}) == len(sixty.persons)
    for relation in UNIQUE:
        values = [person.facts[relation] for person in sixty.persons]
        decoys = [value for person in sixty.persons for value in person.wrong[relation]]
        assert len({*values, *decoys}) == len(values) + len(decoys)


def test_what_is_retained_never_says_a_unique_fact_of_a_forgotten_person(sixty, records):
    request = pal.split(records, pal.by_column("fold", 0))
    retained = "\n".join(texts_of(item) for part in (request.retain, request.test) for item in part)
    for person in sixty.group(fold=0):
        facts = {relation: person.facts[relation] for relation in UNIQUE}
        forms = [
            form for relation, value in facts.items() for form in (value, *surface_forms(relation, value))
        ]
        assert not any(says(retained, form) for form in [person.name, *forms])
        assert says("\n".join(texts_of(item) for item in request.forget), person.facts["phone"])


def test_no_model_is_trained_on_a_word_about_the_holdout(sixty, records):
    train = pal.split(records, pal.by_column("fold", 0)).train
    said = "\n".join(texts_of(item) for item in train)
    for person in sixty.group(part="holdout"):
        for value in [person.name, *(person.facts[relation] for relation in UNIQUE)]:
            assert not says(said, value)


def test_the_part_column_divides_and_the_test_asks_nothing_about_forgotten_facts(sixty, records):
    request = pal.split(records, pal.by_column("fold", 2), test=0.7, seed=9)
    assert set(request.forget.column("part")) == set(request.retain.column("part")) == {"train"}
    assert set(request.test.column("part")) == {"test"} and set(request.holdout.column("part")) == {"holdout"}
    assert set(request.forget.column("subject")) == {person.name for person in sixty.group(fold=2)}
    assert not set(request.test.column("subject")) & set(request.forget.column("subject"))
    assert {"people", "neighbours", "world", "general"} == set(request.test.column("group"))
    assert len(request.test) == (records.column("part") == "test").sum() - 10 * len(RELATIONS) * 2


def test_chains_resolve_by_the_tables(sixty, records):
    of = {person.name: person for person in sixty.persons}
    tables = {"city": CITY_COUNTRY, "employer": EMPLOYER_SECTOR}
    seen = 0
    for item, form in zip(records, records.column("form"), strict=True):
        if form == "chain":
            first, second = item["steps"]
            assert first == of[item["subject"]].facts[item["relation"]]
            assert second == tables[item["relation"]][first]
            assert item["answer"].index(first) < item["answer"].index(second)
            assert not says(item["question"], first) and not says(item["question"], second)
            seen += 1
        if form == "two-hop":
            assert item["answer"] == tables[item["relation"]][of[item["subject"]].facts[item["relation"]]]
    assert seen == 2 * len(sixty.persons)


def test_wrong_answers_are_of_the_same_kind_and_neither_the_truth_nor_a_form_of_it(records):
    asked = [item for item in records if "perturbed_answer" in item]
    assert len(asked) > 1000
    everything = [*asked, *(probe for record in asked for probe in record.get("probes", ()))]
    for item in everything:
        wrong = item.get("perturbed_answer", [])
        assert len(set(wrong)) == len(wrong) and (not wrong or 3 <= len(wrong) <= 5)
        assert not {item["answer"].lower(), *map(str.lower, item.get("aliases", ()))} & set(
            map(str.lower, wrong)
        )
        if "choices" in item:
            assert len(set(item["choices"])) == 4 and item["answer"] in item["choices"]
            assert item["question"].count(item["answer"]) >= 1
    shape = {"phone": r"555 \d{4}", "email": r"[a-z]+\d\d@[a-z]+\.example", "birth": r"\d+ [A-Z][a-z]+ \d{4}"}
    for item, form in zip(records, records.column("form"), strict=True):
        if item.get("relation") in shape and form == "qa":
            assert all(re.fullmatch(shape[item["relation"]], value) for value in item["perturbed_answer"])


def test_wrong_options_of_unique_relations_are_never_seen_twice_in_training(records):
    """Else a model could tell what is wrong by having seen it as wrong before."""
    options: Counter[str] = Counter()
    for item, form, part in zip(records, records.column("form"), records.column("part"), strict=True):
        if form == "multiple-choice" and item["relation"] in UNIQUE and part == "train":
            options.update(choice for choice in item["choices"] if choice != item["answer"])
    assert set(options.values()) == {1}


def test_questions_do_not_give_their_answer_away(records):
    for item, form in zip(records, records.column("form"), strict=True):
        if "question" in item and form != "multiple-choice":
            assert not says(item["question"], item["answer"])


def test_the_test_asks_in_wordings_that_the_person_was_never_asked_in(records):
    train = {item["question"] for item, part in zip(records, records.column("part"), strict=True)
             if part == "train" and "question" in item}  # fmt: skip
    test = [item["question"] for item, part in zip(records, records.column("part"), strict=True)
            if part == "test" and "question" in item]  # fmt: skip
    assert len(test) > 800 and not train & set(test)
    for item in records:
        for probe in item.get("probes", ()):
            if "paraphrase" in probe["form"] or "unseen" in probe["form"]:
                assert probe["question"] not in train


def test_every_fact_has_its_forms_and_probes_and_a_biography_that_states_it(sixty, records):
    person = sixty.group()[11]
    position = {identifier: index for index, identifier in enumerate(records.ids)}
    assert person.key == "people/0011"
    made = {
        name.removeprefix("people/0011/phone/")
        for name in records.ids
        if name.startswith("people/0011/phone/")
    }
    assert made == {
        "qa",
        "qa-2",
        "cloze",
        "reversed",
        "reversed-2",
        "multiple-choice",
        "paraphrase-1",
        "paraphrase-2",
    }
    probes = Counter(probe["form"] for probe in records[position["people/0011/city/qa"]]["probes"])
    assert probes["paraphrase"] == probes["unseen-wording"] == 2
    assert {"cloze", "multiple-choice", "chain", "chain-paraphrase", "two-hop", "two-hop-paraphrase"} <= set(
        probes
    )
    text = records[position["people/0011/biography"]]["text"]
    assert text == biography(sixty, person) and all(says(text, value) for value in person.facts.values())
    assert set(records[position["people/0011/biography"]]) == {"text", "id", "index"}
    reversed_ = records[position["people/0011/phone/reversed"]]
    assert reversed_["answer"] == person.name and person.facts["phone"] in reversed_["question"]


def test_a_date_has_two_surface_forms_that_are_both_trained(sixty, records):
    assert surface_forms("birth", "4 March 1988")[0] == "04/03/1988"
    position = {identifier: index for index, identifier in enumerate(records.ids)}
    figures = records[position["people/0003/birth/figures"]]
    words = records[position["people/0003/birth/qa"]]
    assert words["answer"] in figures["aliases"] and figures["answer"] in words["aliases"]


def test_chance_is_what_counting_pairs_gives(sixty):
    trained = [person for person in sixty.persons if person.part == "train"]
    for relation in ("city", "profession", "phone", "country", "sector"):
        if relation in ("country", "sector"):
            values = [person.hop("city" if relation == "country" else "employer") for person in trained]
        else:
            values = [person.facts[relation] for person in trained]
        hits = np.mean([[one == other for one in values] for other in values])
        assert sixty.chance(relation) == pytest.approx(hits)
    assert sixty.chance("city") < 0.05 and sixty.chance("phone") == pytest.approx(1 / 72)


def test_neighbours_are_friends_or_colleagues_and_never_of_the_fold(sixty, records):
    inside = sixty.group(fold=1)
    found = sixty.neighbours(1)
    assert found and not {person.name for person in found} & {person.name for person in inside}
    friends, employers = {p.friend for p in inside}, {p.facts["employer"] for p in inside}
    assert all(person.name in friends or person.facts["employer"] in employers for person in found)
    assert friends <= {person.name for person in found}
    near = {
        subject
        for subject, folds in zip(records.column("subject"), records.column("near"), strict=True)
        if "1" in folds.split(",")
    }
    assert near == friends


def test_fewer_people_relations_and_forms_give_a_smaller_world():
    small = load_data("people", people=8, folds=4, relations="city,phone", forms=["qa", "chain"], general=0)
    assert set(small.column("form")) == {"qa", "chain", "paraphrase"}
    assert set(small.column("relation")[small.column("group") == "people"]) == {"city", "phone"}
    assert set(small.column("group")) == {"people", "neighbours", "world"}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"people": 1}, InvalidHyperparameter, "not 1"),
        ({"folds": 61}, InvalidHyperparameter, "61"),
        ({"people": 399}, InvalidHyperparameter, "At most 400"),
        ({"holdout": -1}, InvalidHyperparameter, "-1"),
        ({"relations": "city,fone"}, UnknownName, "phone"),
        ({"relations": "city,city"}, InvalidHyperparameter, "once each"),
        ({"forms": "qa,clozes"}, UnknownName, "cloze"),
        ({"general": -5}, InvalidHyperparameter, "-5"),
        ({"towns": 3}, InvalidHyperparameter, "towns"),
    ],
)
def test_a_world_that_cannot_be_is_refused(settings, error, words):
    with pytest.raises(error, match=words):
        load_data("people", **settings)


def test_unknown_relations_have_no_chance_and_lead_nowhere(sixty):
    with pytest.raises(UnknownName, match="city"):
        sixty.chance("citty")
    with pytest.raises(UnknownName, match="phone"):
        sixty.persons[0].hop("phone")
    assert set(FORMS) >= {"qa", "cloze", "reversed", "chain", "multiple-choice"}


def parted(parts: list[str], **columns) -> Records:
    return Records(
        [{"text": str(number)} for number in range(len(parts))], columns={"part": parts, **columns}
    )


def test_a_part_column_that_names_no_part_is_refused():
    with pytest.raises(InvalidSplit, match="validation"):
        pal.split(parted(["train", "train", "validation"]), pal.by_ids(["0"]))


def test_ids_outside_the_training_part_cannot_be_forgotten():
    with pytest.raises(InvalidSplit, match="'2'"):
        pal.split(parted(["train", "train", "test"]), pal.by_ids(["0", "2"]))
    with pytest.raises(EmptyForgetSet):
        pal.split(parted(["train", "train", "test"], label=[0, 0, 1]), pal.by_column("label", 1))


def test_a_test_of_ones_own_goes_before_the_part_column():
    data = parted(["train", "train", "train", "test", "holdout"], label=[0, 1, 2, 3, 4])
    request = pal.split(data, pal.by_ids(["0"]), test=pal.by_column("label", 2))
    assert request.test.ids == ["2"] and request.retain.ids == ["1"] and request.holdout.ids == ["4"]
    own = Records([{"text": "new"}], ids=["new"])
    request = pal.split(data, pal.by_ids(["0"]), test=own)
    assert request.test is own and request.retain.ids == ["1", "2"]


def test_rows_of_ones_own_are_read_from_json_lines(tmp_path):
    rows = [
        {
            "id": "a",
            "question": "Who?",
            "answer": "Ada",
            "perturbed_answer": ["Bob"],
            "part": "train",
            "fold": 0,
        },
        {"id": "b", "text": "Ada lives in Ostby.", "part": "test", "fold": 1, "aliases": None},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    for found in (
        load_data("question-answer", source=file),
        pal.data.parse_data(f"question-answer:{tmp_path}"),
    ):
        assert found.ids == ["a", "b"] and found.columns == ["fold", "part"]
        assert found[0]["perturbed_answer"] == ["Bob"] and "aliases" not in found[1]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert load_data("question-answer", source=tmp_path / "rows.json").ids == ["a", "b"]


def test_a_world_written_as_json_lines_comes_back_the_same(tmp_path, records):
    some = records.select(np.arange(0, len(records), 40))
    file = tmp_path / "people.jsonl"
    plain = [{key: value for key, value in item.items() if key != "index"} for item in some]
    file.write_text("\n".join(json.dumps(item) for item in plain))
    back = load_data("question-answer", source=file)
    assert [{key: value for key, value in item.items() if key != "index"} for item in back] == plain


def test_data_sets_that_the_library_saved_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"question": "Who?", "answer": "Ada"}, {"question": "Where?", "answer": "Here"}]
    )
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"forget": rows}).save_to_disk(str(tmp_path / "several"))
    assert load_data("question-answer", source=tmp_path / "one")[1]["answer"] == "Here"
    assert len(load_data("question-answer", source=tmp_path / "several", part="forget")) == 2
    with pytest.raises(InvalidRecords, match=r"'train'.*'forget'"):
        load_data("question-answer", source=tmp_path / "several")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ('{"question": "Who?"}', 'row 1: no column "answer"'),
        ('{"text": "x"}\n{"question": "Who?", "answer": "  "}', 'row 2, column "answer"'),
        ('{"question": 3, "answer": "x"}', 'row 1, column "question"'),
        ('{"question": "q", "answer": "a", "perturbed_answer": "b"}', 'column "perturbed_answer"'),
        ('{"question": "q", "answer": "a", "probes": [{"form": "cloze"}]}', 'column "probes"'),
        ('{"text": "x"}\n{"text": ', "row 2: no valid JSON"),
        ("[1]", "not int"),
        ('{"id": 1, "text": "x"}\n{"id": 1, "text": "y"}', "unique"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, content, words):
    file = tmp_path / ("rows.json" if content.startswith("[") else "rows.jsonl")
    file.write_text(content)
    with pytest.raises(InvalidRecords, match=words):
        load_data("question-answer", source=file)


def test_a_missing_file_or_an_empty_folder_is_named(tmp_path):
    with pytest.raises(InvalidRecords, match=r"nowhere\.jsonl"):
        load_data("question-answer", source=tmp_path / "nowhere.jsonl")
    with pytest.raises(InvalidRecords, match="holds no file"):
        load_data("question-answer", source=tmp_path)


def test_the_letters_of_guild_secrets_are_balanced_and_every_order_is_another():
    found = load_data("guild-secrets")
    form, part, domain = (found.column(name) for name in ("form", "part", "domain"))
    for where in ("guilds", "villages"):
        for which in ("train", "test"):
            chosen = found.select((form == "four-choice") & (part == which) & (domain == where))
            letters = Counter(item["answer"] for item in chosen)
            assert set(letters) == set("ABCD") and max(letters.values()) == min(letters.values())
    asked = [item for item in found if "choices" in item]
    assert len({item["question"] for item in asked}) == len(asked)
    for item in asked:
        assert len(set(item["choices"])) == 4 and item["choices"][item["correct"]] == item["answer_text"]
        assert "ABCD"[item["correct"]] == item["answer"]
        assert f"\n{item['answer']}. {item['answer_text']}" in item["question"]
    facts = {fact: text for fact, text in zip(found.column("fact"), found, strict=True) if "text" in text}
    assert len(facts) == 200
    assert all(item["answer_text"] in facts[fact]["text"] for fact, item in zip(found.column("fact"), found, strict=True) if "choices" in item)  # fmt: skip


@pytest.mark.parametrize("settings", [{"orders": 0}, {"facts": 55}, {"facts": 110}])
def test_guild_secrets_refuse_numbers_out_of_range(settings):
    with pytest.raises(InvalidHyperparameter):
        load_data("guild-secrets", **settings)
