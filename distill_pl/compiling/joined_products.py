"""Of what torch.compile was given: matrix products that share a factor, and those that are only added up, are made one.

    forward     x W_i^T           q, k, v and whatever else reads x: x [W_1; W_2; ..]^T, and its columns
    backward    sum_i dy_i W_i    [dy_1 dy_2 ..] [W_1; W_2; ..]: the sum is the product's own, in fp32
                dy_i^T x          [dy_1 dy_2 ..]^T x, and its rows

Fewer products fill a GPU better, and what several would write to be read and added up is written once. Gradients of weights
leave their product in fp32, as the weights have them, rather than in bf16 to be cast.

A product that is added to a sum worked out for it alone, as an MLP's is, adds to it: nobody writes it to read it again.

What makes the dy_i writes them where they are to lie. So can an operator of our own, tagged flexible_layout, whose last
arguments are `width` and `starts`, 0 and [] in the graph given: its result i, [B, T, ..], becomes the columns from starts[i]
on, if that is not -1, of its last result, [B, T, width]. `even_rows` to `where_to` are for such operators.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten, cast = torch.ops.aten, torch.ops.prims.convert_element_type.default
RESHAPES = (aten.reshape.default, aten.view.default)
WIDTH = 64  # parts are padded to a multiple of this: rows of 128 bytes, as inductor would pad them, but without gaps between


@torch.library.custom_op("distill_pl::side_by_side", mutates_args=())
def side_by_side(parts: list[Tensor]) -> Tensor:
    """[N, X_i] -> [N, sum of X_i]."""
    return torch.cat(parts, 1)


@side_by_side.register_fake
def _(parts):
    return torch.cat(parts, 1)


@torch.library.custom_op("distill_pl::fill_in", mutates_args=())
def fill_in(whole: Tensor, parts: list[Tensor], starts: list[int]) -> Tensor:
    """`whole` [N, width] with parts [N, X_i] in the columns from `starts` on. Inductor writes them into it."""
    whole = whole.clone()
    for part, start in zip(parts, starts, strict=True):
        whole[:, start : start + part.shape[1]] = part
    return whole


@fill_in.register_fake
def _(whole, parts, starts):
    return torch.empty_like(whole)


@torch.library.custom_op("distill_pl::add_product", mutates_args=())
def add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """[N, X] + [N, K] [K, X]."""
    return torch.addmm(total, x, weight)


@add_product.register_fake
def _(total, x, weight):
    return torch.empty_like(total)


library = torch.library.Library("distill_pl", "FRAGMENT")  # less Python around every call than a custom_op has
library.define("add_product_(Tensor(a!) total, Tensor x, Tensor weight) -> ()", tags=(torch.Tag.flexible_layout,))


@torch.library.impl(library, "add_product_", "CompositeExplicitAutograd")
def _(total, x, weight):
    """In place."""
    total.addmm_(x, weight)


def even_rows(*tensors: Tensor) -> list[Tensor]:
    """[B, T, H, X], copied unless the H X numbers of a token lie together and tokens evenly, as in columns of a product."""
    even = ((x.stride(1) * x.shape[1], x.shape[3], 1) == (x.stride(0), *x.stride()[2:]) for x in tensors)
    return [x if so else x.contiguous() for x, so in zip(tensors, even, strict=True)]


def token_steps(*tensors: Tensor) -> list[int]:
    """Of such, from a token to the next."""
    return [x.shape[2] * x.shape[3] if x.is_contiguous() else x.stride(1) for x in tensors]


def results(inputs: Sequence[Tensor], width: int, starts: Sequence[int]) -> list[Tensor]:
    """Of such an operator, unfilled: the gradients of `inputs` [B, T, ..], empty where they have a start, and the whole."""
    starts = [*starts, *[-1] * len(inputs)]
    apart = [x.new_empty(x.shape if start < 0 else 0) for x, start in zip(inputs, starts, strict=False)]
    return [*apart, inputs[0].new_empty(*inputs[0].shape[:2], width)]


def where_to(filled: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    """Where each gradient belongs: one of `results`, or columns of the last."""
    places = list(filled[: len(inputs)])
    for i, start in enumerate(starts):
        if start >= 0:
            shape = inputs[i].shape[2:]
            places[i] = filled[-1][..., start : start + shape.numel()].unflatten(-1, shape)
    return places


class JoinProducts(CustomGraphPass):
    """Inductor's pass over a forward or a backward graph, before it looks for patterns of its own."""

    def __call__(self, graph: Graph) -> None:
        """In place."""
        from torch._inductor.ir import ConcatKernel, FallbackKernel, TensorBox
        from torch._inductor.lowering import lowerings, register_lowering

        if side_by_side._opoverload not in lowerings:  # inductor's `cat` may work out all parts for each element of the whole

            @register_lowering(side_by_side._opoverload, type_promotion_kind=None)
            def _(parts):
                return TensorBox(ConcatKernel.create(parts, 1))

            @register_lowering(fill_in._opoverload, type_promotion_kind=None)
            def _(whole, parts, starts):
                for part, start in zip(parts, starts, strict=True):
                    columns = lowerings[aten.slice.Tensor](whole, 1, start, start + part.get_size()[1])
                    lowerings[aten.copy_.default](columns, part)
                return whole

            @register_lowering(add_product._opoverload, type_promotion_kind=None)
            def _(total, x, weight):
                total = lowerings[aten.clone.default](total)
                total.realize()
                FallbackKernel.create(torch.ops.distill_pl.add_product_.default, total, x, weight)
                return total

        join_products(graph)

    def uuid(self) -> Any:
        """Of what inductor kept of earlier runs, nothing that another version made counts."""
        return get_hash_for_files((__file__,))


