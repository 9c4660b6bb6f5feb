"""Join matrix products of backward passes that share a factor or are only summed: a pass over Inductor's graphs.

A linear i, y_i = x W_i^T, reads x [N, K], with N tokens, and has a weight W_i [X_i, K]; dy_i [N, X_i] is the gradient of y_i.

    sum_i dy_i W_i    ->  [dy_1 dy_2 ..] [W_1; W_2; ..]     gradient of an input that several linears read
    dy_i^T x          ->  rows of [dy_1 dy_2 ..]^T x        gradients of these linears' weights; the product returns fp32
    a + b + x W^T     ->  (a + b) += x W^T                  an MLP's product added to the residual stream

Fewer, larger products use a GPU better, and their sum is written once instead of being read and added afterwards. This module
is the only one that reaches into Inductor's graphs and lowerings.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten, cast = torch.ops.aten, torch.ops.prims.convert_element_type.default
RESHAPES = (aten.reshape.default, aten.view.default)
WIDTH = 64  # parts are padded to a multiple of this, so that rows are aligned to 128 bytes

# The pass inserts add_product, which changes nothing in place, as Inductor expects of a graph. Its lowering clones `total`,
# which can be fused with the sum a + b, and adds the product to the clone by add_product_. flexible_layout: no copies of views.
library = torch.library.Library("distill_pl", "FRAGMENT")
library.define("side_by_side(Tensor[] parts) -> Tensor")
library.define("add_product(Tensor total, Tensor x, Tensor weight) -> Tensor")
library.define("add_product_(Tensor(a!) total, Tensor x, Tensor weight) -> ()", tags=(torch.Tag.flexible_layout,))
for key in ("CompositeExplicitAutograd", "Meta"):
    library.impl("side_by_side", lambda parts: torch.cat(parts, 1), key)
    library.impl("add_product", torch.addmm, key)


@torch.library.impl(library, "add_product_", "CompositeExplicitAutograd")
def _(total, x, weight):
    total.addmm_(x, weight)


side_by_side, add_product = torch.ops.distill_pl.side_by_side.default, torch.ops.distill_pl.add_product.default


class JoinProducts(CustomGraphPass):
    """Apply `join_products` to every graph, as Inductor's `post_grad_custom_pre_pass`."""

    def __call__(self, graph: Graph) -> None:
        """Register how Inductor lowers the two operators above, then change the graph in place."""
        from torch._inductor.ir import ConcatKernel, FallbackKernel, TensorBox
        from torch._inductor.lowering import lowerings, register_lowering

        if side_by_side not in lowerings:

            @register_lowering(side_by_side, type_promotion_kind=None)
            def _(parts):  # not Inductor's cat, which may compute all parts for every element of the result
                return TensorBox(ConcatKernel.create(parts, 1))

            @register_lowering(add_product, type_promotion_kind=None)
            def _(total, x, weight):
                total = lowerings[aten.clone.default](total)
                total.realize()
                FallbackKernel.create(torch.ops.distill_pl.add_product_.default, total, x, weight)
                return total

        join_products(graph)

    def uuid(self) -> Any:
        """Identify this version of the pass, so that Inductor does not reuse graphs cached by another version."""
        return get_hash_for_files((__file__,))


def join_products(graph: Graph) -> None:
    """Join products of a forward or backward graph in place."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    joined: dict[tuple[Node, ...], Node] = {}  # concatenated dy, which the gradients of inputs and of weights share
    _join_sums(graph, joined)
    _join_weight_gradients(graph, joined)
    _add_to_sums(graph)
    stable_topological_sort(graph)
    graph.eliminate_dead_code()


def _join_sums(graph: Graph, joined: dict[tuple[Node, ...], Node]) -> None:
    """Replace sums sum_i dy_i W_i by one product each."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if len(total.users) == 1 and next(iter(total.users)).target is aten.add.Tensor:
            continue  # part of a larger sum
        summands = {product: leaf for leaf in _summands(total, total.meta["val"]) if (product := _product(leaf))}
        products = sorted(summands, key=lambda product: order.get(product, -1))
        if len(products) > 1 and len({(x.meta["val"].shape, x.meta["val"].dtype) for x in products}) == 1:
            dy, weights = zip(*(product.args for product in products), strict=True)
            with graph.inserting_before(products[-1]):
                weight = _call(graph, aten.cat.default, [_pad(graph, x, 0) for x in weights])
                product = _call(graph, aten.mm.default, _side_by_side(graph, dy, joined), weight)
            products[-1].replace_all_uses_with(product)
            for other in products[:-1]:
                (add,) = summands[other].users
                rest: Any = add.args[1] if add.args[0] is summands[other] else add.args[0]
                add.replace_all_uses_with(rest)
                graph.erase_node(add)


