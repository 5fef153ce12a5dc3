"""What a GPU moves and computes in a layer's forward and backward pass, kernel by kernel.

`layer_calls` and `dense_calls` say what metalora's CUDA code and a dense layer ask of the GPU, in
order; the tests hold the names and sizes to what the code really asks for, through the host shim.
A call takes the time of its bytes, of its multiplications or of its random numbers, whichever is
the longest, and that of a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from benchmarks.lib.tuning import chosen

TILE = 128  # rows and columns of the tiles that products are charged in
LEAST = 64  # of either side that a product of the BLAS is charged for
FLOAT = 4  # bytes
PLANNED_PROCESSORS = 132  # kPlannedProcessors of csrc/cuda/token_plan.h


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at most.

    Attributes:
        copy: bytes read and written a second.
        rates: floating-point operations a second: "short" in 16 bits, "mma" the same in kernels
            that use no more than a warp's instructions, "tf32", and "fp32".
        philox: random numbers a second.
        launch: seconds that every launch adds.
        processors: streaming multiprocessors; the last wave of a product's tiles leaves some idle.
    """

    copy: float
    rates: dict[str, float]
    philox: float
    launch: float
    processors: int


@dataclass(frozen=True)
class Layer:
    """A multi-task LoRA layer and what is asked of it.

    Attributes:
        rows: of each task.
        parameter, activation: bytes of an element of the weights, and of x and y.
        unit: in which products of activations are computed: "short", "tf32" or "fp32".
        keep_merged: whether the weight route keeps the merged weights for backward.
        need_x, need_weight: whether these have gradients; the adapters always do.
        adds_to_x: whether x has a gradient already, which is given to the layer to add to.
    """

    rows: tuple[int, ...]
    in_features: int
    out_features: int
    rank: int
    dropout: float
    bias: bool
    parameter: int
    activation: int
    unit: str
    keep_merged: bool = False
    need_x: bool = True
    need_weight: bool = True
    adds_to_x: bool = False

    @property
    def tasks(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def equal(self) -> int:
        """Rows of each task where there are several with equally many and not none, else 0."""
        return self.rows[0] if len(set(self.rows)) == 1 < self.tasks else 0

    @property
    def weight(self) -> int:
        """Elements of W."""
        return self.in_features * self.out_features

    @property
    def factors(self) -> int:
        """Elements of all A_t and B_t."""
        return self.tasks * self.rank * (self.in_features + self.out_features)

    @property
    def added_to(self) -> int:
        """Elements of a gradient of x that are read to be added to."""
        return self.total * self.in_features if self.adds_to_x and self.need_x else 0

    @property
    def tf32(self) -> bool:
        """Whether our kernels may round factors to TF32."""
        return self.unit != "fp32"


@dataclass(frozen=True)
class Call:
    """One launch, or one call of torch's.

    Attributes:
        name: of the kernel, or of torch's operator.
        step: "forward" or "backward".
        moved: bytes read and written.
        flops: floating-point operations.
        unit: in which they are.
        tiles: of a product, that run beside each other.
        randoms: random numbers drawn.
        sizes: of a product: how many, m, n and k; of a sum: 1, rows, columns, columns.
        after: bytes that the BLAS moves in a second kernel, which sums what the first left.
    """

    name: str
    step: str
    moved: float
    flops: float = 0
    unit: str = "fp32"
    tiles: int = 0
    randoms: float = 0
    sizes: tuple[int, ...] = ()
    after: float = 0

    def seconds(self, ceilings: Ceilings) -> float:
        used = 1.0
        if self.tiles:
            waves = ceil(self.tiles / ceilings.processors)
            used = self.tiles / (waves * ceilings.processors)
        return (
            ceilings.launch
            + self.after / ceilings.copy
            + max(
                self.moved / ceilings.copy,
                self.flops / (ceilings.rates[self.unit] * used),
                self.randoms / ceilings.philox,
            )
        )


def seconds(calls: Iterable[Call], ceilings: Ceilings) -> float:
    return sum(call.seconds(ceilings) for call in calls)


def dense_calls(layer: Layer) -> list[Call]:
    """A plain layer of the same shape, as nn.Linear and autograd compute it."""
    rows, outer, inner = layer.total, layer.out_features, layer.in_features
    calls = [*_cast_down(layer, layer.weight)]
    calls.append(_product(layer, "linear", "forward", (1, rows, outer, inner)))
    if layer.need_x:
        calls.append(_product(layer, "mm", "backward", (1, rows, inner, outer)))
    if layer.need_weight:
        calls.append(_product(layer, "mm", "backward", (1, outer, inner, rows)))
        calls += _cast_up(layer, layer.weight)
        calls += _bias_sum(layer)
    return calls


def layer_calls(layer: Layer, route: str) -> list[Call]:
    """metalora's layer by a route, "weight" or "token"."""
    return list(_weight_route(layer) if route == "weight" else _token_route(layer))


def calls_of_readers(
    layer: Layer, calls_of: Callable[[Layer], list[Call]], readers: int, *, handed_on: bool
) -> list[Call]:
    """What ``readers`` layers like this one ask for that read the same x, and what x asks for.

    Under autocast x and its gradient are cast from and to the dtype of the parameters.

    Args:
        calls_of: a layer's calls.
        handed_on: whether x is cast once, and its gradient given to the next layer to add to;
            else each layer casts x, and autograd adds up the gradients.
    """
    size = layer.total * layer.in_features
    casts, calls = [*_cast_down(layer, size), *_cast_up(layer, size)], calls_of(layer)
    if handed_on:
        return [*calls, *calls_of(replace(layer, adds_to_x=True)) * (readers - 1), *casts]
    others = [*calls, _add(size * layer.parameter)]
    return [*calls, *others * (readers - 1), *casts * readers]


def _add(size: int) -> Call:
    """What autograd adds up, of so many bytes."""
    return Call("add", "backward", 3 * size)


def _weight_route(layer: Layer) -> Iterator[Call]:
    tasks, outer, inner = layer.tasks, layer.out_features, layer.in_features
    rows = layer.equal
    grouped = layer.activation == 2 and tasks > 1 and inner % 8 == outer % 8 == 0
    yield _merge(layer, "forward")
    if rows:
        name = "biased" if layer.bias else "bmm"
        yield _product(layer, name, "forward", (tasks, rows, outer, inner))
    elif grouped and not layer.bias:
        yield Call("task_ends_kernel", "forward", 4 * tasks)
        yield _product(layer, "grouped", "forward", (1, layer.total, outer, inner), tasks)
    else:
        for n in filter(None, layer.rows):
            yield _product(layer, "linear", "forward", (1, n, outer, inner))
    if layer.need_x:
        if not layer.keep_merged:
            yield _merge(layer, "backward")
        if rows:
            sizes = (tasks, rows, inner, outer)
            yield _product(layer, "baddbmm", "backward", sizes, extra=layer.added_to)
        elif grouped:
            yield Call("task_ends_kernel", "backward", 4 * tasks)
            yield _product(layer, "grouped", "backward", (1, layer.total, inner, outer), tasks)
        else:
            extra = layer.added_to if tasks == 1 else 0
            for n in filter(None, layer.rows):
                yield _product(layer, "addmm", "backward", (1, n, inner, outer), extra=extra)
        if layer.added_to and len(set(layer.rows)) > 1:
            yield _add(layer.added_to * layer.activation)
    # The sums over rows of dY come with the products, as one of each product.
    summed = layer.need_weight and layer.bias and layer.activation < 8
    summed = summed and chosen("bias_sums", layer.activation).depth > 0
    chunks = 1
    if rows:
        chunks = product_chunks(tasks, rows, outer, inner, layer.activation)
        products = [("summed" if summed else "bmm", tasks * chunks, rows // chunks)]
    else:
        products = [("summed" if summed else "mm", 1, n) for n in filter(None, layer.rows)]
    for name, count, n in products:
        yield _product(layer, name, "backward", (count, outer, inner, n), result=FLOAT)
    yield from _merge_backward(layer, chunks)
    if summed:
        parts = tasks * chunks
        yield Call("sum", "backward", FLOAT * parts * outer, sizes=(1, parts, outer, outer))
    elif layer.need_weight:
        yield from _bias_sum(layer)


def _token_route(layer: Layer) -> Iterator[Call]:
    """csrc/cuda/token_rows.cu, between products of a weight's size."""
    rows, outer, inner = layer.total, layer.out_features, layer.in_features
    drawn = layer.dropout > 0
    yield from _cast_down(layer, layer.weight + layer.factors)
    yield from _token_table(layer, "forward")
    yield _token_pass(layer, "forward", inner, outer, 2, drawn=drawn)
    # What stands in y is added to.
    yield _product(layer, "addmm", "forward", (1, rows, outer, inner), extra=rows * outer)
    addends = 8 * token_blocks(layer) * layer.rank
    own_B = addends <= layer.activation * rows
    own_A = addends <= (2 if drawn else 1) * layer.activation * rows
    yield from _token_table(layer, "backward")
    if layer.need_weight:
        yield _product(layer, "mm", "backward", (1, outer, inner, rows))
    written, products = inner * layer.need_x, 1 + layer.need_x + own_B
    extra = layer.added_to
    yield _token_pass(layer, "backward", outer, written, products, sums=own_B, extra=extra)
    if layer.need_x:
        yield _product(layer, "addmm", "backward", (1, rows, inner, outer), extra=rows * inner)
    if own_A:
        yield _token_pass(layer, "backward", inner, 0, 1, sums=True)
        yield _token_sum(layer, inner * layer.rank, layer.tasks)
    else:
        if drawn:
            moved = 2 * rows * inner * layer.activation + rows * inner // 8
            yield Call("kept_kernel", "backward", moved)
        yield from _outer_products(layer, layer.rank, inner)
    if own_B:
        yield _token_sum(layer, outer * layer.rank, layer.tasks)
    else:
        yield from _outer_products(layer, outer, layer.rank)
    if layer.need_weight and layer.bias:
        yield _token_sum(layer, outer, 1)
    yield from _cast_up(layer, layer.factors + layer.weight * layer.need_weight)


def token_blocks(layer: Layer) -> int:
    """How many blocks the rows are cut into: `plan_token_blocks` of token_rows.cu."""
    tile = 16 if layer.activation == 8 else 64
    wanted = chosen("token_rows", layer.activation, layer.rank).blocks
    block = token_block_rows(layer.rows, tile, wanted)
    return sum(ceil(n / block) for n in layer.rows)


def token_block_rows(
    rows: Sequence[int], tile: int, wanted: int, processors: int = PLANNED_PROCESSORS
) -> int:
    """Rows of a block, of so many rows of each task: csrc/cuda/token_plan.h."""

    def count(tiles: int) -> int:
        return sum(ceil(n / (tiles * tile)) for n in rows)

    def of_busiest(tiles: int) -> int:
        return ceil(count(tiles) / processors) * tiles

    middle = max(sum(rows) // tile // wanted, 1)
    step, steps = max(middle // 16, 1), min(8, 512 // max(len(rows), 1))
    offered = [middle + sign * n * step for n in range(1, steps + 1) for sign in (1, -1)]
    offered = [t for t in offered if t >= 1 and wanted <= 2 * count(t) <= 4 * wanted]
    return min([middle, *offered], key=of_busiest) * tile


def _token_table(layer: Layer, step: str) -> Iterator[Call]:
    if len(set(layer.rows)) > 1:
        yield Call("task_ends_kernel", step, 8 * layer.tasks)


def _token_pass(
    layer: Layer,
    step: str,
    columns: int,
    results: int,
    products: int,
    *,
    drawn: bool = False,
    sums: bool = False,
    extra: int = 0,
) -> Call:
    """One read of [M, columns] and of ``extra`` elements and one write of [M, results].

    With ``sums``, addends of blocks are written, too.
    """
    rows, rank = layer.total, layer.rank
    moved = (rows * (columns + results + 2 * rank) + extra) * layer.activation
    if layer.dropout:
        moved += rows * layer.in_features // 8
    if sums:
        # Added to in the L2, as long as they fit there, and written once.
        moved += FLOAT * token_blocks(layer) * columns * rank
    # The tensor cores compute 8 ranks at least, in TF32 16 and at half the rate; FFMA those that
    # there are.
    mma = layer.activation == 2 or (layer.activation == 4 and layer.tf32)
    charged = {2: max(rank, 8), 4: 2 * max(rank, 16)}[layer.activation] if mma else rank
    flops = products * 2 * rows * max(columns, results) * charged
    randoms = rows * columns if drawn else 0
    return Call("token_kernel", step, moved, flops, "mma" if mma else "fp32", randoms=randoms)


def _token_sum(layer: Layer, elements: int, results: int) -> Call:
    moved = FLOAT * token_blocks(layer) * elements + results * elements * layer.activation
    return Call("sum_token_kernel", "backward", moved)


def product_chunks(
    tasks: int, rows: int, outer: int, inner: int, element: int, *, divisors: bool = True
) -> int:
    """Into how many chunks the rows of a task are cut for P_t: csrc/cuda/product_plan.h."""
    processors, work = chosen("product_plan", element).choice
    flops_per_byte, area = work / element, float(outer * inner)
    tiles = tasks * ceil(outer / TILE) * ceil(inner / TILE)
    streamed = float(tasks * rows * (outer + inner) * element)

    def cost(chunks: int) -> float:
        count = tiles * chunks
        use = count / (ceil(count / processors) * processors)
        addends = 4.0 * tasks * chunks * area
        moved = streamed / min(1.0, count / processors) + addends
        return max(2.0 * tasks * rows * area / use, flops_per_byte * moved) + (
            flops_per_byte * addends
        )

    offered = [c for c in range(2, 65) if rows // c >= 256 and not (divisors and rows % c)]
    return min([1, *offered], key=cost)


def _outer_products(layer: Layer, left: int, right: int) -> Iterator[Call]:
    """Over the rows of every task."""
    if layer.equal:
        yield _product(layer, "baddbmm", "backward", (layer.tasks, left, right, layer.equal))
        return
    for n in filter(None, layer.rows):
        yield _product(layer, "addmm", "backward", (1, left, right, n))


def _product(
    layer: Layer,
    name: str,
    step: str,
    sizes: tuple[int, int, int, int],
    groups: int = 1,
    *,
    result: int | None = None,
    extra: int = 0,
) -> Call:
    """How many, m, n and k; ``result`` bytes an element, and ``extra`` elements moved."""
    count, m, n, k = sizes
    each = layer.activation
    read = count * (m * k + groups * k * n) * each
    written = count * m * n * (each if result is None else result)
    flops = 2 * count * max(m, LEAST) * max(n, LEAST) * k
    tiles = count * (ceil(m / TILE) * ceil(n / TILE) + groups - 1)
    moved = read + written + extra * each
    after = 0
    if count == 1 and min(m, n) >= LEAST:
        # Where tiles are few, the BLAS cuts k by itself, and sums the parts in a second kernel.
        parts = product_chunks(1, k, m, n, each, divisors=False)
        tiles *= parts
        after = FLOAT * parts * m * n if parts > 1 else 0
        moved += after
    return Call(name, step, moved, flops, layer.unit, tiles, sizes=sizes, after=after)


def _cast_down(layer: Layer, elements: int) -> Iterator[Call]:
    """Under autocast, parameters in the dtype of the activations."""
    if layer.parameter != layer.activation:
        yield Call("cast", "forward", elements * (layer.parameter + layer.activation))


def _cast_up(layer: Layer, elements: int) -> Iterator[Call]:
    """Under autocast, gradients in the dtype of the parameters."""
    if layer.parameter != layer.activation:
        yield Call("cast", "backward", elements * (layer.parameter + layer.activation))


def _bias_sum(layer: Layer) -> Iterator[Call]:
    if layer.bias:
        size = layer.total, layer.out_features
        sizes = (1, *size, layer.out_features)
        yield Call("sum", "backward", prod(size) * layer.activation, sizes=sizes)


def _merge(layer: Layer, step: str) -> Call:
    """csrc/cuda/merge_lora.cu."""
    moved = (layer.weight + layer.factors) * layer.parameter
    moved += layer.tasks * layer.weight * layer.activation
    flops = 2 * layer.tasks * layer.weight * layer.rank
    unit = "tf32" if layer.tf32 and layer.rank >= 8 else "fp32"
    return Call("merge_kernel", step, moved, flops, unit)


def _merge_backward(layer: Layer, chunks: int) -> Iterator[Call]:
    """csrc/cuda/merge_lora_backward.cu, whose plan is in merge_backward_tile.h."""
    tasks, rank = layer.tasks * chunks, layer.rank
    tile_rows = TILE if layer.tf32 else 64
    row_tiles, column_tiles = ceil(layer.out_features / tile_rows), ceil(layer.in_features / TILE)
    tiles = row_tiles * column_tiles
    blocks, strip_tiles = chosen("merge_lora_backward", FLOAT, rank).choice
    strips = ceil(column_tiles / min(max(tiles // blocks, 1), strip_tiles))
    groups = ceil(tasks / min(ceil(tasks / max(blocks // tiles, 1)), 32))
    padded = column_tiles * TILE, row_tiles * tile_rows
    factors = FLOAT * layer.tasks * rank * sum(padded)
    addends = FLOAT * tasks * rank * (padded[0] * row_tiles + padded[1] * strips)
    weight = layer.weight * layer.need_weight
    partial = FLOAT * groups * weight if groups > 1 else 0
    yield Call("prepare_kernel", "backward", layer.factors * layer.parameter + factors)
    yield Call(
        "backward_kernel",
        "backward",
        FLOAT * tasks * layer.weight + factors + addends + (partial or weight * layer.parameter),
        4 * tasks * layer.weight * max(rank, 8 if layer.tf32 else 1),
        "tf32" if layer.tf32 else "fp32",
    )
    written = (layer.factors + (weight if partial else 0)) * layer.parameter
    yield Call("sum_kernel", "backward", addends + partial + written)


def table_rows(calls: Sequence[Call], ceilings: Ceilings) -> list[list[str]]:
    """A row for each call: what, when, MB, GFLOP, microseconds."""
    return [
        [
            call.name,
            call.step,
            f"{call.moved / 1e6:,.1f}",
            f"{call.flops / 1e9:,.1f}",
            f"{1e6 * call.seconds(ceilings):,.1f}",
        ]
        for call in calls
    ]
