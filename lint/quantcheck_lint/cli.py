"""The command line: `quantcheck-lint [check] PATHS`, `quantcheck-lint rule CODE`, `quantcheck-lint rules`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from quantcheck_lint import __version__
from quantcheck_lint.actions import CANNOT_CHECK, CLEAN, PROGRAM, check_files, check_stdin, say
from quantcheck_lint.config import Settings, codes, per_file_ignores, settings_for
from quantcheck_lint.finding import CannotCheck
from quantcheck_lint.formats import FORMATS
from quantcheck_lint.rules import RULES, by_code

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@dataclass(frozen=True, slots=True)
class Options:
    """What `check` does with what it finds."""

    fix: bool
    unsafe_fixes: bool
    diff: bool
    add_noqa: str | None
    baseline: str | None
    write_baseline: bool
    output_format: str
    output_file: str | None
    statistics: bool
    exit_zero: bool
    jobs: int
    quiet: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = program.main(_with_command(arguments), prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        return _fail(f"{error.format_message()} (usage)")
    except CannotCheck as error:
        return _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted (signal)")
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CANNOT_CHECK
    return status if isinstance(status, int) else CLEAN


def _with_command(arguments: list[str]) -> list[str]:
    """`check` is what is meant when no command is named."""
    # What follows a bare `--add-noqa` is a path: the reason needs `=`.
    arguments = ["--add-noqa=" if argument == "--add-noqa" else argument for argument in arguments]
    if not arguments:
        return ["check"]
    named = arguments[0] in program.commands or arguments[0] in {"-h", "--help", "--version"}
    return arguments if named else ["check", *arguments]


def _fail(message: str) -> int:
    say(f"error: {message}")
    return CANNOT_CHECK


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name=PROGRAM)
def program() -> None:
    """Find parameter counts that are wrong on quantized models."""


@program.command(context_settings=HELP)
@click.argument("paths", nargs=-1)
@click.option("--select", multiple=True, metavar="CODES", help="Only these rules, by code, prefix or name.")
@click.option("--extend-select", multiple=True, metavar="CODES", help="These rules as well.")
@click.option("--ignore", multiple=True, metavar="CODES", help="Not these rules.")
@click.option("--per-file-ignores", multiple=True, metavar="GLOB:CODES", help="Not these rules where GLOB matches.")
@click.option("--preview/--no-preview", default=None, help="Preview rules as well.")
@click.option("--fix", is_flag=True, help="Apply safe fixes.")
@click.option("--unsafe-fixes", is_flag=True, help="Apply all fixes, those that change values as well.")
@click.option("--diff", is_flag=True, help="Show what fixes would change and write nothing.")
@click.option("--add-noqa", default=None, metavar="[=REASON]", help="Suppress what is found, with a reason.")
@click.option("--baseline", metavar="FILE", help="Report only what is beyond the counts in FILE.")
@click.option("--write-baseline", is_flag=True, help="Write what is found to the baseline.")
@click.option("--output-format", type=click.Choice(FORMATS), default="full", help="How findings are written.")
@click.option("--output-file", "-o", metavar="FILE", help="Where findings are written instead of stdout.")
@click.option("--statistics", is_flag=True, help="Findings per rule instead of findings.")
@click.option("--exit-zero", is_flag=True, help="Exit with 0 even if there are findings.")
@click.option("--exclude", multiple=True, metavar="GLOBS", help="Leave these out instead of the default list.")
@click.option("--extend-exclude", multiple=True, metavar="GLOBS", help="Leave these out as well.")
@click.option("--force-exclude/--no-force-exclude", default=None, help="Leave excluded files out even if named.")
@click.option("--respect-gitignore/--no-respect-gitignore", default=None, help="Leave out what git ignores.")
@click.option("--config", metavar="FILE", help="A pyproject.toml, instead of the nearest one upward.")
@click.option("--isolated", is_flag=True, help="Read no configuration.")
@click.option("--stdin-filename", metavar="NAME", help="The name of what is read from stdin (path `-`).")
@click.option("--jobs", "-j", type=click.IntRange(0, 256), default=0, help="Processes; 0 decides by itself.")
@click.option("--max-file-size", type=click.IntRange(1), metavar="BYTES", help="Largest source that is checked.")
@click.option("--timeout", type=click.FloatRange(0.1), metavar="SECONDS", help="For a source parsed on its own.")
@click.option("--quiet", "-q", is_flag=True, help="Findings only, no summary or hints.")
@click.pass_context
def check(context: click.Context, /, paths: tuple[str, ...], **given: Any) -> int:
    """Check files and folders (default: the current one)."""
    overrides = _overrides(given)
    options = Options(**{name: given[name] for name in Options.__slots__})
    roots = paths or (("-",) if given["stdin_filename"] else (".",))
    settings = {root: _settings(root, given, overrides) for root in dict.fromkeys(roots)}
    _warn_about_preview(next(iter(settings.values())), given)
    if "-" in settings:
        if len(settings) > 1:
            raise click.UsageError("`-` and other paths cannot be checked together")
        return check_stdin(_stdin_name(given), settings["-"], options)
    return check_files(settings, options)


def _stdin_name(given: dict[str, Any]) -> str:
    return str(given["stdin_filename"] or "-")


def _settings(root: str, given: dict[str, Any], overrides: dict[str, Any]) -> Settings:
    where = _stdin_name(given) if root == "-" else root
    found = settings_for("." if where == "-" else where, given["config"], given["isolated"])
    if "extend_select" in overrides:
        overrides = {**overrides, "extend_select": (*found.extend_select, *overrides["extend_select"])}
    if "per_file_ignores" in overrides:
        overrides = {**overrides, "per_file_ignores": (*found.per_file_ignores, *overrides["per_file_ignores"])}
    return replace(found, **overrides)


def _overrides(given: dict[str, Any]) -> dict[str, Any]:
    """What the command line says about settings."""
    out: dict[str, Any] = {}
    for name in ("select", "extend_select", "ignore"):
        if given[name]:
            out[name] = codes(f"--{name.replace('_', '-')}", given[name])
    for name in ("exclude", "extend_exclude"):
        if given[name]:
            out[name] = tuple(part.strip() for text in given[name] for part in text.split(",") if part.strip())
    if given["per_file_ignores"]:
        out["per_file_ignores"] = per_file_ignores("--per-file-ignores", _pairs(given["per_file_ignores"]))
    for name in ("preview", "force_exclude", "respect_gitignore", "max_file_size", "timeout"):
        if given[name] is not None:
            out[name] = given[name]
    return out


def _pairs(values: Sequence[str]) -> list[tuple[str, list[str]]]:
    pairs = []
    for value in values:
        glob, colon, listed = value.rpartition(":")
        if not colon or not glob:
            raise CannotCheck("--per-file-ignores", f"`{value}` is not GLOB:CODES", "usage")
        pairs.append((glob, [listed]))
    return pairs


def _warn_about_preview(settings: Settings, given: dict[str, Any]) -> None:
    named = {*settings.select, *settings.extend_select}
    off = [rule.code for rule in RULES if rule.preview and rule.code in named and not settings.preview]
    if off:
        say(f"warning: {', '.join(off)} is a preview rule and stays off without --preview")
    if not settings.rules:
        raise CannotCheck("--select", "no rule is on, nothing would be checked", "usage")


@program.command("rule", context_settings=HELP)
@click.argument("code")
def explain(code: str) -> int:
    """Explain one rule."""
    from quantcheck_lint.docs import rule_text

    found = by_code(code)
    if found is None:
        raise CannotCheck(code, "unknown rule", "see `quantcheck-lint rules`")
    click.echo(rule_text(found), nl=False)
    return CLEAN


@program.command("rules", context_settings=HELP)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_rules(as_json: bool) -> int:
    """List all rules."""
    from quantcheck_lint.docs import rules_json, rules_table

    click.echo(rules_json() if as_json else rules_table(), nl=False)
    return CLEAN


if __name__ == "__main__":
    sys.exit(main())
