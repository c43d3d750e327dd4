"""What a run says in a line, and which of its checks have to be looked at."""

from __future__ import annotations

from pytest_quantcheck.checks.size import WHERE
from pytest_quantcheck.quantities import counted
from pytest_quantcheck.report.run import ArtifactRun, Checked, Run, Status


def status(artifact: ArtifactRun) -> Status:
    """Return `error` where something could not be checked, else `failed` where a check failed; no check is an error."""
    found = {checked["status"] for checked in artifact["checks"]}
    if artifact["error"] is not None or not found or "error" in found:
        return "error"
    return "failed" if "failed" in found else "passed"


def not_passed(artifact: ArtifactRun) -> list[Checked]:
    """Return the checks of an artifact that did not pass; none of one that could not be read, which says it all."""
    if artifact["error"] is not None:
        return []
    return [checked for checked in artifact["checks"] if checked["status"] != "passed"]


def said_once(checks: list[Checked]) -> list[Checked]:
    """Return the checks of an artifact with the project's own words at the first alone."""
    return [*checks[:1], *(Checked(**{**checked, "message": None}) for checked in checks[1:])]


def own_details(checked: Checked) -> list[str]:
    """Return the details without the table of all bytes, for who has that elsewhere or has no room."""
    details = checked["details"]
    return details[: details.index(WHERE)] if WHERE in details else details


def failures(run: Run) -> list[ArtifactRun]:
    """Return the artifacts that failed or could not be checked."""
    return [artifact for artifact in run["artifacts"] if status(artifact) != "passed"]


def headline(run: Run) -> str:
    """Return the verdict of a run in one line."""
    checks = sum(len(artifact["checks"]) for artifact in run["artifacts"])
    artifacts = counted(len(run["artifacts"]), "artifact")
    wrong = failures(run)
    stopped = "; interrupted before every check was made" if run["partial"] else ""
    if not run["artifacts"]:
        return f"nothing was checked{stopped}"
    if not wrong:
        return f"{artifacts}, {counted(checks, 'check')}: all good{stopped}"
    failed, unread = (sum(status(artifact) == kind for artifact in wrong) for kind in ("failed", "error"))
    parts = [f"{failed:,} failed"] if failed else []
    parts += [f"{unread:,} could not be checked"] if unread else []
    return f"{', '.join(parts)} of {artifacts}{stopped}"
