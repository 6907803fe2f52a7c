"""The CUDA backend: launches the kernels of ``cuda/*.cu`` on torch's tensors and current stream.

Nothing here synchronises with the host, or keeps state between calls but plans and kernels it has looked up, so calls
are safe on several streams and inside CUDA graphs: the only memory besides y is a float32 workspace from torch's
allocator, on GPUs without clusters and where tiles are cut.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import OperatorError
from ..spec import whole_group
from . import choice, jit, layout, mma, plan, tiles, tuned
from .boxes import tensor_map

_MINIMUM_CAPABILITY = (8, 0)
_FILES: dict[type, str] = {plan.Plan: "decode.cu", tiles.Tiling: "matmul.cu", mma.Tiling: "mma.cu"}
_LARGE = ("lut_decode", "lut_m", "hadamard", "int_", "kronecker", "turn_heads", "kv_attent", "decode_")  # begin so
_thread = threading.local()


# ---- devices and kernels -------------------------------------------------------------------------------------------


@cache
def _core() -> Any:
    return jit._import_core()[0]


@lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    """cuda-core's view of a torch stream; torch keeps its streams for the life of the process."""
    return _core().Stream.from_handle(handle)


@cache
def _arch(device: int) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < _MINIMUM_CAPABILITY:
        raise OperatorError(
            f"cuda:{device} ({torch.cuda.get_device_name(device)}) is sm_{capability[0]}{capability[1]}; "
            "flute's kernels need sm_80 or newer, use the CPU there"
        )
    return f"sm_{capability[0]}{capability[1]}"


@cache
def _shared_bytes(device: int) -> int:
    """Most shared memory of one block, in bytes."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
    return int(properties.shared_memory_per_block_optin)


@cache
def gpu(device: int) -> plan.Gpu:
    """What `plan` needs to know of ``cuda:device``, asked once; clusters are asked of the driver, not assumed."""
    properties = torch.cuda.get_device_properties(device)
    arch, sms, shared = _arch(device), properties.multi_processor_count, _shared_bytes(device)
    bare = plan.Gpu(sms, shared, arch, tuple((split, sms // split) for split in plan.CLUSTER_SIZES))
    if not bare.has_clusters:
        return bare
    probe = plan.make(bare, 1, 4096, 4096, 4, 64)
    assert probe is not None, "one token of K = 4096 fits on every GPU with clusters"
    kernel, core = _kernel(device, "decode.cu", probe.macros(4, False), "lut_decode"), _core()
    counts = [(1, sms)]
    with torch.cuda.device(device):
        core.Device(device).set_current()  # torch makes its context current only with the first allocation
        stream = core.Device(device).default_stream
        for split in plan.CLUSTER_SIZES[1:]:
            config = core.LaunchConfig(grid=sms // split, cluster=split, block=512, shmem_size=shared - 1024)
            counts.append((split, kernel.occupancy.max_active_clusters(config, stream=stream)))
    return plan.Gpu(sms, shared, arch, tuple(counts))


def _target(device: int, file: str) -> str:
    """What to compile ``file`` for: wgmma is there only in "sm_90a", the architecture with what is Hopper's alone."""
    return _arch(device) + ("a" if file in ("matmul.cu", "integer_matmul.cu") else "")


@cache
def _kernel(device: int, file: str, macros: tuple[tuple[str, int], ...], name: str) -> Any:
    kernel = jit.load(file, macros, _target(device, file), name)
    if name.startswith(_LARGE):  # more than 48 KiB of shared memory must be asked for
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.cuKernelSetAttribute(attribute, _shared_bytes(device), kernel.handle, driver.CUdevice(device))
    return kernel


@cache
def machine(device: int) -> tuned.Machine:
    """What timings made on ``cuda:device`` hold for."""
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, {_arch(device)}, {properties.multi_processor_count} SMs"
    return tuned.Machine(name, _driver(), tuned.source_hash(jit.nvrtc_version()))


def _driver() -> str:
    """The driver's version, such as "580.65.06"; where nobody tells, the CUDA version that it speaks."""
    try:
        from cuda.core import system

        return ".".join(map(str, system.get_kernel_mode_driver_version()))
    except (ImportError, AttributeError, RuntimeError):  # an older cuda-core; NVML is missing
        from cuda.bindings import driver

        return f"CUDA {driver.cuDriverGetVersion()[1]}"


@cache
def _config(grid: tuple[int, int], block: int, shared: int, cluster: int, overlap: bool) -> Any:
    extra: dict[str, Any] = {}
    if cluster > 1:  # cuda-core then counts the grid in clusters
        extra["cluster"] = (cluster, 1)
    if overlap:  # our prologue may run while the kernel before it drains; the kernel itself waits before it reads x
        extra["programmatic_stream_serialization"] = True
    return _core().LaunchConfig(grid=grid, block=block, shmem_size=shared, **extra)


def _bind() -> None:
    """A thread new to CUDA, such as autograd's, has no current context yet: give it that of torch's current device."""
    if not getattr(_thread, "bound", False):
        _core().Device(torch.cuda.current_device()).set_current()
        _thread.bound = True


