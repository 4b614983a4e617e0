"""Every closed form against the oracle, on shapes that hypothesis draws.

The layer is the whole model, so that no error of another layer can hide its own; the objectives are
random linear functions of its output. The fallback and the slow way are out of order: what has a
rule must be served by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jddist.autogram import Engine, assembly, local_pass
from jddist.autogram.rules import find_rule
from tests._oracle import flat_grad, gramian, relative_error, weighted_gradient
from tests.unit.autogram._common import SLOW_WAY

# 1e-10 for Gramians is the project's bound; gradients have no cancellation between rows to fear.
GRAMIAN, GRADIENT = 1e-10, 1e-12
# Step 1 and 2 are checked by the engine itself and differentiate; at step 3 the rows are combined.
STEPS = 3

few = settings(max_examples=15)
sizes = st.integers(1, 4)
batch_dims = st.sampled_from([0, None])


@contextmanager
def _rules_only() -> Iterator[None]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("a layer with a rule was computed another way")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "vjp_rows", refuse)
        original = local_pass.row_gradients
        patch.setattr(
            local_pass,
            "row_gradients",
            lambda o, lay, at, **kw: refuse() if at else original(o, lay, at, **kw),
        )
        yield


def check(
    model: nn.Module,
    make: Callable[[], tuple[Any, ...]],
    batch_dim: int | None,
    objectives: int = 1,
    forward: Callable[..., Tensor] | None = None,
) -> None:
    """The engine's Gramian and gradient of random linear functions of ``model(*make())``."""
    model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert find_rule(model) is not None
    engine = Engine(model, batch_dim=batch_dim)

    def losses_of(output: Tensor) -> Tensor:
        flat = output.flatten(1)
        directions = torch.randn(*flat.shape, objectives, dtype=torch.float64)
        losses = (flat.unsqueeze(2) * directions).sum(1)
        return losses.squeeze(1) if objectives == 1 else losses

    parameters = list(model.parameters())
    for _ in range(STEPS):
        model.zero_grad()
        losses = losses_of((forward or model)(*make()))
        expected = gramian(losses, parameters)
        weights = torch.randn(losses.shape, dtype=torch.float64)
        gradient = weighted_gradient(losses, weights, parameters)
        with _rules_only():
            assert relative_error(engine.compute_gramian(losses), expected) <= GRAMIAN
            # The rows are combined and the graph is kept, then whatever a training step does.
            engine.backward(losses, lambda _g, w=weights: w, retain_graph=True)
            assert relative_error(flat_grad(parameters), gradient) <= GRADIENT
            model.zero_grad()
            engine.backward(losses, lambda _g, w=weights: w)
        assert relative_error(flat_grad(parameters), gradient) <= GRADIENT


