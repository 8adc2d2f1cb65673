"""The server as its clients see it: the real openai client and lm-eval, over a socket."""

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live_server import Live, live
from oracle_runs import Ask

if TYPE_CHECKING:
    from openai import OpenAI

pytest.importorskip("openai")

WINDOW = 16


@pytest.fixture(scope="module")
def server(map_run: Path) -> Iterator[Live]:
    with live(map_run, steps=64) as running:
        yield running


@pytest.fixture
def client(server: Live) -> "Iterator[OpenAI]":
    from openai import DefaultHttpxClient, OpenAI

    http = DefaultHttpxClient(trust_env=False)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as made:
        yield made


def test_the_openai_client_gets_texts(client: "OpenAI") -> None:
    (model,) = client.models.list().data
    assert model.id == "map"
    assert client.models.retrieve("map").id == "map"
    answer = client.completions.create(model="map", prompt="the cat", max_tokens=9, n=3, seed=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {len(choice.text) for choice in answer.choices} == {9}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 27, 34)
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")


def test_left_out_and_null_are_the_defaults(server: Live) -> None:
    bare = server.texts(seed=1)
    nulls = dict.fromkeys(("prompt", "n", "stop", "max_tokens", "temperature", "top_p", "echo", "stream", "infill"))
    assert bare == server.texts(seed=1, model="map", **nulls)
    assert len(bare[0]) == 16


def test_a_seed_is_a_text_whatever_is_asked_beside_it(server: Live) -> None:
    bodies = [{"prompt": "the cat"[: i % 8], "max_tokens": 1 + i % 9, "seed": i, "n": 1 + i % 2} for i in range(40)]
    alone = [server.texts(**body) for body in bodies]
    with ThreadPoolExecutor(20) as pool:
        crowd = list(pool.map(lambda body: server.texts(**body), bodies))
    assert crowd == alone
    assert server.texts(prompt="the", seed=5, n=3)[0] == server.texts(prompt="the", seed=5)[0]
    assert server.texts(prompt="the", seed=5, n=2) != server.texts(prompt="the", seed=6, n=2)


def test_without_a_seed_texts_differ_and_the_seed_is_told(server: Live) -> None:
    first, second = (server.ask(prompt="the").json() for _ in range(2))
    assert first["catmaps"]["seed"] != second["catmaps"]["seed"]
    assert server.texts(prompt="the", seed=first["catmaps"]["seed"]) == [first["choices"][0]["text"]]


def test_prompts_come_as_text_tokens_or_lists_of_them(server: Live) -> None:
    asked = {"max_tokens": 5, "seed": 3}
    text = server.texts(prompt="ab", **asked)
    assert server.texts(prompt=[1, 2], **asked) == text
    assert server.texts(prompt=["ab"], **asked) == server.texts(prompt=[[1, 2]], **asked) == text
    many = server.texts(prompt=["ab", "ba", "ab"], n=2, **asked)
    assert len(many) == 6
    assert many[0] == text[0]
    assert many[4] != many[0]  # a place of its own has random numbers of its own


def test_what_shapes_a_text_is_taken(server: Live) -> None:
    def how(**body: object) -> tuple[int, str]:
        said = server.ask(prompt="the", max_tokens=8, seed=1, **body).json()
        return said["catmaps"]["network_calls"], said["catmaps"]["sampler"]

    assert how() == (4, "renoise")
    assert how(num_steps=7) == (7, "renoise")
    assert how(num_steps=7, sampler="heun") == (13, "heun")
    changes: list[dict[str, object]] = [
        {},
        {"temperature": 0},
        {"top_p": 0.2},
        {"sampler": "euler"},
        {"num_steps": 1},
        {"noise": 1},
    ]
    assert len({server.texts(seed=1, max_tokens=16, **change)[0] for change in changes}) == len(changes)


def test_texts_end_before_a_stop_string(server: Live) -> None:
    (whole,) = server.texts(prompt="the ", max_tokens=60, seed=2)
    stop = whole[25:27]
    said = server.ask(prompt="the ", max_tokens=60, seed=2, stop=["#never#", stop]).json()["choices"][0]
    assert said["text"] == whole[: whole.index(stop)]
    assert said["finish_reason"] == "stop"
    assert server.texts(prompt="the ", max_tokens=60, seed=2, stop="#never#") == [whole]


