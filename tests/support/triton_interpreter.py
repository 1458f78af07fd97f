"""Triton's interpreter made right for bfloat16, and made to refuse what a GPU would punish.

`install()` patches Triton's own interpreter, whose parts are private: hence one version of Triton. After it
  - bfloat16 is exact: values live in float32 arrays and every result is rounded to nearest even (stock: raw bits);
  - sums, dot products and exponentials do not depend on an array's shape: computed in float64, rounded once;
  - NaN is dropped by tl.max and tl.maximum as a GPU does; lanes that a mask left out hold garbage, not zeros;
  - float arguments are float32 tensors as in a compiled kernel; a misspelt keyword of a launch is an error;
  - float32 dot products must ask for input_precision="ieee", and be as large as tensor cores want;
  - a failing device_assert raises, and `triton_memory` checks every address.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia.compiler import CUDAOptions, min_dot_size
from triton.runtime import interpreter
from triton_memory import ADDRESS, TAG, Memory

TRITON_VERSION = "3.7.1"
LAUNCH_OPTIONS = {field.name for field in dataclasses.fields(CUDAOptions)} | {"grid", "warmup"}

if triton.__version__ != TRITON_VERSION:
    raise RuntimeError(
        f"tests/support/triton_interpreter.py knows Triton {TRITON_VERSION}, not {triton.__version__}"
    )
if not isinstance(tl.sum, interpreter.InterpretedFunction):
    raise RuntimeError(
        "triton was imported before TRITON_INTERPRET=1 was set: run these tests in a process of their own"
    )

TensorHandle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
_stock: dict[str, Any] = {}
_dtypes: dict[str, np.dtype] = {"bf16": np.dtype(np.float32)}
_order: Callable[[list[Any]], None] = lambda programs: None  # noqa: E731
_memory: Memory | None = None


@contextlib.contextmanager
def program_order(order: str | int) -> Iterator[None]:
    """Run the programs of each launch "ascending" (as without this), "descending" or shuffled by a seed."""
    global _order
    before = _order
    if order == "descending":
        _order = list.reverse
    elif order != "ascending":
        _order = random.Random(order).shuffle
    try:
        yield
    finally:
        _order = before


def round_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, kept as float32."""
    bits = np.array(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), np.float32(np.nan), rounded.view(np.float32))


