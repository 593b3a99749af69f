"""Which functions of the library compute the reference values of knowledge isolation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from palimpsest.forget.language.joint_loss import AdaptiveMultiplier, joint_loss
from palimpsest.parts.causal_tracing import trace_fact
from palimpsest.parts.subject_span import subject_range
from palimpsest.parts.tokens import IGNORED, token_mean

Data = dict[str, Any]


def _joint(inputs: Data, params: Data) -> Data:
    labels = torch.tensor(inputs["input_ids"]).masked_fill(~torch.tensor(inputs["loss_mask"]).bool(), IGNORED)
    gone = torch.tensor(inputs["factor"]) == -1
    state = inputs["state"]
    adaptive = AdaptiveMultiplier(
        params["a"],
        params["b"],
        params["c"],
        params["min"],
        params["max"],
        baseline="official",
        total=state["average_positive_loss"],
        rows=state["n_positive_examples"],
        reference=state["previous_positive_avg_loss"],
    )
    steps = []
    for logits in torch.tensor(inputs["logits"]):
        forget = token_mean(logits[gone], labels[gone]) if gone.any() else None
        retain = token_mean(logits[~gone], labels[~gone]) if (~gone).any() else None
        multiplier = adaptive.update(
            retain.item() if retain is not None else 0.0, int((~gone).sum()), inputs["epoch"]
        )
        steps.append(
            {
                "loss": joint_loss(forget, retain, multiplier).item(),
                "negative_loss": -forget.item() if forget is not None else 0,
                "multiplier": multiplier,
                "change_in_loss": adaptive.change,
                "average_positive_loss": adaptive.total,
                "n_positive_examples": adaptive.rows,
                "previous_positive_avg_loss": adaptive.reference,
            }
        )
    return {"steps": steps}


class Attention(nn.Module):
    """The mean of all states up to each token, through a matrix."""

    def __init__(self, weight: list[Any]):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, h.shape[1] + 1)[:, None]
        return (h.cumsum(1) / count) @ self.weight.T


class MLP(nn.Module):
    """A matrix and a hyperbolic tangent."""

    def __init__(self, weight: list[Any]):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ self.weight.T)


class Block(nn.Module):
    """Attention, then MLP, each added to the state."""

    def __init__(self, attention: list[Any], mlp: list[Any]):
        super().__init__()
        self.self_attn, self.mlp = Attention(attention), MLP(mlp)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.self_attn(h)
        return h + self.mlp(h)


class ToyDecoder(nn.Module):
    """The decoder that the reference values describe."""

    def __init__(self, weights: Data):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.tensor(weights["embed"]))
        self.layers = nn.ModuleList(
            Block(attention, mlp) for attention, mlp in zip(weights["attn"], weights["mlp"], strict=True)
        )
        self.register_buffer("head", torch.tensor(weights["lm_head"]))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return h @ self.head.T


def _trace(inputs: Data, params: Data) -> Data:
    found = trace_fact(
        ToyDecoder(inputs["weights"]),
        torch.tensor(inputs["input_ids"]),
        tuple(inputs["subject_range"]),
        torch.tensor(inputs["noise_added"]),
        params["window"],
    )
    assert found is not None
    return {
        "answer": found.answer,
        "high_score": found.high,
        "low_score": found.low,
        "states": found.scores["state"].tolist(),
        "mlp_window": found.scores["mlp"].tolist(),
        "attn_window": found.scores["attention"].tolist(),
    }


def _subject(inputs: Data, params: Data) -> Data:
    return {"range": list(subject_range(inputs["tokens"], inputs["subject"]))}


FUNCTIONS = {"joint_loss": _joint, "trace_toy": _trace, "subject_range": _subject}
