"""Exported directories: catmaps reads them as the run itself; nothing but catmaps is needed to write them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import config_of, make_run
from test_layering import OPTIONAL

from catmaps.cli import main
from catmaps.config import DataConfig
from catmaps.errors import UserError
from catmaps.generation import default_sampling, generate_texts
from catmaps.hub.export import export
from catmaps.model import CLOCK, load_run
from catmaps.text.fast import fast
from catmaps.text.tokenizers import ByteTokenizer, Text8Tokenizer, Tokenizer, train_bpe

BPE = train_bpe(["the cat sat on the mat, and the rat saw the cat"] * 3, 270)
TOKENIZERS = [Text8Tokenizer(), ByteTokenizer(), BPE]
PIECES = [
    "abc DEF 019",
    "Éclair ﬁne",
    "Ⅷ ½ ²",
    "日本",
    "𝐁𝐨𝐥𝐝",
    "İstanbul ß ẞ Æ œ",
    "e\u0301\u0301x",
    "\t\n  x",
    "ŉ Ω",
    "<|eos|>",
]


@pytest.fixture(params=["map", "base", "linear", "masked", "autoregressive"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = config_of(a_map=request.param == "map")
    if request.param == "linear":
        config = replace(config, network=replace(config.network, input="linear", skip=False))
    elif request.param not in ("map", "base"):
        config = replace(config, family=request.param)
    return make_run(tmp_path / "run", config)


def test_commands_take_the_directory_for_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "dir")]) == 0
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    said = []
    for folder in ("run", "dir"):
        capsys.readouterr()
        assert main(["sample", str(tmp_path / folder), "--num", "3", "--seed", "5"]) == 0
        assert main(["score", str(tmp_path / folder), str(tmp_path / "text.txt"), "--samples", "2"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
def test_the_fast_tokenizer_gives_the_same_ids_and_texts(tokenizer: Tokenizer) -> None:
    made = type(fast(tokenizer)).from_str(fast(tokenizer).to_str())
    made.encode_special_tokens = True  # a setting that its file does not keep
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice([*PIECES, *map(chr, rng.integers(32, 0x600, 20))], rng.integers(0, 6)))
        ids = tokenizer.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == ids.tolist(), text
        assert made.decode(ids.tolist()) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
def test_catmaps_reads_its_own_tokenizer_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", config_of(), tokenizer))
    export(run, tmp_path / "dir")
    back = load_run(tmp_path / "dir").tokenizer
    assert (type(back), back.name, back.eos_id) == (type(tokenizer), tokenizer.name, tokenizer.eos_id)


def test_no_path_of_the_machine_travels(tmp_path: Path) -> None:
    config = config_of(base="/home/me/base", data=DataConfig(shards="/data/me/novels", length=12))
    export(load_run(make_run(tmp_path / "run", config)), tmp_path / "dir")
    for file in (tmp_path / "dir").iterdir():
        assert not re.search(rb"/home|/data/|" + str(tmp_path).encode(), file.read_bytes()), file
    assert load_run(tmp_path / "dir").config.data.shards == "novels"


def test_the_card_says_what_the_metrics_say(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config_of())
    rows = [{"step": 7, "tokens": 1234, "seconds": 60.0, "nelbo_bits_per_char": 2.25, "nelbo_stderr": 0.015}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(load_run(run), tmp_path / "dir", licence="apache-2.0")
    card = (tmp_path / "dir" / "README.md").read_text()
    assert card.startswith("---\n")
    for part in ("license: apache-2.0", "- flow-map", "7 steps, 1,234 tokens, 1 min", "2.250 ± 0.015 bits"):
        assert part in card


def test_without_its_law_a_directory_still_scores_and_a_run_does_not(tmp_path: Path) -> None:
    export(load_run(make_run(tmp_path / "run", config_of())), tmp_path / "dir")
    for folder in ("run", "dir"):
        (tmp_path / folder / CLOCK).unlink()
    run = load_run(tmp_path / "dir")
    assert torch.equal(run.law.table, run.clock.table)
    with pytest.raises(UserError, match=CLOCK):
        load_run(tmp_path / "run")


def test_wrong_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", config_of())
    assert main(["export", str(run), "--out", str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "dir")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_bare_install_exports_samples_and_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config_of())
    (tmp_path / "text.txt").write_text("the cat")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))
from catmaps.cli import main
assert main(["export", {str(run)!r}, "--out", {str(tmp_path / "dir")!r}]) == 0
assert main(["sample", {str(tmp_path / "dir")!r}, "--num", "1"]) == 0
assert main(["score", {str(tmp_path / "dir")!r}, {str(tmp_path / "text.txt")!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_export_of_an_export_is_the_same(tmp_path: Path) -> None:
    export(load_run(make_run(tmp_path / "run", config_of())), tmp_path / "one")
    export(load_run(tmp_path / "one"), tmp_path / "two")
    first, second = load_run(tmp_path / "one"), load_run(tmp_path / "two")
    assert first.config == second.config
    assert generate_texts(first, 2, default_sampling(first)) == generate_texts(second, 2, default_sampling(second))
