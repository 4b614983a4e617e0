"""Jacobian descent with explicit Jacobians, in the ``.jac`` fields of parameters."""

from ._allocate_state import allocate_state
from ._backward import backward
from ._jac import jac
from ._jac_to_grad import jac_to_grad, jac_to_grad_groups
from ._mtl_backward import mtl_backward

__all__ = ["allocate_state", "backward", "jac", "jac_to_grad", "jac_to_grad_groups", "mtl_backward"]
