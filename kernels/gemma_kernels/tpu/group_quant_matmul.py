"""Products with int4 and int8 weights on TPU: groups of 32 inputs share a scale (Q4_0), or all inputs of an output do.

The weights go from HBM to VMEM as they are stored, once for each block of rows, and no wider copy ever leaves VMEM.
Two forms of the product with groups:

* Weights: a block is multiplied by its scales, rounded to x's dtype and goes to the matrix unit. What that costs is
  shared by all rows of x, so this is the form of prefill.
* Sums: one product gives the sums of all groups, since x is spread to a row for each group, with zeros outside of the
  group; the sums are multiplied by the scales. 32 weights then cost one multiplication for each row of x, and int4
  or int8 is exact in bfloat16: for up to 16 rows this keeps pace with HBM, where the vector unit, scaling each weight,
  would not.

Dimension letters: M rows of x, I inputs and O outputs of the matrix.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

GROUP = 32  # inputs that share a scale
GROUP_BITS = 5  # GROUP = 2 ** GROUP_BITS: a vector unit shifts, it does not divide
LANES = 128
DEPTH = 256  # inputs that one product takes: the depth of the newer matrix units
SUM_DEPTH = 128  # where x is spread: v5's matrix unit is so deep, and rows of zeros cost more with more depth
SUBLANES = 8  # rows of a register

Add = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, slice], None]


@dataclass(frozen=True, kw_only=True)
class QuantMatmulBlocks:
    """Sizes of a step: rows of x, and inputs and outputs of the matrix.

    sums_groups: the form for few rows, which scales sums and not weights. It holds all rows of x in one block.
    scales_wide: weights are scaled in float32, which v5 needs to be fast; else in x's dtype, to which the scales are
        then rounded (bfloat16 scales lose nothing: both forms give the same bits).
    """

    rows: int
    inputs: int
    outputs: int
    sums_groups: bool = False
    scales_wide: bool = True


def _product_forward(x, values, scales, blocks, interpret):
    return _forward(x, values, scales, blocks, interpret), (values, scales)


def _product_backward(blocks, interpret, residuals, d_out):
    values, scales = residuals
    return _backward(d_out, values, scales, blocks, interpret), None, None


_product = jax.custom_vjp(lambda *args: _forward(*args), nondiff_argnums=(3, 4))
_product.defvjp(_product_forward, _product_backward)


def group_quant_matmul(
    x: Float[Array, "M I"],
    values: Int[Array, "I O"],
    scales: Float[Array, "groups O"],
    *,
    blocks: QuantMatmulBlocks,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "M O"]:
    """x times `reference.dequantised(values, scales)`, summed in float32, in x's dtype.

    values: int4 or int8. scales: one for each 32 inputs, or [1, O]. Differentiable with respect to x alone: values and
    scales get gradients of zero. Raises ValueError for arrays or blocks that do not fit.
    """
    _check_arrays(x, values, scales)
    _check_blocks(x, values, scales, blocks)
    return _product(x, values, scales, blocks, interpret)


def _check_arrays(x: jax.Array, values: jax.Array, scales: jax.Array) -> None:
    if x.dtype not in (jnp.bfloat16, jnp.float32) or scales.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype} and scales {scales.dtype}; wanted bfloat16 or float32: cast them")
    if values.dtype not in (jnp.int4, jnp.int8):
        raise ValueError(f"values are {values.dtype}; wanted int4 or int8: quantise them, or use a plain product")
    if x.ndim != 2 or values.ndim != 2 or x.shape[1] != values.shape[0]:
        raise ValueError(f"x is {x.shape} and values {values.shape}; wanted [M, I] and [I, O]: reshape them")
    groups = (1, values.shape[0] // GROUP)
    if scales.ndim != 2 or scales.shape[0] not in groups or scales.shape[1] != values.shape[1]:
        wanted = f"[{groups[1]} or 1, {values.shape[1]}]"
        raise ValueError(f"scales are {scales.shape}; values {values.shape} want {wanted}, groups of {GROUP} inputs")
    if values.shape[0] % LANES or values.shape[1] % LANES:
        raise ValueError(f"values are {values.shape}; wanted multiples of {LANES}: leave this product to XLA")


def _check_blocks(x: jax.Array, values: jax.Array, scales: jax.Array, blocks: QuantMatmulBlocks) -> None:
    for name, size, whole, unit in (
        ("inputs", blocks.inputs, values.shape[0], DEPTH),
        ("outputs", blocks.outputs, values.shape[1], LANES),
    ):
        if size != whole and (size <= 0 or whole % size or size % unit):
            raise ValueError(f"blocks.{name} is {size}; wanted {whole}, or a multiple of {unit} that divides it")
    rows, unit = x.shape[0], SUBLANES * 4 // x.dtype.itemsize
    if blocks.rows <= 0 or (blocks.rows < rows and blocks.rows % unit):
        raise ValueError(f"blocks.rows is {blocks.rows}; wanted a multiple of {unit}, or at least all {rows} rows")
    if _sums_groups(scales, blocks) and (rows > blocks.rows or (rows > SUBLANES and rows % SUBLANES)):
        raise ValueError(
            f"blocks.sums_groups with {rows} rows and blocks.rows {blocks.rows}; wanted all rows in one block and,"
            f" if they are more than {SUBLANES}, a multiple of {SUBLANES}: pad x, or leave sums_groups out"
        )


def _sums_groups(scales: jax.Array, blocks: QuantMatmulBlocks) -> bool:
    return blocks.sums_groups and scales.shape[0] > 1


def _parts(size: int, depth: int) -> list[slice]:
    return [slice(start, min(start + depth, size)) for start in range(0, size, depth)]


def _scales_of(part: slice) -> slice:
    return slice(part.start // GROUP, part.stop // GROUP)


def _dot(x: jax.Array, weights: jax.Array, *, is_transposed: bool = False) -> jax.Array:
    """x times the weights, or the transposed weights; float32 keeps its bits, which the matrix unit would drop."""
    dims = (((1,), (1 if is_transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weights, dims, precision=precision, preferred_element_type=jnp.float32)


def _scaled(values: jax.Array, scales: jax.Array, dtype: jnp.dtype, scales_wide: bool) -> jax.Array:
    """The weights of some groups, in dtype."""
    compute = jnp.dtype(jnp.float32) if scales_wide else dtype
    grouped = values.astype(compute).reshape(scales.shape[0], GROUP, -1)
    return (grouped * scales.astype(compute)[:, None]).reshape(values.shape).astype(dtype)


def _add_plain(x, values, scales, sums_ref, scale_part):
    """The form of one scale per output: the sums are scaled at the end."""
    del scales, scale_part
    sums_ref[...] += _dot(x, values.astype(x.dtype))


def _add_weights(x, values, scales, sums_ref, scale_part, *, scales_wide):
    """The form that scales weights."""
    sums_ref[...] += _dot(x, _scaled(values, scales[scale_part], x.dtype, scales_wide))


def _add_sums(x, values, scales, sums_ref, scale_part):
    """The form that scales the sums of groups, for 8 rows and more: the groups of the spread x follow each other."""
    rows, depth = x.shape
    wide = x.astype(jnp.float32)
    group = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) >> GROUP_BITS
    num_groups = depth // GROUP
    spread = jnp.concatenate([jnp.where(group == g, wide, 0.0) for g in range(num_groups)])
    sums = _dot(spread.astype(x.dtype), values.astype(x.dtype)).reshape(num_groups, rows, -1)
    sums_ref[...] += jnp.sum(sums * scales[scale_part].astype(jnp.float32)[:, None], axis=0)


def _add_few_sums(x, values, scales, sums_ref, scale_part):
    """The same for less than 8 rows: the 8 groups of one row of x fill a register and are summed at the end."""
    rows, depth = x.shape
    num_groups = depth // GROUP
    shape = (rows * num_groups, depth)
    wide = jnp.broadcast_to(x.astype(jnp.float32)[:, None], (rows, num_groups, depth)).reshape(shape)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    spread = jnp.where(column >> GROUP_BITS == row & (num_groups - 1), wide, 0.0)
    sums = _dot(spread.astype(x.dtype), values.astype(x.dtype)).reshape(rows, num_groups, -1)
    sums_ref[:, :num_groups] += sums * scales[scale_part].astype(jnp.float32)


def _forward_kernel(x_ref, values_ref, scales_ref, out_ref, sums_ref, *, add: Add, depth: int):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def clear():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    for part in _parts(values_ref.shape[0], depth):
        add(x_ref[:, part], values_ref[part], scales_ref, sums_ref, _scales_of(part))

    @pl.when(step == pl.num_programs(2) - 1)
    def write():
        sums = sums_ref[...]
        if sums.ndim == 3:
            sums = jnp.sum(sums, axis=1)
        if scales_ref.shape[0] == 1:
            sums *= scales_ref[...].astype(jnp.float32)
        out_ref[...] = sums.astype(out_ref.dtype)


def _form(num_rows: int, scales: jax.Array, blocks: QuantMatmulBlocks) -> tuple[Add, int, tuple[int, ...]]:
    """How a step adds its part, the inputs of one product, and the shape of the sums."""
    whole = (num_rows, blocks.outputs)
    if scales.shape[0] == 1:
        return _add_plain, DEPTH, whole
    if not blocks.sums_groups:
        return functools.partial(_add_weights, scales_wide=blocks.scales_wide), DEPTH, whole
    if num_rows < SUBLANES:
        return _add_few_sums, DEPTH, (num_rows, DEPTH // GROUP, blocks.outputs)
    return _add_sums, SUM_DEPTH, whole


def _scales_spec(scales: jax.Array, blocks: QuantMatmulBlocks, index: Callable) -> pl.BlockSpec:
    """The block of scales beside a block of values, whose index `index` gives from the grid's."""
    if scales.shape[0] == 1:
        return pl.BlockSpec((1, blocks.outputs), lambda *grid: (0, index(*grid)[1]))
    return pl.BlockSpec((blocks.inputs // GROUP, blocks.outputs), index)


def _forward(x, values, scales, blocks, interpret):
    (num_rows, num_inputs), num_outputs = x.shape, values.shape[1]
    rows = min(blocks.rows, num_rows)
    add, depth, sums = _form(rows, scales, blocks)
    grid = (pl.cdiv(num_rows, rows), num_outputs // blocks.outputs, num_inputs // blocks.inputs)

    def weights_index(m, o, i):
        return i, o

    return pl.pallas_call(
        functools.partial(_forward_kernel, add=add, depth=depth),
        name="group_quant_matmul",
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, blocks.inputs), lambda m, o, i: (m, i)),
            pl.BlockSpec((blocks.inputs, blocks.outputs), weights_index),
            _scales_spec(scales, blocks, weights_index),
        ],
        out_specs=pl.BlockSpec((rows, blocks.outputs), lambda m, o, i: (m, o)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_outputs), x.dtype),
        scratch_shapes=[pltpu.VMEM(sums, jnp.float32)],
        cost_estimate=_cost(x, values, scales, num_outputs, grid),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(x, values, scales)