def to_bits(values: np.ndarray) -> np.ndarray:
    return (round_bfloat16(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_bfloat16(dtype: Any) -> bool:
    return dtype.scalar.name == "bf16"


def numpy_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.scalar
    if scalar.name not in _dtypes:
        _dtypes[scalar.name] = _stock["_get_np_dtype"](scalar)
    return _dtypes[scalar.name]


def size_is_right(data: np.ndarray, dtype: Any) -> bool:
    return is_bfloat16(dtype) or _stock["_validate_np_data_size"](data, dtype)


def round_handle(handle: Any) -> None:
    """TensorHandle.__post_init__: whatever computed a bfloat16 value, it is rounded here."""
    if is_bfloat16(handle.dtype) and handle.data.dtype.kind == "f":
        handle.data = round_bfloat16(handle.data)
    _stock["__post_init__"](handle)


class ExactBuilder:
    """Methods that replace those of Triton's InterpreterBuilder."""

    def get_bf16(self, value: float) -> Any:
        return TensorHandle(np.array([value], np.float32), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        return TensorHandle(src.data.astype(numpy_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if is_bfloat16(src.dtype):
            src = TensorHandle(src.data, tl.float32)
        if not is_bfloat16(dst_type):
            return _stock["create_fp_to_fp"](self, src, dst_type, rounding_mode)
        if src.dtype.scalar.primitive_bitwidth == 8:
            src = _stock["create_fp_to_fp"](self, src, tl.float32, None)
        data = src.data.astype(np.float32)
        if rounding_mode is not None and rounding_mode != interpreter._ir.ROUNDING_MODE.RTNE:
            data = (data.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return TensorHandle(data, tl.bfloat16)

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        data = to_bits(src.data) if is_bfloat16(src.dtype) else src.data
        if is_bfloat16(dst_type):
            return TensorHandle(from_bits(data.view(np.uint16)), tl.bfloat16)
        return TensorHandle(data.view(numpy_dtype(dst_type)), dst_type.scalar)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., np.ndarray]) -> Any:
        output = op(lhs.data, rhs.data)
        if output.dtype == np.bool_:  # a comparison: stock keeps the operands' type
            return TensorHandle(output, tl.int1)
        return TensorHandle(output.astype(numpy_dtype(lhs.dtype)), lhs.dtype.scalar)

    def unary_op(self, arg: Any, op: Callable[..., np.ndarray]) -> Any:
        exact = op(arg.data.astype(np.float64)) if arg.data.dtype.kind == "f" else op(arg.data)
        return TensorHandle(exact.astype(arg.data.dtype), arg.dtype.scalar)

    def create_rsqrt(self, arg: Any) -> Any:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_fabs(self, arg: Any) -> Any:
        return TensorHandle(np.abs(arg.data), arg.dtype.scalar)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
        if a.dtype.scalar == tl.float32 and input_precision != interpreter._ir.INPUT_PRECISION.IEEE:
            raise ValueError('tl.dot of float32 drops 13 bits of its operands without input_precision="ieee"')
        if a.dtype.scalar.is_fp8():
            return _stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
        exact = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data.astype(np.float64)
        return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    def create_assert(self, condition: Any, message: str) -> None:
        if not condition.data.all():
            raise AssertionError(f"device_assert: {message}")

    def create_barrier(self) -> None:
        _launch_memory().barrier()

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, cache_modifier: Any, eviction_policy: Any, is_volatile: bool
    ) -> Any:
        dtype = ptrs.get_element_ty()
        stored = _stock["_get_np_dtype"](dtype)
        keep = _mask_of(mask)
        _launch_memory().load(ptrs.data, np.broadcast_to(keep, ptrs.data.shape), stored.itemsize)
        if other is None:
            data = garbage(ptrs.data.shape, stored, is_bfloat16(dtype))
        else:
            data = to_bits(other.data) if is_bfloat16(dtype) else other.data.astype(stored)
        loaded = interpreter._interpreter.load(ptrs.data & ADDRESS, keep, data, stored)
        return TensorHandle(from_bits(loaded) if is_bfloat16(dtype) else loaded, dtype)

    def create_masked_store(
        self, ptrs: Any, value: Any, mask: Any, cache_modifier: Any, eviction_policy: Any
    ) -> None:
        dtype = ptrs.get_element_ty()
        data = (
            to_bits(value.data) if is_bfloat16(dtype) else value.data.astype(_stock["_get_np_dtype"](dtype))
        )
        keep = _mask_of(mask)
        _launch_memory().store(ptrs.data, data, np.broadcast_to(keep, ptrs.data.shape))
        interpreter._interpreter.store(ptrs.data & ADDRESS, data, keep)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        _check_atomic(ptr, mask.data, sem, scope)
        plain = TensorHandle(ptr.data & ADDRESS, ptr.dtype)
        if not is_bfloat16(val.dtype):
            return _stock["create_atomic_rmw"](self, op, plain, val, mask, sem, scope)
        if op != interpreter._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"bfloat16 atomic {op}")
        before = np.zeros(val.data.shape, np.float32)
        one, u16 = np.ones(1, bool), np.dtype(np.uint16)
        for index in np.ndindex(val.data.shape):  # lane by lane: two lanes may add to one address
            if mask.data[index]:
                address = plain.data[index].reshape(1)
                before[index] = from_bits(interpreter._interpreter.load(address, one, np.zeros(1, u16), u16))[
                    0
                ]
                interpreter._interpreter.store(
                    address, to_bits(before[index] + val.data[index].reshape(1)), one
                )
        return TensorHandle(before, tl.bfloat16)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        if is_bfloat16(val.dtype):
            raise NotImplementedError("bfloat16 atomic_cas")
        _check_atomic(ptr, np.ones(ptr.data.shape, bool), sem, scope)
        return _stock["create_atomic_cas"](
            self, TensorHandle(ptr.data & ADDRESS, ptr.dtype), cmp, val, sem, scope
        )


def garbage(shape: tuple[int, ...], stored: np.dtype, bfloat16: bool) -> np.ndarray:
    """What a masked load without `other` leaves: a GPU promises nothing, so nothing that looks harmless."""
    if bfloat16:
        return np.full(shape, 0x7FC0, stored)
    return np.full(
        shape, np.nan if stored.kind == "f" else stored.kind == "b" or np.iinfo(stored).max // 3, stored
    )


def _mask_of(mask: Any) -> np.ndarray:
    return mask if isinstance(mask, np.ndarray) else mask.data  # block pointers and descriptors pass arrays


def _check_atomic(ptr: Any, mask: np.ndarray, sem: Any, scope: Any) -> None:
    order, reach = interpreter._ir.MEM_SEMANTIC, interpreter._ir.MEM_SYNC_SCOPE
    ordered = scope in (reach.GPU, reach.SYSTEM)
    _launch_memory().atomic(
        ptr.data,
        np.broadcast_to(mask, ptr.data.shape),
        ptr.get_element_ty().primitive_bitwidth // 8,
        acquire=ordered and sem in (order.ACQUIRE, order.ACQUIRE_RELEASE),
        release=ordered and sem in (order.RELEASE, order.ACQUIRE_RELEASE),
    )


def _launch_memory() -> Memory:
    if _memory is None:
        raise RuntimeError("no kernel is running")
    return _memory


def reduce_sum(self: Any, input: Any) -> Any:
    """tl.sum: in bfloat16 rounded at every addition as on a GPU, in a tree; other floats rounded once."""
    data = input.handle.data
    if not is_bfloat16(input.dtype):
        dtype = np.float64 if data.dtype.kind == "f" else None
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=dtype), input.dtype)
    axis = self.axis
    terms = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
    while len(terms) > 1:  # a power of two
        terms = round_bfloat16(terms[: len(terms) // 2] + terms[len(terms) // 2 :])
    total = terms[0]
    if self.keep_dims:
        total = total.reshape((1,) * data.ndim) if axis is None else np.expand_dims(total, axis)
    return self.to_tensor(total, input.dtype)


def reduce_min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    """tl.max and tl.min: NaN loses against any number, and stays where there is nothing else."""
    ops = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
    return _stock["min_max"](self, input, ops.get(val_reduce_op, val_reduce_op), idx_reduce_op)


def generic_reduce(self: Any, input: Any) -> list[Any]:
    """tl.reduce with a function of the kernel's own, slice by slice (stock: element by element)."""
    inputs, axis = self.unravel(input, self.axis)
    slices = [np.moveaxis(arg.handle.data, axis, 0) for arg in inputs]
    dtypes = [arg.dtype for arg in inputs]
    result = tuple(self.to_tensor(data[0], dtype) for data, dtype in zip(slices, dtypes, strict=True))
    for i in range(1, len(slices[0])):
        item = tuple(self.to_tensor(data[i], dtype) for data, dtype in zip(slices, dtypes, strict=True))
        result = self.combine_fn(*result, *item)
        result = result if isinstance(result, tuple) else (result,)
    if not self.keep_dims:
        return list(result)
    ndim = input[0].handle.data.ndim
    shapes = [
        (1,) * ndim
        if self.axis is None
        else np.expand_dims(part.handle.data.reshape(slices[0].shape[1:]), axis).shape
        for part in result
    ]
    return [
        self.to_tensor(part.handle.data.reshape(shape), dtype)
        for part, shape, dtype in zip(result, shapes, dtypes, strict=True)
    ]


class Arguments:
    """Python values to interpreted ones; numbers the tensors for `Memory`, in the order met."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, Tensor]] = []

    def convert(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                raise ValueError(f"{name} is on {value.device}: the interpreter works on the CPU's tensors")
            self.tensors.append((name, value))
            converted = interpreter._implicit_cvt(value)
            converted.handle.data = converted.handle.data | (np.uint64(len(self.tensors)) << TAG)
            return converted
        if isinstance(value, tuple):
            return interpreter._tuple_create(
                value, [self.convert(f"{name}[{i}]", v) for i, v in enumerate(value)]
            )
        if isinstance(value, bool):
            return tl.tensor(TensorHandle(np.array([value]), tl.int1), tl.int1)
        if isinstance(value, float):
            return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return interpreter._implicit_cvt(value)


def launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """GridExecutor.__call__: run every program of the grid."""
    global _memory
    unknown = kwargs.keys() - set(self.arg_names) - LAUNCH_OPTIONS
    if unknown:
        raise TypeError(f"{self.fn.__name__} got an unexpected keyword argument {sorted(unknown)}")
    bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
    arguments = Arguments()
    scope = interpreter._LangPatchScope()
    try:
        _patch_language(scope)
        converted = {
            name: value if name in self.constexprs else arguments.convert(name, value)
            for name, value in bound.items()
        }
        grid = self.grid(bound) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        programs = list(np.ndindex(*grid))
        _order(programs)
        memory = _memory = Memory(self.fn.__name__, iter(arguments.tensors))
        interpreter.interpreter_builder.set_grid_dim(*grid)
        with np.errstate(all="ignore"):
            for program in programs:
                interpreter.interpreter_builder.set_grid_idx(*program)
                memory.begin(program)
                self.fn(**converted)
    finally:
        _memory = None
        scope.restore()


def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """InterpretedFunction.__call__: `launch` has patched the language already, and errors keep their type."""
    return self.rewrite()(*args, **kwargs)


def _patch_language(scope: Any) -> None:
    for module in (tl, tl.core):
        interpreter._patch_builtin(module, interpreter.interpreter_builder, scope)
        interpreter._patch_builtin(module.tensor, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_tensor(module.tensor, scope)
        interpreter._patch_lang_core(module, scope)
    interpreter._patch_builtin(tl.math, interpreter.interpreter_builder, scope)
    interpreter._patch_builtin(tl.core.tensor_descriptor_base, interpreter.interpreter_builder, scope)


def install() -> None:
    """Patch Triton's interpreter for the rest of the process. Calling it again changes nothing."""
    if _stock:
        return

    def replace(owner: Any, name: str, value: Any) -> None:
        _stock[name] = getattr(owner, name, None)
        setattr(owner, name, value)

    replace(interpreter, "_get_np_dtype", numpy_dtype)
    replace(interpreter, "_validate_np_data_size", size_is_right)
    replace(TensorHandle, "__post_init__", round_handle)
    for name, method in vars(ExactBuilder).items():
        if inspect.isfunction(method):
            replace(Builder, name, method)
    replace(interpreter.ReduceOps, "sum", reduce_sum)
    replace(interpreter.ReduceOps, "min_max", reduce_min_max)
    replace(interpreter.ReduceOps, "generic_reduce", generic_reduce)
    replace(interpreter.GridExecutor, "__call__", launch)
    replace(interpreter.InterpretedFunction, "__call__", call_device_function)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)
    builder.codegen_fns["min_dot_size"] = min_dot_size(None)