def test_long_texts_are_written_window_by_window(server: Live) -> None:
    said = server.ask(prompt="the cat sat on a mat and", max_tokens=50, seed=1).json()
    assert len(said["choices"][0]["text"]) == 50
    assert said["catmaps"]["network_calls"] == 4 * math.ceil(50 / (WINDOW // 2))


def test_blanks_keep_what_is_given(server: Live) -> None:
    template = "the [[4]] sat[[3]]"
    for text in server.texts(infill=template, n=4, seed=1):
        assert re.fullmatch(r"the .{4} sat.{3}", text)
    middle = server.ask(prompt="the ", suffix=" sat", max_tokens=4, seed=1).json()
    assert len(middle["choices"][0]["text"]) == 4
    assert (middle["usage"]["prompt_tokens"], middle["usage"]["completion_tokens"]) == (8, 4)


def test_echo_repeats_the_prompt_as_it_was_read(server: Live) -> None:
    (text,) = server.texts(prompt="The Cat", max_tokens=3, seed=1)
    assert server.texts(prompt="The Cat", max_tokens=3, seed=1, echo=True) == ["the cat" + text]


def test_logprobs_are_shares_of_the_bound(client: "OpenAI") -> None:
    choice = client.completions.create(model="map", prompt="the ", max_tokens=30, seed=1, logprobs=1).choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == list(range(30))
    bound = choice.model_extra or {}
    assert sum(found.token_logprobs or []) == pytest.approx(-bound["bound"]["nats"])
    assert bound["bound"]["stderr_nats"] > 0


def test_logprobs_of_a_stopped_text_of_blanks_and_of_a_given_text(server: Live) -> None:
    (whole,) = server.texts(prompt="the ", max_tokens=30, seed=1)
    cut = server.ask(prompt="the ", max_tokens=30, seed=1, stop=whole[12:15], logprobs=0).json()["choices"][0]
    assert len(cut["logprobs"]["token_logprobs"]) == len(cut["text"]) < 15
    blanks = server.ask(infill="the [[4]] sat", seed=1, logprobs=0).json()["choices"][0]["logprobs"]
    assert [value is None for value in blanks["token_logprobs"]] == [True] * 4 + [False] * 4 + [True] * 4
    given = server.ask(prompt="the cat sat on a mat", max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
    assert given["text"] == "".join(given["logprobs"]["tokens"]) == "the cat sat on a mat"
    assert sum(given["logprobs"]["token_logprobs"]) == pytest.approx(-given["bound"]["nats"])


def test_a_stream_is_drafts_and_then_the_text(client: "OpenAI", server: Live) -> None:
    asked = {"model": "map", "prompt": "the ", "max_tokens": 20, "seed": 9, "n": 2}
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    whole = server.texts(**asked)
    joined = ["", ""]
    drafts: dict[int, list[str]] = {0: [], 1: []}
    for event in events[:-1]:
        (choice,) = event.choices
        joined[choice.index] += choice.text
        extra = choice.model_extra or {}
        if "draft" in extra:
            drafts[choice.index].append(extra["draft"])
            assert extra["step"] == len(drafts[choice.index])
    assert joined == whole
    for index in (0, 1):
        assert drafts[index][-1] == whole[index]
        assert len(drafts[index]) >= 8  # 4 steps of 2 windows at least
        assert len(set(drafts[index])) > 2
    assert events[-1].choices == []
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 40


def test_a_trajectory_shows_alternatives_of_every_step(server: Live) -> None:
    choice = server.ask(prompt="the ", max_tokens=7, seed=1, trajectory=5).json()["choices"][0]
    shown = choice["trajectory"]
    assert [step["calls"] for step in shown["steps"]] == [1, 2, 3, 4]
    assert shown["given"] == [1] * 4 + [0] * 7
    last = shown["steps"][-1]
    assert "".join(shown["strings"][str(ids[0])] for ids in last["ids"]) == "the " + choice["text"]
    assert all(len(ids) == len(p) == 5 for ids, p in zip(last["ids"], last["p"], strict=True))
    assert all(p == sorted(p, reverse=True) and 0 < sum(p) <= 1.001 for step in shown["steps"] for p in step["p"])


def test_health_metrics_and_schema(server: Live) -> None:
    server.texts(prompt="the")
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok", "model": "map"}
        text = client.get("/metrics").text
        schema = client.get("/openapi.json").json()
    sample = re.compile(r'catmaps_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+')
    for line in text.splitlines():
        assert line.startswith(("# HELP catmaps_", "# TYPE catmaps_")) or sample.fullmatch(line), line
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert values['catmaps_requests_total{route="/v1/completions",status="200"}'] >= 1
    assert values["catmaps_tokens_total"] >= 16
    assert values["catmaps_network_calls_total"] >= 4
    assert values["catmaps_resident_bytes"] > 1e7
    assert values['catmaps_batch_rows_bucket{le="+Inf"}'] == values["catmaps_batch_rows_count"]
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"num_steps", "infill", "sampler"} <= set(body["properties"])


def test_the_page_is_one_file_under_a_strict_policy(server: Live) -> None:
    with server.client() as client:
        answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_lm_eval_writes_through_local_completions(server: Live) -> None:
    pytest.importorskip("tenacity")
    models = pytest.importorskip("lm_eval.models.openai_completions")
    lm = models.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="map", tokenizer_backend=None, eos_string="#", max_gen_toks=12
    )
    asked = [Ask((text, {"until": ["z"], "temperature": 0.7})) for text in ("the cat ", "two red fish ")]
    written = lm.generate_until(asked)
    assert len(written) == 2
    assert all(isinstance(text, str) and len(text) <= 12 and "z" not in text for text in written)


def test_lm_eval_cannot_take_shares_of_a_joint_bound_for_conditional_ones(server: Live) -> None:
    body = {"prompt": [[1, 2, 3, 4]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1, "echo": True}
    answer = server.ask(**body)
    assert answer.status_code == 400
    assert "catmaps eval" in json.loads(answer.text)["error"]["message"]
