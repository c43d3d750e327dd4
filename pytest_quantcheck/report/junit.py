"""JUnit XML: a suite per artifact with its numbers as properties, a case per check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from xml.sax.saxutils import escape, quoteattr

from pytest_quantcheck.report.run import ArtifactRun, Checked, Run
from pytest_quantcheck.report.shown import shown
from pytest_quantcheck.report.verdicts import status

TAGS = {"failed": "failure", "error": "error"}


def render(run: Run) -> str:
    """Return the document."""
    clean = shown(run)
    suites = "".join(map(_suite, clean["artifacts"]))
    counts = _counts(checked for artifact in clean["artifacts"] for checked in _cases(artifact))
    return f'<?xml version="1.0" encoding="utf-8"?>\n<testsuites name="quantcheck"{counts}>\n{suites}</testsuites>\n'


def _suite(artifact: ArtifactRun) -> str:
    cases = _cases(artifact)
    properties = "".join(
        f"      <property{_attributes({'name': name, 'value': str(value)})}/>\n"
        for name, value in _numbers(artifact).items()
        if value is not None
    )
    body = "".join(_case(artifact, checked) for checked in cases)
    return (
        f"  <testsuite{_attributes({'name': artifact['name']})}{_counts(cases)}>\n"
        f"    <properties>\n{properties}    </properties>\n{body}  </testsuite>\n"
    )


def _cases(artifact: ArtifactRun) -> list[Checked]:
    """The checks, or one that says that the artifact could not be read."""
    if artifact["checks"] or status(artifact) == "passed":
        return artifact["checks"]
    why = artifact["error"] or "nothing was checked"
    return [
        Checked(
            check="read",
            status="error",
            headline=why,
            details=[],
            measured=None,
            allowed=None,
            unit=None,
            where=None,
            message=None,
            findings=[],
        )
    ]


def _numbers(artifact: ArtifactRun) -> dict[str, object]:
    found, compared, grown = artifact["inspect"], artifact["compare"], artifact["baseline"]
    numbers: dict[str, object] = {"path": artifact["path"]}
    if found:
        bits = found["bits_per_weight"]
        numbers |= {key: found[key] for key in ("file_bytes", "logical_params", "quantized_fraction")}
        numbers |= {f"bytes.{kind}": size for kind, size in found["bytes"].items() if size}
        numbers |= {f"bits_per_weight.{of}": bits[of] for of in ("quantized", "model")}
    if compared:
        numbers["sqnr_db"] = compared["sqnr_db"]
    if grown:
        numbers["growth"] = grown["file_bytes"]["growth"]
    return numbers


def _case(artifact: ArtifactRun, checked: Checked) -> str:
    numbers = {key: value for key in ("measured", "allowed", "unit", "where") if (value := checked[key]) is not None}
    properties = "".join(
        f"<property{_attributes({'name': name, 'value': str(value)})}/>" for name, value in numbers.items()
    )
    inside = f"<properties>{properties}</properties>" if properties else ""
    if checked["status"] != "passed":
        tag = TAGS[checked["status"]]
        text = "\n".join([checked["headline"], *(checked["message"] or "").splitlines(), *checked["details"]])
        inside += f"<{tag}{_attributes({'type': checked['check'], 'message': checked['headline']})}>"
        inside += f"{escape(text)}</{tag}>"
    return (
        f"    <testcase{_attributes({'classname': artifact['name'], 'name': checked['check']})}>{inside}</testcase>\n"
    )


def _counts(cases: Iterable[Checked]) -> str:
    found = [checked["status"] for checked in cases]
    numbers = {"tests": len(found), "failures": found.count("failed"), "errors": found.count("error")}
    return _attributes({name: str(number) for name, number in numbers.items()})


def _attributes(values: Mapping[str, str]) -> str:
    return "".join(f" {name}={quoteattr(value)}" for name, value in values.items())
