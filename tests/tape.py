"""Reverse-mode differentiation of float64 NumPy, for models written a second time in tests: values and every gradient.

A `Number` remembers how it was made; `gradients` walks back from a sum. Few operations, each with its derivative beside it, and
nothing of JAX or of ours: an oracle that shares no code with what it judges.
"""

from __future__ import annotations

import math

import numpy as np


class Number:
    """An array, and how to send a gradient back to what it was made of."""

    def __init__(self, value, parents=(), back=None):
        self.value = np.asarray(value, np.float64)
        self.parents, self.back = parents, back

    @property
    def shape(self):
        return self.value.shape

    def __add__(self, other):
        other = number(other)
        return Number(self.value + other.value, (self, other), lambda g: (_to(g, self), _to(g, other)))

    def __sub__(self, other):
        other = number(other)
        return Number(self.value - other.value, (self, other), lambda g: (_to(g, self), _to(-g, other)))

    def __mul__(self, other):
        other = number(other)
        return Number(self.value * other.value, (self, other), lambda g: (_to(g * other.value, self), _to(g * self.value, other)))

    def __truediv__(self, other):
        other = number(other)
        return Number(
            self.value / other.value,
            (self, other),
            lambda g: (_to(g / other.value, self), _to(-g * self.value / other.value**2, other)),
        )

    def __getitem__(self, index):
        def back(g):
            whole = np.zeros(self.shape)
            np.add.at(whole, index, g)
            return (whole,)

        return Number(self.value[index], (self,), back)

    def reshape(self, *shape):
        return Number(self.value.reshape(*shape), (self,), lambda g: (g.reshape(self.shape),))

    def transpose(self, *axes):
        return Number(self.value.transpose(axes), (self,), lambda g: (g.transpose(np.argsort(axes)),))

    def sum(self, axis=None, keepdims=False):
        def back(g):
            return (np.broadcast_to(g if keepdims or axis is None else np.expand_dims(g, axis), self.shape),)

        return Number(self.value.sum(axis, keepdims=keepdims), (self,), back)

    def mean(self, axis, keepdims=False):
        total = self.sum(axis, keepdims)
        return total / (self.value.size / total.value.size)

    def of(self, function, derivative):
        """An elementwise function, given with its derivative."""
        return Number(function(self.value), (self,), lambda g: (g * derivative(self.value),))

    def sqrt(self):
        return self.of(np.sqrt, lambda x: 0.5 / np.sqrt(x))

    def exp(self):
        return self.of(np.exp, np.exp)

    def tanh(self):
        return self.of(np.tanh, lambda x: 1 - np.tanh(x) ** 2)

    def relu(self):
        return self.of(lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(np.float64))

    def gelu(self):
        inner = self * math.sqrt(2 / math.pi) + self * self * self * (0.044715 * math.sqrt(2 / math.pi))
        return self * 0.5 * (inner.tanh() + 1)

    def softmax(self):
        e = (self - self.value.max(-1, keepdims=True)).exp()
        return e / e.sum(-1, keepdims=True)

    def largest(self, axis):
        """The largest along an axis, whose gradient goes to the first of them."""
        place = np.expand_dims(self.value.argmax(axis), axis)

        def back(g):
            whole = np.zeros(self.shape)
            np.put_along_axis(whole, place, np.expand_dims(g, axis), axis)
            return (whole,)

        return Number(np.take_along_axis(self.value, place, axis).squeeze(axis), (self,), back)

    def pad(self, widths, value=0.0):
        inside = tuple(slice(a, a + n) for (a, _), n in zip(widths, self.shape, strict=True))
        return Number(np.pad(self.value, widths, constant_values=value), (self,), lambda g: (g[inside],))


def number(x) -> Number:
    return x if isinstance(x, Number) else Number(x)


def _to(gradient, of: Number):
    """The gradient of a broadcast array: summed over what was repeated."""
    g = np.asarray(gradient)
    g = g.sum(tuple(range(g.ndim - of.value.ndim)))
    return g.sum(tuple(i for i, n in enumerate(of.shape) if n == 1 and g.shape[i] != 1), keepdims=True)


def einsum(form: str, a, b) -> Number:
    a, b = number(a), number(b)
    (left, right), out = form.split("->")[0].split(","), form.split("->")[1]
    return Number(
        np.einsum(form, a.value, b.value, optimize=True),
        (a, b),
        lambda g: (
            np.einsum(f"{out},{right}->{left}", g, b.value, optimize=True),
            np.einsum(f"{out},{left}->{right}", g, a.value, optimize=True),
        ),
    )


def concatenate(parts, axis) -> Number:
    parts = [number(p) for p in parts]
    cuts = np.cumsum([p.shape[axis] for p in parts])[:-1]
    return Number(np.concatenate([p.value for p in parts], axis), tuple(parts), lambda g: tuple(np.split(g, cuts, axis)))


def gradients(total: Number, leaves: list[Number]) -> list[np.ndarray]:
    """The derivatives of a scalar by each leaf."""
    order, seen = [], set()
    stack = [(total, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack += [(node, True), *((p, False) for p in node.parents)]
    found = {id(total): np.ones(total.shape)}
    for node in reversed(order):
        if node.back is None or id(node) not in found:
            continue
        for parent, g in zip(node.parents, node.back(found[id(node)]), strict=True):
            found[id(parent)] = found[id(parent)] + g if id(parent) in found else np.asarray(g)
    return [found.get(id(leaf), np.zeros(leaf.shape)) for leaf in leaves]