def _launch(device: int, config: Any, kernel: Any, *arguments: Any) -> None:
    # torch's current_stream makes an object, which takes as long as the launch; compiled code asks for the handle, too
    stream = _stream(torch._C._cuda_getCurrentRawStream(device))
    _bind()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _core().launch(stream, config, kernel, *arguments)
    else:
        _core().launch(stream, config, kernel, *arguments)


# ---- arguments -----------------------------------------------------------------------------------------------------


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and 16-byte aligned, by a copy if it must be."""
    if tensor.is_contiguous() and not tensor.data_ptr() & 15:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _group_magic(group: int, k: int) -> int:
    """ceil(2**31 / (group / 32)): the kernel turns block numbers into groups by multiplication."""
    blocks = -(-k // 32) if group >= k else group // 32
    return -(-(1 << 31) // blocks)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- matrix product ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16384)
def choose(device: int, m: int, n: int, k: int, bits: int, group: int, bf16: bool = False) -> choice.Launch | None:
    """The launch to run: the best estimate, or what tuning found on this GPU; None when no kernel takes the problem.

    Decided once per process and problem; ``choose.cache_clear()`` makes it decide anew, after tuning.
    """
    problem = tuned.Problem(m, n, k, bits, group, "bfloat16" if bf16 else "float16")
    return choice.choose(gpu(device), problem, lambda last: tuned.lookup(machine(device), last))


def compile_ahead(device: int, launches: Sequence[choice.Launch], bits: int, bf16: bool) -> None:
    """The kernels of all launches into the cache on disk, several at a time; loading them one by one is then quick."""
    wanted = {(_FILES[type(one)], one.macros(bits, bf16)) for one in launches}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(jit.cubin, jit.source(file, dict(macros)), _target(device, file)) for file, macros in wanted
        ]
    for job in jobs:
        job.result()


_Problem = tuple[int, int, int, int, int, int, bool]  # device, M, N, K, bits, group, whether bfloat16


class _Prepared(NamedTuple):
    """All that a launch needs besides addresses."""

    problem: _Problem
    chosen: choice.Launch
    kernel: Any
    config: Any
    sizes: tuple[Any, ...]  # the kernel's last arguments
    workspace: tuple[int, ...] = ()  # of float32: slices of K where there are no clusters, parts of tiles that are cut
    second: Any = None  # kernel that adds up slices, or clears the flags in front of parts
    second_config: Any = None


_launches: dict[
    tuple[Any, ...], _Prepared
] = {}  # by `_signature`: what was checked and prepared once is only looked up
_MOST_LAUNCHES = 16384
_NOTHING_AROUND = (0, 0, c_float(0.0))  # residual, weight and eps of a norm: `fused_cuda` gives its own


def _signature(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None,
    out_features: int, bits: int, group_size: int,
) -> tuple[Any, ...]:  # fmt: skip
    """All that the operator's checks and a launch depend on, addresses and strides aside."""
    return (
        x.shape, x.dtype, x.get_device(), weight.shape, weight.dtype, weight.get_device(), scales.shape, scales.dtype,
        scales.get_device(), table.shape, table.dtype, table.get_device(), out_features, bits, group_size,
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
    )  # fmt: skip


def again(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor | None:
    """`lut_linear` where it has run with operands of these shapes and dtypes before, without any check; else None."""
    launch = _launches.get(_signature(x, weight, scales, table, bias, out_features, bits, group_size))
    if launch is None or launch.chosen is not choose(*launch.problem):
        return None
    return _run(launch, x, weight, scales, table, bias)


def lut_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    *,
    forced: choice.Launch | None = None,
) -> torch.Tensor | None:
    """y (..., N) of x (..., K), codes and scales in kernel order; None when no kernel takes it (see `choose`).

    Args:
        forced: run this plan instead of the chosen one (tests, tuning).
    """
    device, k = x.get_device(), x.shape[-1]
    m, group = x.numel() // k, whole_group(group_size, k)
    problem = (device, m, out_features, k, bits, group, x.dtype == torch.bfloat16)
    chosen = forced or choose(*problem)
    if chosen is None:
        return None
    launch = _prepare(problem, chosen)
    if forced is None:
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        _launches[_signature(x, weight, scales, table, bias, out_features, bits, group_size)] = launch
    return _run(launch, x, weight, scales, table, bias)


