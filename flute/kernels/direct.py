"""May an operator's kernel be called without torch's dispatcher? Yes, where that would do nothing but call it.

An operator written in Python costs some 10 us of dispatch per call, most of it for the autograd key. What the
dispatcher would do follows from two sets of keys: those of the tensors, and those that modes of this thread add
(FakeTensor, functorch's transforms, tracing, functionalization, profiling by dispatch mode). If both hold nothing but
the plain ones of a CPU or CUDA tensor, autograd's kernel would find nothing to record (the caller sees to that) and
pass on to the backend's: exactly the call that is made instead. Everything else takes the operator.

The sets are read through private names of torch; a torch without them takes the operator every time.
"""

from __future__ import annotations

import torch


def _keys(*names: str) -> int:
    raw = 0
    for name in names:
        raw |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return raw


try:
    _of_tensor = torch._C._dispatch_keys
    _of_thread = torch._C._dispatch_tls_local_include_set
    _functions = torch._C._len_torch_function_stack
    _OTHER = ~_keys(
        "CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView", "BackendSelect"
    )  # fmt: skip
    _known = True
except AttributeError:  # pragma: no cover
    _known = False

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def possible(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether a kernel may be called with these tensors as it is. False where autograd has something to record."""
    if torch.compiler.is_compiling() or not _known or type(x) not in _PLAIN:
        return False
    recording = torch.is_grad_enabled()
    if recording and x.requires_grad:
        return False
    for tensor in others:
        if tensor is not None and (type(tensor) not in _PLAIN or (recording and tensor.requires_grad)):
            return False
    return not ((_of_tensor(x).raw_repr() | _of_thread().raw_repr()) & _OTHER or _functions())
