"""What attention sees with prefixes and tokens, against attention that is written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from palimpsest.core.errors import ModelMismatch
from palimpsest.models import build_model
from palimpsest.retain.attention_blocks import attention_blocks, prefixes, tokens


def of_transformers(kind="eager"):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=24, image_size=8,
        patch_size=4, num_channels=1, num_labels=4, attn_implementation=kind, initializer_range=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def of_timm(**settings):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    settings = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 3, "num_heads": 3, **settings}  # fmt: skip
    return timm.models.VisionTransformer(num_classes=4, **settings).eval()


NETWORKS = {
    "eager": of_transformers,
    "sdpa": lambda: of_transformers("sdpa"),
    "timm": of_timm,
    "small_vit": lambda: build_model("small_vit", (1, 8, 8), 4, width=12, layers=3, heads=3, patch=4).eval(),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]()


def projected(attention, hidden):
    """Query, key and value of hidden states."""
    if attention.query is None:
        return attention.key(hidden).chunk(3, -1)
    return attention.query(hidden), attention.key(hidden), attention.value(hidden)


def by_hand(attention, hidden, keys, values, heads=3):
    """softmax(Q [K; keys]^T / sqrt(d)) [V; values], heads together, before the output projection."""
    query, key, value = projected(attention, hidden)
    key, value = torch.cat([keys, key], 1), torch.cat([values, value], 1)
    size, found = attention.width // heads, []
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)
        scores = query[..., cut] @ key[..., cut].transpose(1, 2) / size**0.5
        found.append(scores.softmax(-1) @ value[..., cut])
    return torch.cat(found, -1)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def after(attention, context):
    """The rest of the attention module: its output projection, where it holds one."""
    for name in ("o_proj", "proj"):
        if hasattr(attention.module, name):
            return getattr(attention.module, name)(context)
    return context


@pytest.mark.parametrize("length", [1, 5, 7])
def test_a_prefix_is_attention_over_concatenated_keys_and_values(network, length):
    blocks, random = attention_blocks(network), torch.Generator().manual_seed(1)
    attention = blocks.attentions[1]
    hidden = torch.randn(2, 5, 12, generator=random)
    keys, values = torch.randn(2, 2, length, 12, generator=random)
    with prefixes(blocks, {1: (keys, values)}), torch.no_grad():
        found = first(attention.module(hidden))
    with torch.no_grad():
        expected = after(attention, by_hand(attention, hidden, keys, values))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_only_named_blocks_see_a_prefix_and_each_row_sees_its_own(network):
    blocks, x = attention_blocks(network), torch.rand(2, 1, 8, 8)
    keys, values = torch.randn(2, 2, 4, 12)
    outputs = {}
    handles = [
        block.register_forward_hook(lambda _m, _i, out, n=number: outputs.__setitem__(n, first(out)))
        for number, block in enumerate(blocks.modules)
    ]
    with torch.no_grad():
        network(x)
        plain = dict(outputs)
        with prefixes(blocks, {1: (keys, values)}):
            network(x)
        prompted = dict(outputs)
        with prefixes(blocks, {1: (keys[:1], values[:1])}):
            network(x[:1])
    for handle in handles:
        handle.remove()
    assert torch.equal(plain[0], prompted[0])
    assert not torch.allclose(plain[1], prompted[1])
    torch.testing.assert_close(outputs[2], prompted[2][:1], atol=1e-5, rtol=1e-4)


def test_an_empty_mind_is_changed_by_nothing_that_has_gone(network):
    blocks, x = attention_blocks(network), torch.rand(3, 1, 8, 8)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
    names = list(network.state_dict())
    logits = getattr(network(x), "logits", network(x))
    with prefixes(blocks, {0: tuple(torch.randn(2, 3, 2, 12))}), tokens(blocks, torch.randn(3, 4, 12), True):
        inside = copy.deepcopy(network)
        with pytest.raises(RuntimeError):
            network(torch.rand(2, 1, 8, 8))  # another batch size: an error must leave no hook either
    assert list(inside.state_dict()) == names
    after = getattr(network(x), "logits", network(x))
    assert torch.equal(logits, after)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.mark.parametrize("kind", ["sdpa", "timm"])  # eager attention takes its softmax in single precision
def test_gradients_of_a_prefix_are_right(kind):
    network = NETWORKS[kind]()
    blocks, x = attention_blocks(network.double()), torch.rand(2, 1, 8, 8).double()
    network.requires_grad_(False)
    keys, values = torch.randn(2, 2, 2, 12, dtype=torch.float64)

    def run(keys, values):
        with prefixes(blocks, {2: (keys, values)}):
            out = network(x)
        return getattr(out, "logits", out)

    assert torch.autograd.gradcheck(run, (keys.requires_grad_(), values.requires_grad_()), fast_mode=True)


def test_tokens_stand_behind_the_class_token_and_are_read_as_their_mean(network):
    blocks, x = attention_blocks(network), torch.rand(2, 1, 8, 8)
    shown, states = torch.randn(2, 4, 12), {}
    handles = [
        blocks.modules[0].register_forward_pre_hook(
            lambda _m, args, kwargs: states.__setitem__("in", args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        blocks.norm.register_forward_hook(lambda _m, _i, out: states.__setitem__("out", out)),
    ]
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        network(x)
        plain = states["in"]
        with tokens(blocks, shown):
            logits = network(x)
        # the spy's hook ran before that of the tokens, so it saw the plain input in either case
        assert torch.equal(states["in"], plain)
        out = states["out"]
        hidden = torch.cat([plain[:, :1], shown, plain[:, 1:]], 1)
        for block in blocks.modules:
            hidden = first(block(hidden))
        torch.testing.assert_close(blocks.norm(hidden), out, atol=1e-5, rtol=1e-4)
        with tokens(blocks, shown, read=True):
            read = network(x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(getattr(logits, "logits", logits), head(out[:, 0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(getattr(read, "logits", read), head(out[:, 1:5].mean(1)), atol=1e-5, rtol=1e-4)


def test_networks_without_such_attention_are_refused_with_what_to_take():
    for model in (build_model("mlp", (1, 8, 8), 4), nn.TransformerEncoderLayer(8, 2)):
        with pytest.raises(ModelMismatch, match="small_vit"):
            attention_blocks(model)


def test_blocks_that_make_no_single_list_are_refused():
    class Attention(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    class Network(nn.Module):
        def __init__(self, *stages):
            super().__init__()
            self.stages = nn.ModuleList(stages)

    with pytest.raises(ModelMismatch, match="hierarchical"):
        attention_blocks(Network(nn.ModuleList([Attention()]), nn.ModuleList([Attention()])))
    with pytest.raises(ModelMismatch, match="different widths"):
        attention_blocks(Network(Attention(), Attention(16)))
    with pytest.raises(ModelMismatch, match="no list"):
        attention_blocks(Attention())
    assert len(attention_blocks(Network(Attention(), Attention()))) == 2


def test_attention_with_a_mask_is_refused(network):
    blocks = attention_blocks(network)
    hidden, mask = torch.rand(2, 5, 12), torch.zeros(2, 1, 5, 5)
    with (
        pytest.raises(ModelMismatch, match="mask"),
        prefixes(blocks, {0: (hidden[:, :2], hidden[:, :2])}),
    ):
        blocks.attentions[0].module(hidden, mask)
