from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch
from palimpsest.parts import causal_tracing
from palimpsest.parts.causal_tracing import (
    FactTrace,
    average_effects,
    concentrated_layers,
    draw_noise,
    noise_scale,
    restoration_window,
    token_groups,
    trace_fact,
)
from palimpsest.parts.decoder import (
    block_parameters,
    decoder_of,
    final_norm,
    part_of,
    parts_of,
    stack_of,
    truncated,
)
from palimpsest.parts.subject_span import subject_range, subject_range_in, token_range

TOKENS = torch.tensor([3, 11, 7, 19, 2, 5])
SUBJECT = (1, 3)


def llama(layers=3, tied=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=32, n_embd=16, n_layer=3, n_head=2, initializer_range=0.4
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(params=[llama, gpt2])
def model(request):
    return request.param()


@pytest.fixture
def noise():
    return draw_noise(4, 2, 16, 1.5, torch.Generator().manual_seed(1))


def by_hand(model, noise, modules, position):
    """Score with the outputs of modules put back at one position, by hooks on a batch of one prompt alone."""
    rows = TOKENS.expand(1 + len(noise), -1)
    handles = []

    def corrupt(_module, _inputs, output):
        output = output.clone()
        output[1:, SUBJECT[0] : SUBJECT[1]] += noise
        return output

    def restore(_module, _inputs, output):
        state = output[0] if isinstance(output, tuple) else output
        state = state.clone()
        state[1:, position] = state[0, position]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handles.append(model.get_input_embeddings().register_forward_hook(corrupt))
    handles += [model.get_submodule(name).register_forward_hook(restore) for name in modules]
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, -1]
    for handle in handles:
        handle.remove()
    p = logits.softmax(-1)
    return p[1:, int(p[0].argmax())].mean()


def test_a_trace_is_that_of_one_run_per_token_and_layer(model, noise):
    model.eval()
    found = trace_fact(model, TOKENS, SUBJECT, noise, window=2)
    blocks = decoder_of(model).blocks
    assert found.low == pytest.approx(by_hand(model, noise, [], 0).item(), rel=1e-5)
    for kind in ("state", "mlp", "attention"):
        for layer, block in enumerate(blocks):
            names = [block]
            if kind != "state":
                names = [part_of(model, blocks[i], kind) for i in restoration_window(layer, 2, 3)]
            for position in range(len(TOKENS)):
                expected = by_hand(model, noise, names, position).item()
                assert found.scores[kind][position, layer].item() == pytest.approx(expected, rel=1e-4)


def test_restoring_before_the_subject_does_nothing_and_the_end_everything(model, noise):
    found = trace_fact(model, TOKENS, SUBJECT, noise)
    assert abs(found.total_effect) > 1e-3
    assert found.scores["state"][-1, -1].item() == pytest.approx(found.high, abs=1e-5)
    for scores in found.scores.values():
        assert scores.shape == (6, 3)
        assert (scores[0] - found.low).abs().max() <= 1e-6
    assert found.indirect_effect("state")[-1, -1].item() == pytest.approx(found.total_effect, abs=1e-5)


def test_the_rows_that_go_through_at_once_do_not_matter(model, noise, monkeypatch):
    whole = trace_fact(model, TOKENS, SUBJECT, noise, kinds=["mlp"])
    monkeypatch.setattr(causal_tracing, "ROWS", 8)
    pieces = trace_fact(model, TOKENS, SUBJECT, noise, kinds=["mlp"])
    torch.testing.assert_close(whole.scores["mlp"], pieces.scores["mlp"], rtol=1e-4, atol=1e-6)


def test_tracing_leaves_the_model_as_it_was(model, noise):
    model.train()
    before = copy.deepcopy(model.state_dict())
    trace_fact(model, TOKENS, SUBJECT, noise)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_fact_that_the_model_does_not_know_is_not_traced(model, noise):
    found = trace_fact(model, TOKENS, SUBJECT, noise, kinds=[])
    assert trace_fact(model, TOKENS, SUBJECT, noise, kinds=[], answer=found.answer) == found
    assert trace_fact(model, TOKENS, SUBJECT, noise, answer=(found.answer + 1) % 23) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"subject": (5, 8)}, "outside"),
        ({"subject": (2, 2)}, "outside"),
        ({"noise": torch.zeros(0, 2, 16)}, "at least one"),
        ({"noise": torch.zeros(4, 3, 16)}, "samples, 2"),
        ({"noise": torch.full((4, 2, 16), float("nan"))}, "NaN"),
        ({"window": 0}, "window"),
        ({"kinds": ["head"]}, "head"),
    ],
)
def test_spans_noise_and_kinds_that_do_not_fit_are_refused(changes, named, noise):
    settings = {"tokens": TOKENS, "subject": SUBJECT, "noise": noise, **changes}
    with pytest.raises(InvalidHyperparameter, match=named):
        trace_fact(llama(), **settings)


