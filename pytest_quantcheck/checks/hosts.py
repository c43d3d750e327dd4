"""The largest file against what a host takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.quantities import counted, format_size, format_sizes


class Host(NamedTuple):
    """The largest file a host takes, and how to get around it."""

    name: str
    bytes: int
    remedy: str
    source: str


HOSTS = (
    Host(
        "github",
        100 << 20,
        "track it with Git LFS or attach it to a release",
        "docs.github.com, About large files on GitHub: files larger than 100 MiB are blocked",
    ),
    Host(
        "github-release",
        (2 << 30) - 1,
        "split it into shards",
        "docs.github.com, About releases: each file must be under 2 GiB",
    ),
    Host(
        "huggingface",
        500 * 10**9,
        "split it into shards",
        "huggingface.co/docs/hub/storage-limits: 500GB is the hard limit for a single file (under 200 GB recommended)",
    ),
)


def check_host(sizes: Mapping[str, int], name: str) -> Verdict:
    """Require every file (its bytes by name) to be one that a host takes."""
    host = next((host for host in HOSTS if host.name == name), None)
    if host is None:
        raise ValueError(f"host `{name}` is not one of {', '.join(host.name for host in HOSTS)}")
    if not sizes:
        return Verdict("host", False, f"{name}: there is no file at all")
    largest = max(sizes, key=sizes.__getitem__)
    headline = f"{name}: the largest of {counted(len(sizes), 'file')}, `{largest}`, has {format_sizes(sizes[largest])}"
    headline = f"{headline}, allowed {format_sizes(host.bytes)} a file"
    over = sorted((file for file in sizes if sizes[file] > host.bytes), key=lambda file: -sizes[file])
    lines = [f"{file}: over by {format_size(sizes[file] - host.bytes)}" for file in over]
    details = (*worst(lines), f"{host.remedy} ({host.source})")
    return Verdict("host", not over, headline, details, (), sizes[largest], host.bytes, "bytes")
