"""A script as people have them: a classifier, a Trainer of its own, callbacks, metrics. It knows no dist_optim.

python train_classifier.py arguments.json
python train_classifier.py --output_dir out --optim adamw_torch
"""

import json
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


@dataclass
class DataArguments:
    num_samples: int = field(default=64, metadata={"help": "How many sequences to make up."})
    length: int = field(default=12, metadata={"help": "Tokens of each."})


@dataclass
class MyTrainingArguments(TrainingArguments):
    head_learning_rate: float = field(default=0.02, metadata={"help": "Learning rate of the classifier's head."})


class Sequences(torch.utils.data.Dataset):
    """Which of two tokens comes more often?"""

    def __init__(self, arguments, seed):
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(2, 30, (arguments.num_samples, arguments.length), generator=generator)
        picks = torch.rand(self.rows.shape, generator=generator)
        self.rows[picks < 0.4] = 0
        self.rows[picks > 0.7] = 1
        self.labels = ((self.rows == 0).sum(1) > (self.rows == 1).sum(1)).long()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


class HeadFirstTrainer(Trainer):
    """The head learns at a rate of its own, and its loss is weighted."""

    def create_optimizer(self):
        super().create_optimizer()
        head = {id(parameter) for parameter in self.model.score.parameters()}
        for group in list(self.optimizer.param_groups):
            kept = [parameter for parameter in group["params"] if id(parameter) not in head]
            moved = [parameter for parameter in group["params"] if id(parameter) in head]
            group["params"] = kept
            if moved:
                self.optimizer.add_param_group({"params": moved, "lr": self.args.head_learning_rate})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, weight=torch.tensor([1.0, 1.5]))
        return (loss, outputs) if return_outputs else loss


class RateLog(TrainerCallback):
    """Remembers each step's rates, one a group."""

    def __init__(self):
        self.rates = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def compute_metrics(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def main():
    parser = HfArgumentParser((DataArguments, MyTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        data_arguments, arguments = parser.parse_json_file(sys.argv[1])
    else:
        data_arguments, arguments = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=2,
        pad_token_id=31,
    )
    rates = RateLog()
    trainer = HeadFirstTrainer(
        model=LlamaForSequenceClassification(config),
        args=arguments,
        train_dataset=Sequences(data_arguments, seed=1),
        eval_dataset=Sequences(data_arguments, seed=2),
        compute_metrics=compute_metrics,
        callbacks=[rates] + ([EarlyStoppingCallback(50)] if arguments.metric_for_best_model else []),
    )
    result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model(os.path.join(arguments.output_dir, "final"))
    if trainer.is_world_process_zero():
        report = {
            "world_size": arguments.world_size,
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "train_loss": result.training_loss,
            "accuracy": metrics["eval_accuracy"],
            "rates": rates.rates[-1],
            "log": trainer.state.log_history,
        }
        with open(os.path.join(arguments.output_dir, "report.json"), "w") as file:
            json.dump(report, file)


if __name__ == "__main__":
    main()
