"""The committed suites: cases that anybody can measure again, one by one, with the command in their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.bench.setting import Case


@dataclass(frozen=True)
class Suite:
    """Cases that belong together.

    Args:
        about: what they show.
        cases: in order.
        against: the peers, unless others are asked for.
    """

    about: str
    cases: Sequence[Case]
    against: str = "eager,inductor,onnxruntime"


def _case(label: str, factory: str, **given: int | str) -> Case:
    """A case of a model of ours: sizes are numbers, the rest are dtype, lengths, precision and device."""
    sizes = {name: value for name, value in given.items() if isinstance(value, int)}
    others = {name: value for name, value in given.items() if isinstance(value, str)}
    return Case(f"bench.models:{factory}", sizes, label=label, **others)  # type: ignore[arg-type]


def _encoder(**changed: int) -> Case:
    sizes = {"layers": 2, "width": 256, "batch": 1, "seq": 64, **changed}
    return _case("", "encoder", **sizes, device="cpu")


def _narrow(model: str, factory: str, batch: int, seq: int, precision: str) -> Case:
    label = f"{model} {batch}x{seq} {precision}"
    return _case(label, factory, batch=batch, seq=seq, precision=precision, device="cpu")


_GPU = {"device": "cuda", "dtype": "float16"}
_GPU_PEERS = "eager,inductor,onnxruntime,tensorrt"

SUITES: dict[str, Suite] = {
    "cpu": Suite(
        "encoders on a CPU, in float32",
        [
            case
            for model, factory in (("MiniLM", "minilm"), ("BERT-base", "bert_base"))
            for case in (
                _case(f"{model} 1x16", factory, batch=1, seq=16, device="cpu"),
                _case(f"{model} 1x128", factory, batch=1, seq=128, device="cpu"),
                _case(f"{model} 8x128", factory, batch=8, seq=128, device="cpu"),
                _case(f"{model} 32x128 ragged", factory, batch=32, seq=128, lengths="real", device="cpu"),
            )
        ],
        "eager,inductor,onnxruntime,openvino",
    ),
    "cpu-lossy": Suite(
        "the same in narrower numbers: graphopt and who else can, all within one loss",
        [
            _narrow(model, factory, batch, seq, name)
            for name in ("int8", "int8-static", "bf16")
            for model, factory, batch, seq in (
                ("MiniLM", "minilm", 1, 16),
                ("MiniLM", "minilm", 1, 128),
                ("MiniLM", "minilm", 8, 128),
                ("BERT-base", "bert_base", 1, 128),
            )
        ]
        + [
            _case("ResNet-50 1 int8-static", "resnet50", batch=1, precision="int8-static", device="cpu"),
            _narrow("Llama 135M step", "decode_step", 1, 128, "int4"),
            _narrow("Llama 135M step", "decode_step", 1, 128, "int8-weights"),
        ],
        "eager,inductor,onnxruntime,openvino",
    ),
    "encoders": Suite(
        "BERT-base on a GPU, in float16",
        [
            _case("BERT-base 1x128", "bert_base", batch=1, seq=128, **_GPU),
            _case("BERT-base 8x128", "bert_base", batch=8, seq=128, **_GPU),
            _case("BERT-base 32x128", "bert_base", batch=32, seq=128, **_GPU),
            # 54 % of it no padding: 8,905 tokens
            replace(
                _case("BERT-base 32x512 ragged", "bert_base", batch=32, seq=512, lengths="uniform", **_GPU),
                seed=4,
            ),
        ],
        _GPU_PEERS,
    ),
    "ort": Suite(
        "BERT-base on a GPU, in float16, in ONNX Runtime: PyTorch's export beside graphopt's",
        [
            _case("BERT-base 1x128 in ONNX Runtime", "bert_base", batch=1, seq=128, **_GPU),
            _case("BERT-base 8x128 in ONNX Runtime", "bert_base", batch=8, seq=128, **_GPU),
            _case("BERT-base 32x128 in ONNX Runtime", "bert_base", batch=32, seq=128, **_GPU),
            _case("BERT-base 8x512 in ONNX Runtime", "bert_base", batch=8, seq=512, **_GPU),
        ],
        "onnxruntime,graphopt-ort",
    ),
    "vision": Suite(
        "images of 224 x 224 on a GPU, in float16",
        [
            _case("ViT-B/16 1", "vit_b16", batch=1, **_GPU),
            _case("ViT-B/16 64", "vit_b16", batch=64, **_GPU),
            _case("ResNet-50 1, channels last", "resnet50", batch=1, **_GPU),
            _case("ResNet-50 64, channels last", "resnet50", batch=64, **_GPU),
        ],
        _GPU_PEERS,
    ),
    "decode": Suite(
        "one step of decoding with a cache, on a CPU in float32 and on a GPU in float16",
        [
            _case("Llama 135M step 1x128, CPU", "decode_step", batch=1, seq=128, device="cpu"),
            _case("Llama 135M step 1x1024, CPU", "decode_step", batch=1, seq=1024, device="cpu"),
            _case("Llama 135M step 1x1024, GPU", "decode_step", batch=1, seq=1024, **_GPU),
            _case("Llama 135M step 32x1024, GPU", "decode_step", batch=32, seq=1024, **_GPU),
        ],
    ),
    "scaling": Suite(
        "how latency and the cost of optimizing grow with layers, width, sequence and batch, on a CPU",
        [
            _encoder(),
            *(_encoder(layers=layers) for layers in (1, 4, 8, 16)),
            *(_encoder(width=width) for width in (128, 512, 1024)),
            *(_encoder(seq=seq) for seq in (16, 256, 512)),
            *(_encoder(batch=batch) for batch in (4, 16, 64)),
        ],
        "eager,onnxruntime",
    ),
}