# Windows, groups, layers


def test_windows_reach_from_half_before_to_half_after_and_stay_in_the_stack():
    for layers in (1, 4, 9):
        for window in (1, 2, 3, 10):
            for layer in range(layers):
                inside = [i for i in range(layers) if layer - window // 2 <= i < layer + -(-window // 2)]
                assert list(restoration_window(layer, window, layers)) == inside
    assert list(restoration_window(5, 1, 9)) == [5]


def test_tokens_are_grouped_around_the_subject():
    assert token_groups(7, (1, 4)) == [
        "before",
        "first subject",
        "middle subject",
        "last subject",
        "further",
        "further",
        "last",
    ]
    assert token_groups(2, (0, 1)) == ["last subject", "last"]
    assert token_groups(2, (0, 2)) == ["first subject", "last subject"]


def test_effects_are_averaged_within_a_fact_and_then_over_facts():
    scores = torch.tensor([[0.5, 0.1], [0.2, 0.3], [0.4, 0.7]])
    one = FactTrace(0, 0.9, 0.1, (0, 1), {"mlp": scores})
    two = FactTrace(0, 0.9, 0.2, (1, 3), {"mlp": scores})
    found = average_effects([one, two], "mlp")
    assert list(found) == ["before", "first subject", "last subject", "further", "last"]
    torch.testing.assert_close(found["last subject"], torch.tensor([(0.4 + 0.2) / 2, (0.0 + 0.5) / 2]))
    torch.testing.assert_close(found["further"], torch.tensor([0.1, 0.2]))
    with pytest.raises(InvalidRecords, match="No fact"):
        average_effects([], "mlp")


def test_the_block_of_layers_with_the_largest_effect_is_found():
    effect = torch.tensor([0.1, 0.5, 0.4, 0.0, 0.6, 0.0])
    assert concentrated_layers(effect, 2) == range(1, 3)
    assert concentrated_layers(effect, 1) == range(4, 5)
    assert concentrated_layers(torch.zeros(5), 2) == range(0, 2)
    with pytest.raises(InvalidHyperparameter, match="count"):
        concentrated_layers(effect, 7)


def test_noise_is_scaled_by_the_spread_of_subject_embeddings():
    embeddings = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    scale = noise_scale(embeddings)
    assert scale == pytest.approx(0.6, rel=0.05)
    drawn = draw_noise(200, 3, 8, scale, torch.Generator().manual_seed(1))
    assert drawn.shape == (200, 3, 8) and drawn.std().item() == pytest.approx(scale, rel=0.05)
    with pytest.raises(InvalidHyperparameter, match="samples"):
        draw_noise(0, 3, 8, scale, torch.Generator())


# The span of a subject


def test_a_subject_is_found_by_text_and_by_offsets_alike():
    words = ["Where", " does", " An", "na", " Lind", " live", "?"]
    prompt = "".join(words)
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word))
    assert subject_range(words, "Anna Lind") == (2, 5)
    exact = list(pairwise(starts))
    assert subject_range_in(prompt, "Anna Lind", exact) == (2, 5)
    without_blanks = [(start + prompt[start:end].startswith(" "), end) for start, end in exact]
    special = [(0, 0), *without_blanks]
    assert subject_range_in(prompt, "Anna Lind", special) == (3, 6)
    assert subject_range(words, "nna") == (2, 4)
    assert subject_range(["Anna", " x"], "Anna") == (0, 1)


def test_a_subject_that_is_not_there_is_an_error_with_the_prompt():
    with pytest.raises(InvalidRecords, match="Who is it"):
        subject_range(["Who", " is", " it"], "Anna")
    with pytest.raises(InvalidRecords, match="''"):
        subject_range(["Who"], "")
    with pytest.raises(InvalidRecords, match="end at 3"):
        token_range([3], 2, 9)


