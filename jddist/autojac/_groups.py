"""Groups of tensors with ``.jac``, and the call of an aggregator on their rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from jddist.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator
from jddist.distribution.base import Distribution
from jddist.distribution.whole import shape_of

from ._accumulate import check_expects_gradients, jac_of


def call_aggregator(aggregator: Aggregator, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The vector [n] and, of a WeightedAggregator, the weights [m] after all of its hooks."""
    if not isinstance(aggregator, WeightedAggregator):
        return aggregator(matrix), None
    captured: list[Tensor] = []

    def capture(_module: nn.Module, _args: object, output: Tensor) -> None:
        captured.append(output)

    handle = aggregator.weighting.register_forward_hook(capture)  # last: after the user's hooks
    try:
        vector = aggregator(matrix)
    finally:
        handle.remove()
    return vector, captured[-1] if captured else None


def check_can_skip_concatenation(aggregator: Aggregator) -> None:
    """Raises ValueError unless the Gramian is all that the aggregator, hooks included, looks at."""
    suitable = isinstance(aggregator, GramianWeightedAggregator) and not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in (aggregator, aggregator.weighting)
    )
    if not suitable:
        raise ValueError(
            f"Found {type(aggregator).__name__} with optimize_gramian_computation=True; expected a "
            "GramianWeightedAggregator without forward hooks (on itself or its weighting), since "
            "the Jacobian is never formed. Pass optimize_gramian_computation=False."
        )


def check_distinct(groups: list[list[Tensor]]) -> None:
    """Raises ValueError if a tensor is listed more than once."""
    seen: dict[Tensor, int] = {}
    for i, group in enumerate(groups):
        for tensor in group:
            if tensor in seen:
                where = f"group {i}" if seen[tensor] == i else f"the groups {seen[tensor]} and {i}"
                raise ValueError(
                    f"Found a tensor of shape {tuple(tensor.shape)} more than once in {where}; "
                    "expected each once, since its .jac is aggregated once."
                )
            seen[tensor] = i


def check_group(group: list[Tensor], index: int) -> None:
    """Raises ValueError unless there are real tensors, which can get a gradient."""
    if not group:
        raise ValueError(
            f"Found no tensors in group {index}; expected some. (A generator that was used up?)"
        )
    check_expects_gradients(group, ".grad")
    for i, tensor in enumerate(group):
        if tensor.is_complex():
            raise ValueError(
                f"Found tensor {i} of shape {tuple(tensor.shape)} in group {index} with complex "
                "numbers; expected real ones, whose products make the Gramian. Keep its real and "
                "imaginary parts in a real tensor, and use torch.view_as_complex in the model."
            )


def check_all_have_jac(
    group: list[Tensor],
    index: int,
    present: Sequence[bool],
    distribution: Distribution | None = None,
) -> None:
    """Raises ValueError naming the tensors that are not ``present`` with a ``.jac``."""
    missing = [
        f"{_name(tensor, distribution)}{i} of shape {tuple(tensor.shape)}"
        for i, (tensor, there) in enumerate(zip(group, present, strict=True))
        if not there
    ]
    if missing:
        raise ValueError(
            f"Found tensors without .jac in group {index}: {', '.join(missing)}; expected all to "
            "have one. Call backward or mtl_backward first, or leave them out."
        )


def _name(tensor: Tensor, distribution: Distribution | None) -> str:
    name = None if distribution is None else distribution.names.get(tensor)
    return f"{name}: " if name else ""


def present_jac(tensor: Tensor) -> Tensor:
    """The ``.jac`` of a tensor that is known to have one."""
    jac = jac_of(tensor)
    assert jac is not None
    return jac


def shaped(vectors: Sequence[Tensor], group: Sequence[Tensor]) -> list[Tensor]:
    """Each vector in the shape and dtype of its tensor."""
    return [v.reshape(shape_of(t)).to(t.dtype) for v, t in zip(vectors, group, strict=True)]