def join_products(graph: Graph) -> None:
    """In place."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    _join_forward(graph)
    beside: dict[tuple[Node, ...], Node] = {}  # the same gradients are joined once
    _join_sums(graph, beside)
    _join_gradients(graph, beside)
    _add_to_sums(graph)
    stable_topological_sort(graph)
    graph.eliminate_dead_code()


def _join_forward(graph: Graph) -> None:
    """x W_i^T, or that and a bias."""
    for x, members in _sharing(graph, (aten.mm.default, aten.addmm.default), 0, _reads_weight):
        if len(members) > 1:
            with graph.inserting_before(members[0]):
                weights = [_transposed(_factors(product)[1]) for product in members]
                weight = _call(graph, aten.cat.default, [_wide(graph, own, 0) for own in weights])
                factors = x, _call(graph, aten.permute.default, weight, [1, 0])
                bias = _bias(graph, members)
                product = _call(graph, aten.addmm.default, bias, *factors) if bias else _call(graph, aten.mm.default, *factors)
                for member, part in zip(members, _cut(graph, members, product, 1), strict=True):
                    member.replace_all_uses_with(part)
                for member, own, part in zip(members, weights, _cut(graph, weights, weight, 0), strict=True):
                    if own.target is cast:  # then what is kept of it is part of the joined one, not another cast
                        _factors(member)[1].replace_all_uses_with(_call(graph, aten.permute.default, part, [1, 0]))


def _bias(graph: Graph, members: list[Node]) -> Node | None:
    """What is added to the joined product: zeros but for the parts that have a bias; None if none has."""
    *starts, end = _edges(members, 1)
    bias = None
    for product, start in zip(members, starts, strict=True):
        if product.target is aten.addmm.default:
            around = [start, end - start - product.meta["val"].shape[1]]
            wide = _call(graph, aten.constant_pad_nd.default, product.args[0], around)
            bias = _call(graph, aten.add.Tensor, bias, wide) if bias else wide
    return bias


def _join_sums(graph: Graph, beside: dict[tuple[Node, ...], Node]) -> None:
    """sum_i dy_i W_i."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if len(total.users) == 1 and next(iter(total.users)).target is aten.add.Tensor:
            continue  # a part of another
        summands = {product: leaf for leaf in _summands(total, total.meta["val"]) if (product := _product(leaf))}
        products = sorted(summands, key=lambda product: places.get(product, -1))
        if len(products) > 1 and len({(x.meta["val"].shape, x.meta["val"].dtype) for x in products}) == 1:
            dy, weights = zip(*(product.args for product in products), strict=True)
            with graph.inserting_before(products[-1]):
                weight = _call(graph, aten.cat.default, [_wide(graph, x, 0) for x in weights])
                joined = _call(graph, aten.mm.default, _join(graph, dy, beside), weight)
            products[-1].replace_all_uses_with(joined)
            for product in products[:-1]:
                (add,) = summands[product].users
                other: Any = add.args[1] if add.args[0] is summands[product] else add.args[0]
                add.replace_all_uses_with(other)
                graph.erase_node(add)


