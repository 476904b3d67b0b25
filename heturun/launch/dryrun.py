"""The table that --dry-run prints: every process, where it would run, and the exact command.

The coordinator's line is the last one: it starts only if the job asks for it, as --preduce and its like do.
"""

from __future__ import annotations

from collections.abc import Sequence

from heturun.launch.processes import Plan, shown

COLUMNS = ("rank", "host", "role", "local rank", "device", "stage", "pipeline", "command")


def table(plan: Plan) -> str:
    """Aligned columns, one line per process, then the notes."""
    command, coordinator = shown(plan.command), plan.coordinator
    if_asked = f"{shown(coordinator.command)} (if the job asks for it)"
    rows = [
        (str(p.rank), p.host, "worker", str(p.local_rank), p.device, str(p.stage), str(p.pipeline), command)
        for p in plan.processes
    ]
    last = (str(coordinator.rank), coordinator.host, "coordinator", "-", "-", "-", "-", if_asked)
    return "\n".join([*_aligned([COLUMNS, *rows, last]), *plan.notes])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
