"""How rewards agree with the utility: by hand on small numbers, and on a tiny model that is asked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from maestro_fast.evals.agreement import agreement_table, correlation, differ, main
from maestro_fast.settings import SettingsError
from tests.tiny import tiny_checkpoint


def test_correlation_is_that_within_groups() -> None:
    """Within both groups x falls as y rises, although the group with more of x has more of y."""
    x_NG = torch.tensor([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]])
    y_NG = torch.tensor([[3.0, 2.0, 1.0], [13.0, 12.0, 11.0]])
    assert correlation(x_NG, y_NG) == pytest.approx(-1.0)
    mixed_NG = torch.tensor([[1.0, 2.0, 3.0], [13.0, 12.0, 11.0]])
    assert correlation(x_NG, mixed_NG) == pytest.approx(0.0)
    assert correlation(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.0, 3.0]])) == pytest.approx(
        3 / math.sqrt(2 * 6)
    )
    assert math.isnan(correlation(x_NG, torch.ones(2, 3)))


def test_differ_counts_groups() -> None:
    assert differ(torch.tensor([[0.2, 0.2], [0.2, 0.3], [0.0, 1.0], [0.5, 0.5]])) == 0.5


def test_table_has_a_row_for_each_family_and_one_for_all() -> None:
    rewards_NGK = torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 0.5]]])
    utilities_NG = torch.tensor([[0.0, 0.5], [1.0, 0.0]])
    table = agreement_table(("a", "b"), ["x", "y"], rewards_NGK, utilities_NG, torch.full((2, 2), 7.0))
    assert table.header[-2:] == ("a", "b")
    assert table.rows == (
        ("x", "0.250", "0.500", "1.00", "1.00", "7", "+1.00", "-"),
        ("y", "0.500", "1.000", "1.00", "1.00", "7", "-1.00", "-1.00"),
        ("all", "0.375", "0.750", "1.00", "1.00", "7", "-0.32", "-0.89"),
    )


def test_a_model_is_asked_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    rows = [{"prompt": "one two", "family": name} for name in ("up", "down")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def size(completions, **_):\n    return [float(len(text)) for text in completions]\n"
        "def worth(completions, family, **_):\n"
        "    return [(1 if kind == 'up' else -1) * len(text) for text, kind in zip(completions, family)]\n"
    )
    config = f"""
run_dir: {tmp_path}/run
model: {{path: {model}}}
data: {{path: {tmp_path}/prompts.jsonl}}
rewards: [{{type: function, function: "{tmp_path}/mine.py:size"}}]
anchor: {{type: function, function: "{tmp_path}/mine.py:worth", labels: {{share: 0.01}}}}
sampling: {{max_new_tokens: 6, group_size: 2}}
"""
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(SettingsError, match="anchor: missing"):
        main([str(tmp_path / "config.yaml"), "--anchor", "null"])
    main([str(tmp_path / "config.yaml"), "--samples", "4", "--prompts", "2"])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["family"][-1] == "size"
    assert lines["up"][-1] == "+1.00"
    assert lines["down"][-1] == "-1.00"
