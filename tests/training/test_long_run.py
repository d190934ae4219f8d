"""Nothing grows from step to step once replay and log are full: neither what a run holds nor its checkpoints."""

from __future__ import annotations

import pytest

from bench import soak
from maestro_fast.training import progress

pytestmark = pytest.mark.long

STEPS, FULL = 160, 80  # steps; from the second on, replay and log are full
GROUPS, LINES = 32, 40


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> soak.Samples:
    """A run with small bounds, so that they are reached soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "REPLAY", GROUPS)
        patch.setattr(soak, "SAVE_EVERY", 20)
        patch.setattr(soak, "EVALUATE_EVERY", 40)
        patch.setattr(progress, "LOG_LINES", LINES)
        found, _ = soak.soak(tmp_path_factory.mktemp("soak"), STEPS, "anchored", 10)
    return found


def late(samples: soak.Samples, name: str) -> list[int]:
    return [row[name] for row in samples.objects if row["step"] >= FULL]


def test_replay_and_log_are_full_and_stay_so(samples: soak.Samples) -> None:
    assert samples.objects[0]["replay_groups"] < GROUPS and samples.objects[0]["log_lines"] < LINES
    assert set(late(samples, "replay_groups")) == {GROUPS}
    assert set(late(samples, "log_lines")) == {LINES}
    assert max(late(samples, "replay_contexts")) <= GROUPS
    assert set(late(samples, "prompt_contexts")) == {64}  # one for each prompt of the data


def test_the_process_holds_no_more_at_the_end(samples: soak.Samples) -> None:
    """A thing that each step left behind would be 80 more by the end; a few come and go with the best policy."""
    for name, slack in (("tensors", 10), ("objects", 60), ("files", 0), ("threads", 0)):
        held = late(samples, name)
        assert max(held) - held[0] <= slack, (name, held)


def test_checkpoints_have_one_size(samples: soak.Samples) -> None:
    """They differ by the digits of the figures in the log, and by the contexts that the replay happens to hold."""
    sizes = [files for step, files in sorted(samples.checkpoints.items()) if step >= FULL]
    assert len(sizes) == 5 and all(files.keys() == sizes[0].keys() for files in sizes)
    for name in sizes[0]:
        each = [files[name] for files in sizes]
        slack = 0.1 * each[0] if name in ("trainer_state.json", "weight_policy.safetensors") else 200
        assert max(each) - min(each) <= slack, (name, each)