def _normal(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


@few
@given(b=sizes, middle=st.lists(sizes, max_size=2), k=st.integers(1, 2), bias=st.booleans())
@pytest.mark.parametrize("batch_dim", [0, None])
def test_linear(b: int, middle: list[int], k: int, bias: bool, batch_dim: int | None) -> None:
    check(nn.Linear(3, 5, bias=bias), _normal(b, *middle, 3), batch_dim, k)


@few
@given(b=sizes, middle=st.lists(sizes, max_size=2), k=st.integers(1, 2))
@pytest.mark.parametrize("batch_dim", [0, None])
def test_conv1d_of_transformers(b: int, middle: list[int], k: int, batch_dim: int | None) -> None:
    from transformers.pytorch_utils import Conv1D

    check(Conv1D(5, 3), _normal(b, *middle, 3), batch_dim, k)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution and the shape of an image it takes."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    into, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, dilation = draw(each), draw(st.tuples(*[st.integers(1, 2)] * dims))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(
        st.one_of(st.just("valid"), st.tuples(*[st.integers(0, 2)] * dims), st.just("same"))
    )
    stride = (1,) * dims if padding == "same" else draw(each)
    size = tuple(
        # Large enough for a patch without padding, and for reflection on both sides.
        d * (k - 1) + draw(st.integers(3, 4))
        for k, d in zip(kernel, dilation, strict=True)
    )
    layer = CONVOLUTIONS[dims](
        into,
        out,
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer, (into, *size)


@settings(max_examples=40)
@given(drawn=convolutions(), b=sizes, k=st.integers(1, 2))
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_convolution(
    drawn: tuple[nn.Module, tuple[int, ...]], b: int, k: int, batch_dim: int | None
) -> None:
    layer, shape = drawn
    check(layer, _normal(b, *shape), batch_dim, k)


@few
@given(
    kernel=st.sampled_from([(3, 3), (1, 2), (2, 1)]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1, (1, 0)]),
    dilation=st.sampled_from([1, 2]),
    b=st.sampled_from([1, 5, 16, 19]),  # more than one convolution has groups for
    bias=st.booleans(),
    groups=st.sampled_from([1, 1, 2, 8]),
    budget=st.sampled_from([0, 1 << 26]),
)
def test_convolution_of_many_channels_in_float32(
    kernel: tuple[int, int],
    stride: int,
    padding: Any,
    dilation: int,
    b: int,
    bias: bool,
    groups: int,
    budget: int,
) -> None:
    """Rows that the library's own kernels form, group by group."""
    layer = nn.Conv2d(16, 8, kernel, stride, padding, dilation, groups, bias=bias)
    engine = Engine(layer, batch_dim=0, memory_budget=budget)
    parameters = list(layer.parameters())
    for _ in range(STEPS):
        layer.zero_grad()
        output = layer(torch.randn(b, 16, 6, 7)).flatten(1)
        losses = (output * torch.randn(output.shape)).sum(1)
        expected = gramian(losses, parameters)
        weights = torch.randn(b)
        gradient = weighted_gradient(losses, weights, parameters)
        found: list[Tensor] = []
        with _rules_only():
            engine.backward(losses, lambda g, w=weights, kept=found: kept.append(g) or w)
        # Sums of some hundred float32 products, in another order.
        assert relative_error(found[0], expected) <= 1e-5
        assert relative_error(flat_grad(parameters), gradient) <= 1e-5


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 3)] * dims)
    stride, dilation = draw(each), draw(st.tuples(*[st.integers(1, 2)] * dims))
    kernel = draw(each)
    layer = TRANSPOSED[dims](
        2,
        3,
        kernel,
        stride=stride,
        dilation=dilation,
        padding=draw(st.tuples(*[st.integers(0, 1)] * dims)),
        output_padding=tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        ),
        bias=draw(st.booleans()),
    )
    return layer, (2, *[draw(st.integers(3, 4)) for _ in range(dims)])


@settings(max_examples=40)
@given(drawn=transposed_convolutions(), b=sizes, k=st.integers(1, 2))
@pytest.mark.parametrize("batch_dim", [0, None])
def test_transposed_convolution(
    drawn: tuple[nn.Module, tuple[int, ...]], b: int, k: int, batch_dim: int | None
) -> None:
    layer, shape = drawn
    check(layer, _normal(b, *shape), batch_dim, k)


@few
@given(
    b=sizes,
    middle=st.lists(sizes, max_size=2),
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    k=st.integers(1, 2),
)
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_the_last_dimensions(
    kind: type[nn.Module],
    b: int,
    middle: list[int],
    shape: list[int],
    k: int,
    batch_dim: int | None,
) -> None:
    check(kind(shape), _normal(b, *middle, *shape), batch_dim, k)  # type: ignore[call-arg]


