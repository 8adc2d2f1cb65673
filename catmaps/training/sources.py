"""Where a run's data lie: the embedded corpus, a directory of shards, a mixture of several, or an object store.

What is small (manifest, tokenizer, counts, held-out splits) is always read from a local directory; shards of the train
split are read where they are.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.text.build import ensure_embedded
from catmaps.text.manifest import MANIFEST_FILE, Manifest, load_manifest
from catmaps.text.pool import Part, pool
from catmaps.text.shards import TOKENIZER_FILE, check_hash, hashed_files, token_counts, verify

BLOCK = 2**26


@dataclass(frozen=True)
class Source:
    """One directory of shards that a run reads.

    Attributes:
        place: As the user named it: a directory or the URL of one.
        local: The directory, or what is kept here of a remote one.
        weight: Its share of the sequences, of all shares' sum.
    """

    place: str
    local: Path
    weight: float
    manifest: Manifest

    @property
    def remote(self) -> bool:
        return is_url(self.place)

    def train_paths(self) -> list[str]:
        """Paths or URLs of the train split's shards."""
        root = self.place.rstrip("/") if self.remote else str(self.local)
        return [f"{root}/{shard.file}" for shard in self.manifest.split("train").shards]

    def files(self) -> list[tuple[Path, str]]:
        """The local files and their hashes."""
        train = set() if not self.remote else set(self.manifest.split("train").files) - {_counts(self.manifest)}
        return [(file, digest) for file, digest in hashed_files(self.local, self.manifest) if file.name not in train]


def cache_folder() -> Path:
    """Where shards of the embedded corpus are kept: $CATMAPS_CACHE, or ~/.cache/catmaps."""
    return Path(os.environ.get("CATMAPS_CACHE", Path.home() / ".cache" / "catmaps"))


def is_url(place: str) -> bool:
    """Whether a place of data is in an object store or on the web. file:// is a directory."""
    return "://" in place and not place.startswith("file://")


def find_sources(config: Config) -> tuple[Source, ...]:
    """The run's directories of shards, sizes checked; those of the embedded corpus are built at first use.

    Raises:
        UserError: One is missing, in parts or unreachable, or they have different tokenizers.
    """
    data = config.data
    if data.shards is None and not data.mixture:
        local = ensure_embedded(cache_folder(), data.tokenizer)
        return (Source(str(local), local, 1.0, load_manifest(local)),)
    places = data.mixture or {str(data.shards): 1.0}
    sources = tuple(_source(place, weight) for place, weight in places.items())
    first = sources[0]
    for source in sources[1:]:
        if source.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise UserError(
                f"{source.place} has another tokenizer ({source.manifest.tokenizer}) than {first.place} "
                f"({first.manifest.tokenizer}): build both with the same tokenizer.json"
            )
    return sources


def _source(place: str, weight: float) -> Source:
    if is_url(place):
        local = _mirror(place.rstrip("/"))
        return Source(place, local, weight, load_manifest(local))
    local = Path(place.removeprefix("file://"))
    return Source(place, local, weight, verify(local, hashes=False))


def find_shards(config: Config) -> Path:
    """One directory with all of a run's data, for who reads held-out text: of a mixture, a pool of its directories.

    Of a remote directory it lacks the train split. Raises UserError as `find_sources`.
    """
    return pooled(find_sources(config))


def pooled(sources: tuple[Source, ...]) -> Path:
    """The directory of one source; for several one of links, whose splits are theirs, one after the other."""
    if len(sources) == 1:
        return sources[0].local
    parts = [Part(source.local.absolute(), source.manifest.splits) for source in sources]
    named = "".join(f"{p.directory}\n{(p.directory / MANIFEST_FILE).read_text()}" for p in parts)
    target = cache_folder() / "pools" / hashlib.sha256(named.encode()).hexdigest()[:16]
    if not (target / MANIFEST_FILE).is_file():
        with _drafted(target) as draft:
            for file in parts[0].directory.glob("tokenizer*.json"):
                shutil.copy(file, draft / file.name)
            splits = pool(parts, draft, lambda shard, link: link.symlink_to(shard))
            replace(sources[0].manifest, splits=splits).save(draft)
    return target


