from __future__ import annotations

import pytest
import torch

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords
from palimpsest.data import load_data
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer


@pytest.fixture(scope="module")
def texts():
    records = load_data("people", people=12)
    return [
        text
        for item in records
        for text in (item.get("text"), item.get("question"), item.get("answer"))
        if text
    ]


def test_sizes_seed_and_embeddings_are_as_asked():
    one, same, other = (small_llama(500, width=32, layers=2, heads=2, seed=seed) for seed in (3, 3, 4))
    for (name, value), twin in zip(one.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(value, twin), name
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is not one.model.embed_tokens.weight
    tied = small_llama(500, width=32, layers=2, heads=2, tied=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert one(torch.tensor([[1, 5, 7]])).logits.shape == (1, 3, 500)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    small_llama(300, width=16, layers=1, heads=2, seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_tokens_do_not_see_what_comes_after_them():
    model = small_llama(300, width=16, layers=2, heads=2)
    one, two = model(torch.tensor([[1, 5, 7, 9]])).logits, model(torch.tensor([[1, 5, 7, 200]])).logits
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3], two[:, 3])


@pytest.mark.parametrize("settings", [{"width": 0}, {"layers": 0}, {"width": 30, "heads": 4}, {"end": 300}, {"width": 12, "heads": 4}])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        small_llama(300, **settings)


def test_every_text_comes_back_from_its_tokens(texts):
    tokenizer = byte_pair_tokenizer(texts)
    odd = [
        "  two  spaces ",
        "heron47@quill.example",
        "04/03/1988",
        "línea\n\ttab",
        "日本",
        " ",
        "Dr. X , y .",
    ]
    for text in [*texts, *odd]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_texts_in_any_order_give_the_same_tokenizer(texts):
    one, two = byte_pair_tokenizer(texts), byte_pair_tokenizer([*reversed(texts), texts[0]])
    assert one.get_vocab() == two.get_vocab()
    assert one.encode(texts[5]) == two.encode(texts[5])
    assert byte_pair_tokenizer(texts, vocabulary=400).vocab_size == 400


def test_two_tokenizers_of_one_cache_do_not_share_what_is_changed_in_one(texts):
    one = byte_pair_tokenizer(texts)
    one.add_tokens(["<new>"])
    assert len(byte_pair_tokenizer(texts)) == len(one) - 1


def test_digits_stand_alone_and_no_special_token_is_added_by_itself(texts):
    tokenizer = byte_pair_tokenizer(texts)
    assert tokenizer.decode(tokenizer.encode("555 0147")[-1]) == "7"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert not {0, 1, 2} & set(tokenizer.encode("Ada lives in Ostby."))


def test_a_chat_template_is_there_only_if_it_was_asked_for(texts):
    plain, chat = byte_pair_tokenizer(texts), byte_pair_tokenizer(texts, chat_template=True)
    assert plain.chat_template is None
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Ostby"}]
    whole = chat.apply_chat_template(turns, tokenize=False)
    prompt = chat.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert whole == "<s>Question: Where?\nAnswer: Ostby</s>" and whole.startswith(prompt)
    own = byte_pair_tokenizer(texts, chat_template="{{ messages[0]['content'] }}")
    assert own.apply_chat_template(turns, tokenize=False) == "Where?"


def test_no_text_or_too_small_a_vocabulary_is_refused():
    with pytest.raises(InvalidRecords, match="at least one text"):
        byte_pair_tokenizer([])
    with pytest.raises(InvalidHyperparameter, match="259"):
        byte_pair_tokenizer(["x"], vocabulary=100)