@few
@given(b=sizes, size=st.lists(st.integers(2, 3), min_size=1, max_size=3), k=st.integers(1, 2))
@pytest.mark.parametrize("batch_dim", [0, None])
def test_norms_of_channels(b: int, size: list[int], k: int, batch_dim: int | None) -> None:
    check(nn.GroupNorm(2, 4), _normal(b, 4, *size), batch_dim, k)
    kinds = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
    check(kinds[len(size) - 1](4, affine=True), _normal(b, 4, *size), batch_dim, k)
    tracking = kinds[len(size) - 1](4, affine=True, track_running_stats=True).eval()
    nn.init.normal_(tracking.running_mean)
    nn.init.uniform_(tracking.running_var, 0.5, 2.0)
    check(tracking, _normal(b, 4, *size), batch_dim, k)


@few
@given(
    b=sizes, size=st.lists(sizes, max_size=2), k=st.integers(1, 2), slopes=st.sampled_from([1, 3])
)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_prelu(b: int, size: list[int], k: int, slopes: int, batch_dim: int | None) -> None:
    check(nn.PReLU(slopes), _normal(b, 3, *size), batch_dim, k)


@few
@given(
    b=sizes,
    length=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    lines=st.sampled_from([2, 7, 50]),  # few lines are multiplied as rows, many as matches
    padding=st.sampled_from([None, 1, -1]),
    scaled=st.booleans(),
    k=st.integers(1, 2),
)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_embedding(
    b: int,
    length: list[int],
    lines: int,
    padding: int | None,
    scaled: bool,
    k: int,
    batch_dim: int | None,
) -> None:
    layer = nn.Embedding(lines, 3, padding_idx=padding, scale_grad_by_freq=scaled)
    check(layer, lambda: (torch.randint(lines, (b, *length)),), batch_dim, k)


@few
@given(
    sizes_of_bags=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    mode=st.sampled_from(["sum", "mean"]),
    padding=st.sampled_from([None, 1]),
    weighted=st.booleans(),
    last=st.booleans(),
    k=st.integers(1, 2),
)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_embedding_bag(
    sizes_of_bags: list[int],
    mode: str,
    padding: int | None,
    weighted: bool,
    last: bool,
    k: int,
    batch_dim: int | None,
) -> None:
    total = sum(sizes_of_bags)
    ends = torch.tensor(sizes_of_bags).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends if last else ends[:-1]])
    layer = nn.EmbeddingBag(5, 3, mode=mode, padding_idx=padding, include_last_offset=last)

    def make() -> tuple[Any, ...]:
        weights = torch.randn(total, dtype=torch.float64) if weighted and mode == "sum" else None
        return torch.randint(5, (total,)), offsets, weights

    check(layer, make, batch_dim, k)
    if not last:
        check(layer, lambda: (torch.randint(5, (len(offsets), 3)),), batch_dim, k)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("special", [{"mode": "max"}, {"scale_grad_by_freq": True}], ids=str)
def test_bags_that_no_rule_serves_are_exact(special: Any, batch_dim: int | None) -> None:
    layer = nn.EmbeddingBag(5, 3, **special).double()
    engine = Engine(layer, batch_dim=batch_dim)
    for _ in range(STEPS):
        output = layer(torch.randint(5, (4, 6)))
        losses = output.square().sum(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SLOW_WAY)
            found = engine.compute_gramian(losses)
        assert relative_error(found, gramian(losses, layer.parameters())) <= GRAMIAN


def test_a_table_that_renormalises_its_lines() -> None:
    layer = nn.Embedding(6, 3, max_norm=0.5)
    check(layer, lambda: (torch.randint(6, (4, 5)),), 0)


