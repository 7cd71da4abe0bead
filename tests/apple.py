"""An Apple chip in software: what a GPU of torch's type `mps` refuses is refused, on any machine.

Tensors on it wrap one of the CPU and report a device of their own, so that mixing devices, fp64
(which Metal lacks) and reading memory that the CPU does not have raise what torch raises on a Mac.
What it cannot show: speed, rounding, and operators that Metal's backend lacks or has wrong.
"""

from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from nanochat import checkpoint

CHIP = torch.device("privateuseone", 0)  # later called "chip"
READ_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class OnChip(torch.Tensor):
    """A tensor of the chip, around `on_cpu`."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnChip":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CHIP,
        )  # fmt: skip
        made.on_cpu = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def is_chip(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type in ("chip", "mps")


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the CPU; its results are on the chip if its tensors or `device` are."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    given = [tensor for tensor in tensors if isinstance(tensor, OnChip)]
    name = func._schema.name
    target = kwargs.get("device")
    on_chip = is_chip(target) if target is not None else bool(given)
    if name == "aten::copy_":
        on_chip = isinstance(args[0], OnChip)
    elif given and len(given) < len(tensors) and name not in READ_INDICES:
        others = [tensor for tensor in tensors if not isinstance(tensor, OnChip)]
        if any(tensor.dim() for tensor in others):
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, mps and cpu"
            )
    if target is not None and is_chip(target):
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner = tree_map(lambda x: x.on_cpu if isinstance(x, OnChip) else x, (args, kwargs))
    out = func(*inner[0], **inner[1])
    if on_chip:
        out = tree_map(lambda x: OnChip(x) if isinstance(x, torch.Tensor) else x, out)
        if given:
            return return_and_correct_aliasing(func, args, kwargs, out)
    return out


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Reads `mps`, which this torch may not have, as the chip."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: CHIP if is_chip(x) else x, (args, kwargs))
        if func in (torch.Tensor.tolist, torch.Tensor.data_ptr) and isinstance(args[0], OnChip):
            return func(args[0].on_cpu)
        if func is torch.Tensor.numpy and isinstance(args[0], OnChip):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if func in (torch.tensor, torch.as_tensor) and is_chip(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(CHIP)
        if torch.is_inference_mode_enabled():  # which wrapped tensors do not support
            with torch.inference_mode(False), torch.no_grad():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """Of the chip or the CPU, which are the same here."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")  # pyright: ignore[reportCallIssue]


def load_file(path: Path, device: str) -> dict[str, torch.Tensor]:
    assert device == "mps"
    return {name: tensor.to(CHIP) for name, tensor in safetensors.load_file(path).items()}


def synchronize(device: torch.device) -> None:
    assert is_chip(device)


def become_a_mac() -> None:
    """Give this process an Apple chip for the rest of its life, unless it has a real one."""
    if torch.backends.mps.is_available():
        return
    backend_registration._setup_privateuseone_for_python_backend("chip")
    torch.Generator = Generator  # type: ignore[misc]
    is_available = torch.backends.mps.is_available
    torch.backends.mps.is_available = wraps(is_available)(lambda: True)  # type: ignore[assignment]
    torch.mps.recommended_max_memory = lambda: 8 * 2**30
    torch.mps.driver_allocated_memory = lambda: 0
    torch.accelerator.synchronize = synchronize  # type: ignore[assignment]
    checkpoint.load_file = load_file  # whose own Rust code asks torch for a real chip
    Operators().__enter__()
    Functions().__enter__()
