"""accelerate's hooks: a layer that is replaced hands its device placement on to its successor."""

from __future__ import annotations

from torch import nn

from ..errors import IntegrationError


def release_hook(name: str, module: nn.Module) -> object | None:
    """Take accelerate's hook off ``module``, which brings offloaded weights back; None if there is none.

    Raises:
        IntegrationError: the weights are offloaded to disk, where a changed layer cannot be kept.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return None
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise IntegrationError(
            f"layer {name!r} is offloaded to disk and cannot be quantized in place; load the model with a device_map "
            "without 'disk', or quantize the checkpoint first and load that"
        )
    return hook


def attach_hook(module: nn.Module, hook: object | None) -> None:
    """Give ``module`` a hook that acts as ``hook`` did on the layer it was taken from."""
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    if isinstance(hook, AlignDevicesHook):  # a new one: the old holds the offloaded weights of the old layer
        hook = AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=hook.offload,
            io_same_device=hook.io_same_device,
            offload_buffers=hook.offload_buffers,
            place_submodules=hook.place_submodules,
            skip_keys=hook.skip_keys,
        )
    add_hook_to_module(module, hook)
