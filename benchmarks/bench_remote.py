"""A file on a server: counting Mistral-7B in NF4 by its URL, with downloading it first beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import measure
from tests import layouts
from tests.ranges import Ranges, serving

OURS = "from pytest_quantcheck import count_params; assert count_params({url!r}) == 7_241_732_096"
DOWNLOAD = """
import tempfile, urllib.request
from pytest_quantcheck import count_params
with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    for start in range(0, {size}, 64 << 20):
        wanted = {{"Range": f"bytes={{start}}-{{min(start + (64 << 20), {size}) - 1}}"}}
        with urllib.request.urlopen(urllib.request.Request({url!r}, headers=wanted)) as answer:
            file.write(answer.read())
    file.flush()
    assert count_params(file.name) == 7_241_732_096
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mistral.safetensors"
        layouts.write_file(path, layouts.mistral_7b())
        with serving(path.parent) as server:
            url, size = server.url(path.name), path.stat().st_size
            commands = {"by URL": OURS.format(url=url), "download": DOWNLOAD.format(url=url, size=size)}
            for name, code in commands.items():
                _traffic(server, name, code, size)
            measure.table(measure.in_turns({name: measure.python(code) for name, code in commands.items()}, rounds=1))


def _traffic(server: Ranges, name: str, code: str, size: int) -> None:
    server.requests.clear()
    measure.run(measure.python(code))
    share = server.bytes_served / size
    print(f"{name}: {server.bytes_served:,} of {size:,} bytes ({share:.2%}) in {len(server.requests)} requests")
