"""Attention in random programs, in one of the spellings that people use."""

from __future__ import annotations

from hypothesis import strategies as st

from tests._builder import HEAD, HEADS, WIDTH, B, Builder, S, product


def attention(p: Builder) -> None:
    x = p.pick(B, p.seq, WIDTH)
    if x is None:
        return
    y = p.pick(B, p.seq, WIDTH) if p.draw(st.booleans()) else x
    sources, bias = (x, y, y), p.draw(st.booleans())
    heads = p.one_of("apart", "packed", "grouped")
    if heads == "apart":
        q, k, v = (_heads(p, p.let(product(p, str(s), WIDTH, WIDTH, bias))) for s in sources)
    elif heads == "grouped":
        q = _heads(p, p.let(product(p, str(x), WIDTH, WIDTH, bias)))
        k, v = (_one_head(p, p.let(product(p, str(y), WIDTH, HEAD, bias))) for _ in range(2))
    else:
        packed = p.let(product(p, str(x), WIDTH, 3 * WIDTH, bias))
        q, k, v = (_heads(p, p.let(f"{packed}.split({WIDTH}, dim=-1)[{i}]")) for i in range(3))
    if p.draw(st.booleans()):
        q, k = rotated(p, q, k)
    made = p.let(_sdpa(p, q, k, v) if p.draw(st.booleans()) else _spelled(p, q, k, v))
    back = p.one_of(f"{made}.transpose(1, 2)", f"{made}.permute(0, 2, 1, 3).contiguous()")
    merged = p.one_of(f"{back}.reshape({x}.shape[0], {p.length}, {WIDTH})", f"{back}.flatten(2)")
    p.emit(product(p, p.let(merged), WIDTH, WIDTH, bias), (B, p.seq, WIDTH))


def _heads(p: Builder, x: str) -> str:
    split = p.one_of(
        f"{x}.view({x}.shape[0], {p.length}, {HEADS}, {HEAD})",
        f"{x}.reshape(-1, {p.length}, {HEADS}, {HEAD})",
        f"{x}.unflatten(-1, ({HEADS}, {HEAD}))",
    )
    return p.let(p.one_of(f"{split}.transpose(1, 2)", f"{split}.permute(0, 2, 1, 3)"))


def _one_head(p: Builder, x: str) -> str:
    """One head of keys or values for all heads of queries."""
    one = p.let(f"{x}.view({x}.shape[0], {p.length}, 1, {HEAD}).transpose(1, 2)")
    grouped = f"{one}[:, :, None].expand(-1, -1, {HEADS}, -1, -1)"
    repeated = f"{grouped}.reshape({x}.shape[0], {HEADS}, {p.length}, {HEAD})"
    return p.let(
        p.one_of(repeated, f"{one}.expand(-1, {HEADS}, -1, -1)", f"{one}.repeat_interleave({HEADS}, 1)")
    )


def rotated(p: Builder, q: str, k: str) -> tuple[str, str]:
    """Rotary positions, halves or neighbours in pairs."""
    angle = p.constant(f"torch.outer(torch.arange({p.length}), torch.tensor([1.0, 0.1])).to(DTYPE)")
    if p.draw(st.booleans()):
        table = p.let(f"torch.cat([{angle}, {angle}], -1)")
        cos, sin = p.let(f"{table}.cos()"), p.let(f"{table}.sin()")

        def turn(t: str) -> str:
            other = p.one_of(
                f"torch.cat([-{t}[..., 2:], {t}[..., :2]], -1)",
                f"torch.cat([{t}.chunk(2, -1)[1].neg(), {t}.chunk(2, -1)[0]], dim=-1)",
            )
            return p.let(f"{t} * {cos} + {other} * {sin}")
    else:
        cos, sin = p.let(f"{angle}.cos()"), p.let(f"{angle}.sin()")

        def turn(t: str) -> str:
            even, odd = p.let(f"{t}[..., ::2]"), p.let(f"{t}[..., 1::2]")
            pair = f"[{even} * {cos} - {odd} * {sin}, {even} * {sin} + {odd} * {cos}]"
            return p.let(f"torch.stack({pair}, dim=-1).flatten(-2)")

    return turn(q), turn(k)


