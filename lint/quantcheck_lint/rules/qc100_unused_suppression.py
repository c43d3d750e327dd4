from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules.rule import Detection, Invalid, Rule

if TYPE_CHECKING:
    from quantcheck_lint.analysis import Analysis


class UnusedSuppression(Rule):
    """QC100: a comment that hides no finding. Found by `suppressions.py` once all other rules have spoken."""

    code = "QC100"
    name = "unused-suppression"
    severity = "warning"
    fix = "safe"
    summary = "A suppression comment hides nothing."
    what = """
Finds `# noqa: QC...` and `# quantcheck: ignore` comments that hide no finding. Codes of other tools and blanket
`# noqa` comments are left alone, and so are codes of rules that are off in this run."""
    why = "The comment says that the code counts wrongly. It hides the next mistake on the same line."
    instead = "Remove it, or the codes in it that hide nothing; `--fix` does."
    fix_safety = "Safe: only comments change, and codes of other tools in the same comment stay."
    valid = (
        "total = sum(p.numel() for p in model.parameters())  # noqa: QC001\n",
        "total = sum(p.numel() for p in model.parameters())  # quantcheck: ignore[QC001]\n",
        "import os  # noqa\n",
        "import os  # noqa: F401\n",
        "text = '# noqa: QC001'\n",
    )
    invalid = (
        Invalid("import os  # noqa: QC001\n", "import os\n"),
        Invalid("import os  # noqa: F401, QC001\n", "import os  # noqa: F401\n"),
        Invalid("import os  # quantcheck: ignore[QC001]\n", "import os\n"),
        Invalid("# quantcheck: ignore-file\nimport os\n", "\nimport os\n"),
    )

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        yield from ()
