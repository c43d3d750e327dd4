"""One file on a server: the right bytes or an error, never wrong ones; headers only, and nothing secret shown."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest
import safetensors.torch
import torch

from pytest_quantcheck import (
    FormatError,
    assert_checkpoint_intact,
    assert_dequant_fidelity,
    assert_size_budget,
    count_params,
    inspect,
)
from pytest_quantcheck.checks.why import explain
from pytest_quantcheck.containers import remote
from tests import gguf_files, layouts, test_tflite
from tests.ranges import Answer, serving

NAMES = ("odd.safetensors", "odd.gguf", "odd.bin", "legacy.pt", "odd.tflite")
PARAMS = 1027 * 769 + 513 * 67
FAR = 3 << 20  # a byte of the first tensor, far behind what opening reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same two matrices, as real writers write them, the second megabytes behind the header."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(1027, 769), "b.weight": torch.randn(513, 67)}
    safetensors.torch.save_file(weights, folder / "odd.safetensors")
    torch.save(weights, folder / "odd.bin")
    torch.save(weights, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    raw = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    tensors = [gguf_files.Tensor(name, "F32", tuple(weights[name].shape), raw[name]) for name in raw]
    (folder / "odd.gguf").write_bytes(gguf_files.gguf(tensors))
    rows = [test_tflite.Row(name, "FLOAT32", tuple(weights[name].shape), raw[name]) for name in raw]
    test_tflite.write(folder / "odd.tflite", rows)
    values = 0.02 * torch.randn(515, 96)
    safetensors.torch.save_file({"c.weight": values}, folder / "plain.safetensors")
    codes = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    encoded = gguf_files.Tensor("c.weight", "Q8_0", (515, 96), codes.tobytes())
    (folder / "q8.gguf").write_bytes(gguf_files.gguf([encoded]))
    splits = [gguf_files.key("split.count", "u16", 2), gguf_files.key("split.no", "u16", 0)]
    (folder / "of-00001-of-00002.gguf").write_bytes(gguf_files.gguf(tensors[1:], splits))
    (folder / "empty.safetensors").touch()
    (folder / "model.onnx").touch()
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture
def file(server):
    return remote.RemoteFile(server.url("odd.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_url_is_what_the_file_is(server, folder, name):
    there, here = inspect(server.url(name)), inspect(folder / name)
    assert there.logical_params == here.logical_params == PARAMS
    assert (there.file_bytes, there.bytes, there.container) == (here.file_bytes, here.bytes, here.container)
    assert [tensor.shape for tensor in there.tensors] == [tensor.shape for tensor in here.tensors]
    assert there.source == server.url(name)
    assert torch.equal(there.tensor("b.weight").decode(3, 11), here.tensor("b.weight").decode(3, 11))


def test_the_checks_take_a_url(server, folder):
    url = server.url("odd.safetensors")
    assert count_params(url) == PARAMS
    assert_size_budget(url, "3.4 MB")
    assert_checkpoint_intact(url)
    assert_dequant_fidelity(server.url("q8.gguf"), server.url("plain.safetensors"))
    with pytest.raises(AssertionError, match=re.escape(url) + "|size"):
        assert_size_budget(url, "3.2 MB")


def test_headers_of_7b_cost_a_thousandth_and_no_torch(tmp_path):
    """Nothing but the header and 224 records, each read with the block around it; `why` asks for nothing more."""
    size = layouts.write_file(tmp_path / "mistral.safetensors", layouts.mistral_7b())
    code = (
        "import sys; from pytest_quantcheck.cli import main\n"
        "try: main([*sys.argv[1:], '--json'])\n"
        "finally: assert not {'torch', 'numpy', 'requests', 'urllib3'} & sys.modules.keys(), 'heavy'"
    )
    for command in ("inspect", "why"):
        with serving(tmp_path) as server:
            done = subprocess.run(
                [sys.executable, "-c", code, command, server.url("mistral.safetensors")],
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(done.stdout)["logical_params"] == 7_241_732_096
            assert server.bytes_served < size / 900
            assert len(server.requests) < 2 + 224 + 5
            assert server.connections == 1


def test_a_plain_header_is_one_or_two_requests(tmp_path):
    layouts.write_file(tmp_path / "plain.safetensors", layouts.mistral_7b(quantized=False))
    gguf_files.write_sparse(
        tmp_path / "plain.gguf", [gguf_files.Tensor(f"t{n}", "Q4_K", (4096, 4096)) for n in range(300)]
    )
    for name in ("plain.safetensors", "plain.gguf"):
        with serving(tmp_path) as server:
            inspect(server.url(name))
            assert len(server.requests) <= 2
            assert server.bytes_served <= 1 << 20


def test_blocks_give_the_bytes_of_the_file_in_bounded_memory(server, folder, file):
    whole = (folder / "odd.safetensors").read_bytes()
    size = len(whole)
    block = remote.BLOCK
    for start, stop in [
        (0, 0),
        (5, 5),
        (block - 1, block + 1),
        (size - 1, size),
        (FAR, FAR + 3 * block + 7),
        (0, size),
    ]:
        assert file.read(start, stop) == whole[start:stop]
    assert file.read_each([(7, 9), (FAR, FAR + 2)]) == [whole[7:9], whole[FAR : FAR + 2]]
    assert len(file._blocks) <= remote.BLOCKS


def test_what_is_large_is_not_kept(server, folder, file, monkeypatch):
    monkeypatch.setattr(remote, "DIRECT", 1 << 16)
    monkeypatch.setattr(remote, "BLOCKS", 3)
    whole = (folder / "odd.safetensors").read_bytes()
    assert file.read(11, 1 << 20) == whole[11 : 1 << 20]
    for start in range(0, 1 << 20, 50_001):
        assert file.read(start, start + 60_000) == whole[start : start + 60_000]
        assert len(file._blocks) <= 3


def test_threads_share_a_file_and_another_process_opens_it_anew(server, folder, file):
    whole = (folder / "odd.safetensors").read_bytes()
    places = [(at * 99_991 % FAR, 4099) for at in range(64)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda place: bytes(file.read(place[0], sum(place))), places))
    assert found == [whole[start : start + size] for start, size in places]
    again = pickle.loads(pickle.dumps(file))
    assert (again.url, again.version) == (file.url, file.version)
    assert again.read(FAR, FAR + 5) == whole[FAR : FAR + 5]


def headers(**changed: str | None):
    """Answers with these headers in place of theirs; None is one that is not there."""

    def fault(answer: Answer) -> None:
        for name, value in changed.items():
            answer.headers.pop(name.replace("_", "-"))
            if value is not None:
                answer.headers[name.replace("_", "-")] = value

    return fault


def answers(**changed: object):
    def fault(answer: Answer) -> None:
        for name, value in changed.items():
            setattr(answer, name, value)

    return fault


def body(change):
    """Answers with another body than the headers say."""

    def fault(answer: Answer) -> None:
        answer.content = change(answer.content)

    return fault


def other_range(answer: Answer) -> None:
    answer.headers["Content-Range"] = f"bytes {answer.start + 1}-{answer.start + len(answer.content)}/{answer.size}"


def shorter_range(answer: Answer) -> None:
    answer.content = answer.content[:-5]
    answer.headers["Content-Length"] = str(len(answer.content))
    last = answer.start + len(answer.content) - 1
    answer.headers["Content-Range"] = f"bytes {answer.start}-{last}/{answer.size}"


def longer_length(answer: Answer) -> None:
    answer.content += b"more"
    answer.headers["Content-Length"] = str(len(answer.content))


def added(name: str, value: str):
    def fault(answer: Answer) -> None:
        answer.headers[name] = value

    return fault


def chunked(answer: Answer) -> None:
    answer.headers.pop("Content-Length")
    answer.headers["Transfer-Encoding"] = "chunked"
    half = len(answer.content) // 2
    chunks = (answer.content[:half], answer.content[half:], b"")
    answer.content = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


def cut_chunk(answer: Answer) -> None:
    chunked(answer)
    answer.content = answer.content[:-100]


def chunk_too_many(answer: Answer) -> None:
    answer.content += b"more"
    chunked(answer)


FAULTS = {
    "cut-chunk": (cut_chunk, "the answer ends after "),
    "chunk-too-many": (chunk_too_many, "the answer has more than the "),
    "drop": (answers(drops=True), "cannot be read: "),
    "short-body": (body(lambda content: content[:-7]), "the answer ends after "),
    "no-body": (body(lambda content: b""), "the answer ends after 0 of "),
    "more-than-asked": (longer_length, "the answer has more than the "),
    "200-for-206": (answers(status=200), "sends whole files only (200 where 206 belongs): download the file"),
    "404": (answers(status=404), "the server answers 404 Not Found"),
    "401": (answers(status=401), "the server answers 401 Unauthorized (no token is sent)"),
    "416": (answers(status=416), "the server has no such bytes (416)"),
    "500": (answers(status=500), "the server answers 500 Internal Server Error"),
    "no-content-range": (headers(Content_Range=None), "does not say which one, or of what size"),
    "unknown-size": (headers(Content_Range="bytes 0-262143/*"), "does not say which one, or of what size"),
    "other-range": (other_range, "answers with bytes "),
    "shorter-range": (shorter_range, "were asked for)"),
    "compressed": (added("Content-Encoding", "gzip"), "is sent as `gzip`"),
    "not-http": (answers(status=99999), "does not answer as HTTP has it"),
}
LATER = {
    "changed-etag": (headers(ETag='"two"'), "changed while being read"),
    "lost-etag": (headers(ETag=None), "changed while being read"),
    "changed-date": (headers(Last_Modified="Sun, 22 Nov 2026 10:00:01 GMT"), "changed while being read"),
    "shrunk": (headers(Content_Range="bytes 3145728-99/100"), "were asked for)"),
    "changed-size": (
        lambda answer: answer.headers.update(
            {"Content-Range": answer.headers["Content-Range"].replace(f"/{answer.size}", f"/{answer.size + 1}")}
        ),
        "changed while being read",
    ),
}


@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_when_it_is_opened_is_one_line(server, fault, said):
    server.fault = fault
    with pytest.raises(FormatError) as error:
        inspect(server.url("odd.safetensors"))
    assert said in str(error.value)
    assert str(error.value).startswith(server.url("odd.safetensors: "))


@pytest.mark.parametrize(("fault", "said"), {**FAULTS, **LATER}.values(), ids={**FAULTS, **LATER})
def test_a_fault_later_is_one_line_and_the_file_reads_on_after_it(server, folder, file, fault, said):
    server.fault = fault
    with pytest.raises(FormatError, match=re.escape(said)):
        file.read(FAR, FAR + 100)
    server.fault = lambda answer: None
    assert file.read(FAR, FAR + 100) == (folder / "odd.safetensors").read_bytes()[FAR : FAR + 100]


def test_a_body_in_chunks_is_read(server, folder, file):
    server.fault = chunked
    assert file.read(FAR, FAR + 100) == (folder / "odd.safetensors").read_bytes()[FAR : FAR + 100]


@pytest.mark.parametrize("pause", [0.01, 0.4], ids=["drip", "stall"])
def test_a_slow_drip_ends_in_time(server, file, monkeypatch, pause):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.5)
    server.fault = answers(pause=pause)
    with pytest.raises(FormatError, match=r"no answer in time \(0.2 s without a byte, 0.5 s for a range\)"):
        file.read(FAR, FAR + 100)


def test_a_file_without_a_version_is_read_once_or_refused(server, folder):
    server.fault = headers(ETag='W/"weak"', Last_Modified=None)
    file = remote.RemoteFile(server.url("odd.safetensors"))
    assert file.read(0, 1000) == (folder / "odd.safetensors").read_bytes()[:1000]
    with pytest.raises(FormatError, match="a change would not be seen: download the file"):
        file.read(FAR, FAR + 1)


def test_a_connection_that_was_idle_too_long_is_made_anew(server, folder, file):
    server.fault = lambda answer: setattr(answer, "drops", answer.number == 2)
    assert file.read(FAR, FAR + 9) == (folder / "odd.safetensors").read_bytes()[FAR : FAR + 9]
    assert server.connections == 2


def redirecting(to: str | None, *, times: int = 99, status: int = 302):
    def fault(answer: Answer) -> None:
        if answer.number <= times:
            answer.status, answer.content = status, b""
            answer.headers = {"Content-Length": "0", **({"Location": to} if to is not None else {})}

    return fault


@pytest.mark.parametrize("status", remote.REDIRECTS)
def test_redirects_lead_on_and_are_remembered(server, folder, status):
    server.fault = redirecting("/odd.gguf?signature=s3cret", times=5, status=status)
    artifact = inspect(server.url("odd.gguf?download=true"))
    assert artifact.logical_params == PARAMS
    assert artifact.source == server.url("odd.gguf")
    assert [path for path, *_ in server.requests[5:]] == ["/odd.gguf?signature=s3cret"] * len(server.requests[5:])


def test_an_address_that_ran_out_is_asked_for_again(server, folder):
    server.fault = redirecting("/odd.gguf?signature=1", times=1)
    file = remote.RemoteFile(server.url("odd.gguf"))

    def expired(answer: Answer) -> None:
        if answer.number == 3:
            answer.status = 403
        if answer.number == 4:
            redirecting("/odd.gguf?signature=2")(answer)

    server.fault = expired
    assert file.read(FAR, FAR + 9) == (folder / "odd.gguf").read_bytes()[FAR : FAR + 9]
    queries = [path.partition("?")[2] for path, *_ in server.requests]
    assert queries == ["", "signature=1", "signature=1", "", "signature=2"]


ELSEWHERE = {
    "file": ("file:///etc/passwd", "is redirected to `file:///etc/passwd`, which is a URL of the scheme `file`"),
    "ftp": ("ftp://127.0.0.1/x", "which is a URL of the scheme `ftp` (https and http are read)"),
    "secret": ("http://me:s3cret@127.0.0.1/x", "which is a URL with a user name or password in it"),
    "nowhere": (None, "is redirected without saying where to"),
    "around": ("/odd.gguf", "is redirected more than 5 times (limit)"),
    "port": ("http://127.0.0.1:999999/", "which is not a URL"),
}


@pytest.mark.parametrize(("to", "said"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_redirects_elsewhere_are_refused(server, to, said):
    server.fault = redirecting(to)
    with pytest.raises(FormatError) as error:
        inspect(server.url("odd.gguf"))
    assert said in str(error.value)
    assert "s3cret" not in str(error.value)
    assert len(server.requests) == (6 if said.startswith("is redirected more") else 1)


REFUSED = {
    "scheme": ("ftp://example.org/a.gguf", "is a URL of the scheme `ftp` (https and http are read)"),
    "file": ("file:///etc/passwd.gguf", "is a URL of the scheme `file`"),
    "s3": ("s3://bucket/a.gguf", "is a URL of the scheme `s3`"),
    "secret": ("https://me:s3cret@example.org/a.gguf", "is a URL with a user name or password in it"),
    "odd-secret": ("https://me:s3c/ret@example.org/a.gguf", "is not a URL"),
    "space": ("https://example.org/a b.gguf", "is not a URL (what is not ASCII, and spaces, are written as %20)"),
    "break": ("https://example.org/a\r\nX: y.gguf", "is not a URL"),
    "no-host": ("https:///a.gguf", "is not a URL"),
    "host": ("https://a..b/a.gguf", "the server cannot be read: "),
    "ending": ("https://example.org/a.zip?x=a.gguf", "does not end like one file that we read"),
    "onnx": ("https://example.org/a.onnx", "may be in several files, and of a URL one file is read"),
    "index": ("https://example.org/model.safetensors.index.json", "may be in several files"),
    "nobody": ("http://127.0.0.1:1/a.gguf?token=s3cret", "the server cannot be read: Connection refused"),
}


@pytest.mark.parametrize(("url", "said"), REFUSED.values(), ids=REFUSED)
def test_a_url_that_is_not_read_is_one_line_on_the_command_line(url, said):
    done = quantcheck("inspect", url)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("quantcheck: error: ")
    assert said in done.stderr
    assert "s3c" not in done.stderr


def quantcheck(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest_quantcheck", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_what_is_not_one_file_is_said(server):
    with pytest.raises(FormatError, match=r"of-00001-of-00002.gguf: is one of 2 splits: of a URL one file is read"):
        inspect(server.url("of-00001-of-00002.gguf"))
    with pytest.raises(FormatError, match="the file is empty, or shorter"):
        inspect(server.url("empty.safetensors"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of the server")
    folder = tmp_path_factory.mktemp("certificate")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command = ["openssl", "req", "-x509", *curve, "-days", "2", "-subj", "/CN=test"]
    out = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "certificate"]
    subprocess.run([*command, *out], check=True, capture_output=True, cwd=folder)
    return folder


@pytest.fixture
def secure(folder, certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "certificate", certificate / "key")
    with serving(folder, context) as server:
        yield server


def test_https_is_read_and_only_with_a_valid_certificate(secure, certificate, monkeypatch):
    url = secure.url("odd.bin")
    with pytest.raises(FormatError, match="the certificate of the server is not valid: self"):
        inspect(url)
    assert secure.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "certificate"))
    assert inspect(url).logical_params == PARAMS
    secure.requests.clear()
    secure.fault = redirecting("http://127.0.0.1:1/odd.bin")
    with pytest.raises(FormatError, match="is redirected from https down to `http://"):
        inspect("HTTPS" + url.removeprefix("https"))


def test_a_configuration_takes_urls(server, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = server.url("q8.gguf?download=s3cret")
    written = quantcheck("init", url)
    assert (written.returncode, written.stderr) == (0, "")
    text = (tmp_path / "quantcheck.toml").read_text()
    assert f'path = "{url}"' in text
    text += f'host = "github"\nbaseline = true\nreference = "{server.url("plain.safetensors")}"\n'
    (tmp_path / "quantcheck.toml").write_text(text)
    assert quantcheck("check", "--update", CI="").returncode == 1  # the baseline is new
    done = quantcheck("check", "--html", "report.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 artifact, 8 checks: all good" in done.stdout
    report = json.loads(quantcheck("check", "--json").stdout)
    assert [artifact["name"] for artifact in report["artifacts"]] == ["q8.gguf"]
    assert [artifact["path"] for artifact in report["artifacts"]] == [server.url("q8.gguf")]
    assert "s3cret" not in json.dumps(report) + (tmp_path / "report.html").read_text() + done.stdout


def test_two_urls_that_end_alike_and_one_that_fails(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    urls = [server.url("odd.bin"), server.url("gone/odd.bin")]
    (tmp_path / "quantcheck.toml").write_text("".join(f'[[artifact]]\npath = "{url}"\nsize = 3\n' for url in urls))
    done = quantcheck("check")
    assert done.returncode == 2
    report = json.loads(quantcheck("check", "--json").stdout)
    assert [artifact["name"] for artifact in report["artifacts"]] == urls
    assert [checked["status"] for artifact in report["artifacts"] for checked in artifact["checks"]] == [
        "failed",
        "error",
    ]


def test_a_mark_takes_a_url(server, pytester):
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.quantized("{server.url("odd.safetensors")}")
        def test_count(quantized_checkpoint):
            assert quantized_checkpoint.logical_params == {PARAMS}
        """
    )
    pytester.runpytest().assert_outcomes(passed=1)


def test_diff_of_two_urls_reads_headers_only(server):
    done = quantcheck("diff", server.url("odd.safetensors"), server.url("odd.gguf"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert server.bytes_served < 2 << 20


def test_copies_are_not_looked_for_behind_a_url(server):
    artifact = inspect(server.url("odd.safetensors"))
    before = len(server.requests)
    assert explain(artifact).file_bytes == artifact.file_bytes
    assert len(server.requests) == before
