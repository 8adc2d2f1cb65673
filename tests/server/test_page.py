"""The page as a file: nothing from elsewhere, nothing that data could break out of; and `catmaps show`."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from catmaps.cli import main
from catmaps.model import load_run
from catmaps.server.page import page, policy
from catmaps.server.pieces import Draft, Settings
from catmaps.server.show import template_after
from catmaps.server.trajectory import as_json, calls_after

SETTINGS = Settings("renoise", 2, 1.0, 1.0)


def setup_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="setup">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_nothing_comes_from_elsewhere() -> None:
    html = page({"about": {}})
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\((?!data:)", html)
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,", "#texts"]


def test_data_cannot_end_its_script() -> None:
    hostile = {"about": {"model": "</script><script>alert(1)</script><!-- /*style*/ /*script*/ \u2028"}}
    html = page(hostile)
    assert html.count("<script") == html.count("</script>") == 2
    assert setup_of(html) == hostile


def test_the_policy_allows_just_what_stands_in_the_page() -> None:
    html = page({"about": {}})
    for element, kind in (("style", "style-src"), ("script", "script-src")):
        content = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
        (digest,) = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in content]
        assert f"{kind} 'sha256-{digest}'" in policy()
    assert not re.search(r'\s(style|on[a-z]+)="', html)  # a policy without unsafe-inline would block these


def test_a_trajectory_is_cut_to_its_text_and_names_its_tokens() -> None:
    ids, p = np.array([[0, 1], [2, 3], [1, 0], [3, 3]]), np.full((4, 2), 0.123456, dtype=np.float32)
    drafts = [Draft(0.5, ids, p), Draft(1.0, ids, p)]
    said = as_json(drafts, np.array([True, False, False]), SETTINGS, ["a", "b", "c", "d", "e"])
    assert said["strings"] == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert said["given"] == [1, 0, 0]
    assert [(step["t"], step["calls"]) for step in said["steps"]] == [(0.5, 1), (1.0, 2)]
    assert said["steps"][0]["ids"] == [[0, 1], [2, 3], [1, 0]]
    assert said["steps"][0]["p"][2] == [0.1235, 0.1235]


def test_heun_calls_twice_but_at_the_end() -> None:
    assert [calls_after(i, Settings("heun", 3, 1.0, 1.0)) for i in (1, 2, 3)] == [2, 4, 5]


def test_show_writes_texts_that_end_in_the_last_step(
    map_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flow.html"
    command = ["show", str(map_run), "--html", str(file), "--infill", "the [[5]] sat", "--steps", "1", "3", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["html"] == str(file)
    setup = setup_of(file.read_text())
    assert not setup["live"]
    assert [panel["calls"] for panel in setup["panels"]] == [1, 3]
    for panel in setup["panels"]:
        shown = panel["trajectory"]
        assert shown["given"] == [1] * 4 + [0] * 5 + [1] * 4
        last = "".join(shown["strings"][str(ids[0])] for ids in shown["steps"][-1]["ids"])
        assert re.fullmatch(r"the .{5} sat", last)
    assert str(map_run) not in file.read_text()


def test_a_prompt_is_seen_by_its_end(map_run: Path) -> None:
    run = load_run(map_run)
    template = template_after("abcdefghijklmnopqrst", 8, run)
    assert run.tokenizer.decode(template.tokens[template.known]) == "mnopqrst"
    assert (~template.known).sum() == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--tokens", "17"], "need more than a window of 16"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--infill", "a"], "no blank"),
        (["--infill", "[[17]]"], "a window holds 16"),
        (["--infill", "[[2]]", "--prompt", "a"], "leave these out"),
        (["--temperature", "0"], "--temperature"),
        (["--html", "no/such/folder.html"], "no folder"),
        (["--html", "/"], "cannot write /"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], message: str, map_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(map_run), "--html", str(tmp_path / "flow.html"), *args]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
