"""How this project spells Numba: typed decorators, and the machine instructions Python has no word for.

    kernel          a loop that Python calls: compiled, cached on disk, runs without the GIL
    inline_kernel   a step that kernels call: always merged into its caller, so that it costs no call
    prefetch        asks for a cache line before it is needed
    mulhi_lo        64 x 64 -> 128 bit product
    lanes_equal     compares the 16 numbers of a cache line at once
    copy_64         copies 64 bytes at once

No fastmath anywhere: the shard machine must give the same bits on every run and every machine, so LLVM may neither
reorder sums nor fuse a multiplication with an addition.

Numba's on-disk cache looks at the file of the function itself, not at the files of the functions it calls: after
editing an `inline_kernel`, delete `__pycache__/*.nb?` (or touch its callers), else its callers keep the old code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numba.core.cgutils
import numba.core.types
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

Int = int | np.int64
"""A whole number on either side of the compiler."""

# Numba's own types have no annotations.
_cgutils: Any = numba.core.cgutils
_types: Any = numba.core.types
# Nor is the option `_nrt`.
_njit: Any = numba.njit


def kernel(function: F) -> F:
    """Compile `function` on its first call: no GIL, no bounds checks, division by zero as in numpy, cached on disk.

    Arrays and scalars in, caller-owned arrays out. Arguments are not checked: that is the wrapper's duty.
    """
    compiled = numba.njit(cache=True, nogil=True, fastmath=False, boundscheck=False, error_model="numpy")(function)
    return cast(F, compiled)


def lean_kernel(function: F) -> F:
    """As `kernel`, for loops that allocate nothing: compiled without reference counts (see `inline_kernel`)."""
    compiled = _njit(cache=True, nogil=True, fastmath=False, boundscheck=False, error_model="numpy", _nrt=False)(
        function
    )
    return cast(F, compiled)


def inline_kernel(function: F) -> F:
    """As `kernel`, for steps called from other kernels: LLVM always merges the code into its caller.

    Takes arrays and tuples of arrays, but allocates none and returns numbers only: it is compiled without reference
    counts (Numba's `_nrt`). Counting every array of an argument up and down, atomically, at each call cost 60 ns of
    the 120 ns that `cell_kernels.locate` took then.
    """
    compiled = _njit(
        cache=True,
        nogil=True,
        fastmath=False,
        boundscheck=False,
        error_model="numpy",
        forceinline=True,
        _nrt=False,
    )(function)
    return cast(F, compiled)


def _emit_prefetch(builder: Any, address: Any) -> None:
    """LLVM's prefetch instruction for an address: read (0), keep in every cache level (3), data (1)."""
    byte_address = builder.bitcast(address, _cgutils.voidptr_t)
    int32 = ir.IntType(32)
    instruction = _cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [_cgutils.voidptr_t, int32, int32, int32]),
        "llvm.prefetch.p0",
    )
    builder.call(instruction, [byte_address, int32(0), int32(3), int32(1)])


def _prefetch(_typing_context: Any, array: Any, index: Any) -> Any:
    """Build `prefetch`: the address of `array[index, 0, ...]` handed to LLVM's prefetch instruction."""
    if not isinstance(array, _types.Array) or not isinstance(index, _types.Integer):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, index_type = signature.args
        array_value = context.make_array(array_type)(context, builder, arguments[0])
        position = context.cast(builder, arguments[1], index_type, _types.intp)
        indices = [position] + [context.get_constant(_types.intp, 0)] * (array_type.ndim - 1)
        address = _cgutils.get_item_pointer(context, builder, array_type, array_value, indices, wraparound=False)
        _emit_prefetch(builder, address)
        return context.get_dummy_value()

    return _types.void(array, index), generate


def _mulhi_lo(_typing_context: Any, a: Any, b: Any) -> Any:
    """Build `mulhi_lo`: one `mul` instruction through LLVM's 128-bit integers."""
    if not isinstance(a, _types.Integer) or not isinstance(b, _types.Integer):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int64, int128 = ir.IntType(64), ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], int128), builder.zext(arguments[1], int128))
        high = builder.trunc(builder.lshr(product, ir.Constant(int128, 64)), int64)
        low = builder.trunc(product, int64)
        return context.make_tuple(builder, signature.return_type, (high, low))

    return _types.UniTuple(_types.uint64, 2)(_types.uint64, _types.uint64), generate


prefetch = cast(Callable[[npt.NDArray[Any], Any], None], intrinsic(_prefetch))
"""`prefetch(array, index)`, inside kernels only: start loading the cache line where `array[index]` begins.

`array`: any dtype, any number of dimensions (`index` counts along the first). `index`: any integer type, not
negative; one beyond the array is harmless, for a prefetch never faults. Writes nothing, returns nothing.
"""

mulhi_lo = cast(Callable[[Any, Any], tuple[np.uint64, np.uint64]], intrinsic(_mulhi_lo))
"""`mulhi_lo(a, b) -> (high, low)`, inside kernels only: the 128-bit product of two u64, as two u64."""