def _join_gradients(graph: Graph, beside: dict[tuple[Node, ...], Node]) -> None:
    """dy_i^T x, of weights."""
    for x, members in _sharing(graph, (aten.mm.default,), 1, _is_gradient):
        dy = [_transposed(product.args[0]) for product in members]
        casts: list[Any] = [user for product in members for user in product.users if _to_fp32(user)]
        fp32 = x.meta["val"].is_cuda and len(casts) == sum(len(product.users) for product in members)
        if len(members) > 1 or fp32:
            with graph.inserting_before(members[-1]):  # and not at the end, until when dy and x would be kept
                factors = _call(graph, aten.permute.default, _join(graph, dy, beside), [1, 0]), x
                target, dtype = (aten.mm.dtype, (torch.float32,)) if fp32 else (aten.mm.default, ())
                product = _call(graph, target, *factors, *dtype)
                for member, part in zip(members, _cut(graph, members, product, 0), strict=True):
                    member.replace_all_uses_with(part)
            if fp32:
                for node in casts:
                    node.replace_all_uses_with(node.args[0])


def _add_to_sums(graph: Graph) -> None:
    """a + b + x W^T."""
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        shape, dtype = total.meta["val"].shape, total.meta["val"].dtype
        for summand, other in (total.args, total.args[::-1]) if not total.kwargs else ():
            summed = isinstance(summand, Node) and isinstance(other, Node) and other.target is aten.add.Tensor
            product = _product(summand) if summed and other.meta["val"].shape == shape else None
            if product and product.meta["val"].dtype == other.meta["val"].dtype == dtype:
                with graph.inserting_before(total):
                    rows = _call(graph, aten.reshape.default, other, list(product.meta["val"].shape))
                    added = _call(graph, add_product._opoverload, rows, *product.args)
                    total.replace_all_uses_with(_call(graph, aten.reshape.default, added, list(shape)))
                break


def _call(graph: Graph, target: Callable, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda argument: argument.meta["val"]))
    return node


def _wide(graph: Graph, x: Node, dim: int) -> Node:
    """With zeros up to a multiple of WIDTH; x has two dimensions."""
    missing = -x.meta["val"].shape[dim] % WIDTH
    return _call(graph, aten.constant_pad_nd.default, x, [0, 0, 0, missing] if dim == 0 else [0, missing]) if missing else x


def _join(graph: Graph, parts: Any, beside: dict[tuple[Node, ...], Node]) -> Node:
    """[N, X_i] side by side, or the only one as it is."""
    if len(parts) == 1:
        return parts[0]
    if (key := tuple(parts)) not in beside:
        wide = [_wide(graph, x, 1) for x in parts]
        beside[key] = _filled_in(graph, wide) or _call(graph, side_by_side._opoverload, wide)
    return beside[key]


def _filled_in(graph: Graph, parts: list[Node]) -> Node | None:
    """`parts` side by side, by the operator that makes some of them; None if none can."""
    *starts, width = accumulate((x.meta["val"].shape[1] for x in parts), initial=0)
    made = [(result, start) for x, start in zip(parts, starts, strict=True) if (result := _result(x))]
    if not made:
        return None
    maker: Any = made[0][0].args[0]
    made = [(result, start) for result, start in made if result.args[0] is maker]
    columns = {result.args[1]: start for result, start in made}
    maker.args = *maker.args[:-2], width, [columns.get(i, -1) for i in range(max(columns) + 1)]
    maker.meta["val"] = maker.target(*map_arg(maker.args, lambda x: x.meta["val"]))
    with graph.inserting_after(maker):
        whole = _call(graph, operator.getitem, maker, len(maker.meta["val"]) - 1)
    with graph.inserting_after(whole):
        whole = _call(graph, aten.reshape.default, whole, [-1, width])
    for result, start in made:
        shape = result.meta["val"].shape
        with graph.inserting_after(whole):
            part = _call(graph, aten.slice.Tensor, whole, 1, start, start + shape[2:].numel())
        with graph.inserting_after(part):
            result.replace_all_uses_with(_call(graph, aten.reshape.default, part, list(shape)))
        graph.erase_node(result)
    rest = [(x, start) for x, start in zip(parts, starts, strict=True) if start not in columns.values()]
    return _call(graph, fill_in._opoverload, whole, *map(list, zip(*rest, strict=True))) if rest else whole


