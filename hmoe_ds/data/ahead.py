"""`prefetch`, for kernels that read rows from all over a mapped file: memory is on its way before it is read."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_BYTE_POINTER, _INT = ir.IntType(8).as_pointer(), ir.IntType(32)


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Begin to load the cache line of `array[index]`, of a one-dimensional contiguous array; for numba kernels.

    It does not wait and does not fail, whatever the index. Numba's cache of a kernel does not notice when this
    function is changed: remove `__pycache__` then.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), _BYTE_POINTER)
        kind = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, _INT, _INT, _INT])
        read, keep, of_data = _INT(0), _INT(3), _INT(1)
        builder.call(
            builder.module.declare_intrinsic("llvm.prefetch", [_BYTE_POINTER], kind), [address, read, keep, of_data]
        )
        return context.get_dummy_value()

    return types.none(array, types.intp), generate
