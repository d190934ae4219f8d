"""Reads the log of a run, draws its plots and writes its report page.

The logs that a trainer attaches to a run are in ``maestro_fast.reporting.run_log``. They import transformers; this
package alone does not.
"""

from maestro_fast.reporting.history import FamilySpread, family_spread
from maestro_fast.reporting.json_lines import JsonLines, iter_jsonl, read_jsonl
from maestro_fast.reporting.report import printed_verdict, write_report
from maestro_fast.reporting.tables import Table, format_table

__all__ = [
    "FamilySpread",
    "JsonLines",
    "Table",
    "family_spread",
    "format_table",
    "iter_jsonl",
    "printed_verdict",
    "read_jsonl",
    "write_report",
]
