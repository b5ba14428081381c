"""The ops that PyTorch's quantization writes into graphs, registered on import."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed

ops = torch.ops.quantized_decomposed
INT8 = (-128, 127, torch.int8)
UINT8 = (0, 255, torch.uint8)
