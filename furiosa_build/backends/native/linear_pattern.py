"""Products with packed weights: with bias and residual where they follow, and all products of one x in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from furiosa_build.backends.native.emission import Emission
from furiosa_build.backends.native.emit_linear import Product, emit_linear
from furiosa_build.backends.native.fusion import Fusion, aten, is_call, is_plain_sum, only_user, other_operand, shape_of
from furiosa_build.quant.ops import QUANTIZED_LINEAR


@dataclass
class _Product:
    """A product of x with a packed weight, as nodes.

    Attributes:
        nodes: What it computes; the last is its result.
    """

    x: Node
    operands: list[Node]
    scheme: str
    largest: Node | None
    nodes: list[Node]
    bias: Node | None = None
    residual: Node | None = None

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @property
    def needs(self) -> list[Node]:
        """What must be there before it, beside parameters and x."""
        return [node for node in (self.bias, self.residual, self.largest) if node is not None]

    def bind(self, emission: Emission) -> Product:
        """The product of values; its output is a matrix of its own where the node's place in memory is not one."""
        weight = emission.weight(self.operands[0])
        assert weight is not None
        # Scales and zero points of groups are matrices too, and packed.
        scale, zero = (
            None if node is None else emission.weight(node) or emission.value(node)
            for node in (*self.operands[1:], None, None)[:2]
        )
        bias, residual = (None if node is None else emission.value(node) for node in (self.bias, self.residual))
        return Product(weight, self.scheme, emission.matrix_out(self.root), scale, zero, bias, residual)


def find_products(nodes: Sequence[Node], taken: set[Node], has_weight: set[Node]) -> list[Fusion]:
    """The products of a graph. `has_weight`: what there is a packed form of."""
    order = {node: number for number, node in enumerate(nodes)}
    products: list[_Product] = []
    taken = set(taken)
    for node in nodes:
        if node not in taken and (product := _product(node, has_weight)) is not None:
            _extend(product, taken)
            taken.update(product.nodes)
            products.append(product)
    groups: list[list[_Product]] = []
    for product in sorted(products, key=lambda product: order[product.root]):
        group = next((group for group in groups if _joins(product, group, order)), None)
        if group is None:
            groups.append([product])
        else:
            group.append(product)
    return [_fusion(group) for group in groups]


def _product(node: Node, has_weight: set[Node]) -> _Product | None:
    if is_call(node, aten.linear.default):
        x, weight, bias = [*node.args, None][:3]
        if weight in has_weight:
            return _Product(x, [weight], "none", None, [node], bias)  # type: ignore[arg-type, list-item]
    if str(node.target) == QUANTIZED_LINEAR:
        given: Any = node.args
        x, operands, largest, scheme = given
        if operands[0] in has_weight:
            return _Product(x, list(operands), scheme, largest, [node])
    return None


def _extend(product: _Product, taken: set[Node]) -> None:
    """Takes up the bias and the residual that are added next."""
    if product.bias is None:
        bias = _added(product, taken)
        if bias is not None and shape_of(bias) == shape_of(product.root)[-1:]:
            product.bias = bias
            product.nodes.append(only_user(product.root))  # type: ignore[arg-type]
    residual = _added(product, taken)
    if residual is not None and shape_of(residual) == shape_of(product.root):
        product.residual = residual
        product.nodes.append(only_user(product.root))  # type: ignore[arg-type]


def _added(product: _Product, taken: set[Node]) -> Node | None:
    """What is added to the product, and to nothing else."""
    user = only_user(product.root)
    if user is None or user in taken or not is_plain_sum(user):
        return None
    other = other_operand(user, product.root)
    return other if isinstance(other, Node) and other.meta["val"].dtype.is_floating_point else None


def _joins(product: _Product, group: list[_Product], order: dict[Node, int]) -> bool:
    """Whether a product can be computed where the first of a group is."""
    first = group[0]
    begin = order[first.root]
    return (
        (product.x, product.largest) == (first.x, first.largest)
        and all(order.get(node, -1) < begin for node in product.needs)
        and first.root not in product.needs
    )


def _fusion(group: list[_Product]) -> Fusion:
    first = group[0]

    def emit(emission: Emission) -> None:
        largest = None if first.largest is None else emission.value(first.largest)
        emit_linear(emission.builder, emission.value(first.x), [one.bind(emission) for one in group], largest)
        for one in group:
            emission.settle(one.root)

    return Fusion(first.root, frozenset(node for one in group for node in one.nodes), emit)
