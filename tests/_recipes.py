"""What random programs are made of: recipes that write statements in the spellings that people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests._attention_recipes import attention
from tests._builder import WIDTH, B, Builder, Dims, Value, product

# Products


def _fixed(x: Value) -> bool:
    """The last dimension is a number."""
    return bool(x.dims) and isinstance(x.dims[-1], int)


def _all_fixed(dims: Dims) -> bool:
    return all(isinstance(size, int) for size in dims)


def linear(p: Builder) -> None:
    x = p.pick()
    if x is None or not _fixed(x):
        return
    after = p.one_of(WIDTH, WIDTH, 6)
    text = product(p, x.name, x.dims[-1], after, p.draw(st.booleans()))
    p.emit(text, (*x.dims[:-1], after))


def flat_linear(p: Builder) -> None:
    x = p.pick(B, p.seq, None)
    if x is not None and _fixed(x):
        flat = p.let(f"{x}.reshape(-1, {x.dims[-1]})")
        w, b = p.weight(x.dims[-1], WIDTH), p.weight(WIDTH)
        made = p.let(p.one_of(f"torch.addmm({b}, {flat}, {w})", f"torch.mm({flat}, {w}) + {b}"))
        p.emit(f"{made}.view({x}.shape[0], {p.length}, {WIDTH})", (B, p.seq, WIDTH))


def parallel_linears(p: Builder) -> None:
    x = p.pick(B, p.seq, None)
    if x is not None and _fixed(x):
        for _ in range(p.one_of(2, 3)):
            after = p.one_of(WIDTH, 4)
            text = product(p, x.name, x.dims[-1], after, p.draw(st.booleans()))
            p.emit(text, (B, p.seq, after))


def matmul(p: Builder) -> None:
    x = p.pick(B, p.seq, None)
    y = p.pick(B, p.seq, x.dims[-1]) if x is not None else None
    if x is not None and y is not None:
        text = p.one_of(
            f"torch.bmm({x}, {y}.transpose(1, 2))", f"{x} @ {y}.mT", f'torch.einsum("bid,bjd->bij", {x}, {y})'
        )
        p.emit(text, (B, p.seq, p.seq))


def residual(p: Builder) -> None:
    x = p.pick(B, p.seq, WIDTH)
    if x is not None:
        made = p.let(product(p, x.name, WIDTH, WIDTH, True))
        p.emit(p.one_of(f"{x} + {made}", f"{made} + {x}", f"torch.add({made}, {x})"), x.dims)


def gated_mlp(p: Builder) -> None:
    x = p.pick(B, p.seq, WIDTH)
    if x is None:
        return
    bias, act = p.draw(st.booleans()), p.one_of("F.silu", "F.gelu", "F.relu", "torch.sigmoid")
    if p.draw(st.booleans()):
        gate, up = (p.let(product(p, x.name, WIDTH, 6, bias)) for _ in range(2))
    else:
        both = p.let(product(p, x.name, WIDTH, 12, bias))
        gate, up = p.let(f"{both}[..., :6]"), p.let(f"{both}[..., 6:]")
    inner = p.let(p.one_of(f"{act}({gate}) * {up}", f"{up} * {act}({gate})"))
    p.emit(product(p, inner, 6, WIDTH, bias), x.dims)


# Norms


def norm(p: Builder) -> None:
    x = p.pick()
    if x is None or not _fixed(x) or x.dims[-1] == 1:
        return
    d = x.dims[-1]
    w, b = p.weight(d), p.weight(d)
    mean, inverse = f"{x}.mean(-1, keepdim=True)", f"torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-6)"
    text = p.one_of(
        f"F.layer_norm({x}, ({d},), {w}, {b}, 1e-5)",
        f"F.layer_norm({x}, ({d},))",
        f"({x} - {mean}) / torch.sqrt({x}.var(-1, keepdim=True, unbiased=False) + 1e-5) * {w}",
        f"({x} - {mean}) / ({x}.std(-1, keepdim=True) + 1e-5) * {w} + {b}",
        f"F.rms_norm({x}, ({d},), {w}, 1e-6)",
        f"{w} * ({x} * {inverse})",
        f"({x}.float() * {inverse.replace(str(x), f'{x}.float()')}).to(DTYPE) * (1 + {w})",
        f"{x} / torch.sqrt(({x} * {x}).mean(-1, keepdim=True) + 1e-5) * {w}",
        f"F.normalize({x}, dim=-1)",
        f"{x} / {x}.norm(dim=-1, keepdim=True).clamp(min=1e-6)",
    )
    p.emit(text, x.dims)


def residual_norm(p: Builder) -> None:
    x, y = p.pick(B, p.seq, WIDTH), p.pick(B, p.seq, WIDTH)
    if x is not None and y is not None:
        total = p.emit(f"{x} + {y}", x.dims)
        w, b = p.weight(WIDTH), p.weight(WIDTH)
        layer = f"F.layer_norm({total}, ({WIDTH},), {w}, {b}, 1e-5)"
        rms = f"{w} * ({total} * torch.rsqrt({total}.pow(2).mean(-1, keepdim=True) + 1e-6))"
        p.emit(p.one_of(layer, rms), x.dims)


# Pointwise


def activation(p: Builder) -> None:
    x = p.pick()
    if x is not None:
        text = p.one_of(
            f"F.gelu({x})",
            f'F.gelu({x}, approximate="tanh")',
            f"0.5 * {x} * (1 + torch.tanh(0.7978845608028654 * ({x} + 0.044715 * {x} ** 3)))",
            f"{x} * 0.5 * (1.0 + torch.erf({x} / 1.4142135623730951))",
            f"F.silu({x})",
            f"{x} * torch.sigmoid({x})",
            f"{x} * torch.sigmoid(1.702 * {x})",
            f"{x} * torch.tanh(F.softplus({x}))",
            f"F.hardswish({x})",
            f"{x} * F.relu6({x} + 3) / 6",
            f"torch.relu({x})",
            f"{x}.clamp(min=0)",
            f"torch.relu({x}) ** 2",
            f"torch.tanh({x})",
            f"F.elu({x})",
            f"F.leaky_relu({x}, 0.1)",
            f"torch.log1p(torch.exp({x}))",
        )
        p.emit(text, x.dims)


def pointwise(p: Builder) -> None:
    x = p.pick()
    if x is not None:
        text = p.one_of(
            f"{x} * 0.125",
            f"{x} / 3",
            f"1 - {x}",
            f"-{x}",
            f"{x}.abs()",
            f"{x}.square()",
            f"torch.sqrt({x}.abs() + 0.1)",
            f"torch.exp({x}.clamp(-3, 3))",
            f"1 / ({x}.abs() + 1)",
            f"torch.sin({x})",
        )
        p.emit(text, x.dims)


def identity(p: Builder) -> None:
    x = p.pick()
    if x is not None:
        text = p.one_of(
            f"{x} + 0",
            f"{x} * 1",
            f"{x} / 1",
            f"{x} - 0.0",
            f"-(-{x})",
            f"{x} * 2 / 2",
            f"{x} ** 1",
            f"F.dropout({x}, 0.5, training=False)",
            f"{x}.to({x}.dtype)",
            f"{x}.double().to(DTYPE)",
            f"{x}.bfloat16().to(DTYPE)",
            f"{x}.contiguous()",
            f"{x}.clone()",
            f"{x} * torch.ones_like({x})",
            f"{x} + torch.zeros_like({x})",
            f"{x}.expand_as({x})",
            f"{x}.reshape({x}.shape)",
            f"{x}.unsqueeze(0).squeeze(0)",
            f"torch.cat([{x}], 0)",
        )
        p.emit(text, x.dims)


def binary(p: Builder) -> None:
    x = p.pick()
    if x is None or not x.dims:
        return
    y: Any = p.pick(*x.dims)
    if _fixed(x) and p.draw(st.booleans()):
        y = p.weight(x.dims[-1])
    text = p.one_of(
        f"{x} + {y}",
        f"{x} - {y}",
        f"{y} - {x}",
        f"{x} * {y}",
        f"{x} / ({y}.abs() + 0.5)",
        f"torch.maximum({x}, {y})",
        f"torch.add({x}, {y}, alpha=2)",
    )
    p.emit(text, x.dims)


# Views


def view(p: Builder) -> None:
    x = p.pick()
    if x is None or len(x.dims) < 2:
        return
    d = x.dims
    choices = [
        (f"{x}.transpose(-1, -2)", (*d[:-2], d[-1], d[-2])),
        (f"{x}.transpose(-1, -2).contiguous().transpose(-1, -2)", d),
        (f"{x}.unsqueeze(1)", (d[0], 1, *d[1:])),
        (f"torch.flip({x}, (-1,))", d),
        (f"{x}.roll(1, -2)", d),
    ]
    if _fixed(x) and d[-1] != 1:
        choices += [
            (f"{x}[..., 1:]", (*d[:-1], d[-1] - 1)),
            (f"{x}[..., ::2]", (*d[:-1], (d[-1] + 1) // 2)),
            (f"{x}[..., -1]", d[:-1]),
            (f"torch.cat([{x}, {x}], dim=-1)", (*d[:-1], 2 * d[-1])),
            (f"torch.stack([{x}, -{x}], dim=-1).flatten(-2)", (*d[:-1], 2 * d[-1])),
        ]
        if d[-1] % 2 == 0:
            half = d[-1] // 2
            choices += [
                (f"{x}.unflatten(-1, (2, {half}))", (*d[:-1], 2, half)),
                (f"torch.cat({x}.chunk(2, dim=-1)[::-1], dim=-1)", d),
                (f"{x}.split({half}, dim=-1)[1]", (*d[:-1], half)),
            ]
    if len(d) > 2 and _all_fixed(d[1:]):
        size = d[1] * d[2]
        choices += [
            (f"{x}.flatten(1, 2)", (d[0], size, *d[3:])),
            (f"{x}.permute({', '.join(map(str, (0, *range(len(d) - 1, 0, -1))))})", (d[0], *d[:0:-1])),
            (f"{x}[:, 0]", (d[0], *d[2:])),
            (f"{x}.unbind(1)[-1]", (d[0], *d[2:])),
        ]
    if 1 in d[1:]:
        place = d.index(1, 1)
        choices.append((f"{x}.squeeze({place})", (*d[:place], *d[place + 1 :])))
    text, dims = p.one_of(*choices)
    p.emit(text, dims)


def reduction(p: Builder) -> None:
    x = p.pick()
    if x is not None and len(x.dims) > 1 and _fixed(x):
        kept = (*x.dims[:-1], 1)
        text, dims = p.one_of(
            (f"{x}.mean(-1, keepdim=True)", kept),
            (f"{x}.sum(-1)", kept[:-1]),
            (f"{x}.amax(-1)", kept[:-1]),
            (f"torch.logsumexp({x}, -1)", kept[:-1]),
            (f"{x}.cumsum(-1)", x.dims),
            (f"{x} - {x}.mean(-1, keepdim=True)", x.dims),
            (f"F.softmax({x}, dim=-1)", x.dims),
            (f"F.log_softmax({x}, dim=-1)", x.dims),
            (f"torch.exp({x} - {x}.amax(-1, keepdim=True))", x.dims),
        )
        p.emit(text, dims)


def repeat(p: Builder) -> None:
    """The same statement again: a common subexpression."""
    single = [(name, text) for name, text in p.lines if any(value.name == name for value in p.values)]
    if single:
        name, text = p.draw(st.sampled_from(single))
        old = next(value for value in p.values if value.name == name)
        p.emit(text, old.dims, old.kind)


# Convolutions, lookups, masks


def convolution(p: Builder) -> None:
    x = p.pick(B, None, None, None)
    if x is None or not _all_fixed(x.dims[1:]) or min(x.dims[2:]) < 3:
        return
    after, groups = p.one_of((4, 1), (6, 1), (x.dims[1], x.dims[1]))
    size = p.one_of(1, 3)
    pad = p.one_of(0, size // 2)
    w = p.weight(after, x.dims[1] // groups, size, size)
    b = p.one_of("None", p.weight(after))
    less = size - 1 - 2 * pad
    dims = (B, after, x.dims[2] - less, x.dims[3] - less)
    made = p.emit(f"F.conv2d({x}, {w}, {b}, padding={pad}, groups={groups})", dims)
    stats = ", ".join(p.weight(after) for _ in range(4))
    text = p.one_of(
        f"F.batch_norm({made}, {stats})",
        f"torch.relu(F.batch_norm({made}, {stats}))",
        f"F.group_norm({made}, 2)",
        f"F.silu(F.group_norm({made}, 2, {p.weight(after)}, {p.weight(after)}))"
        if after % 2 == 0
        else f"{made}",
        f"F.max_pool2d({made}, 3, 1, 1)",
        f"{made} * F.adaptive_avg_pool2d({made}, 1).sigmoid()",
    )
    if "group_norm" not in text or after % 2 == 0:
        p.emit(text, dims)


def lookup(p: Builder) -> None:
    ids = p.pick(B, p.seq, kind="int")
    if ids is None:
        return
    words, places = p.weight(7, WIDTH), p.weight(9, WIDTH)
    text = f"F.embedding({ids}, {words})"
    text = p.one_of(
        text,
        f"{text} * 8**0.5",
        f"{text} + F.embedding(torch.arange({ids}.shape[1]), {places})",
        f"F.layer_norm({text} + {places}[:{p.length}], ({WIDTH},), {p.weight(WIDTH)}, {p.weight(WIDTH)})",
    )
    p.emit(text, (B, p.seq, WIDTH))


def integer(p: Builder) -> None:
    ids, mask = p.pick(B, p.seq, kind="int"), p.pick(B, p.seq, kind="bool")
    if mask is not None:
        p.emit(
            p.one_of(f"{mask}.long().cumsum(-1)", f"{mask}.sum(-1, keepdim=True) - {mask}.long()"),
            (B, p.seq),
            "int",
        )
        p.emit(
            p.one_of(f"~{mask}", f"{mask} & {mask}", f"{mask} | ~{mask}", f"{mask}.long().bool()"),
            (B, p.seq),
            "bool",
        )
    if ids is not None:
        p.emit(
            p.one_of(f"{ids} * 1", f"({ids} + 1) % 7", f"{ids} // 2", f"{ids}.clamp(0, 6)"), (B, p.seq), "int"
        )
        p.emit(p.one_of(f"{ids} > 3", f"{ids} != 0", f"{ids} == {ids}"), (B, p.seq), "bool")


def masked(p: Builder) -> None:
    x, mask = p.pick(B, p.seq, None), p.pick(B, p.seq, kind="bool")
    if x is None or mask is None:
        return
    each = f"{mask}.unsqueeze(-1)"
    text, dims = p.one_of(
        (f"{x}.masked_fill({each}, 0.0)", x.dims),
        (f"torch.where({each}, {x}, -{x})", x.dims),
        (f"{x} * {each}.to({x}.dtype)", x.dims),
        (f"({x} * {each}).sum(1) / {each}.sum(1).clamp(min=1)", (B, x.dims[-1])),
    )
    p.emit(text, dims)


RECIPES: tuple[Callable[[Builder], None], ...] = (
    linear,
    flat_linear,
    parallel_linears,
    matmul,
    residual,
    gated_mlp,
    norm,
    residual_norm,
    activation,
    pointwise,
    identity,
    binary,
    view,
    reduction,
    repeat,
    attention,
    convolution,
    lookup,
    integer,
    masked,
)
