"""What README claims is what the results say, and what it points to is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *(page for part in ("ideal", "service", "deploy", "jobs") for page in (ROOT / part).rglob("*.md")),
]


def test_the_table_of_results_is_the_comparisons() -> None:
    found = json.loads((ROOT / "jobs/results/study/held-out/compare.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    shown = re.findall(
        r"^\| `([^`]+)`[^|]*\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(shown) >= 5
    for label, score, to_joint, search in shown:
        overall, against = rows[label]["overall"], rows[label]["against"]
        assert score == f"{overall['mean']:.3f} [{overall['low']:.3f}, {overall['high']:.3f}]"
        if label != found["base"]:
            assert to_joint == f"{against['mean']:+.3f} [{against['low']:+.3f}, {against['high']:+.3f}]"
        assert search == f"{rows[label]['search_share']:.1f} ×"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_setting_that_the_pages_name_exists() -> None:
    from ideal.config.config import Config

    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for page in (ROOT / "README.md", ROOT / "service" / "README.md", ROOT / "ideal" / "README.md"):
        for section, name in re.findall(r"`([a-z]+)\.([a-z_]+)", page.read_text()):
            fields = getattr(sections.get(section), "model_fields", None)
            assert fields is None or name in (*fields, "py"), f"{page.name}: {section}.{name}"
