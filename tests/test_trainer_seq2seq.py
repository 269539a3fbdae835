"""Models that are no Llama: losses that are means already, and generating while the model is sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from trainers import Job, Outcome, gap_between, train
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from dist_optim.errors import UnsupportedError
from dist_optim.integrations.transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from dist_optim.integrations.transformers.loss import LossOfRanksMixin
from dist_optim.testing import RankPool


def make_bert() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=300, max_position_embeddings=64, **shape, **undropped))


def make_t5() -> nn.Module:
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=300, **shape, **special))


MODELS = [make_bert, make_t5]
EVALUATED = {"learning_rate": 0.1, "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}


def by_sgd(make: Callable[[], nn.Module], strategy: str, directory: str, multiplied: bool = False) -> Outcome:
    """Twice the gradient is twice the step of SGD: nothing hides it."""
    if not multiplied:
        return train(Job("sgd", EVALUATED, make_model=make), strategy, directory)
    with mock.patch.object(LossOfRanksMixin, "_is_multiplied", lambda *_: False):
        return train(Job("sgd", EVALUATED, make_model=make), strategy, directory)


BERT_LAYERS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}


def assert_that_of_one_process(found: Outcome, one_process: Outcome) -> None:
    kept = {name: found.weights[name] for name in one_process.weights}  # FSDP1 saves both ends of a tie
    assert gap_between(replace(found, weights=kept), one_process) < 1e-5
    for key in ("loss", "eval_loss"):
        assert found.all(key) == pytest.approx(one_process.all(key), rel=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_a_loss_that_is_a_mean_already_stays_it_on_ranks(
    make: Callable[[], nn.Module], two_ranks: RankPool, tmp_path: Path
) -> None:
    one_process = by_sgd(make, "alone", str(tmp_path / "alone"))
    for found in two_ranks.run(by_sgd, make, "ddp", str(tmp_path / "ddp")):
        assert_that_of_one_process(found, one_process)


def sharded_bert(directory: str) -> Outcome:
    config = {**BERT_LAYERS, "version": 1}
    return train(Job("sgd", EVALUATED, make_model=make_bert), "fsdp1", directory, fsdp_config=config)


def test_a_tied_bert_is_sharded_as_the_refusal_says(two_ranks: RankPool, tmp_path: Path) -> None:
    one_process = by_sgd(make_bert, "alone", str(tmp_path / "alone"))
    for found in two_ranks.run(sharded_bert, str(tmp_path / "fsdp1")):
        assert_that_of_one_process(found, one_process)


def refusals(directory: str) -> dict[str, str]:
    found = {}
    for make, strategy in ((make_bert, "fsdp1"), (make_bert, "fsdp2"), (make_t5, "fsdp2")):
        with pytest.raises(UnsupportedError) as caught:
            by_sgd(make, strategy, directory)
        found[f"{make.__name__} {strategy}"] = str(caught.value)
    return found


def test_ties_that_fsdp_would_part_are_refused_before_the_first_step(two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(refusals, str(tmp_path)):
        assert found["make_bert fsdp1"].endswith("\"transformer_layer_cls_to_wrap\": ['BertLayer'].")
        assert "['BertLayer']" in found["make_bert fsdp2"] and '"version": 1' in found["make_bert fsdp2"]
        assert found["make_t5 fsdp2"].endswith('Set in fsdp_config: "version": 1.')
        assert "'decoder.embed_tokens'" in found["make_t5 fsdp2"]


def test_control_as_transformers_has_it_is_seen(two_ranks: RankPool, tmp_path: Path) -> None:
    one_process = by_sgd(make_bert, "alone", str(tmp_path / "alone"))
    for ranks in two_ranks.run(by_sgd, make_bert, "ddp", str(tmp_path / "ddp"), multiplied=True):
        assert gap_between(ranks, one_process) > 1e-3


def own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Divides by the number as a plain number, which autograd does not see."""
    logits = outputs["logits"].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / float(num_items_in_batch)


def by_own_loss(strategy: str, directory: str) -> Outcome:
    job = Job("sgd", {"learning_rate": 0.1}, make_model=make_bert, options={"compute_loss_func": own_loss})
    return train(job, strategy, directory)


def test_a_loss_that_divides_by_the_number_is_transformers_own(two_ranks: RankPool, tmp_path: Path) -> None:
    one_process = by_own_loss("alone", str(tmp_path / "alone"))
    for ranks in two_ranks.run(by_own_loss, "ddp", str(tmp_path / "ddp")):
        assert gap_between(ranks, one_process) < 1e-5


GENERATING = {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "steps", "eval_steps": 2}


def generating(strategy: str, directory: str, settings: dict[str, Any]) -> Outcome:
    job = Job("adamw_torch", settings, make_model=make_t5, kind=Seq2SeqTrainer)
    return train(job, strategy, directory, Seq2SeqTrainingArguments)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1"])
def test_generating_leaves_the_parameters_alone(strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    quiet, *_ = two_ranks.run(generating, strategy, str(tmp_path / "quiet"), {})
    for generated in two_ranks.run(generating, strategy, str(tmp_path / "generating"), GENERATING):
        assert gap_between(generated, quiet) == 0 and len(generated.all("eval_loss")) == 3


def test_one_process_is_transformers_own(tmp_path: Path) -> None:
    job = Job("adafactor", GENERATING, make_model=make_t5, kind=Seq2SeqTrainer)
    ours = train(job, "alone", tmp_path / "ours", Seq2SeqTrainingArguments)
    stock_job = replace(job, kind=transformers.Seq2SeqTrainer)
    stock = train(stock_job, "alone", tmp_path / "stock", transformers.Seq2SeqTrainingArguments)
    assert gap_between(ours, stock) == 0 and ours.all("eval_loss") == stock.all("eval_loss") != []
