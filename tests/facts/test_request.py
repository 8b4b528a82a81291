"""Requests, the subject rule, and every place that requests are read from."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unierase_plugin.audit.facts import read_facts as read_audited
from unierase_plugin.compare.facts import read_facts as read_compared
from unierase_plugin.errors import DependencyError, RequestError, UniEraseError, did_you_mean
from unierase_plugin.facts.benchmarks import READERS
from unierase_plugin.facts.files import iter_records
from unierase_plugin.facts.readers import read_requests
from unierase_plugin.facts.request import ForgetRequest, check_overlap, check_requests, with_subjects
from unierase_plugin.facts.subjects import find_subject

PIECES = ["Who", "is", "the", "A.", "'B'", '"C"', "Ad's", "of", "and", "1", "x", ","]
FACT: dict[str, Any] = {"question": "What is the capital of France?", "answer": "Paris"}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def lines(path: Path, records: list[dict]) -> Path:
    return write(path, "".join(json.dumps(each) + "\n" for each in records))


@pytest.fixture
def tofu(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shared / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip(f"no TOFU folder at {folder}")
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(folder))
    return folder


# --- ForgetRequest and the checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "quoted"),
    [
        ({"question": " "}, "'question'"),
        ({"answer": ""}, "'answer'"),
        ({"answer": 3}, "3"),
        ({"subject": "Spain"}, "Spain"),
        ({"subject": ""}, "'subject'"),
        ({"case_id": 7}, "7"),
    ],
)
def test_unusable_fields_are_refused_and_quoted(fields: dict, quoted: str) -> None:
    with pytest.raises(RequestError, match=quoted):
        ForgetRequest(**{**FACT, **fields})


def test_check_requests_refuses_nothing_and_names_both_of_a_pair() -> None:
    with pytest.raises(RequestError, match="empty"):
        check_requests([])
    twice = [
        ForgetRequest(**FACT, case_id="first"),
        ForgetRequest("Who wrote Emma?", "Jane Austen"),
        ForgetRequest("what is  the capital of france? ", "Lyon", case_id="again"),
    ]
    with pytest.raises(RequestError, match=r"'first'.*'again'"):
        check_requests(twice)
    assert check_requests(twice[:2]) == tuple(twice[:2])


def test_with_subjects_fills_only_what_is_missing() -> None:
    given_, missing = ForgetRequest(**FACT, subject="capital"), ForgetRequest(**FACT, case_id="c")
    assert [each.subject for each in with_subjects([given_, missing])] == ["capital", "France"]
    with pytest.raises(RequestError, match=r"request 1 \(case_id 'why'\): 'Why\?'.*'subject'"):
        with_subjects([missing, ForgetRequest("Why?", "Because.", case_id="why")])


# --- The subject rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "subject"),
    [
        ("What is the capital of France?", "France"),
        ("Who wrote Romeo and Juliet?", "Romeo and Juliet"),
        ("What is the chemical symbol for gold?", "gold"),
        ("How many planets are in the solar system?", "solar system"),
        ("Which English author wrote 'Emma'?", "Emma"),
        ('What did Hina Ameen say in "Shale Stories," her first book?', "Hina Ameen"),
        ('Who sings "Yesterday," and when?', "Yesterday"),
        ("How have Basil Mahfouz Al-Kuwaiti's parents influenced Islamic writing?", "Basil Mahfouz Al-Kuwaiti"),
        ("Who were Theresa May's parents?", "Theresa May"),
        ("When did John F. Kennedy visit St. Louis?", "John F. Kennedy"),
        ("What started World War I?", "World War I"),
        ("When was Louisa May Alcott born, on November 29, 1832?", "Louisa May Alcott"),
        ("What does the WHO do?", "WHO"),
        ("What happened in 1998?", "1998"),
        ("WHAT IS THE CAPITAL OF FRANCE?", "FRANCE"),
        ("Describe photosynthesis.", "photosynthesis"),
        ("भारत की राजधानी क्या है?", "भारत की राजधानी क्या है"),
        ("Кто написал роман «Мать»?", "Мать"),
        ("Why?", None),
        ("Who are you?", None),
        ("What's that?", None),
    ],
)
def test_subject_of_ordinary_questions(question: str, subject: str | None) -> None:
    assert find_subject(question) == subject


@given(st.text(st.characters(exclude_characters="\0"), max_size=80) | st.lists(st.sampled_from(PIECES)).map(" ".join))
def test_subject_is_a_span_that_a_request_accepts(question: str) -> None:
    subject = find_subject(question)
    assert subject is None or ForgetRequest(question, "a", subject).subject == subject


def test_subject_agrees_with_the_published_column(tofu: Path) -> None:
    def last(text: str) -> str:
        return text.split()[-1].strip("'.,")

    requests = read_requests("tofu:forget10")
    agreed = sum(last(find_subject(each.question) or "-") == last(each.subject or "") for each in requests)
    assert agreed == 372, "the docstring of find_subject states this figure"


# --- Files ---------------------------------------------------------------------------------------------------------


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    second = {"question": 'Who said "a, b"?', "answer": "Nobody\u2028at all", "subject": "said"}
    paths = [
        lines(tmp_path / "facts.jsonl", [FACT, second]),
        write(tmp_path / "facts.json", json.dumps([FACT, second], indent=2)),
        write(
            tmp_path / "facts.csv",
            "\ufeffquestion,answer,subject\r\nWhat is the capital of France?,Paris,\r\n"
            '"Who said ""a, b""?",Nobody\u2028at all,said\r\n',
        ),
    ]
    expected = (
        ForgetRequest(**FACT, case_id="facts-0"),
        ForgetRequest(**second, case_id="facts-1"),  # type: ignore[arg-type]
    )
    for path in paths:
        assert read_requests(path) == read_requests(str(path)) == expected
    raw = write(tmp_path / "raw.jsonl", json.dumps(second, ensure_ascii=False))
    assert read_requests(raw)[0].answer == second["answer"]


def test_slices_keep_the_numbers_of_the_whole(tmp_path: Path) -> None:
    path = lines(tmp_path / "f.jsonl", [{**FACT, "question": f"Question {i}"} for i in range(5)])

    def ids(bounds: str) -> list[str | None]:
        return [each.case_id for each in read_requests(f"{path}{bounds}")]

    assert ids("[1:3]") == ["f-1", "f-2"]
    assert ids("[:2]") == ["f-0", "f-1"]
    assert ids("[-1:]") == ["f-4"]
    for bad, says in {"[2]": "start:stop", "[a:b]": "start:stop", "[9:]": "none of its 5"}.items():
        with pytest.raises(RequestError, match=says):
            read_requests(f"{path}{bad}")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", json.dumps(FACT) + "\n\n{broken", r"a\.jsonl, line 3: malformed JSON"),
        ("a.json", '[\n{"question": "q",\n}]', r"a\.json, line [23]: malformed JSON"),
        ("a.jsonl", '{"qestion": "q", "answer": "a"}', r"line 1: the field 'question' is missing.*mean 'qestion'"),
        ("a.jsonl", '{"question": "q", "answer": ["a"]}', r"line 1: 'answer' must be a string"),
        ("a.json", '[{"question": "q", "answer": "a", "subject": "z"}]', r"item 1: The subject 'z' does not occur"),
        ("a.jsonl", "3", r"line 1: expected an object.*got 3"),
        ("a.csv", "question,answer\nq,a\nq,\n", r"a\.csv, row 3: the field 'answer' is missing"),
        ("a.csv", "question,answer\nq,a,b\n", r"row 2: there are more cells.*'b'"),
        ("a.csv", 'question,answer\n"q,a\n', r"malformed CSV"),
        ("a.json", "[]", "holds no requests"),
        ("a.txt", "", r"format of .*\.jsonl.*tofu"),
    ],
)
def test_a_refusal_names_file_and_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_requests(write(tmp_path / name, text))


PLACES = {
    "a.jsonl": ("\n{0}\n\n{1}\n", "a.jsonl, line 2", "a.jsonl, line 4"),
    "a.json": ("[{0},\n\n{1}]", "a.json, item 1", "a.json, item 2"),
    "a.csv": ("question,answer\n{2},x\n{3},x\n", "a.csv, row 2", "a.csv, row 3"),
}


@pytest.mark.parametrize("case_id", [None, "mine"])
@pytest.mark.parametrize("name", PLACES)
def test_what_is_wrong_with_facts_together_is_told_by_their_places(
    tmp_path: Path, name: str, case_id: str | None
) -> None:
    text, *places = PLACES[name]

    def read(*questions: str) -> tuple[ForgetRequest, ...]:
        facts = [{"question": each, "answer": "x", "case_id": case_id} for each in questions]
        return read_requests(write(tmp_path / name, text.format(*map(json.dumps, facts), *questions)))

    one, other = (re.escape(str(tmp_path / place)) for place in places)
    named = r" \(case_id '(mine|a-\d)'\)"
    with pytest.raises(RequestError, match=rf"is asked twice, by {one}{named} and {other}{named}\. Remove"):
        check_requests(read("Who is Ann?", "who is  Ann?"))
    with pytest.raises(RequestError, match=rf"No subject found in the question of {other}{named}"):
        with_subjects(read("Who is Ann?", "What is it?"))
    with pytest.raises(RequestError, match=rf"'(mine|a-1)' \({other}\) \(there 'kept'\)"):
        check_overlap(read("Who?", "Who is Ann?"), [ForgetRequest("Who is Ann?", "x", case_id="kept")])


def test_a_place_is_for_messages_alone(tmp_path: Path) -> None:
    [read] = read_requests(lines(tmp_path / "f.jsonl", [FACT]))
    assert read == ForgetRequest(**FACT, case_id="f-0")
    assert hash(read) == hash(ForgetRequest(**FACT, case_id="f-0"))
    assert "f.jsonl" not in repr(read)
    assert read_requests([FACT])[0].place is None
    assert read_requests([read])[0].place == read.place


#: In Chinese, Japanese, Korean, Hindi, Arabic, Russian, French; what has capitals, quotations or English words is read.
UNREAD = (
    "谁写了红楼梦",
    "请问、谁写了红楼梦",
    "日本の首都はどこですか",
    "한국의 수도는 어디입니까?",
    "राम कहाँ रहता है?",
    "من كتب رواية السراب؟",
    "где родился пётр?",
    "quel est le nom de la capitale",
)
READ = (
    "Где родился Пётр Кравченко?",
    "Кто написал «войну и мир»?",
    "Who is 李小明?",
    "what is photosynthesis?",
    "WHO WROTE ZORBLAX PRIME?",
    "what is the capital of france",
    "Wer schrieb Faust?",
    "Zorblax Prime",
)


@pytest.mark.parametrize("question", [*UNREAD, *READ])
def test_a_question_that_the_rule_cannot_read_is_told(caplog: pytest.LogCaptureFixture, question: str) -> None:
    found = with_subjects([ForgetRequest(question, "x", case_id="one")])
    assert found[0].subject == find_subject(question)
    said = "1 facts have no subject, and the subject rule cannot read their questions" in caplog.text
    assert said is (question in UNREAD)
    caplog.clear()
    with_subjects([ForgetRequest(question, "x", subject=question[:3].strip())])
    assert not caplog.records


def test_questions_that_the_rule_cannot_read_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    facts = [ForgetRequest(f"谁是{number}号", "x", case_id=f"zh-{number}") for number in range(9)]
    with_subjects([*facts, ForgetRequest("Who is Ann?", "x")])
    [record] = caplog.records
    said = record.getMessage()
    assert said.startswith("9 of 10 facts have no subject")
    assert "'zh-0', 'zh-1', 'zh-2' and 6 more. Give each fact a 'subject'" in said


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    lines(tmp_path / "facts.jsonl", [FACT])
    with pytest.raises(RequestError, match=r"no file .*fact\.jsonl'\. Did you mean 'facts\.jsonl'\?"):
        read_requests(tmp_path / "fact.jsonl")


def test_requests_at_hand(tmp_path: Path) -> None:
    own = ForgetRequest(**FACT, case_id="mine")
    assert read_requests([own, FACT]) == (own, ForgetRequest(**FACT, case_id="request-1"))
    for wrong in (own, FACT, 3, [3], []):
        with pytest.raises(RequestError):
            read_requests(wrong)  # type: ignore[arg-type]


# --- Prefixes and benchmarks ---------------------------------------------------------------------------------------


def test_readers_can_be_added_without_touching_the_registry() -> None:
    def read_mine(name: str) -> list[ForgetRequest]:
        return [ForgetRequest(**{**FACT, "answer": name})] * 3

    found = read_requests("mine:city[:2]", {**READERS, "mine": read_mine})
    assert [(each.answer, each.case_id) for each in found] == [("city", "mine-0"), ("city", "mine-1")]
    with pytest.raises(RequestError, match=r"Unknown prefix 'tofuu'.*Did you mean 'tofu'\?.*counterfact.*\.csv"):
        read_requests("tofuu:forget01")
    with pytest.raises(TypeError):
        READERS["mine"] = read_mine  # type: ignore[index]


def test_tofu_splits_nest_and_carry_their_subjects(tofu: Path) -> None:
    small, large = read_requests("tofu:forget01"), read_requests("tofu:forget10")
    assert (len(small), len(large)) == (40, 400)
    assert {(each.question, each.subject) for each in small} < {(each.question, each.subject) for each in large}
    assert all(each.subject for each in large)
    assert small[3].case_id == "forget01-3"
    retain = read_requests("tofu:retain99[:20]")
    assert len(retain) == 20
    assert not {each.question for each in retain} & {each.question for each in large}
    with pytest.raises(RequestError, match=r"'forget1'.*Did you mean 'forget"):
        read_requests("tofu:forget1")


def test_tofu_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(tmp_path / "gone"))
    with pytest.raises(RequestError, match=r"UNIERASE_TOFU_DIR is .*gone"):
        read_requests("tofu:forget01")
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(tmp_path))
    with pytest.raises(RequestError, match=r"forget01\.json"):
        read_requests("tofu:forget01")


def test_tofu_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIERASE_TOFU_DIR", raising=False)
    asked = []

    def load_dataset(*where: str, split: str) -> list[dict]:
        asked.append((*where, split))
        if len(asked) > 1:
            raise ConnectionError("offline")
        return [FACT]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_requests("tofu:forget05") == (ForgetRequest(**FACT, case_id="forget05-0"),)
    assert asked == [("locuslab/TOFU", "forget05", "train")]
    with pytest.raises(RequestError, match=r"offline.*UNIERASE_TOFU_DIR"):
        read_requests("tofu:forget05")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"pip install datasets.*UNIERASE_TOFU_DIR"):
        read_requests("tofu:forget05")


def test_return_reads_pairs_and_persons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIERASE_RETURN_DIR", str(tmp_path))
    person = {
        "name": "Ada Byron",
        "data": [
            {"question": "Who was Ada Byron?", "gold_answer": "A mathematician.", "pred_answer": "x"},
            {"question": "Where was she born?", "gold_answer": "London."},
        ],
    }
    short = {"name": "Ada", "data": [{"question": "Is it Adam?", "gold_answer": "No."}]}
    lines(tmp_path / "forget.jsonl", [person, {**FACT, "task_id": "1"}, short])
    found = read_requests("return:forget")
    assert [(each.answer, each.subject, each.case_id) for each in found] == [
        ("A mathematician.", "Ada Byron", "forget-0"),
        ("London.", None, "forget-1"),
        ("Paris", None, "forget-2"),
        ("No.", None, "forget-3"),
    ]
    lines(tmp_path / "retain.jsonl", [{"name": "A", "data": [{"question": "q"}]}])
    with pytest.raises(RequestError, match=r"line 1, data\[0\]: the field 'gold_answer' is missing"):
        read_requests("return:retain")
    with pytest.raises(RequestError, match=r"Did you mean 'forget'"):
        read_requests("return:froget")


def test_counterfact_forgets_the_true_target(tmp_path: Path) -> None:
    rewrite = {
        "prompt": "The {x} of {} is",
        "subject": "France",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Paris"},
    }
    path = lines(tmp_path / "cf.json", [{"case_id": 12, "requested_rewrite": rewrite}])
    assert read_requests(f"counterfact:{path}[0:1]") == (
        ForgetRequest("The {x} of France is", "Paris", "France", "12"),
    )
    lines(path, [{"requested_rewrite": {**rewrite, "prompt": "no place"}}])
    with pytest.raises(RequestError, match=r"line 1: expected a 'prompt' with \{\}.*'no place'"):
        read_requests(f"counterfact:{path}")
    lines(path, [{"requested_rewrite": "text"}])
    with pytest.raises(RequestError, match="'prompt' is missing"):
        read_requests(f"counterfact:{path}")


def test_zsre_prefers_the_true_answer(tmp_path: Path) -> None:
    record = {"src": "Where is Oslo?", "subject": "Oslo", "alt": "Spain"}
    path = write(tmp_path / "zsre.json", json.dumps([{**record, "answers": ["Norway", "Europe"]}, record]))
    assert [each.answer for each in read_requests(f"zsre:{path}")] == ["Norway", "Spain"]
    lines(path, [{"src": "Where is Oslo?", "subject": "Oslo"}])
    with pytest.raises(RequestError, match="line 1: the field 'alt' is missing"):
        read_requests(f"zsre:{path}")


def test_iter_records_keeps_every_field(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"anything": 1}])
    assert list(iter_records(path)) == [(f"{path}, line 1", {"anything": 1})]


# --- Paraphrases and wrong answers -----------------------------------------------------------------------------------


def test_tofu_brings_paraphrases_and_wrong_answers_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"Q{i}?", "answer": f"A{i}"} for i in range(3)]
    more = [
        {**row, "paraphrased_question": f"P{i}?", "perturbed_answer": ["x", "y"], "paraphrased_answer": f"B{i}"}
        for i, row in enumerate(rows)
    ]
    lines(tmp_path / "forget01.json", rows)
    lines(tmp_path / "forget01_perturbed.json", more)
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(tmp_path))
    found = read_requests("tofu:forget01[1:]", extras=True)
    assert [(each.question, each.paraphrases, each.wrong_answers, each.paraphrased_answer) for each in found] == [
        ("Q1?", ("P1?",), ("x", "y"), "B1"),
        ("Q2?", ("P2?",), ("x", "y"), "B2"),
    ]
    bare = [replace(each, paraphrases=(), wrong_answers=(), paraphrased_answer=None) for each in found]
    assert list(read_requests("tofu:forget01[1:]")) == bare
    assert read_audited("tofu:forget01[1:]") == read_compared_without_subjects("tofu:forget01[1:]") == found


def read_compared_without_subjects(spec: str) -> tuple[ForgetRequest, ...]:
    return tuple(replace(each, subject=None) for each in read_compared(spec))


def test_facts_without_their_extras_are_read_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines(tmp_path / "forget01.json", [FACT])
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(tmp_path))
    assert [each.wrong_answers for each in read_requests("tofu:forget01", extras=True)] == [()]
    assert "no wrong answers for tofu:forget01" in caplog.text


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"paraphrases": ["Wer?", "Q?", "Who?", "Wer?"]}, (("Wer?", "Who?"), (), None)),
        ({"paraphrased_question": "Wer?", "paraphrases": "Who?"}, (("Who?", "Wer?"), (), None)),
        ({"perturbed_answer": ["x", "y", "x"]}, ((), ("x", "y", "x"), None)),
        ({"wrong_answers": "x", "paraphrased_answer": "It is A"}, ((), ("x",), "It is A")),
        ({"paraphrases": [{"text": "Who?"}, " "], "wrong_answers": 3, "paraphrased_answer": None}, ((), (), None)),
    ],
)
def test_files_and_mappings_bring_paraphrases_and_wrong_answers(
    tmp_path: Path, record: dict, found: tuple[object, ...]
) -> None:
    record = {"question": "Q?", "answer": "A", **record}
    for read in (read_requests(lines(tmp_path / "facts.jsonl", [record])), read_requests([record])):
        assert [(each.paraphrases, each.wrong_answers, each.paraphrased_answer) for each in read] == [found]


@pytest.mark.parametrize("fields", [{"paraphrases": "Who?"}, {"wrong_answers": ["x", " "]}, {"paraphrased_answer": 3}])
def test_unusable_paraphrases_and_wrong_answers_are_refused(fields: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        ForgetRequest("Q?", "A", **fields)


# --- Errors --------------------------------------------------------------------------------------------------------


def test_hints_and_the_base_class() -> None:
    assert did_you_mean("Layrs", ["layers", "device"]) == " Did you mean 'layers'?"
    assert did_you_mean("zzz", ["layers"]) == did_you_mean("layers", []) == ""
    assert issubclass(RequestError, UniEraseError)
    assert issubclass(DependencyError, UniEraseError)