def _join_weight_gradients(graph: Graph, joined: dict[tuple[Node, ...], Node]) -> None:
    """Replace products dy_i^T x that share x by one; on a GPU it returns fp32 if all readers cast the products to fp32."""
    found: dict[tuple, list[Node]] = {}
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        if _is_weight_gradient(product):
            x: Any = product.args[1]  # one reshaped node for all products, or one for each
            found.setdefault((x.args[0] if x.target in RESHAPES else x, x.meta["val"].shape), []).append(product)
    for products in found.values():
        x, dy = products[0].args[1], [_transposed(product.args[0]) for product in products]
        casts: list[Any] = [user for product in products for user in product.users if _is_cast_to_fp32(user)]
        fp32 = x.meta["val"].is_cuda and len(casts) == sum(len(product.users) for product in products)
        if len(products) > 1 or fp32:
            with graph.inserting_before(products[-1]):  # not at the end of the graph, which would keep dy and x until then
                factors = _call(graph, aten.permute.default, _side_by_side(graph, dy, joined), [1, 0]), x
                target, dtype = (aten.mm.dtype, (torch.float32,)) if fp32 else (aten.mm.default, ())
                whole = _call(graph, target, *factors, *dtype)
                sizes = [product.meta["val"].shape[0] for product in products]
                starts = accumulate((size + -size % WIDTH for size in sizes), initial=0)
                for product, start, size in zip(products, starts, sizes, strict=False):
                    product.replace_all_uses_with(_call(graph, aten.slice.Tensor, whole, 0, start, start + size))
            for node in casts if fp32 else ():
                node.replace_all_uses_with(node.args[0])


def _add_to_sums(graph: Graph) -> None:
    """Replace a + b + x W^T by a product that adds to a + b in place."""
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        shape, dtype = total.meta["val"].shape, total.meta["val"].dtype
        for summand, other in (total.args, total.args[::-1]) if not total.kwargs else ():
            is_sum = isinstance(summand, Node) and isinstance(other, Node) and other.target is aten.add.Tensor
            product = _product(summand) if is_sum and other.meta["val"].shape == shape else None
            if product and product.meta["val"].dtype == other.meta["val"].dtype == dtype:
                with graph.inserting_before(total):
                    rows = _call(graph, aten.reshape.default, other, list(product.meta["val"].shape))
                    added = _call(graph, add_product, rows, *product.args)
                    total.replace_all_uses_with(_call(graph, aten.reshape.default, added, list(shape)))
                break


def _call(graph: Graph, target: Callable, *args: Any) -> Node:
    """Insert a call of `target` at the graph's insertion point, with the fake result that later steps read shapes from."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda argument: argument.meta["val"]))
    return node


def _pad(graph: Graph, x: Node, dim: int) -> Node:
    """Append zeros to a matrix up to a multiple of WIDTH."""
    missing = -x.meta["val"].shape[dim] % WIDTH
    return _call(graph, aten.constant_pad_nd.default, x, [0, 0, 0, missing] if dim == 0 else [0, missing]) if missing else x


def _side_by_side(graph: Graph, parts: Sequence[Any], joined: dict[tuple[Node, ...], Node]) -> Node:
    """Concatenate matrices [N, X_i], each padded, unless there is only one or they are joined already."""
    if len(parts) == 1:
        return parts[0]
    if (key := tuple(parts)) not in joined:
        joined[key] = _call(graph, side_by_side, [_pad(graph, x, 1) for x in parts])
    return joined[key]


def _transposed(node: Any) -> Any:
    """Return the matrix of which `node` is the transpose, or None if it is no transpose."""
    return node.args[0] if node.target is aten.permute.default and node.args[1] == [1, 0] else None


def _is_weight_gradient(product: Node) -> bool:
    """Return whether a product is dy^T x and read only by the graph's output, directly or after a cast."""
    results = [user for node in product.users for user in (node.users if node.target is cast else [node])]
    return _transposed(product.args[0]) is not None and all(user.op == "output" for user in results)


def _is_cast_to_fp32(node: Node) -> bool:
    return node.target is cast and node.args[1] == torch.float32


def _summands(node: Node, like: Tensor) -> Iterator[Node]:
    """Yield the summands of nested, unweighted additions that have the shape and dtype of `like` and a single reader."""
    for x in node.args if not node.kwargs else ():
        if isinstance(x, Node) and len(x.users) == 1 and (x.meta["val"].shape, x.meta["val"].dtype) == (like.shape, like.dtype):
            yield from _summands(x, like) if x.target is aten.add.Tensor else (x,)


def _product(node: Any) -> Node | None:
    """Return the matrix product behind `node`, through reshapes and casts, if nothing else reads it; else None."""
    while node.target in (cast, *RESHAPES) and len(node.users) == 1:
        node = node.args[0]
    return node if node.target is aten.mm.default and len(node.users) == 1 else None