def _causal(p: Builder) -> str:
    return p.constant(f"torch.ones({p.length}, {p.length}, dtype=torch.bool).tril()")


def _key_mask(p: Builder) -> str | None:
    mask = p.pick(B, p.seq, kind="bool")
    return f"{mask}[:, None, None, :]" if mask is not None and p.draw(st.booleans()) else None


def _sdpa(p: Builder, q: str, k: str, v: str) -> str:
    mask = _key_mask(p)
    extra = p.one_of("", ", is_causal=True", ", scale=0.3")
    if mask is not None:
        floating = f"torch.where({mask}, torch.zeros((), dtype=DTYPE), torch.finfo(DTYPE).min)"
        extra = p.one_of(f", {mask}", f", attn_mask={floating}", f", {mask} & {_causal(p)}")
    return f"F.scaled_dot_product_attention({q}, {k}, {v}{extra})"


def _spelled(p: Builder, q: str, k: str, v: str) -> str:
    """Scores, scale, mask, softmax and the weighted sum, each in one of its spellings."""
    scale = p.one_of("query", "times", "over", "both", "none")
    if scale == "query":
        q = p.let(f"{q} * 0.5")
    elif scale == "both":
        q, k = p.let(f"{q} * 0.7"), p.let(f"{k} / 1.4")
    flat = p.draw(st.booleans())
    if flat:
        q, k, v = (p.let(f"{t}.reshape(-1, {p.length}, {HEAD})") for t in (q, k, v))
    scored = p.one_of(f"torch.matmul({q}, {k}.transpose(-1, -2))", f"{q} @ {k}.mT")
    if not flat:
        scored = p.one_of(scored, f'torch.einsum("bhqd,bhkd->bhqk", {q}, {k})')
    else:
        scored = p.one_of(scored, f"torch.bmm({q}, {k}.transpose(1, 2))")
    scores = p.let({"times": f"({scored}) * 0.5", "over": f"({scored}) / 2.0"}.get(scale, scored))
    if p.one_of(True, False, False):
        scores = p.let(f"torch.tanh({scores} / 5.0) * 5.0")
    if p.seq != S and not flat and p.one_of(True, False, False):
        scores = p.let(f"{scores} + {p.weight(HEADS, p.seq, p.seq)}")
    scores = _masked(p, scores, None if flat else _key_mask(p))
    shares = p.let(
        p.one_of(
            f"F.softmax({scores}, dim=-1)",
            f"torch.softmax({scores}, -1, dtype=torch.float32).to({v}.dtype)",
            f"F.dropout({scores}.softmax(-1), 0.0, training=False)",
            f"torch.exp({scores} - torch.logsumexp({scores}, -1, keepdim=True))",
        )
    )
    made = p.one_of(f"torch.matmul({shares}, {v})", f"{shares} @ {v}")
    return f"({made}).view(-1, {HEADS}, {p.length}, {HEAD})" if flat else f"({made})"


def _masked(p: Builder, scores: str, mask: str | None) -> str:
    low = p.one_of('float("-inf")', "torch.finfo(DTYPE).min", "-1e4")
    if mask is not None:
        scores = p.let(
            p.one_of(
                f"{scores}.masked_fill(~{mask}, {low})",
                f"torch.where({mask}, {scores}, {low})",
                f"{scores} + (1 - {mask}.to(DTYPE)) * -1e4",
            )
        )
    if p.draw(st.booleans()):
        causal = _causal(p)
        scores = p.let(
            p.one_of(
                f"{scores}.masked_fill(~{causal}, {low})",
                f"torch.where({causal}, {scores}, torch.full((), {low}, dtype=DTYPE))",
                f"{scores} + torch.zeros({p.length}, {p.length}, dtype=DTYPE).masked_fill(~{causal}, {low})",
            )
        )
    return scores