def _run(
    launch: _Prepared,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    device, m, n, k = launch.problem[:4]
    y = x.new_empty(*x.shape[:-1], n)
    # copies that must be made live until the launch: names hold them, not only their addresses
    x, weight, scales, table = _aligned(x), _aligned(weight), _aligned(scales), _aligned(table)
    bias = None if bias is None else bias.contiguous()
    operands = (weight.data_ptr(), scales.data_ptr(), table.data_ptr(), int(table.dim() == 2))
    work = torch.empty(launch.workspace, dtype=torch.float32, device=x.device) if launch.workspace else None
    add, out, parts = _pointer(bias), y.data_ptr(), _pointer(work)
    if k % 8 and not isinstance(launch.chosen, plan.Plan):  # the others copy 16 bytes of a row at a time
        x = torch.nn.functional.pad(x, (0, -k % 8))
    if isinstance(launch.chosen, tiles.Tiling):
        box = tensor_map(device, x.data_ptr(), m, x.shape[-1], launch.chosen.tokens)
        if work is not None:
            _launch(device, launch.second_config, launch.second, parts, launch.chosen.blocks)
        _launch(device, launch.config, launch.kernel, box, *operands, add, out, parts, *launch.sizes)
    else:
        _launch(device, launch.config, launch.kernel, *operands, x.data_ptr(), add, out, parts, *launch.sizes)
        if work is not None:
            _launch(device, launch.second_config, launch.second, parts, add, out, m, n, work.shape[0])
    return y


def _prepare(problem: _Problem, chosen: choice.Launch) -> _Prepared:
    if isinstance(chosen, tiles.Tiling):
        return _prepare_matmul(problem, chosen)
    if isinstance(chosen, mma.Tiling):
        return _prepare_mma(problem, chosen)
    return _prepare_decode(problem, chosen)


def _prepare_decode(problem: _Problem, chosen: plan.Plan, fused: tuple[tuple[str, int], ...] = ()) -> _Prepared:
    device, m, n, k, bits, group, bf16 = problem
    clusters = gpu(device).has_clusters
    macros = (*chosen.macros(bits, bf16), *fused)
    cluster = chosen.split if clusters else 1
    blocks = (chosen.clusters * (chosen.split // cluster), chosen.passes)
    sizes = (m, n, k, -(-k // group), _group_magic(group, k), *chosen.logs, chosen.pitch, chosen.tokens)
    kernel = _kernel(device, "decode.cu", macros, "lut_decode")
    config = _config(blocks, 32 * chosen.warps, chosen.shared_bytes, cluster, clusters)
    launch = _Prepared(problem, chosen, kernel, config, sizes if fused else (*sizes, *_NOTHING_AROUND))
    return launch if chosen.split == 1 or clusters else _with_workspace(launch, macros)


def _prepare_mma(problem: _Problem, chosen: mma.Tiling) -> _Prepared:
    device, m, n, k, bits, group, bf16 = problem
    launch = _Prepared(
        problem,
        chosen,
        _kernel(device, "mma.cu", chosen.macros(bits, bf16), "lut_mma"),
        _config((chosen.blocks, 1), chosen.threads, chosen.shared_bytes, 1, False),
        (m, n, -(-k // 8) * 8, -(-k // group), _group_magic(group, k), chosen.split),
    )
    if chosen.split == 1:
        return launch
    return _with_workspace(launch, plan.decode_macros(bits, bf16, 128, 1, 1, 4, 1, False))  # any decode kernel has it


def _with_workspace(launch: _Prepared, macros: tuple[tuple[str, int], ...]) -> _Prepared:
    """Slices of K go to a workspace, and the decode kernel of ``macros`` brings what adds them up."""
    device, m, n = launch.problem[:3]
    return launch._replace(
        workspace=(launch.chosen.split, m, n),
        second=_kernel(device, "decode.cu", macros, "lut_reduce"),
        second_config=_config((-(-m * n // 256), 1), 256, 0, 1, False),
    )


def _prepare_matmul(problem: _Problem, chosen: tiles.Tiling) -> _Prepared:
    device, m, n, k, bits, group, bf16 = problem
    split, macros = chosen.split, chosen.macros(bits, bf16)
    launch = _Prepared(
        problem,
        chosen,
        _kernel(device, "matmul.cu", macros, "lut_matmul"),
        _config((chosen.blocks // split, 1), chosen.threads, chosen.shared_bytes, split, True),
        (m, n, k, -(-k // group), _group_magic(group, k), split, -(-(1 << 32) // split), chosen.span, 0, 0),
    )
    if not chosen.cut:
        return launch
    return launch._replace(
        workspace=(chosen.workspace,),
        second=_kernel(device, "matmul.cu", macros, "clear_flags"),
        second_config=_config((1, 1), 128, 0, 1, True),
    )


# ---- dequantization --------------------------------------------------------------------------------------------------


def dequantize(
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """W (N, K) from kernel order, in the scales' dtype (16 bits)."""
    n, k, device = out_features, in_features, weight.device
    group = whole_group(group_size, k)
    out = torch.empty(n, k, dtype=scales.dtype, device=device)
    macros = (("BITS", bits), ("BF16", int(scales.dtype == torch.bfloat16)), ("WIDE_TABLE", 0))
    kernel = _kernel(device.index, "dequantize.cu", macros, "lut_dequantize")
    tiles, chunks, _ = layout.packed_shape(n, k, bits)
    config = _config((-(-tiles * chunks // 8), 1), 256, 0, 1, False)
    weight, scales, table = _aligned(weight), _aligned(scales), _aligned(table)
    _launch(
        device.index, config, kernel, weight.data_ptr(), scales.data_ptr(), table.data_ptr(),
        int(table.dim() == 2), out.data_ptr(), n, k, scales.shape[1], _group_magic(group, k),
    )  # fmt: skip
    return out
