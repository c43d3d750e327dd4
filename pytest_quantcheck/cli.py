"""The command line: `quantcheck inspect`, `why`, `diff`, `predict`, `compare`, `check`, `init`, `lint`.

Exit code 0: all good, notes and warnings included. 1: findings of severity error (`--strict`: warnings too).
2: could not check; one line on stderr says why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pytest_quantcheck.errors import FormatError, printable
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted

if TYPE_CHECKING:
    from pytest_quantcheck.report.run import Run

OK, FOUND, COULD_NOT_CHECK = 0, 1, 2
SIGNALLED = 130

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document (schema 1) instead of tables."
)
strict_option = click.option("--strict", is_flag=True, help="Exit with 1 on warnings too.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pytest-quantcheck", prog_name="quantcheck")
def cli() -> None:
    """The test kit for quantized models: logical parameter counts, dequantization fidelity and sizes."""


@cli.command(short_help="Count and weigh every tensor of a checkpoint.")
@click.argument("path", type=click.Path())
@json_option
@strict_option
@click.option(
    "--verify-architecture",
    is_flag=True,
    help="Have transformers build the model of config.json on the meta device and report every shape that disagrees.",
)
def inspect(path: str, as_json: bool, strict: bool, verify_architecture: bool) -> int:
    """Show every tensor of PATH: its logical shape beside what is stored, its scheme, bits and bytes; then totals.

    PATH is a file, an index, a checkpoint folder, or the URL of a file. Only headers are read.
    """
    from pytest_quantcheck.artifact import uncollected

    with uncollected():
        findings = _show(path, as_json, verify_architecture)
    return _exit_code(findings, strict=strict)


def _show(path: str, as_json: bool, verify_architecture: bool) -> Sequence[Finding]:
    """Print the artifact at a path and return its findings."""
    from pytest_quantcheck.artifact import inspect as inspect_path

    artifact = inspect_path(path, verify_architecture=verify_architecture)
    if as_json:
        from pytest_quantcheck.report.json import of_artifact

        _print_json(of_artifact(artifact))
    else:
        from pytest_quantcheck.report.terminal import print_artifact

        print_artifact(artifact)
    return artifact.findings


@cli.command(short_help="Explain the size: where the bytes go, and what could be saved.")
@click.argument("path", type=click.Path())
@json_option
@click.option(
    "--depth",
    type=click.IntRange(0, 4),
    default=2,
    show_default=True,
    help="How far the tree goes: 1 components, 2 layers, 3 tensors, 4 parts; 0 shows none.",
)
def why(path: str, as_json: bool, depth: int) -> int:
    """Explain why PATH has the size it has: what it was expected to be, and every byte under its reason.

    Each reason says what it could save at most. Large tensors of one size are compared by content, except of a URL.
    """
    from pytest_quantcheck.artifact import inspect as inspect_path
    from pytest_quantcheck.checks.tree import tree
    from pytest_quantcheck.checks.why import explain

    artifact = inspect_path(path)
    explanation, root = explain(artifact), tree(artifact, depth)
    if as_json:
        from pytest_quantcheck.report.json import of_explanation

        _print_json(of_explanation(explanation, root))
    else:
        from pytest_quantcheck.report.sizes import print_explanation

        print_explanation(explanation, root)
    return OK


@cli.command(short_help="List what grew and what shrank from one checkpoint to another.")
@click.argument("old", type=click.Path())
@click.argument("new", type=click.Path())
@json_option
@click.option(
    "--limit", type=click.IntRange(0), default=20, show_default=True, help="Rows of tensors; the rest are summed."
)
def diff(old: str, new: str, as_json: bool, limit: int) -> int:
    """List what changed from OLD to NEW, per byte class and per tensor: what grew most first, then what shrank most.

    Only headers are read. A difference is no finding: the exit code is 0.
    """
    from pytest_quantcheck.artifact import inspect as inspect_path
    from pytest_quantcheck.checks.diff import difference

    found = difference(inspect_path(old), inspect_path(new))
    if as_json:
        from pytest_quantcheck.report.json import of_difference

        _print_json(of_difference(found, limit))
    else:
        from pytest_quantcheck.report.sizes import print_difference

        print_difference(found, limit)
    return OK


@cli.command(short_help="Tell the size of a model before it is quantized.")
@click.argument("path", type=click.Path())
@json_option
@click.option("--recipe", "recipes", multiple=True, metavar="NAME", help="Show this recipe in full; may be repeated.")
@click.option(
    "--fits",
    multiple=True,
    metavar="SIZE",
    help="List what fits in SIZE, such as '24 GB' or '24 GiB'; may be repeated.",
)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Load the unquantized model in this dtype.")
def predict(path: str, as_json: bool, recipes: tuple[str, ...], fits: tuple[str, ...], dtype: str | None) -> int:
    """Tell how many bytes the tensors of PATH will have under each recipe, and what will fit.

    PATH is a config.json or a folder with one (needs transformers), or an unquantized checkpoint. Tensor bytes are
    exact; headers and tokenizers come on top. Without --recipe, a table of all recipes.
    """
    from pytest_quantcheck.checks.predict import predict as predict_sizes

    prediction = predict_sizes(path, recipes, dtype=dtype, fits=fits)
    if as_json:
        from pytest_quantcheck.report.json import of_prediction

        _print_json(of_prediction(prediction))
    else:
        from pytest_quantcheck.report.predictions import print_prediction

        print_prediction(prediction, in_full=bool(recipes))
    return OK


@cli.command(short_help="Compare decoded values with the original.")
@click.argument("path", type=click.Path())
@click.argument("reference", type=click.Path())
@json_option
@strict_option
@click.option(
    "--min-sqnr-db",
    "floors",
    multiple=True,
    metavar="[PATTERN=]DB",
    help="Require this SQNR instead of what is expected of each encoding; of the tensors that a pattern matches, the "
    "first pattern counts. May be given again.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to decode: cpu, cuda, cuda:1 ...")
@click.option(
    "--max-steps",
    type=float,
    help="Allow errors of so many quantization steps, where they are known; rounding to nearest has 0.5. Slow.",
)
@click.option("--workers", type=click.IntRange(1), help="Spread the work over so many processes instead of threads.")
@click.option("--dask", metavar="ADDRESS", help="Spread the work over the Dask cluster with this scheduler.")
def compare(
    path: str,
    reference: str,
    as_json: bool,
    strict: bool,
    floors: tuple[str, ...],
    max_steps: float | None,
    device: str,
    workers: int | None,
    dask: str | None,
) -> int:
    """Decode PATH and compare every tensor with REFERENCE, the unquantized checkpoint. Needs torch."""
    from pytest_quantcheck import executors
    from pytest_quantcheck.artifact import inspect as inspect_path
    from pytest_quantcheck.checks.fidelity import Limits
    from pytest_quantcheck.checks.fidelity import compare as compare_values
    from pytest_quantcheck.report.progress import progress

    limits = Limits(min_sqnr_db=_floors(floors) if floors else "auto", max_steps=max_steps)
    artifact, other = inspect_path(path), inspect_path(reference)
    _require_torch(device)
    with executors.chosen(workers, dask) as executor, progress("comparing") as told:
        comparison = compare_values(artifact, other, limits, device=device, executor=executor, progress=told)
    if as_json:
        from pytest_quantcheck.report.json import of_comparison

        _print_json(of_comparison(comparison))
    else:
        from pytest_quantcheck.report.terminal import print_comparison

        print_comparison(comparison)
    return _exit_code(comparison.findings, strict=strict)


def _floors(floors: Sequence[str]) -> dict[str, float]:
    """The floors by pattern; one without a pattern is for all, after those with one."""
    parsed: dict[str, float] = {}
    for floor in floors:
        pattern, _, decibels = floor.rpartition("=")
        try:
            parsed[pattern] = float(decibels)
        except ValueError:
            raise click.UsageError(f"--min-sqnr-db `{floor}` is neither DB nor PATTERN=DB") from None
    everything = parsed.pop("", None)
    return parsed if everything is None else parsed | {"*": everything}


@cli.command(short_help="Make every check of quantcheck.toml.")
@click.argument("config", type=click.Path(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the run as one JSON document (schema 1).")
@click.option("--html", type=click.Path(), help="Write a report to look at: one file, offline.")
@click.option("--markdown", type=click.Path(), help="Write a summary in Markdown.")
@click.option("--junit", type=click.Path(), help="Write JUnit XML.")
@click.option("-k", "only", default="", metavar="TEXT", help="Only checks whose id (`NAME::KEY`) contains this.")
@click.option("--device", default="cpu", show_default=True, help="Where to decode: cpu, cuda, cuda:1 ...")
@click.option("--update", is_flag=True, help="Record the baselines anew; fails where one changed. Not in CI.")
@click.option("--force", is_flag=True, help="Update in CI as well.")
def check(
    config: str | None, as_json: bool, only: str, device: str, update: bool, force: bool, **reports: str | None
) -> int:
    """Make every check of CONFIG: quantcheck.toml, or [tool.quantcheck] in pyproject.toml.

    Exits with 1 where a check failed, with 2 where something could not be checked.
    """
    from pytest_quantcheck import config as configs
    from pytest_quantcheck import lock, runner
    from pytest_quantcheck.report import sinks

    if update:
        lock.require_update_allowed(force)
    loaded = configs.load(config or configs.find())
    documents = as_json or sinks.shows_documents(reports)
    planned = runner.plan(loaded, device=device, update=update, documents=documents)
    if update and not any("baseline" in entry.settings for entry in planned.entries()):
        raise ValueError(f"{loaded.path}: no artifact has `baseline`, so there is nothing to update")
    return _report(runner.run(planned, only=only), as_json, reports)


def _report(run: Run, as_json: bool, reports: Mapping[str, str | None]) -> int:
    """Show and write a run, and return its exit code."""
    from pytest_quantcheck.report import sinks
    from pytest_quantcheck.report.check_terminal import print_run
    from pytest_quantcheck.report.terminal import open_console

    if as_json:
        sys.stdout.write(sinks.render(run, "json"))
    else:
        print_run(run, open_console())
    sinks.write(run, reports)
    sinks.tell_github(run, lambda text: print(text, file=sys.stderr))
    return SIGNALLED if run["partial"] else run["exit_code"]


@cli.command("check-size", short_help="Check the size budgets of the artifacts that files belong to.")
@click.argument("paths", metavar="FILE...", nargs=-1, type=click.Path())
@click.option("--config", type=click.Path(), help="The configuration, where it is not quantcheck.toml.")
def check_size(paths: tuple[str, ...], config: str | None) -> int:
    """Check the size budgets and host limits of the artifacts that FILE... belong to: the pre-commit hook.

    All of them where the configuration itself is among the files; nothing where no file belongs to an artifact.
    """
    from pytest_quantcheck import config as configs
    from pytest_quantcheck import runner
    from pytest_quantcheck.keys import SIZES

    loaded = configs.having(configs.load(config or configs.find()), paths, SIZES)
    if not loaded.entries:
        return OK
    run = runner.run(runner.plan(loaded, documents=False), keys=SIZES)
    return _report(run, False, {}) if run["exit_code"] else OK


@cli.command(short_help="Write a quantcheck.toml from artifacts as they are today.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path())
@click.option("--output", type=click.Path(), default="quantcheck.toml", show_default=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Overwrite it.")
def init(paths: tuple[str, ...], output: str, force: bool) -> int:
    """Write a configuration from PATH... as they are today: counts exact, sizes + 5 %, what is plain stays plain.

    Only headers are read. The first `quantcheck check` is green.
    """
    from pytest_quantcheck.report.atomic import write_text
    from pytest_quantcheck.starter import render

    if os.path.lexists(output) and not force:
        raise ValueError(f"{output}: is there already (--force overwrites it)")
    different = list({os.path.abspath(path): path for path in paths}.values())
    write_text(output, render(different, os.path.dirname(output)))
    print(printable(f"{output}: {counted(len(different), 'artifact')}; now run: quantcheck check {output}"))
    return OK


@cli.command(
    short_help="Flag naive parameter counts in source code.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lint(arguments: tuple[str, ...]) -> int:
    """Flag naive parameter counts in source code: the same as `quantcheck-lint`."""
    from quantcheck_lint.cli import main as lint_main

    return lint_main(list(arguments)) or OK


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; whatever goes wrong is one line, never a traceback."""
    try:
        code = cli.main(arguments, prog_name="quantcheck", standalone_mode=False)
        sys.stdout.flush()
    except (FormatError, ValueError, TypeError, ImportError) as error:
        _fail(str(error))
    except click.UsageError as error:
        _fail(error.format_message() + (f" (see {error.ctx.command_path} --help)" if error.ctx else ""))
    except click.ClickException as error:
        _fail(error.format_message())
    except BrokenPipeError:
        # The reader has seen enough: `quantcheck inspect ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except (click.Abort, KeyboardInterrupt):
        code = SIGNALLED
    except MemoryError:
        _fail("out of memory")
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    line = " ".join(printable(part) for part in message.splitlines() if part)
    print(f"quantcheck: error: {line}", file=sys.stderr)
    sys.exit(COULD_NOT_CHECK)


def _print_json(document: dict[str, Any]) -> None:
    from pytest_quantcheck.report.json import dumps

    print(dumps(document))


def _exit_code(findings: Sequence[Finding], *, strict: bool) -> int:
    serious = ("error", "warning") if strict else ("error",)
    return FOUND if any(finding.severity in serious for finding in findings) else OK


def _require_torch(device: str) -> None:
    """Fail in one line where values cannot be decoded at all."""
    from pytest_quantcheck.asserts import require_torch

    require_torch("compare decodes values")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.ClickException(f"device `{device}` cannot be used: {str(error).splitlines()[0]}") from None
