"""Histories, checkers, metrics, tables and figures.

Needs no JAX, and matplotlib only once a figure is drawn.
"""

from resilient_moe.report.breakdown import breakdown_figure
from resilient_moe.report.checkers import Checker, Value, Verdict
from resilient_moe.report.figures import timeline, timeline_figure
from resilient_moe.report.history import (
    SCHEMA,
    Event,
    History,
    HistoryWriter,
    Recorder,
    RequestId,
    read_history,
)
from resilient_moe.report.judge import CHECKERS, VALID, verdict
from resilient_moe.report.latency import goodput
from resilient_moe.report.ledger import Answer, Ledger, Request, ledger_of
from resilient_moe.report.metrics import Samples, measure, samples, speedups
from resilient_moe.report.perfetto import trace, write_trace
from resilient_moe.report.phases import (
    Phases,
    recovery_phases,
    recovery_time_s,
    restart_stages,
    stall_by_action,
)
from resilient_moe.report.request_timeline import (
    RequestTimeline,
    request_timelines,
)
from resilient_moe.report.rows import METRICS, Row, Stat, rows_of
from resilient_moe.report.runs import Run, read_runs
from resilient_moe.report.spans import Span, Spans, read_spans
from resilient_moe.report.stalls import Stalls, Usual, fault_stalls, usual
from resilient_moe.report.table import to_csv, to_markdown, write_tables
from resilient_moe.report.text import (
    BeforeAndAfter,
    affected_requests,
    before_and_after,
)

__all__ = [
    "Answer",
    "BeforeAndAfter",
    "CHECKERS",
    "Checker",
    "Event",
    "History",
    "HistoryWriter",
    "Ledger",
    "METRICS",
    "Phases",
    "Recorder",
    "Request",
    "RequestId",
    "RequestTimeline",
    "Row",
    "Run",
    "SCHEMA",
    "Samples",
    "Span",
    "Spans",
    "Stalls",
    "Stat",
    "Usual",
    "VALID",
    "Value",
    "Verdict",
    "affected_requests",
    "before_and_after",
    "breakdown_figure",
    "fault_stalls",
    "goodput",
    "ledger_of",
    "measure",
    "recovery_phases",
    "read_history",
    "read_runs",
    "read_spans",
    "recovery_time_s",
    "request_timelines",
    "restart_stages",
    "rows_of",
    "samples",
    "speedups",
    "stall_by_action",
    "timeline",
    "timeline_figure",
    "to_csv",
    "to_markdown",
    "trace",
    "usual",
    "verdict",
    "write_tables",
    "write_trace",
]
