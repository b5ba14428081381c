"""Networks in plain torch, as published but tiny: what transformers has not, or not so."""

from __future__ import annotations

import torch
from torch import nn


def conv_norm(before: int, after: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    conv = nn.Conv2d(before, after, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


class SqueezeExcitation(nn.Module):
    """Channels weighted by what the whole image holds of them (Hu et al., arXiv:1709.01507)."""

    def __init__(self, channels: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.expand = nn.Conv2d(channels // 2, channels, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.expand(self.activation(self.reduce(mean))))


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel by itself, weigh, project; the input is added where shapes agree."""

    def __init__(self, before: int, after: int, stride: int, activation: nn.Module, weigh: nn.Module) -> None:
        super().__init__()
        inner = 2 * before
        self.expand = conv_norm(before, inner, 1)
        self.filter = conv_norm(inner, inner, 3, stride, groups=inner)
        self.weigh = weigh
        self.project = conv_norm(inner, after, 1)
        self.activation = activation
        self.same = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.filter(self.activation(self.expand(x))))
        y = self.project(self.weigh(y))
        return x + y if self.same else y


class EfficientNet(nn.Module):
    """A stem and two blocks with SiLU and squeeze-and-excitation (Tan and Le, arXiv:1905.11946)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 8, 3, 2), nn.SiLU())
        shapes = [(8, 8, 1), (8, 12, 2)]
        self.blocks = nn.Sequential(
            *(
                InvertedBottleneck(b, a, s, nn.SiLU(), SqueezeExcitation(2 * b, nn.SiLU(), nn.Sigmoid()))
                for b, a, s in shapes
            )
        )
        self.head = nn.Linear(12, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


class MobileNet(nn.Module):
    """A block with ReLU6 and one with hard-swish (Howard et al., arXiv:1905.02244)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 8, 3, 2), nn.Hardswish())
        self.blocks = nn.Sequential(
            InvertedBottleneck(8, 8, 1, nn.ReLU6(), nn.Identity()),
            InvertedBottleneck(8, 12, 2, nn.Hardswish(), SqueezeExcitation(16, nn.ReLU(), nn.Hardsigmoid())),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.blocks(self.stem(image)), 1)
        return self.head(torch.flatten(x, 1))


class Expert(nn.Module):
    """A SwiGLU block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ExpertLayer(nn.Module):
    """The two best of three experts a token, each weighed by its router's probability.

    Every expert reads every token, which is how a mixture is written where shapes must not depend on values.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(Expert(width, 24) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        best, chosen = self.router(y).softmax(-1).topk(2, dim=-1)
        shares = torch.zeros(*y.shape[:-1], 3, dtype=y.dtype).scatter(-1, chosen, best)
        shares = shares / shares.sum(-1, keepdim=True)
        for index, expert in enumerate(self.experts):
            x = x + shares[..., index, None] * expert(y)
        return x


class Experts(nn.Module):
    """Layers of a mixture of experts (Jiang et al., arXiv:2401.04088), without attention."""

    def __init__(self, layers: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ExpertLayer(width) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layers(x))
