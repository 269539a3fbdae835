"""What a run leaves behind, for any Trainer: metrics, plots, the model and a summary, never a half-written one.

::

    from dist_optim.integrations.transformers.run_report import Progress, RunReport

    report = RunReport()
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[report, Progress()])
    trainer.train()
    report.finish(trainer)  # on every rank

``args.output_dir`` then holds ``model/``, ``metrics.jsonl``, ``loss.png``, ``lr.png``, ``run.json``, ``summary.json``;
until then the metrics are in ``.unfinished``. ``dist-optim report`` shows them as a page. Reading order: ``directory``,
``about``, ``measures``, ``plots``, ``callbacks``.
"""

from dist_optim.integrations.transformers.run_report.callbacks import Progress, RunReport
from dist_optim.integrations.transformers.run_report.directory import (
    FINISHED_NAMES,
    LAST,
    RunDirectory,
    find_checkpoint,
)
from dist_optim.integrations.transformers.run_report.measures import (
    optimizer_state_bytes,
    peak_memory_bytes,
    print_summary,
    strategy_name,
)

__all__ = [
    "FINISHED_NAMES",
    "LAST",
    "Progress",
    "RunDirectory",
    "RunReport",
    "find_checkpoint",
    "optimizer_state_bytes",
    "peak_memory_bytes",
    "print_summary",
    "strategy_name",
]