def _load(bits: int) -> Callable[..., Any]:
    """Build `load_u64` or `load_u32`: one unaligned little-endian load out of an array of bytes."""

    def typed(_typing_context: Any, array: Any, index: Any) -> Any:
        if not isinstance(array, _types.Array) or array.dtype != _types.uint8 or not isinstance(index, _types.Integer):
            return None

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array_type, index_type = signature.args
            array_value = context.make_array(array_type)(context, builder, arguments[0])
            position = context.cast(builder, arguments[1], index_type, _types.intp)
            address = _cgutils.get_item_pointer(context, builder, array_type, array_value, [position], wraparound=False)
            word = builder.load(builder.bitcast(address, ir.IntType(bits).as_pointer()), align=1)
            return builder.zext(word, ir.IntType(64)) if bits < 64 else word

        return _types.uint64(array, index), generate

    return typed


load_u64 = cast(Callable[[npt.NDArray[np.uint8], Any], np.uint64], intrinsic(_load(64)))
"""`load_u64(raw, index)`, inside kernels only: bytes `raw[index : index + 8]` as one little-endian u64.

Every machine that Numba and Valkey's wheels run on is little-endian; `raw` must hold those 8 bytes.
"""

load_u32 = cast(Callable[[npt.NDArray[np.uint8], Any], np.uint64], intrinsic(_load(32)))
"""`load_u32(raw, index)`, inside kernels only: bytes `raw[index : index + 4]` as a little-endian number, u64."""


def _lowest_bit(_typing_context: Any, word: Any) -> Any:
    """Build `lowest_bit`: LLVM's count of trailing zeros."""
    if word != _types.uint64:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return _types.int64(_types.uint64), generate


lowest_bit = cast(Callable[[Any], int], intrinsic(_lowest_bit))
"""`lowest_bit(word)`, inside kernels only: position of the lowest set bit of a u64 that is not 0, as int64."""


LANES = 16


def _lanes_equal(_typing_context: Any, array: Any, index: Any, shift: Any, value: Any) -> Any:
    """Build `lanes_equal`: one vector load, shift and comparison, whose result is taken as a number."""
    if not isinstance(array, _types.Array) or array.dtype != _types.uint32:
        return None
    if not all(isinstance(argument, _types.Integer) for argument in (index, shift, value)):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, index_type, shift_type, value_type = signature.args
        array_value = context.make_array(array_type)(context, builder, arguments[0])
        position = context.cast(builder, arguments[1], index_type, _types.intp)
        address = _cgutils.get_item_pointer(context, builder, array_type, array_value, [position], wraparound=False)
        vector = ir.VectorType(ir.IntType(32), LANES)
        line = builder.load(builder.bitcast(address, vector.as_pointer()), align=4 * LANES)

        def in_all_lanes(argument: Any, argument_type: Any) -> Any:
            number = context.cast(builder, argument, argument_type, _types.uint32)
            lanes = ir.Constant(vector, ir.Undefined)
            for lane in range(LANES):
                lanes = builder.insert_element(lanes, number, ir.IntType(32)(lane))
            return lanes

        shifted = builder.lshr(line, in_all_lanes(arguments[2], shift_type))
        equal = builder.icmp_unsigned("==", shifted, in_all_lanes(arguments[3], value_type))
        return builder.zext(builder.bitcast(equal, ir.IntType(LANES)), ir.IntType(64))

    return _types.uint64(array, index, shift, value), generate


lanes_equal = cast(Callable[[npt.NDArray[np.uint32], Any, Any, Any], np.uint64], intrinsic(_lanes_equal))
"""`lanes_equal(array, index, shift, value)`, inside kernels only: which of `array[index : index + 16] >> shift` equal
`value`, as a u64 of 16 bits, the first number's being the lowest.

`array`: u32, contiguous; `index`: where 16 numbers begin that fill one cache line (the address is a multiple of 64).
"""


BLOCK_BYTES = 64


def _copy_64(_typing_context: Any, source: Any, start: Any, target: Any, place: Any) -> Any:
    """Build `copy_64`: one unaligned vector load and store."""
    if any(not isinstance(array, _types.Array) or array.dtype != _types.uint8 for array in (source, target)):
        return None
    if not isinstance(start, _types.Integer) or not isinstance(place, _types.Integer):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = ir.VectorType(ir.IntType(8), BLOCK_BYTES)

        def address(array: int) -> Any:
            array_type = signature.args[array]
            array_value = context.make_array(array_type)(context, builder, arguments[array])
            position = context.cast(builder, arguments[array + 1], signature.args[array + 1], _types.intp)
            item = _cgutils.get_item_pointer(context, builder, array_type, array_value, [position], wraparound=False)
            return builder.bitcast(item, block.as_pointer())

        builder.store(builder.load(address(0), align=1), address(2), align=1)
        return context.get_dummy_value()

    return _types.void(source, start, target, place), generate


copy_64 = cast(Callable[[npt.NDArray[np.uint8], Any, npt.NDArray[np.uint8], Any], None], intrinsic(_copy_64))
"""`copy_64(source, start, target, place)`, inside kernels only: 64 bytes from `source[start]` on go to `target[place]`.

Both u8, contiguous, and both must hold those 64 bytes; if the two overlap, what was there before is copied.
"""
