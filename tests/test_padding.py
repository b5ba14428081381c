"""Padding removal through the whole pipeline: real tokens are exact, whatever the mask, and others zero."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import InputError
from graphopt.optimized_model import OptimizedModel
from tests import _models as models
from tests._models import VOCABULARY, padding, randomised, tokens

ORT = ("ort", "eager")
BATCH, SEQ = 3, 9
HOLES = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0, 1], [1] + [0] * 8, [1, 1, 1, 0, 0, 0, 0, 1, 1]])
MASKS = {
    "right": padding((9, 1, 4), SEQ),
    "full": torch.ones(BATCH, SEQ, dtype=torch.long),
    "left": padding((9, 1, 4), SEQ).flip(1),
    "holes": HOLES,
    "an empty row": HOLES * torch.tensor([[1], [0], [1]]),
    "nothing": torch.zeros(BATCH, SEQ, dtype=torch.long),
}


def config(kind: str, **more: Any) -> Any:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64}
    return getattr(transformers, f"{kind}Config")(**{**sizes, **more})


def distilbert() -> nn.Module:
    from transformers import DistilBertModel

    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    return randomised(DistilBertModel(config("DistilBert", **sizes)))


def roberta() -> nn.Module:
    from transformers import RobertaModel

    return randomised(RobertaModel(config("Roberta", pad_token_id=1), add_pooling_layer=False))


def mpnet() -> nn.Module:
    from transformers import MPNetModel

    return randomised(MPNetModel(config("MPNet"), add_pooling_layer=False))


class First(nn.Module):
    """An encoder of which only the first token's state is given."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = models.bert().model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"first": states[:, 0]}