# The anatomy


def test_the_parts_of_usual_decoders_are_found():
    assert decoder_of(llama()).blocks == tuple(f"model.layers.{i}" for i in range(3))
    assert decoder_of(llama()).embedding == "model.embed_tokens"
    assert decoder_of(gpt2()).blocks[0] == "transformer.h.0"
    assert part_of(gpt2(), "transformer.h.1", "attention") == "transformer.h.1.attn"


def test_the_stack_names_its_blocks_and_their_parts(model):
    stack, names = stack_of(model), decoder_of(model)
    assert tuple(stack.block(at) for at in range(len(stack))) == names.blocks and stack.name == names.stack
    assert all(
        model.get_submodule(name) is block for name, block in zip(names.blocks, stack.blocks, strict=True)
    )
    for kind in ("mlp", "attention"):
        assert parts_of(model, None, kind) == [part_of(model, block, kind) for block in names.blocks]
    assert (
        stack.part(1, "self_attn") == stack.part(1, "attention") and stack.part(1, "all") == names.blocks[1]
    )
    down = model.get_submodule(stack.part(2, "down"))
    assert max(down.weight.shape) > min(down.weight.shape) == 16
    assert final_norm(model) is (model.model.norm if hasattr(model, "model") else model.transformer.ln_f)
    for number, kind in ((3, "mlp"), (-1, "mlp"), (0, "head")):
        with pytest.raises(InvalidHyperparameter):
            stack.part(number, kind)
    with pytest.raises(ModelMismatch, match="No final"):
        final_norm(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)] * 2)}))


def test_experts_within_blocks_are_not_taken_for_blocks():
    blocks = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(8))}) for _ in range(3)]
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "blocks": nn.ModuleList(blocks)})
    assert decoder_of(model).blocks == ("blocks.0", "blocks.1", "blocks.2")


def test_parameters_of_blocks_are_chosen_by_layer_and_part():
    names = block_parameters(llama(), [2, 0], "mlp")
    assert len(names) == 6
    assert all(name.startswith(("model.layers.0.mlp.", "model.layers.2.mlp.")) for name in names)
    assert len(block_parameters(llama(), [1], "attention")) == 4
    assert "model.layers.1.input_layernorm.weight" in block_parameters(llama(), [1], "all")
    for layers, part in (([3], "mlp"), ([-1], "mlp"), ([], "mlp"), ([0], "head")):
        with pytest.raises(InvalidHyperparameter):
            block_parameters(llama(), layers, part)


def test_a_model_without_blocks_and_a_block_of_unknown_naming_are_refused():
    with pytest.raises(ModelMismatch, match="no list of blocks"):
        decoder_of(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)))
    odd = nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": nn.ModuleList([nn.Linear(2, 2)] * 2)})
    with pytest.raises(ModelMismatch, match=r"layers\.0"):
        part_of(odd, "layers.0", "mlp")
    with pytest.raises(ModelMismatch, match="embedding"):
        decoder_of(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)] * 2)}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_truncated_copy_has_the_first_blocks_and_shares_nothing(tied):
    model = llama(4, tied).eval()
    seen = {}
    handle = model.model.layers[1].register_forward_hook(
        lambda _m, _i, output: seen.update(state=output[0] if isinstance(output, tuple) else output)
    )
    model(input_ids=TOKENS[None])
    handle.remove()
    short = truncated(model, 2)
    assert len(short.model.layers) == short.config.num_hidden_layers == 2
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    expected = model.lm_head(model.model.norm(seen["state"]))
    torch.testing.assert_close(short(input_ids=TOKENS[None]).logits, expected)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() not in ours for parameter in short.parameters())
    assert (short.lm_head.weight is short.model.embed_tokens.weight) == tied
    prompt = {"input_ids": TOKENS[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    assert short.generate(**prompt, max_new_tokens=3, do_sample=False).shape == (1, 9)


def test_a_truncated_copy_keeps_at_least_one_block_and_at_most_all():
    for layers in (0, 4):
        with pytest.raises(InvalidHyperparameter, match="layers"):
            truncated(llama(), layers)
    whole = truncated(gpt2(), 3)
    torch.testing.assert_close(
        whole.eval()(input_ids=TOKENS[None]).logits, gpt2().eval()(input_ids=TOKENS[None]).logits
    )
