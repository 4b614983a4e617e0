"""The kinds of layer, one or two in each model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .case import Case, normal, on_x, tokens


def _sequential(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def _layer(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*args, **kwargs)


class _SecondInput(nn.Module):
    """Bilinear with both inputs computed from x."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 3)
        self.right = nn.Linear(6, 4)
        self.bilinear = nn.Bilinear(3, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bilinear(self.left(x), self.right(x).tanh())
        return out


class _Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 4, mode=mode, padding_idx=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bag(x))
        return out


def _affine(norm: nn.Module) -> nn.Module:
    """Random weights: with the initial ones and zeros some mistakes cancel."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def _norm(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: _affine(kind(*args, **kwargs))


_linear = lambda i, o, **kw: _layer(nn.Linear, i, o, **kw)  # noqa: E731
_relu = _layer(nn.ReLU)
_tanh = _layer(nn.Tanh)
_flat = _layer(nn.Flatten)


LAYERS = [
    Case(
        "mlp",
        _sequential(_linear(6, 7), _relu, _linear(7, 8), _tanh, _linear(8, 3)),
        normal(6),
        on_x,
    ),
    Case(
        "mlp_inplace_relu",
        _sequential(_linear(6, 7), _layer(nn.ReLU, inplace=True), _linear(7, 3)),
        normal(6),
        on_x,
    ),
    Case(
        "linear_no_bias",
        _sequential(_linear(6, 7, bias=False), _tanh, _linear(7, 2)),
        normal(6),
        on_x,
    ),
    Case("linear_one_output", _sequential(_linear(6, 1), _layer(nn.Flatten, 0)), normal(6), on_x),
    Case("linear_3d", _sequential(_linear(6, 7), _tanh, _linear(7, 3)), normal(4, 6), on_x),
    Case("linear_4d", _sequential(_linear(6, 7), _tanh, _linear(7, 3)), normal(2, 4, 6), on_x),
    Case("bilinear", _SecondInput, normal(6), on_x),
    Case(
        "embedding_padding",
        _sequential(_layer(nn.Embedding, 9, 4, padding_idx=3), _tanh, _linear(4, 3)),
        tokens(8, 9),
        on_x,
    ),
    Case("embedding_bag_mean", lambda: _Bags("mean"), tokens(7, 11), on_x),
    Case("embedding_bag_sum", lambda: _Bags("sum"), tokens(7, 11), on_x),
    Case(
        "layer_norm",
        _sequential(_linear(6, 8), _norm(nn.LayerNorm, 8), _tanh, _linear(8, 3)),
        normal(6),
        on_x,
    ),
    Case(
        "layer_norm_3d",
        _sequential(_linear(6, 8), _norm(nn.LayerNorm, [4, 8], bias=False), _linear(8, 3)),
        normal(4, 6),
        on_x,
    ),
    Case(
        "rms_norm",
        _sequential(_linear(6, 8), _norm(nn.RMSNorm, 8), _tanh, _linear(8, 3)),
        normal(4, 6),
        on_x,
    ),
    Case(
        "group_norm",
        _sequential(
            _layer(nn.Conv2d, 3, 6, 3), _norm(nn.GroupNorm, 2, 6), _relu, _flat, _linear(96, 3)
        ),
        normal(3, 6, 6),
        on_x,
    ),
    Case(
        "group_norm_2d_input",
        _sequential(_linear(4, 6), _norm(nn.GroupNorm, 3, 6), _tanh, _linear(6, 2)),
        normal(4),
        on_x,
    ),
    Case(
        "instance_norm",
        _sequential(
            _layer(nn.Conv2d, 3, 4, 3),
            _norm(nn.InstanceNorm2d, 4, affine=True),
            _flat,
            _linear(64, 3),
        ),
        normal(3, 6, 6),
        on_x,
        # torch's instance_norm refuses zero samples.
        empty_ok=False,
    ),
    Case(
        "prelu",
        _sequential(
            _linear(6, 7), _norm(nn.PReLU), _linear(7, 8), _norm(nn.PReLU, 8), _linear(8, 2)
        ),
        normal(6),
        on_x,
    ),
    Case(
        "prelu_channels",
        _sequential(_layer(nn.Conv1d, 3, 4, 3), _norm(nn.PReLU, 4), _flat),
        normal(3, 8),
        on_x,
    ),
    Case(
        "conv1d",
        _sequential(_layer(nn.Conv1d, 3, 4, 3, stride=2, padding=1), _relu, _flat, _linear(16, 3)),
        normal(3, 8),
        on_x,
    ),
    Case(
        "cnn",
        _sequential(
            _layer(nn.Conv2d, 3, 6, 3, padding=1),
            _relu,
            _layer(nn.MaxPool2d, 2),
            _layer(nn.Conv2d, 6, 8, 3, stride=2, bias=False),
            _tanh,
            _flat,
            _linear(32, 10),
            _relu,
            _linear(10, 3),
        ),
        normal(3, 12, 12),
        on_x,
    ),
    Case(
        "conv2d_dilated_grouped",
        _sequential(
            _layer(
                nn.Conv2d, 4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2
            ),
            _tanh,
            _layer(nn.Conv2d, 6, 3, 3, padding="same"),
        ),
        normal(4, 6, 7),
        on_x,
    ),
    Case(
        "conv2d_circular",
        _sequential(_layer(nn.Conv2d, 2, 4, 3, padding=1, padding_mode="circular"), _tanh),
        normal(2, 6, 6),
        on_x,
    ),
    Case(
        "depthwise_separable",
        _sequential(
            _layer(nn.Conv2d, 4, 4, 3, groups=4),
            _relu,
            _layer(nn.Conv2d, 4, 6, 1),
            _layer(nn.Conv2d, 6, 12, 3, groups=6),
        ),
        normal(4, 7, 7),
        on_x,
    ),
    Case(
        "conv3d",
        _sequential(_layer(nn.Conv3d, 2, 3, 2), _tanh, _flat, _linear(24, 2)),
        normal(2, 3, 3, 3),
        on_x,
    ),
    Case(
        "conv_transpose2d",
        _sequential(
            _layer(nn.Conv2d, 2, 3, 3),
            _tanh,
            _layer(nn.ConvTranspose2d, 3, 4, 3, stride=2, padding=1, output_padding=1),
        ),
        normal(2, 6, 6),
        on_x,
    ),
    Case(
        "dropout",
        _sequential(_linear(6, 20), _layer(nn.Dropout, 0.4), _relu, _linear(20, 3)),
        normal(6),
        on_x,
        random=True,
    ),
    Case(
        "dropout2d",
        _sequential(_layer(nn.Conv2d, 2, 6, 3), _layer(nn.Dropout2d, 0.4), _flat, _linear(96, 3)),
        normal(2, 6, 6),
        on_x,
        random=True,
    ),
    Case(
        "batch_norm",
        _sequential(_linear(6, 7), lambda: _affine(nn.BatchNorm1d(7)), _tanh, _linear(7, 3)),
        normal(6),
        on_x,
        batch_dim_ok=False,
    ),
    Case(
        "batch_norm_eval",
        _sequential(_linear(6, 7), lambda: _affine(nn.BatchNorm1d(7)), _tanh, _linear(7, 3)),
        normal(6),
        on_x,
        training=False,
    ),
    Case(
        "tasks",
        _sequential(_linear(6, 8), _tanh, _linear(8, 4)),
        normal(6),
        lambda model, batch: model(batch["x"]).square() + model(batch["x"] + 1.0).sin(),
    ),
]