class Pooled(nn.Module):
    """An encoder or a decoder of which one vector a sequence is given, as sentence-transformers makes it."""

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"pooled": getattr(self, self.pooling)(states, attention_mask)}

    def cls(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._taken(states, mask.to(torch.int).argmax(dim=1))

    def last(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        largest, place = mask.flip(1).max(1)
        place = states.shape[1] - torch.where(largest == 0, states.shape[1] - 1, place) - 1
        return self._taken(states * mask.unsqueeze(-1).expand_as(states).to(states.dtype), place)

    def max(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(-1).expand_as(states).to(states.dtype)
        return states.masked_fill(weights == 0, float("-inf")).max(dim=1).values

    def _taken(self, states: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        index = place.unsqueeze(-1).unsqueeze(1).expand(-1, 1, states.shape[-1])
        return torch.gather(states, 1, index).squeeze(dim=1)


MODELS = {
    "cls": lambda: Pooled(roberta(), "cls").eval(),
    "max": lambda: Pooled(roberta(), "max").eval(),
    "last": lambda: Pooled(models.llama().model.model, "last").eval(),
    "first": lambda: First().eval(),
    "bert": lambda: models.bert().model,
    "minilm": lambda: models.minilm().model,
    "llama": lambda: models.llama().model,
    "distilbert": distilbert,
    "roberta": roberta,
    "mpnet": mpnet,
}
PACKED = {"bert": 2, "minilm": 2, "llama": 2, "distilbert": 1, "roberta": 1}  # and their layers
DYNAMIC = ("bert", "minilm")  # the others have fixed sizes here, which is faster


@functools.cache
def model(family: str) -> nn.Module:
    return MODELS[family]()


def call(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": 1 + tokens(*mask.shape, seed=2) % (VOCABULARY - 2), "attention_mask": mask}


@functools.cache
def optimized(family: str, way: str = "remove", dtype: torch.dtype = torch.int64) -> OptimizedModel:
    kwargs = call(MASKS["right"].to(dtype))
    dynamic = dict.fromkeys(kwargs, models.BATCH_SEQ) if family in DYNAMIC and way == "remove" else None
    return graphopt.optimize(
        model(family), (), kwargs, executors=ORT, effort="fast", dynamic=dynamic, padding=way
    )


def assert_exact_on_tokens(family: str, opt: OptimizedModel, mask: torch.Tensor) -> None:
    kwargs = call(mask)
    with torch.no_grad():
        before = model(family)(**kwargs)
        exact = copy.deepcopy(model(family)).double()(**kwargs)
    after = opt(**kwargs)
    for name, value in after.items():
        if not isinstance(value, torch.Tensor):
            continue
        sides = [before[name], value, exact[name]]
        if value.dim() == 3:
            padded = (mask == 0)[..., None]
            assert not value.masked_select(padded).count_nonzero()
            sides = [side.masked_fill(padded, 0) for side in sides]
        found = compare(*sides, MODEL_FLOOR_ULPS)
        assert found.ok, found.reason


def reasons(opt: OptimizedModel) -> str:
    return "\n".join(row.reason for row in opt.report.remarks if row.kind in ("missed", "analysis"))


@pytest.mark.parametrize("label", MASKS)
@pytest.mark.parametrize("family", PACKED)
def test_real_tokens_are_exact(family: str, label: str) -> None:
    opt = optimized(family)
    assert opt.plan.padded is not None
    (step,) = opt.plan.steps
    assert step.executor == "ort"
    assert step.region.graph.op_counts()["graphopt.packed_attention"] == PACKED[family]
    assert_exact_on_tokens(family, opt, MASKS[label])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_other_types(dtype: torch.dtype) -> None:
    opt = optimized("roberta", dtype=dtype)
    assert opt.plan.padded is not None
    assert [step.executor for step in opt.plan.steps] == ["ort"]
    for label in ("right", "holes", "an empty row"):
        assert_exact_on_tokens("roberta", opt, MASKS[label].to(dtype))


def test_without_onnx_runtime() -> None:
    """Sizes that depend on the mask are none that memory is laid out for."""
    opt = graphopt.optimize(
        model("roberta"),
        (),
        call(MASKS["right"]),
        executors=("eager",),
        effort="fast",
        padding="remove",
    )
    assert opt.plan.padded is not None
    assert [step.executor for step in opt.plan.steps] == ["eager"]
    for mask in MASKS.values():
        assert_exact_on_tokens("roberta", opt, mask)


def test_a_relative_bias_keeps_the_padding() -> None:
    opt = optimized("mpnet")
    assert opt.plan.padded is None
    assert "is not one of keys alone: a bias perhaps" in reasons(opt)
    kwargs = call(MASKS["left"])
    with torch.no_grad():
        states = model("mpnet")(**kwargs).last_hidden_state
    torch.testing.assert_close(opt(**kwargs).last_hidden_state, states, rtol=1e-4, atol=1e-4)


def test_a_pooling_over_real_tokens_is_packed_by_itself() -> None:
    opt = optimized("minilm", "keep")
    assert opt.plan.padded is not None
    assert any(row.pass_name == "hoist_pack" for row in opt.report.rewrites)
    for mask in MASKS.values():
        assert_exact_on_tokens("minilm", opt, mask)


def test_what_the_caller_may_see_stays_padded_by_itself() -> None:
    opt = optimized("roberta", "keep")
    assert opt.plan.padded is None
    kwargs = call(MASKS["left"])
    with torch.no_grad():
        states = model("roberta")(**kwargs).last_hidden_state
    torch.testing.assert_close(opt(**kwargs).last_hidden_state, states)  # padded positions included


def test_a_first_token_alone_is_packed_by_itself() -> None:
    """All layers but the last compute real tokens; the last one computes keys and values of these alone."""
    opt = optimized("first", "keep")
    assert opt.plan.padded is not None
    (step,) = opt.plan.steps
    counts = step.region.graph.op_counts()
    assert (counts["graphopt.packed_attention"], counts["graphopt.attention"]) == (1, 1)
    for label, mask in MASKS.items():
        packed = opt.plan.serving([call(mask)[name] for name in opt.plan.inputs]) is opt.plan
        assert packed == (label in ("right", "holes")), label
        assert_exact_on_tokens("first", opt, mask)


@pytest.mark.parametrize("family", ["max", "last"])
def test_other_poolings_are_packed_by_themselves(family: str) -> None:
    opt = optimized(family, "keep")
    assert opt.plan.padded is not None
    for label, mask in MASKS.items():
        packed = opt.plan.serving([call(mask)[name] for name in opt.plan.inputs]) is opt.plan
        assert packed == (label not in ("full", "nothing")), label
        if family != "max" or bool(mask.any(1).all()):  # of nothing the largest is -inf, on either side
            assert_exact_on_tokens(family, opt, mask)


def test_the_first_real_token_is_packed_where_every_sequence_has_it_in_front() -> None:
    opt = optimized("cls", "keep")
    for label, mask in MASKS.items():
        packed = opt.plan.serving([call(mask)[name] for name in opt.plan.inputs]) is opt.plan
        assert packed == (label in ("right", "holes")), label
        assert_exact_on_tokens("cls", opt, mask)


def test_a_pooling_of_the_first_token_is_packed_where_that_is_real() -> None:
    """BERT's pooler reads the first position, which is padded on the left and in an empty row."""
    opt = optimized("bert")
    for label, mask in MASKS.items():
        packed = opt.plan.serving([call(mask)[name] for name in opt.plan.inputs]) is opt.plan
        assert packed == (label in ("right", "holes")), label


def test_examples_without_padding_keep_it() -> None:
    opt = graphopt.optimize(
        model("roberta"), (), call(MASKS["full"]), executors=ORT, effort="fast", padding="remove"
    )
    assert opt.plan.padded is None
    assert "pads nothing" in reasons(opt)
    assert_exact_on_tokens("roberta", opt, MASKS["holes"])


def test_a_model_without_a_mask_has_nothing_to_remove() -> None:
    example = models.vit()
    opt = graphopt.optimize(
        example.model, example.args, example.kwargs, executors=ORT, effort="fast", padding="remove"
    )
    assert "padding stays: no attention of the model has a mask" in reasons(opt)


def test_the_measurement_decides() -> None:
    """Tiny as it is, either may win; what runs is exact, and the report names both."""
    opt = graphopt.optimize(model("minilm"), (), call(MASKS["right"]), executors=ORT, padding="remove")
    names = [row.name for row in opt.report.candidates]
    assert names == ["ort + eager, padding removed", "ort + eager"]
    assert all(row.ms is not None for row in opt.report.candidates)
    if opt.plan.padded is not None:
        assert 0 < opt.plan.padded.fullest <= 1
    for mask in MASKS.values():
        assert_exact_on_tokens("minilm", opt, mask)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(InputError, match="padding='drop' is unknown"):
        graphopt.optimize(model("minilm"), (), call(MASKS["right"]), padding="drop")  # type: ignore[arg-type]
