"""Where data lie does not matter, what they are does: mixtures, moved and remote shards, other processes in between."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from processes import run
from tiny_runs import LENGTH, Job, began, losses, make_shards, rows, tiny, train_on_record, trained

from catmaps import cli
from catmaps.config import Config, DataConfig, from_json, to_json
from catmaps.errors import UserError
from catmaps.hub.export import portable
from catmaps.model import CONFIG, read_config
from catmaps.text.build import build_shards
from catmaps.text.corpus import Document
from catmaps.text.manifest import load_manifest
from catmaps.text.shards import load_boundaries, load_tokens, sequences, token_counts
from catmaps.text.tokenizers import ByteTokenizer, Text8Tokenizer
from catmaps.training import loader, sources
from catmaps.training.callbacks import MetricsCallback
from catmaps.training.sources import damage, find_shards, find_sources, train_counts
from catmaps.training.train import _validation, train, with_steps

Row = tuple[int, ...]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of texts without the letter a, twice as many as in `shards`, in several files."""
    splits, rng = ["train"] * 20 + ["valid"] * 4 + ["test"] * 2, np.random.default_rng(7)
    texts = [" ".join(rng.choice(["zig", "fox", "jump", "quick"], 60)) for _ in splits]
    documents = [Document(str(i), "tests", str(i), text, splits[i]) for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("others") / "shards"
    build_shards(documents, Text8Tokenizer(), folder, tokens_per_shard=1000, progress=False)
    return folder


def mixed(config: Config, **weights: float) -> Config:
    return replace(config, data=replace(config.data, shards=None, mixture=weights))


def batches(config: Config, skip: int = 0) -> np.ndarray:
    """(steps, rows of this process, L) of the first epoch, after so many batches."""
    made = loader.make_loader(config, find_sources(config))
    made.reshuffle(1)
    if skip:
        state = {**made.state_dict(), "batches_processed": skip, "tokens_processed": skip * made.global_batch_size}
        made.load_state_dict({**state, "source_fingerprints": ("of an earlier version",)})
    return np.stack([batch["input_ids"].numpy() for batch in made])


def as_rows(tokens: np.ndarray) -> list[Row]:
    return [tuple(row) for row in tokens.reshape(-1, tokens.shape[-1]).tolist()]


def test_a_mixture_gives_each_directory_its_share(shards: Path, others: Path) -> None:
    config = mixed(tiny(shards, steps=20), **{str(shards): 3.0, str(others): 1.0})
    seen = as_rows(batches(config)[:20])
    ours = as_rows(sequences(shards, "train", LENGTH))
    theirs = as_rows(sequences(others, "train", LENGTH))
    assert not set(ours) & set(theirs)
    from_ours, from_theirs = ([row for row in seen if row in set(of)] for of in (ours, theirs))
    assert len(seen) == len(from_ours) + len(from_theirs) == 320
    assert abs(len(from_ours) - 240) <= 2
    # Fewer than its share: shown whole, then in part once more. More than its share: none twice.
    assert all(ours.count(row) <= from_ours.count(row) <= 2 * ours.count(row) for row in set(ours))
    assert all(from_theirs.count(row) <= theirs.count(row) for row in set(from_theirs))


def test_the_order_of_a_mixture_is_free_of_processes_and_resumed(
    shards: Path, others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mixed(tiny(shards, steps=6), **{str(shards): 0.5, str(others): 0.5})
    whole = batches(config)
    assert (batches(config, skip=4) == whole[4:]).all()
    monkeypatch.setattr(loader, "get_world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(loader, "get_rank", lambda rank=rank: rank)
        halves.append(batches(config))
    assert (np.stack(halves, axis=2).reshape(whole.shape) == whole).all()


def test_counts_and_held_out_text_of_a_mixture(shards: Path, others: Path) -> None:
    config = mixed(tiny(shards), **{str(shards): 1.0, str(others): 3.0})
    config = replace(config, training=replace(config.training, evaluate_every=5, evaluate_sequences=16))
    found = find_sources(config)
    counts, parts = train_counts(found), [token_counts(folder) for folder in (shards, others)]
    assert counts.sum() == pytest.approx(sum(part.sum() for part in parts))
    expected = sum(share * part / part.sum() for share, part in zip((0.25, 0.75), parts, strict=True))
    np.testing.assert_allclose(counts / counts.sum(), expected)

    held = as_rows(_validation(config, found, MetricsCallback()).tokens.numpy())
    ours, theirs = (as_rows(sequences(folder, "valid", LENGTH)) for folder in (shards, others))
    assert [row in ours for row in held] == [True] * 4 + [False] * 12
    assert all(row in theirs for row in held[4:])

    pool = find_shards(config)
    for split in ("train", "valid", "test"):
        first, second = (load_tokens(folder, split) for folder in (shards, others))
        assert load_tokens(pool, split).tolist() == [*first, *second]
        starts = [*load_boundaries(shards, split), *(len(first) + load_boundaries(others, split))]
        assert load_boundaries(pool, split).tolist() == starts
    assert find_shards(config) == pool


def test_sequences_cross_the_ends_of_documents(tmp_path: Path, shards: Path) -> None:
    spoken = make_shards(tmp_path / "bytes", ByteTokenizer())
    config = tiny(spoken)
    config = replace(config, training=replace(config.training, evaluate_every=5))
    whole, seen = sequences(spoken, "train", LENGTH), batches(config)
    ends = ByteTokenizer().eos_id
    assert set(as_rows(seen.reshape(-1, LENGTH))) <= set(as_rows(whole))
    assert (whole == ends).sum() > 5  # a symbol within sequences, with text on both of its sides
    assert any(ends in row[1:-1] for row in as_rows(seen.reshape(-1, LENGTH)))
    valid = load_manifest(spoken).split("valid")
    assert valid.tokens == valid.characters + valid.documents
    bound = _validation(config, find_sources(config), MetricsCallback())
    assert bound.characters_per_token == pytest.approx(valid.characters / valid.tokens)

    joined = load_tokens(shards, "train")
    assert (joined[load_boundaries(shards, "train")[1:] - 1] == 0).all()  # 27 symbols: a space, which is a character
    text8 = load_manifest(shards).split("train")
    assert text8.tokens == text8.characters


def test_mixtures_that_do_not_fit(tmp_path: Path, shards: Path, others: Path) -> None:
    spoken = make_shards(tmp_path / "bytes", ByteTokenizer())
    with pytest.raises(UserError, match=rf"{spoken} has another tokenizer \(bytes\) than {shards} \(text8\)"):
        find_sources(mixed(tiny(shards), **{str(shards): 1.0, str(spoken): 1.0}))
    little = mixed(tiny(shards, steps=1), **{str(shards): 1.0, str(others): 0.01})
    with pytest.raises(UserError, match=f"{others}: its share of the run is less than one sequence"):
        loader.make_loader(little, find_sources(little))
    long = replace(little, data=replace(little.data, length=100_000))
    with pytest.raises(UserError, match=f"{shards}: the train split is shorter than one sequence"):
        loader.make_loader(long, find_sources(long))


def test_a_mixture_in_the_configuration(shards: Path) -> None:
    config = mixed(tiny(shards), **{"a/web": 0.7, "b/web": 0.2, "books": 0.1})
    assert from_json(to_json(config), "it") == config
    assert portable(config).data.mixture == {"web 1": 0.7, "web 2": 0.2, "books 3": 0.1}
    assert portable(mixed(config, **{"a/web": 1.0})).data.mixture == {"web": 1.0}
    values = json.loads(to_json(tiny(shards)))
    del values["data"]["mixture"]  # a file of an earlier version
    assert from_json(json.dumps(values), "it") == tiny(shards)
    for mixture, message in (
        (["a"], "data.mixture must be an object"),
        ({"a": "b"}, r"data.mixture.a must be of type"),
    ):
        values["data"] |= {"mixture": mixture, "shards": None}
        with pytest.raises(UserError, match=message):
            from_json(json.dumps(values), "it")
    with pytest.raises(ValueError, match="the weight of a must be positive"):
        DataConfig(mixture={"a": 0.0})
    with pytest.raises(ValueError, match="exclude each other"):
        DataConfig(shards="a", mixture={"b": 1.0})


def test_two_then_one_then_two_processes_are_one(tmp_path: Path, shards: Path, others: Path) -> None:
    configs = {"plain": tiny(shards), "mixed": mixed(tiny(shards), **{str(shards): 0.3, str(others): 0.7})}
    folders = {name: began(config, tmp_path / name) for name, config in configs.items()}
    run(train_on_record, 2, *(Job(folder, stop_after=6) for folder in folders.values()))
    for folder in folders.values():
        assert train(folder, stop_after=13).step == 13
    run(train_on_record, 2, *(Job(folder) for folder in folders.values()))
    with pytest.raises(UserError, match="reads a mixture, which is laid out for 20 steps"):
        with_steps(configs["mixed"], folders["mixed"], 30)
    for name, config in configs.items():
        whole = trained(config, tmp_path / f"{name}-whole")
        assert len(losses(folders[name])) == 20
        np.testing.assert_allclose(losses(folders[name]), losses(whole), rtol=1e-5)


def test_a_run_goes_on_with_shards_that_were_moved(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(shutil.copytree(shards, tmp_path / "here"))
    folder = began(tiny(here), tmp_path / "run")
    train(folder, stop_after=10)
    there, folder = here.rename(tmp_path / "there"), folder.rename(tmp_path / "moved")
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"if the data were moved: --resume {folder} --data.shards DIR" in error
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume", str(folder), "--data.shards", "there"]) == 0
    assert read_config(folder).data == replace(tiny(here).data, shards="there")
    assert rows(folder) == rows(trained(tiny(there), tmp_path / "whole"))


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, shards: Path, others: Path) -> None:
    folder = began(tiny(shards), tmp_path / "run")
    config = (folder / CONFIG).read_text()
    other = replace(tiny(shards).data, shards=str(others))
    with pytest.raises(UserError, match=rf"{others} is not what {folder} was begun with: .* train-00000\.bin"):
        train(folder, data=other)
    with pytest.raises(UserError, match=r"was begun with the weights \[\]"):
        train(folder, data=replace(other, shards=None, mixture={str(shards): 1.0}))
    bytes_ = replace(other, shards=str(make_shards(tmp_path / "bytes", ByteTokenizer())))
    with pytest.raises(UserError, match=r"it differs in the tokenizer \(text8 and bytes\)"):
        train(folder, data=bytes_)
    assert (folder / CONFIG).read_text() == config


def test_manifests_are_compared_by_what_is_in_the_files(shards: Path, others: Path, tmp_path: Path) -> None:
    ours, theirs = load_manifest(shards), load_manifest(others)
    assert ours.difference(ours) is None
    less = replace(theirs, splits={**theirs.splits, "train": replace(theirs.splits["train"], shards=())})
    assert (
        theirs.difference(less) == f"the number of shards of split 'train' ({len(theirs.splits['train'].shards)} and 0)"
    )
    without = replace(ours, splits={"train": ours.splits["train"]})
    assert ours.difference(without) == "split 'valid', which only one of them has"
    assert ours.difference(replace(ours, vocab_size=28)) == "the type of the ids"


def test_whole_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "shards")
    found, read = find_sources(tiny(folder)), []
    check = sources.check_hash
    monkeypatch.setattr(sources, "check_hash", lambda file, digest: (read.append(file.name), check(file, digest)))
    parts = [damage(found, share, 2) for share in (0, 1)]
    assert parts == [None, None]
    assert len(read) == len(set(read)) == len(list(folder.iterdir())) - 1  # all but the manifest
    assert damage(found) is None
    assert len(read) == len(set(read))
    file = folder / "test-00000.bin"
    file.write_bytes(bytes(len(file.read_bytes())))
    assert str(damage(found)).startswith(f"{file} is damaged")
    file.unlink()
    assert str(damage(found)) == f"cannot read {file} (No such file or directory)"


class Ranges(SimpleHTTPRequestHandler):
    """Files over HTTP, parts of them too, as object stores give them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if asked is None or not file.is_file():
            return super().do_GET()
        content = file.read_bytes()
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *args: object) -> None:
        del args


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which a server gives it away; also the store of s3:// here."""
    from olmo_core.io import _get_s3_client

    root = tmp_path / "store"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(root)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in (
        ("AWS_ENDPOINT_URL_S3", address),
        ("AWS_DEFAULT_REGION", "eu-west-1"),
        ("AWS_ACCESS_KEY_ID", "nobody"),
        ("AWS_SECRET_ACCESS_KEY", "nothing"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    _get_s3_client.cache_clear()
    yield root, address
    _get_s3_client.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("place", [lambda address: f"{address}/bucket/shards/", lambda _: "s3://bucket/shards"])
def test_remote_shards_are_read_where_they_are(
    place: Callable[[str], str], store: tuple[Path, str], others: Path, tmp_path: Path
) -> None:
    root, address = store
    shutil.copytree(others, root / "bucket" / "shards")
    local, url = tiny(others, steps=4), place(address)
    remote = replace(local, data=replace(local.data, shards=url))
    assert (batches(remote) == batches(local)).all()
    (found,) = find_sources(remote)
    assert found.remote
    assert not list(found.local.glob("train-*.bin"))
    assert damage((found,)) is None
    assert sequences(found.local, "valid", LENGTH).tolist() == sequences(others, "valid", LENGTH).tolist()
    assert load_manifest(found.local).difference(load_manifest(others)) is None

    file = root / "bucket" / "shards" / "train-00001.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00001\.bin holds \d+ tokens, \d+ expected: copy it there again"):
        batches(remote)
    missing = replace(local, data=replace(local.data, shards=f"{url.rstrip('/')}/none"))
    with pytest.raises(UserError, match=r"cannot read .*none/manifest\.json \(\w+"):
        find_sources(missing)


def test_files_by_url_are_a_directory(shards: Path) -> None:
    config = tiny(shards)
    named = replace(config, data=replace(config.data, shards=f"file://{shards}"))
    (found,) = find_sources(named)
    assert (found.local, found.remote) == (shards, False)
