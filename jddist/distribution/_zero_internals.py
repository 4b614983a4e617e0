"""What jddist needs to know of DeepSpeed's internals: the only place that looks at them.

An engine hooks its outputs, and with ZeRO-3 its modules, so as to notice a backward. A pass that
differentiates towards activations must not be taken for one: the hooks would scale its gradients,
start reductions, and free weights. DeepSpeed has no public function to say so.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from jddist.errors import UnsupportedModelError

# The versions of DeepSpeed with which these attributes mean what is assumed below.
TESTED = ("0.19.8",)
# The shape of a whole parameter, of which ZeRO-3 keeps a slice.
WHOLE_SHAPE = "ds_shape"

_MANAGERS = "_backward_hook_managers"
_PROLOGUE = "_backward_prologue"
_REFERENCES, _REMAINING = "applied_pre_backward_ref_cnt", "ds_grads_remaining"
_MODULE_HOOKS = ("forward_hooks", "backward_hooks", "fwd_pre_hook")
# So many gradients never arrive.
_NEVER = 1 << 60


def package() -> Any:
    """DeepSpeed itself, which is imported when an engine is there."""
    return importlib.import_module("deepspeed")


def is_tested(version: str) -> bool:
    """Whether the internals of a version of DeepSpeed are known: it differs in the patch only."""
    return version.split(".")[:2] in [tested.split(".")[:2] for tested in TESTED]


def unknown(what: str) -> UnsupportedModelError:
    """The error that names the versions that are known."""
    return UnsupportedModelError(
        f"Found DeepSpeed {package().__version__}, in which {what}; expected DeepSpeed "
        f"{', '.join(TESTED)}, whose internals jddist was tested with. Install it (pip install "
        f'"deepspeed=={TESTED[-1]}"), or, at ZeRO stages 0 to 2 and for the losses given to '
        "backward, call jddist.integrations.deepspeed.attach(..., public_only=True)."
    )


class Internals:
    """The hooks of one DeepSpeed engine.

    Args:
        engine: The engine.

    Raises:
        UnsupportedModelError: An attribute that is needed is missing.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._stage = int(engine.zero_optimization_stage())
        self._managers: weakref.WeakSet[Any] = weakref.WeakSet()
        if not callable(getattr(engine, _PROLOGUE, None)):
            raise unknown(f"an engine has no method {_PROLOGUE}")
        if self._stage == 3:
            self._zero_hook_ids()
        self._inside: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._raw: list[Tensor] = []
        self._handles = [
            # Before ZeRO-3's own hooks, which hand out other tensors than the model computed.
            engine.module.register_forward_hook(self._note_raw, prepend=True),
            engine.register_forward_hook(self._note_outputs),
        ]

    def release(self) -> None:
        """Takes the hooks off the engine."""
        for handle in self._handles:
            handle.remove()

    def inside(self, tensor: Tensor) -> Tensor:
        """What the model computed, if ``tensor`` is what the engine handed out for it."""
        found: Tensor = self._inside.get(tensor, tensor)
        return found

    @property
    def noticed(self) -> bool:
        """Whether the engine has noticed a backward through an output that is still in use."""
        return any(manager.preprocess_done for manager in self._managers)

    def begin_backward(self) -> None:
        """Does what a backward that starts at the engine's outputs does first."""
        getattr(self._engine(), _PROLOGUE)()

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Inside, backward passes do not look like the engine's; nothing is sent or freed.

        With ZeRO-3, all parameters have to be whole already.
        """
        engine = self._engine()
        assert engine is not None
        with contextlib.ExitStack() as stack:
            if self._stage == 3:
                # Before anything changes: it may find that an attribute is missing.
                stack.enter_context(self._no_module_hooks(engine.module))
                stack.enter_context(self._no_counting(engine.module))
            stack.enter_context(self._no_output_hooks(engine))
            yield

    def _note_raw(self, _root: nn.Module, _inputs: Any, output: Any) -> None:
        if self._stage == 3:
            self._raw = list(_tensors(output))

    def _note_outputs(self, _engine: nn.Module, _inputs: Any, output: Any) -> None:
        raw, self._raw = self._raw, []
        for outer, inner in zip(_tensors(output), raw, strict=False):
            if outer is not inner and inner.grad_fn is not None:
                self._inside[outer] = inner
        tensors = [t for t in _tensors(output) if t.grad_fn is not None]
        found = [manager for t in tensors for manager in getattr(t, _MANAGERS, ())]
        needed = ("preprocess_done", "preprocess_per_tensor_fn")
        if tensors and not found:
            raise unknown(f"the outputs of an engine have no attribute {_MANAGERS}")
        for manager in found:
            for name in needed:
                if not hasattr(manager, name):
                    raise unknown(f"a manager of backward hooks has no attribute {name}")
            self._managers.add(manager)

    @contextmanager
    def _no_output_hooks(self, engine: Any) -> Iterator[None]:
        managers = list(self._managers)
        before = [(m, m.preprocess_done, m.preprocess_per_tensor_fn) for m in managers]
        try:
            for manager in managers:
                manager.preprocess_done, manager.preprocess_per_tensor_fn = True, None
            # A manager that is not known here would call it.
            engine.__dict__[_PROLOGUE] = _refuse_unknown_output
            yield
        finally:
            del engine.__dict__[_PROLOGUE]
            for manager, done, per_tensor in before:
                manager.preprocess_done, manager.preprocess_per_tensor_fn = done, per_tensor

    @contextmanager
    def _no_counting(self, root: nn.Module) -> Iterator[None]:
        """The nodes that ZeRO-3 puts around modules count down to gathering and freeing weights."""
        for name in (_REFERENCES, _REMAINING):
            if name not in root.__dict__:
                raise unknown(f"the model has no attribute {name} after a forward pass")
        modules = list(root.modules())
        before = [
            {name: m.__dict__[name] for name in (_REFERENCES, _REMAINING) if name in m.__dict__}
            for m in modules
        ]
        try:
            for module, values in zip(modules, before, strict=True):
                module.__dict__.update({n: 0 if n == _REFERENCES else _NEVER for n in values})
            yield
        finally:
            for module, values in zip(modules, before, strict=True):
                module.__dict__.update(values)

    @contextmanager
    def _no_module_hooks(self, root: nn.Module) -> Iterator[None]:
        """A forward that is repeated (a checkpoint, a fallback) must not free weights either."""
        ids = self._zero_hook_ids()
        tables = [t for m in root.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
        before: list[dict[int, Callable[..., Any]]] = [dict(table) for table in tables]
        try:
            for table in tables:
                for key in [key for key in table if key in ids]:
                    del table[key]
            yield
        finally:
            for table, contents in zip(tables, before, strict=True):
                table.clear()
                table.update(contents)

    def _zero_hook_ids(self) -> set[int]:
        engine: Any = self._engine()
        offload: Any = getattr(engine.optimizer, "parameter_offload", None)
        for name in _MODULE_HOOKS:
            if not hasattr(offload, name):
                raise unknown(f"the optimizer of ZeRO-3 has no parameter_offload.{name}")
        handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
        return {handle.id for handle in handles}


def configuration(engine: Any) -> dict[str, Any]:
    """The configuration as it was given, without defaults."""
    given = getattr(getattr(engine, "_config", None), "_param_dict", None)
    if not isinstance(given, dict):
        raise unknown("an engine has no _config._param_dict")
    return given


def _refuse_unknown_output() -> None:
    raise UnsupportedModelError(
        "Found losses of a forward pass that jddist did not see; expected model_engine(inputs), "
        "after jddist.attach(model_engine) or Engine(model_engine, ...). Attach before the forward "
        "pass, and call the engine itself rather than its forward method."
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that an engine hooks: in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
