"""Tables in the READMEs that the code knows: ``python -m tests.docs`` rewrites them, a test compares them.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from maestro_fast.evals.suite import SuiteConfig
from maestro_fast.evals.training_arms import ARMS, CHOSEN, SINGLE
from maestro_fast.integrations.trl.refuse import refusal_table
from maestro_fast.integrations.verl.settings import refusal_table as verl_refusal_table
from maestro_fast.ops import PROFILES
from maestro_fast.rewards import REWARD_TYPES
from maestro_fast.settings import sentences, settings_of
from maestro_fast.weighting import POLICIES

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def first_sentence(docstring: str | None) -> str:
    """Up to the first full stop, on one line."""
    text = " ".join((docstring or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0]


def policies() -> str:
    return markdown(
        ["type", "what it does"], [[f"`{name}`", first_sentence(kind.__doc__)] for name, kind in POLICIES.items()]
    )


def rewards() -> str:
    return markdown(
        ["type", "what it gives"], [[f"`{name}`", first_sentence(kind.__doc__)] for name, kind in REWARD_TYPES.items()]
    )


def profiles() -> str:
    head = [
        "profile",
        "each reward: centre, scale",
        "score: centre, scale",
        "eps",
        "ddof",
        "lone response",
        "abstention",
        "KL in",
    ]
    rows = []
    for name, profile in PROFILES.items():
        eps = f"{profile.reward_eps:g}, {profile.score_eps:g}"
        rewards, scores = (
            f"{profile.reward_center}, {profile.reward_scale}",
            f"{profile.score_center}, {profile.score_scale}",
        )
        rows.append(
            [f"`{name}`", rewards, scores, eps, str(profile.ddof), profile.singleton, profile.missing, profile.kl_in]
        )
    return markdown(head, rows)


def arms() -> str:
    about = {name: arm.about for name, arm in ARMS.items()} | CHOSEN | {SINGLE: "Each reward alone, one arm for each."}
    return markdown(["arm", "what is done"], [[f"`{name}`", text] for name, text in about.items()])


def suite() -> str:
    about = sentences(SuiteConfig)
    return markdown(["setting", "what it says"], [[f"`{name}`", about[name]] for name in settings_of(SuiteConfig)])


TABLES: dict[str, Callable[[], str]] = {
    "policies": policies,
    "rewards": rewards,
    "profiles": profiles,
    "arms": arms,
    "suite": suite,
    "refusals": refusal_table,
    "verl_refusals": verl_refusal_table,
}


def filled(text: str) -> str:
    """The page with every generated table as the code gives it now."""
    return PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


def pages() -> list[Path]:
    """The pages that hold generated tables."""
    folders = [ROOT, ROOT / "bench", ROOT / "kernels", *(ROOT / "maestro_fast").rglob("*/")]
    found = [
        page for folder in folders for page in folder.glob("*.md") if PLACE.search(page.read_text(encoding="utf-8"))
    ]
    return sorted(set(found))


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(ROOT))
