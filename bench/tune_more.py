import sys, os, time
import concurrent.futures as cf, multiprocessing as mp
import torch, torch.nn.functional as F
from bench import tune_products as T
from bench.tune_products import graph, times, name
from graphopt.kernels._linear_configs import tiles, tma_tiles
from graphopt.kernels._tuning import Config
from graphopt.kernels import gated_mlp as G
from graphopt.kernels._triton import prefetched_weights
MORE = [tma_tiles(m, n, 128, w, s, sp, g, t) for (m, n, w, s) in ((128, 128, 8, 3), (128, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 3), (64, 256, 4, 2), (128, 256, 8, 2), (256, 128, 8, 2), (128, 64, 4, 4), (64, 64, 4, 6), (64, 64, 4, 4))
        for sp in (1, 2) for g in (8, 2) for t in (1,) if sp == 1 or m * n <= 128 * 128]
MORE += [tma_tiles(128, 256, 64, 8, 3, 1, g, t) for g in (1, 4, 16) for t in (1, 2)] + [tma_tiles(64, 128, 64, 4, 6, 1, g, t) for g in (2, 8) for t in (1, 2)] + [tma_tiles(128, 256, 64, 8, 4, 1, 8, t) for t in (1, 2)]
T.LARGE = MORE
GATED = [Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": g}, w, s) for (m, n, k, w, s) in ((64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 128, 64, 8, 4), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (64, 32, 128, 4, 4), (16, 64, 128, 4, 4), (16, 32, 256, 4, 3), (16, 32, 128, 4, 5), (16, 64, 64, 4, 6)) for g in (8,)]
def gname(c): t = c.tiles; return f"{t['BLOCK_M']}x{t['BLOCK_N']}x{t['BLOCK_K']} w{c.num_warps} s{c.num_stages}"
def grun(args, c):
    G.choose = lambda *a: c
    return G._launch(*args)
def gwarm(c):
    try:
        for M in (128, 1):
            x, g, u = torch.randn(M, 2048, dtype=torch.float16, device="cuda"), torch.randn(5632, 2048, dtype=torch.float16, device="cuda") / 45, torch.randn(5632, 2048, dtype=torch.float16, device="cuda") / 45
            with prefetched_weights(): out = grun((x, g, u), c)
            ref = F.silu(F.linear(x.float(), g.float())) * F.linear(x.float(), u.float())
            err = (out - ref).abs().max().item()
            if not err < 0.05: return f"WRONG {err}"
    except Exception as e: return f"{type(e).__name__} {str(e)[:100]}"
def gated(t0):
    with cf.ProcessPoolExecutor(14, mp_context=mp.get_context("spawn")) as pool:
        bad = dict(zip(map(gname, GATED), pool.map(gwarm, GATED)))
    for k, v in bad.items():
        if v: print("bad", k, v)
    for M in (1, 16, 128, 1024, 4096):
        R = 16 if M < 4096 else 6
        x = torch.randn(M, 2048, dtype=torch.float16, device="cuda")
        ws = [[torch.randn(5632, 2048, dtype=torch.float16, device="cuda") / 45 for _ in range(2)] for _ in range(4)]
        both = [torch.cat(w) for w in ws]
        rows = []
        for c in GATED:
            if bad[gname(c)]: continue
            with prefetched_weights(): g = graph([lambda i=i: grun((x, *ws[i % 4]), c) for i in range(R)])
            rows.append((times([g], 3, R)[0], gname(c), g))
        rows.sort(key=lambda t: t[0])
        def two(i): return F.silu(F.linear(x, ws[i % 4][0])) * F.linear(x, ws[i % 4][1])
        everyone = [(n, g) for _, n, g in rows[:4]] + [("cublas x2 + 2 kernels", graph([lambda i=i: two(i) for i in range(R)])), ("cublas one product alone", graph([lambda i=i: F.linear(x, both[i % 4]) for i in range(R)]))]
        t = times([g for _, g in everyone], 15, R)
        print(f"gated M={M}: " + " | ".join(f"{n} {u:.2f}" for (n, _), u in zip(everyone, t)), f"[{time.time()-t0:.0f}s]", flush=True)

if __name__ == "__main__":
    t0 = time.time()
    sys.argv = ["x", "large", "60"]
    T.main()
    gated(t0)
