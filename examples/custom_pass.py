"""A pass of your own: the same three functions, and verification, remarks and bisection for nothing.

Run it with ``python -m examples.custom_pass``. A package offers such a module under the entry point group
``graphopt.passes``; a project names it in pyproject.toml: ``[tool.graphopt]``, ``passes = ["my_passes"]``.
"""

import torch

import graphopt
from graphopt.ir.pattern import Call, Match, Var, shared_inside

aten = torch.ops.aten


@graphopt.custom_pass("fold", after="fold_constants")
class FoldRootOfSquare:
    """sqrt(x * x) -> abs(x)."""

    pattern = Call(aten.sqrt.default, Call(aten.mul.Tensor, Var("x"), Var("x")))

    @staticmethod
    def check(match: Match) -> str | None:
        """Nothing else may read the square."""
        shared = shared_inside(match)
        return f"{shared[0].name} is also read by {shared[1].name}" if shared else None

    @staticmethod
    def rewrite(rewriter, match: Match) -> None:
        """One operation instead of two, and no overflow."""
        rewriter.replace(match.root, rewriter.call(aten.abs.default, match["x"]))


class Model(torch.nn.Module):
    """Two places: one where the pass applies, one where it refuses."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Magnitudes by way of squares, one of which is returned."""
        square = x * x
        return torch.sqrt((x + 1) * (x + 1)), torch.sqrt(square) + square


def main() -> None:
    """Optimize the model, and say what became of the pass."""
    report = graphopt.optimize(Model().eval(), (torch.randn(64, 256),), effort="fast").report
    for rewrite in report.rewrites:
        if rewrite.pass_name == "fold_root_of_square":
            print(f"kept: {rewrite.kept}, at {rewrite.site}, error after {rewrite.error_after:.1e}")
    for remark in report.remarks:
        if remark.pass_name == "fold_root_of_square":
            print(f"{remark.kind}: {remark.reason}")


if __name__ == "__main__":
    main()
