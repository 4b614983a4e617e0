"""Attention, transformers with tied weights, position tables without a batch, recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Batch, Case, normal, on_x, per_sample, tokens

_VOCABULARY = 13


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.attention.in_proj_bias)
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.attention(x, x, x, need_weights=False)[0])
        return out


class _CrossAttention(nn.Module):
    """Queries, keys and values of different widths: three projection weights; weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            8, 2, batch_first=True, kdim=5, vdim=6, add_bias_kv=True
        )

    def forward(self, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        values = F.pad(keys, (0, 1)).sin()
        attended, weights = self.attention(x, keys, values)
        return attended, weights


def _queries_and_keys(size: int, generator: torch.Generator) -> Batch:
    return {**normal(3, 8)(size, generator), **normal(4, 5, name="keys")(size, generator)}


class _PositionsFirstAttention(nn.Module):
    """batch_first=False, torch's default; perhaps with the last position of each sample masked."""

    def __init__(self, padded: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.padded = padded

    def forward(self, x: Tensor) -> Tensor:
        first = x.transpose(0, 1)
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, -1] = True
        out: Tensor = self.attention(
            first, first, first, mask if self.padded else None, need_weights=False
        )[0]
        return out.transpose(0, 1)


def _encoder_layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **kwargs)


class _TiedTransformer(nn.Module):
    """Token embedding and output head share their weight; the positions have a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 8)
        self.positions = nn.Embedding(10, 8)
        self.block = _encoder_layer(dropout=0.0, norm_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, _VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)[None]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        hidden = self.embedding(x) + self.positions(place)
        logits: Tensor = self.head(self.norm(self.block(hidden, src_mask=mask)))
        return logits


def _next_token_losses(logits: Tensor, x: Tensor) -> Tensor:
    """Cross entropy per sample and position: [b, t - 1]."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none")


def _per_sequence(model: nn.Module, batch: Batch) -> Tensor:
    return _next_token_losses(model(batch["x"]), batch["x"]).mean(1)


def _per_token(model: nn.Module, batch: Batch) -> Tensor:
    return _next_token_losses(model(batch["x"]), batch["x"])


class _PositionTable(nn.Module):
    """Positions without any batch dimension, [t, d], broadcast later."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 6)
        self.positions = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        out: Tensor = self.head((self.embedding(x) + self.positions(place)).tanh())
        return out


class _RelativeBias(nn.Module):
    """T5's attention bias: a lookup [q, k, heads], permuted, and broadcast over the batch."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 4 * heads)
        self.bias = nn.Embedding(9, heads)
        self.query = nn.Linear(4 * heads, 4 * heads, bias=False)
        self.head = nn.Linear(4 * heads, 3)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x)
        b, t, d = hidden.shape
        split = (b, t, self.heads, d // self.heads)
        query, key = self.query(hidden).view(split), hidden.view(split)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key)
        place = torch.arange(t)
        distance = (place[None, :] - place[:, None]).clamp(-4, 4) + 4
        scores = scores + self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), key).reshape(b, t, d)
        out: Tensor = self.head(mixed)
        return out


def _attention(implementation: str) -> dict[str, Any]:
    return {"attn_implementation": implementation}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=10,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **_attention("eager"),
    )
    return GPT2LMHeadModel(config)


def _llama(attention: str = "eager") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=10,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **_attention(attention),
    )
    return LlamaForCausalLM(config)


def _llama_float64() -> nn.Module:
    """Llama without the float32 in which its norms and its eager softmax always compute."""
    model = _llama("sdpa")
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(name, nn.RMSNorm(8, eps=1e-6))
    return model


def _language_model_losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["x"]).logits
    return _next_token_losses(logits, batch["x"]).mean(1)


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], **kwargs: Any) -> None:
        super().__init__()
        self.recurrent = kind(5, 4, batch_first=True, **kwargs)
        self.head = nn.Linear(4 * self.recurrent.num_layers, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = self.recurrent(x)[1]
        state = state[0] if isinstance(state, tuple) else state
        out: Tensor = self.head(state.transpose(0, 1).flatten(1))
        return out


SEQUENCES = [
    Case("self_attention", _SelfAttention, normal(4, 8), on_x),
    Case(
        "cross_attention",
        _CrossAttention,
        _queries_and_keys,
        lambda model, batch: per_sample(*model(batch["x"], batch["keys"])),
    ),
    Case("positions_first_attention", _PositionsFirstAttention, normal(4, 8), on_x, announced=True),
    # As many positions as samples in the tests' batch of 5, and a mask that cannot be cut so.
    Case(
        "positions_first_padded",
        lambda: _PositionsFirstAttention(padded=True),
        normal(5, 8),
        on_x,
        empty_ok=False,
        announced=True,
    ),
    Case(
        "transformer_layer_post_norm",
        lambda: nn.Sequential(_encoder_layer(dropout=0.0), nn.Linear(8, 3)),
        normal(4, 8),
        on_x,
    ),
    Case(
        "transformer_layer_dropout",
        lambda: _encoder_layer(dropout=0.3, norm_first=True),
        normal(4, 8),
        on_x,
        random=True,
    ),
    Case("tied_transformer", _TiedTransformer, tokens(6, _VOCABULARY), _per_sequence),
    Case("tied_transformer_per_token", _TiedTransformer, tokens(4, _VOCABULARY), _per_token),
    Case("position_table", _PositionTable, tokens(6, _VOCABULARY), on_x, announced=True),
    Case("relative_bias", _RelativeBias, tokens(6, _VOCABULARY), on_x, announced=True),
    # As many queries as samples in the tests' batch of 5: the sizes do not give it away.
    Case("relative_bias_square", _RelativeBias, tokens(5, _VOCABULARY), on_x, announced=True),
    Case("gpt2", _gpt2, tokens(6, _VOCABULARY), _language_model_losses, empty_ok=False),
    Case(
        "llama",
        _llama,
        tokens(6, _VOCABULARY),
        _language_model_losses,
        empty_ok=False,
        # Its norms and its softmax compute in float32 whatever the model is; eps is 1.2e-7.
        tolerance=1e-6,
    ),
    Case(
        "llama_float64",
        _llama_float64,
        tokens(6, _VOCABULARY),
        _language_model_losses,
        empty_ok=False,
    ),
    Case("rnn", lambda: _Recurrent(nn.RNN), normal(4, 5), on_x, batch_dim_ok=False),
    Case(
        "lstm",
        lambda: _Recurrent(nn.LSTM, num_layers=2),
        normal(4, 5),
        on_x,
        batch_dim_ok=False,
    ),
    Case("gru", lambda: _Recurrent(nn.GRU), normal(4, 5), on_x, batch_dim_ok=False),
]
