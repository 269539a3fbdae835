"""The table of ``docs/doctor.md``: what each rule says of its example. ``python tests/doctor_page.py`` writes it."""

from __future__ import annotations

import copy
import re
from pathlib import Path

from dist_optim.doctor import Rule, Subject
from dist_optim.doctor.rules import RULES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "doctor.md"
BEGIN, END = "<!-- rules: begin -->\n", "<!-- rules: end -->"
LENGTH = 150


def table() -> str:
    rows = [_row(rule) for rule in RULES if rule.example]
    return "\n".join(["| code | what it says, of an example | what is changed |", "| --- | --- | --- |", *rows]) + "\n"


def _row(rule: Rule) -> str:
    subject = Subject.of(**copy.deepcopy(dict(rule.example)))
    found = next(one for one in rule.find(subject) if one.code == rule.code)
    changes = "; ".join(f"`{change}`" for change in found.changes)
    return f"| `{rule.code}` | {_short(found.reason)} | {changes or (f'`{found.command}`' if found.command else '')} |"


def _short(reason: str) -> str:
    first = re.split(r"(?<=[a-z)\]\d\"'])[.;] ", reason)[0].rstrip(".")
    return (first if len(first) <= LENGTH else first[:LENGTH].rsplit(" ", 1)[0] + " ...").replace("|", "\\|")


def written(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