def _result(part: Any) -> Any:
    """Which result of an operator that can write it elsewhere this is, [B, T, ..] as [B T, X]; None if it is none."""
    rows, width = part.meta["val"].shape
    while part.target in RESHAPES:
        part = part.args[0]
    if part.target is operator.getitem and isinstance(part.args[0].target, OpOverload):
        maker, shape = part.args[0], part.meta["val"].shape
        able = torch.Tag.flexible_layout in maker.target.tags and maker.target._schema.arguments[-1].name == "starts"
        if able and not maker.args[-1] and (shape[:2].numel(), shape[2:].numel()) == (rows, width):
            return part
    return None


def _edges(members: list[Node], dim: int) -> list[int]:
    """Where in a joined product each of `members` starts, and where the last ends, padded."""
    sizes = (node.meta["val"].shape[dim] for node in members)
    return list(accumulate((size + -size % WIDTH for size in sizes), initial=0))


def _cut(graph: Graph, members: list[Node], joined: Node, dim: int) -> list[Node]:
    """The part of `joined` that each of `members` is."""
    return [
        _call(graph, aten.slice.Tensor, joined, dim, start, start + node.meta["val"].shape[dim])
        for node, start in zip(members, _edges(members, dim)[:-1], strict=True)
    ]


def _factors(product: Any) -> tuple[Any, Any]:
    """Of mm, or of addmm, which has the bias before them."""
    return product.args[-2:]


def _sharing(graph: Graph, targets: tuple, factor: int, wanted: Callable[[Node], bool]) -> Iterator[tuple[Any, list[Node]]]:
    """Products of which this factor is the same, reshaped once or each time anew; in their order."""
    found: dict[tuple, list[Node]] = {}
    for product in graph.nodes:
        if product.target in targets and not product.kwargs and wanted(product):
            x = _factors(product)[factor]
            source = x.args[0] if x.target in RESHAPES else x
            found.setdefault((source, x.meta["val"].shape), []).append(product)
    return ((_factors(members[0])[factor], members) for members in found.values())


def _transposed(node: Any) -> Any:
    """What this is the transpose of; None if it is not one."""
    return node.args[0] if node.target is aten.permute.default and node.args[1] == [1, 0] else None


def _reads_weight(product: Node) -> bool:
    """Whether it is x W^T, W an input of the graph, or cast from one."""
    weight = _transposed(_factors(product)[1])
    return weight is not None and (weight.args[0] if weight.target is cast else weight).op == "placeholder"


def _is_gradient(product: Node) -> bool:
    """Whether it is dy^T x, and a result of the graph, as it is or cast."""
    results = [user for node in product.users for user in (node.users if node.target is cast else [node])]
    return _transposed(product.args[0]) is not None and all(user.op == "output" for user in results)


def _to_fp32(node: Node) -> bool:
    return node.target is cast and node.args[1] == torch.float32


def _summands(node: Node, like: Tensor) -> Iterator[Node]:
    """What is added up, unweighted, and read by nobody else, where all is like `like`."""
    for x in node.args if not node.kwargs else ():
        if isinstance(x, Node) and len(x.users) == 1 and (x.meta["val"].shape, x.meta["val"].dtype) == (like.shape, like.dtype):
            yield from _summands(x, like) if x.target is aten.add.Tensor else (x,)


def _product(node: Any) -> Node | None:
    """The product that this is, reshaped or cast or not."""
    while node.target in (cast, *RESHAPES) and len(node.users) == 1:
        node = node.args[0]
    return node if node.target is aten.mm.default and len(node.users) == 1 else None