@few
@given(
    b=sizes,
    lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tensors=st.sampled_from(["self", "shared keys", "all different", "other widths"]),
    options=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "add_bias_kv": st.booleans(),
            "add_zero_attn": st.booleans(),
            "batch_first": st.booleans(),
            "dropout": st.sampled_from([0.0, 0.4]),
        }
    ),
    masks=st.sampled_from(["none", "float", "padding", "one for each head"]),
    weights=st.sampled_from(["no", "averaged", "by head"]),
    training=st.booleans(),
)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_multihead_attention(
    b: int,
    lengths: tuple[int, int],
    tensors: str,
    options: dict[str, Any],
    masks: str,
    weights: str,
    training: bool,
    batch_dim: int | None,
) -> None:
    if batch_dim == 0:
        options["batch_first"] = True
    t, s = lengths if tensors != "self" else lengths[:1] * 2
    widths = {"kdim": 3, "vdim": 5} if tensors == "other widths" else {}
    attention = nn.MultiheadAttention(4, 2, **options, **widths).train(training)
    heads = {"attn_mask": torch.randn(b * 2, t, s, dtype=torch.float64)}
    given_masks: dict[str, dict[str, Tensor]] = {
        "none": {},
        "float": {"attn_mask": torch.randn(t, s, dtype=torch.float64)},
        # The first key is never masked: attention to nothing is NaN.
        "padding": {"key_padding_mask": torch.arange(s).expand(b, s) > torch.arange(b)[:, None]},
        "one for each head": heads,
    }

    def make() -> tuple[Any, ...]:
        shapes = [(t, 4), (s, widths.get("kdim", 4)), (s, widths.get("vdim", 4))]
        first = [
            torch.randn((b, n, d) if options["batch_first"] else (n, b, d), dtype=torch.float64)
            for n, d in shapes
        ]
        if tensors == "self":
            return (first[0],) * 3
        return (first[0], first[1], first[1]) if tensors == "shared keys" else tuple(first)

    def combined(output: Tensor, attended: Tensor | None) -> Tensor:
        output = output if options["batch_first"] else output.transpose(0, 1)
        pieces = [output.flatten(1)] + ([] if attended is None else [attended.flatten(1)])
        return torch.cat(pieces, dim=1)

    engine_model = attention.double()
    call = {
        "need_weights": weights != "no",
        "average_attn_weights": weights == "averaged",
        **given_masks[masks],
    }
    check(engine_model, make, batch_dim, forward=lambda *x: combined(*engine_model(*x, **call)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("trained", ["all", "norms"])
def test_transformer_layers(training: bool, padded: bool, trained: str) -> None:
    """In eval mode they have fused kernels that call no module; never with a graph."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), 1)
    model = nn.ModuleList([encoder, decoder]).double().train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or "norm" in name)
    x, target = (torch.randn(3, n, 4, dtype=torch.float64) for n in (5, 2))
    mask = torch.arange(5).expand(3, 5) > torch.tensor([[4], [2], [3]]) if padded else None
    engine = Engine(model, batch_dim=0)
    parameters = list(model.parameters())
    for _ in range(STEPS):
        model.zero_grad()
        memory = encoder(x, src_key_padding_mask=mask)
        losses = decoder(target, memory, memory_key_padding_mask=mask).square().sum((1, 2))
        expected = gramian(losses, parameters)
        gradient = weighted_gradient(losses, torch.ones_like(losses), parameters)
        with _rules_only():
            found = []
            engine.backward(losses, lambda g, kept=found: kept.append(g) or torch.ones(3).double())
        assert relative_error(found[0], expected) <= GRAMIAN
        assert relative_error(flat_grad(parameters), gradient) <= GRADIENT


class _OtherConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.sin(), bias)


class _OnlyAnotherName(nn.Conv2d):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return "mine"


def test_a_subclass_that_computes_otherwise_is_not_served() -> None:
    assert find_rule(_OtherConvolution(1, 1, 2, bias=False)) is None
    assert find_rule(_OnlyAnotherName(1, 1, 2, bias=False)) is not None
    model = nn.Sequential(_OtherConvolution(2, 3, 2)).double()
    engine = Engine(model, batch_dim=0)
    losses = model(torch.randn(3, 2, 4, 4, dtype=torch.float64)).square().sum((1, 2, 3))
    expected = gramian(losses, model.parameters())
    assert relative_error(engine.compute_gramian(losses), expected) <= GRAMIAN