def _backward_kernel(d_ref, values_ref, scales_ref, out_ref, sums_ref, *, scales_wide: bool):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def clear():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    d_out = d_ref[...]
    if scales_ref.shape[0] == 1:
        d_out = (d_out.astype(jnp.float32) * scales_ref[...].astype(jnp.float32)).astype(d_out.dtype)
    for part in _parts(values_ref.shape[0], DEPTH):
        if scales_ref.shape[0] == 1:
            weights = values_ref[part].astype(d_out.dtype)
        else:
            weights = _scaled(values_ref[part], scales_ref[_scales_of(part)], d_out.dtype, scales_wide)
        sums_ref[:, part] += _dot(d_out, weights, is_transposed=True)

    @pl.when(step == pl.num_programs(2) - 1)
    def write():
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


def _backward(d_out, values, scales, blocks, interpret):
    (num_rows, num_outputs), num_inputs = d_out.shape, values.shape[0]
    rows = min(blocks.rows, num_rows)
    grid = (pl.cdiv(num_rows, rows), num_inputs // blocks.inputs, num_outputs // blocks.outputs)

    def weights_index(m, i, o):
        return i, o

    return pl.pallas_call(
        functools.partial(_backward_kernel, scales_wide=blocks.scales_wide),
        name="group_quant_matmul_backward",
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, blocks.outputs), lambda m, i, o: (m, o)),
            pl.BlockSpec((blocks.inputs, blocks.outputs), weights_index),
            _scales_spec(scales, blocks, weights_index),
        ],
        out_specs=pl.BlockSpec((rows, blocks.inputs), lambda m, i, o: (m, i)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_inputs), d_out.dtype),
        scratch_shapes=[pltpu.VMEM((rows, blocks.inputs), jnp.float32)],
        cost_estimate=_cost(d_out, values, scales, num_inputs, grid),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(d_out, values, scales)


def _cost(x: jax.Array, values: jax.Array, scales: jax.Array, width: int, grid: tuple[int, ...]) -> pl.CostEstimate:
    """The arithmetic of the product, and what the blocks move: x once for each column of blocks unless it stays."""
    bits = 4 if values.dtype == jnp.int4 else 8
    weights = values.size * bits // 8 + scales.size * scales.dtype.itemsize
    x_reads = 1 if grid[2] == 1 else grid[1]
    moved = weights * grid[0] + (x.size * x_reads + x.shape[0] * width) * x.dtype.itemsize
    return pl.CostEstimate(flops=2 * x.shape[0] * values.size, transcendentals=0, bytes_accessed=moved)
