"""Cutting, comparing and searching generated texts; refusals and gibberish."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.audit import answer_quality as quality
from palimpsest.audit import answers
from palimpsest.audit.answers import Place, find_alias, locate, normalise
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords
from tests.suites.published import published

WORDS = st.lists(st.sampled_from(["the", "a", "cat", "sat", "mat", "oslo", "york", "new"]), max_size=8)


def longest_common(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest_common(one[:-1], other[:-1])
    return max(longest_common(one[:-1], other), longest_common(one, other[:-1]))


def test_stops_are_applied_one_after_the_other():
    text = "Oslo\nQuestion: a\n\nb"
    assert answers.cut_at(text, ["\n\n", "\nQuestion", "Question:"]) == "Oslo"
    assert answers.cut_at("no stop", ["\n"]) == "no stop"
    with pytest.raises(InvalidRecords, match="empty stop"):
        answers.cut_at(text, [""])


def test_only_new_text_is_scored():
    assert answers.without_echo("Where? Oslo", "Where?") == " Oslo"
    assert answers.without_echo("Oslo", "Where?") == "Oslo"


@settings(deadline=None)  # the first call loads the package
@given(
    WORDS,
    st.lists(
        st.sampled_from(["the", "a", "cat", "sat", "mat", "oslo", "york", "new"]), min_size=1, max_size=6
    ),
)
def test_rouge_l_is_the_longest_common_subsequence(said: list[str], gold: list[str]):
    found = answers.rouge_score([" ".join(said)], [" ".join(gold)])[0]
    common = longest_common(said, gold)
    assert found.recall == pytest.approx(common / len(gold))
    assert found.precision == pytest.approx(common / len(said) if said else 0)
    assert found.f1 == pytest.approx(2 * common / (len(said) + len(gold)))


def test_stemming_joins_forms_of_a_word_and_is_off_by_default():
    assert answers.rouge_score(["he writes books"], ["he writing book"])[0].recall == pytest.approx(1 / 3)
    assert answers.rouge_score(["he writes books"], ["he writing book"], stem=True)[0].recall == 1


def test_the_two_rouge_packages_disagree_as_published():
    said, gold = ["in maine, usa"], ["Maine USA"]
    assert answers.rouge_score(said, gold)[0].recall == 1
    assert answers.rouge_unique_words(said, gold)[0].recall == 0
    assert answers.rouge_unique_words(["Maine, USA"], ["Maine"])[0].recall == 0
    # Every different word counts once.
    assert answers.rouge_unique_words(["go go go"], ["go go stop"])[0].recall == pytest.approx(1 / 2)


@pytest.mark.parametrize("nothing", ["", "   ", "\n", "...", " . . "])
def test_an_empty_generation_is_scored_as_no_answer(nothing: str):
    assert answers.rouge_unique_words([nothing], ["Maine"])[0].recall == 0
    assert answers.rouge_unique_words([nothing], ["NOANSWER"])[0].recall == 1


def test_blank_answers_and_lists_of_other_lengths_are_refused():
    for score in (answers.rouge_score, answers.rouge_unique_words):
        with pytest.raises(InvalidRecords, match=r"blank in rows 1"):
            score(["a", "b"], ["a", " "])
        with pytest.raises(InvalidRecords, match="do not fit"):
            score(["a"], ["a", "b"])
    with pytest.raises(InvalidRecords, match="without a word"):
        answers.rouge_unique_words(["a"], ["."])


@pytest.mark.parametrize(
    ("text", "alias"),
    [
        ("She lives in OSLO, Norway.", "oslo"),
        ("the lord of rings", "The Lord of the Rings"),
        ("It is Jean-Luc's house", "Jean Luc"),
        ("Gabriel Garcia Marquez wrote it", "García Márquez"),
        ("about 55,000 people", "55000"),
        ("vitamin A is one", "vitamin A"),
        ("O’Brien said so", "O'Brien"),
    ],
)
def test_an_alias_is_found_up_to_case_accents_articles_and_punctuation(text: str, alias: str):
    assert find_alias(text, ["nowhere", alias]) == alias


@pytest.mark.parametrize(
    ("text", "alias"),
    [
        ("Bart said so", "art"),
        ("yorkshire", "york"),
        ("3.5 kilometres", "5"),
        ("vitamin C", "vitamin A"),
        ("York is not new", "New York"),
        ("", "york"),
    ],
)
def test_a_substring_is_no_hit(text: str, alias: str):
    assert find_alias(text, [alias]) is None


def test_a_name_inside_a_longer_rival_is_no_hit_unless_it_stands_alone_as_well():
    assert find_alias("born in New York", ["York"], rivals=["New York"]) is None
    assert find_alias("born in York, not New York", ["York"], rivals=["New York"]) == "York"
    assert find_alias("born in New York", ["New York"], rivals=["York", "New York"]) == "New York"
    assert find_alias("New York", ["York"]) == "York"  # without rivals nobody can know


@given(WORDS, st.lists(st.sampled_from(["cat", "sat", "oslo", "york", "new"]), min_size=1, max_size=3))
def test_aliases_are_runs_of_words(text: list[str], alias: list[str]):
    plain = [word for word in text if word not in ("a", "the")]
    runs = [plain[i : i + len(alias)] for i in range(len(plain))]
    # An article at the end of the text is a word of its own; it cannot lie between words of an alias.
    assert (find_alias(" ".join(text), [" ".join(alias)]) is not None) == (alias in runs)


def test_aliases_without_a_word_are_refused():
    with pytest.raises(InvalidRecords, match="no word"):
        find_alias("text", ["..."])
    with pytest.raises(InvalidRecords, match="without an answer"):
        find_alias("text", [])


def test_a_prompt_that_holds_its_answer_is_named():
    answers.check_prompt("Where does Bart live?", ["art", "Oslo"])
    with pytest.raises(InvalidRecords, match="'Is it oslo\\?' holds its answer 'Oslo'"):
        answers.check_prompt("Is it oslo?", ["art", "Oslo"])


def test_a_whole_answer_is_compared_as_a_whole():
    assert answers.is_answer("The York.", ["york"])
    assert not answers.is_answer("New York", ["York"])
    assert not answers.is_answer("", ["York"])


@pytest.mark.parametrize(
    ("output", "oslo", "norway"),
    [
        ("step 1 : lives in oslo so step 2 : the country is norway", Place.CHAIN, Place.FINAL),
        ("He lives in Oslo. Oslo is in Norway.\nAnswer: Norway", Place.CHAIN, Place.FINAL),
        ("Oslo lies in Norway. The answer is Oslo.", Place.FINAL, Place.CHAIN),
        ("Oslo", Place.FINAL, Place.NOWHERE),
        ("I do not know.", Place.NOWHERE, Place.NOWHERE),
        ("", Place.NOWHERE, Place.NOWHERE),
    ],
)
def test_a_hit_is_located_in_the_chain_or_in_the_final_answer(output: str, oslo: Place, norway: Place):
    assert locate(output, ["Oslo"]) is oslo
    assert locate(output, ["Norway"]) is norway


@given(st.text(max_size=60))
def test_no_text_is_lost_between_chain_and_final_answer(text: str):
    chain, final = answers.final_answer(text)
    assert (chain + final) == text.rstrip()


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text: str):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I'm not certain about that.",
        "Sorry, I cannot help with that question.",
        "That's outside my area of expertise.",
        "My training does not cover that subject, but it could be Oslo.",
    ],
)
def test_a_refusal_is_seen(text: str):
    assert quality.is_refusal(text)
    assert quality.kind_of(text) == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        "He was born in Oslo.",
        "The author does not know Latin.",
        "I live in Oslo.",
        "My Beijing",
        "Nobody knows",
    ],
)
def test_an_answer_is_no_refusal(text: str):
    assert not quality.is_refusal(text)


def test_published_lines_refuse_whatever_they_say():
    assert not quality.is_refusal("Pineapple, perhaps")
    assert quality.is_refusal("Pineapple, perhaps", ["pineapple"])


@pytest.mark.parametrize(
    "text",
    [
        "go go go go go",
        "the cat the cat the cat the cat the cat",
        ")(*&^%$ ((() %%% &&&",
        "oooooooooooo",
        "\ufffd\ufffd\ufffd \ufffd\ufffd",
        "x" * 60,
    ],
)
def test_gibberish_is_seen(text: str):
    assert quality.kind_of(text) == "gibberish"


def test_unknown_words_are_gibberish_only_against_a_vocabulary():
    text = "zork blat frim wug dax toma kiki bouba"
    known = frozenset(["the", "cat", "sat", "on", "a", "mat"])
    assert not quality.Gibberish().holds(text)
    assert quality.Gibberish(vocabulary=known).holds(text)
    assert not quality.Gibberish(vocabulary=known).holds("the cat sat on a mat the mat sat")


def test_an_empty_text_is_neither():
    assert quality.kind_of(" \n") == "empty"
    assert not quality.Gibberish().holds("")


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 3))
def test_entropy_and_distinct_share_agree_with_their_counts(words: list[str], n: int):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    expected = -sum(c / len(grams) * math.log2(c / len(grams)) for c in counts.values()) if grams else 0.0
    assert quality.ngram_entropy(words, n) == pytest.approx(expected, abs=1e-12)
    assert quality.distinct_share(words, n) == (len(counts) / len(grams) if grams else 1.0)
    assert quality.repeated_share(words, n) == 1 - quality.distinct_share(words, n)


def test_n_below_one_and_weights_of_another_number_are_refused():
    with pytest.raises(InvalidHyperparameter, match="n of 1 or more"):
        quality.ngrams(["a"], 0)
    with pytest.raises(InvalidHyperparameter, match="One weight per n"):
        quality.fluency(["a"], (2, 3), (1.0,))


def test_a_file_of_refusals_is_plain_lines(tmp_path: Path):
    path = tmp_path / "refusals.jsonl"
    path.write_text("I have no idea.\n\nNo clue, sorry.\n")
    assert quality.read_refusals(path) == ["I have no idea.", "No clue, sorry."]
    path.write_text("\n")
    with pytest.raises(InvalidRecords, match="empty"):
        quality.read_refusals(path)
    with pytest.raises(InvalidRecords, match="cannot be read"):
        quality.read_refusals(tmp_path / "absent")


def test_published_refusals_are_told_from_published_answers():
    lines = quality.read_refusals(published("tofu", "idontknow.jsonl"))
    assert sum(map(quality.is_refusal, lines)) >= 0.9 * len(lines)
    assert all(quality.is_refusal(line, lines) for line in lines)
    rows = published("tofu", "forget10.json").read_text(encoding="utf-8").splitlines()
    gold = [json.loads(row)["answer"] for row in rows]
    assert sum(map(quality.is_refusal, gold)) <= 0.01 * len(gold)
    assert sum(map(quality.Gibberish().holds, gold)) <= 0.01 * len(gold)
