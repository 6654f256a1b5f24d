"""The intention evaluator: who may call whom, decided in one place for sidecar, API and command line.

*Policy*: the intentions in force, compiled. *Decision*: its answer, with the intention and the reason it rests on.
*Request*: what of an HTTP request a permission can see. Pure: no I/O, clock or randomness.
"""

from proxy.authz.permission import check_permission
from proxy.authz.policy import Decision, Policy, compile_policy
from proxy.authz.request import Request

__all__ = ["Decision", "Policy", "Request", "check_permission", "compile_policy"]