def train_counts(sources: tuple[Source, ...]) -> Float[np.ndarray, "v"]:
    """How often each id occurs in what is trained on, float64; of a mixture, by its weights, out of all its tokens."""
    counts = [token_counts(source.local).astype(np.float64) for source in sources]
    if len(sources) == 1:
        return counts[0]
    tokens, weights = sum(float(count.sum()) for count in counts), sum(source.weight for source in sources)
    shares = [
        count * (source.weight / weights * tokens / float(count.sum()))
        for source, count in zip(sources, counts, strict=True)
    ]
    return np.sum(shares, axis=0)


def damage(sources: tuple[Source, ...], share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the first damaged file of one process's share of all; None if nothing is.

    A file is read once: what was found whole, and has the size, time and place it had then, is not read again.
    """
    seen = cache_folder() / "verified"
    try:
        seen.mkdir(parents=True, exist_ok=True)
        for file, digest in [found for source in sources for found in source.files()][share::shares]:
            stat = file.stat()
            known = f"{file.absolute()}\n{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n{digest}"
            mark = seen / hashlib.sha256(known.encode()).hexdigest()
            if not mark.exists():
                check_hash(file, digest)
                mark.touch()
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"cannot read {error.filename} ({error.strerror})"
    return None


def check_same(folder: Path, shards: Path, places: str) -> None:
    """Whether data are those that a run was begun with, by their hashes, wherever they lie.

    Raises:
        UserError: They are others; names the first difference.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise UserError(f"{folder / MANIFEST_FILE} is missing: copy the run's folder again")
    found = load_manifest(folder).difference(load_manifest(shards))
    if found is not None:
        raise UserError(
            f"{places} is not what {folder} was begun with: it differs in {found}; name the right place with "
            f"--resume {folder} --data.shards DIR"
        )


def _mirror(url: str) -> Path:
    """What is kept here of a remote directory: all but the shards and boundaries of its train split."""
    manifest = _fetched(f"{url}/{MANIFEST_FILE}")
    key = hashlib.sha256(url.encode() + b"\n" + manifest).hexdigest()[:16]
    target = cache_folder() / "remote" / key
    if not (target / MANIFEST_FILE).is_file():
        with _drafted(target) as draft:
            (draft / MANIFEST_FILE).write_bytes(manifest)
            described = load_manifest(draft)
            if _counts(described) is None:
                raise UserError(f"{url} was built by an earlier version, without counts: build it again")
            (draft / TOKENIZER_FILE).write_bytes(raw := _fetched(f"{url}/{TOKENIZER_FILE}"))
            if "catmaps_tokenizer" not in json.loads(raw):
                (draft / "tokenizer_config.json").write_bytes(_fetched(f"{url}/tokenizer_config.json"))
            for file, digest in Source(url, draft, 1.0, described).files()[1:]:
                _fetch(f"{url}/{file.name}", file)
                check_hash(file, digest)
            check_hash(draft / TOKENIZER_FILE, described.tokenizer_sha256)
    return target


def _counts(manifest: Manifest) -> str | None:
    return manifest.split("train").counts


def _fetched(url: str) -> bytes:
    return b"".join(_blocks(url))


def _fetch(url: str, file: Path) -> None:
    with file.open("wb") as out:
        for block in _blocks(url):
            out.write(block)


def _blocks(url: str) -> Iterator[bytes]:
    """A remote file in pieces, by the engine's clients: s3, gs, r2, weka, http and https."""
    try:
        from olmo_core.io import get_bytes_range, get_file_size
    except ImportError as error:
        raise UserError("reading from an object store needs the engine: pip install 'catmaps[train]'") from error
    try:
        size = get_file_size(url)
        for start in range(0, size, BLOCK):
            yield get_bytes_range(url, start, min(BLOCK, size - start))
    except Exception as error:  # each store's library has its own kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot read {url} ({reason})") from error


@contextmanager
def _drafted(target: Path) -> Iterator[Path]:
    """A directory that takes the name `target` when it is complete; another process may have been first."""
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    draft.mkdir(parents=True)
    try:
        yield draft
        try:
            os.rename(draft, target)
        except OSError:
            if not (target / MANIFEST_FILE).is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
