from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.language.data import Corpus, load
from experiments.language.dialogues import SILENCE, Dialogue, PersonaMap, plain, read_parlai
from experiments.lib.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "convai2"
CLUSTERS = {7: "i am a cook", 3: "i have two dogs", 9: "i do not sleep", 0: "i like it"}
SIZES = {7: 4, 3: 5, 9: 4, 0: 9}
OPTIONS: dict[str, Any] = {
    "tasks": 1,
    "test_tasks": 1,
    "held_out": 1,
    "test_held_out": 1,
    "per_turn": 4,
}
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/convai2")


def turns(cluster: int, number: int, prefix: str = "") -> list[list[str]]:
    """Three turns that no other dialogue has."""
    name = f"{prefix}{cluster}.{number}"
    return [[f"question {name}.{k} ?", f"answer {name}.{k} ."] for k in range(3)]


def write_json_lines(path: Path, prefix: str = "", **extra: Any) -> Path:
    records = [
        {"cluster": cluster, "turns": turns(cluster, number, prefix), **extra}
        for cluster, size in SIZES.items()
        for number in range(size)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parlai_lines(cluster: int, number: int, lists: bool) -> list[str]:
    lines = [f"your persona: {CLUSTERS[cluster]}.", "your persona: i'm 30."]
    for question, answer in turns(cluster, number):
        candidates = "|".join([*(f"wrong {k}" for k in range(3)), answer])
        lines.append(f"{question}\t{answer}" + (f"\t\t{candidates}" if lists else ""))
    return [f"{i} {line}" for i, line in enumerate(lines, start=1)]


def write_parlai(path: Path, lists: bool = True) -> Path:
    """Three persona clusters and the catch-all one, five lines to each of 22 dialogues."""
    lines = [
        line
        for cluster, size in SIZES.items()
        for number in range(size)
        for line in parlai_lines(cluster, number, lists)
    ]
    path.write_text("\n".join(lines) + "\n")
    personas = {str(c): [[sentence, "i am 30"]] for c, sentence in CLUSTERS.items()}
    path.with_name("valid_persona_map.json").write_text(json.dumps(personas))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_parlai(tmp_path / "valid_self_original.txt")


def edit(path: Path, line: int, text: str | None) -> None:
    """Puts a text in the place of a line (from 1); None takes the line out."""
    lines = path.read_text().split("\n")
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_text("\n".join(lines))


def said(dialogues: Sequence[Dialogue]) -> list[list[list[str]]]:
    return [[[t.utterance, t.response] for t in d.turns] for d in dialogues]


def shape(corpus: Corpus) -> list[tuple[int, int, int]]:
    tasks = (*corpus.retraining, *corpus.testing)
    return [(t.cluster, len(t.train), len(t.held_out)) for t in tasks]


def test_clusters_are_tasks_largest_first_and_the_last_dialogues_are_held_out(file: Path) -> None:
    corpus = load(file.parent, **OPTIONS | {"test_tasks": 2, "held_out": 2})
    # 7 before 9, which has as many dialogues; nothing of the catch-all cluster 0.
    assert shape(corpus) == [(3, 3, 2), (7, 3, 1), (9, 3, 1)]
    assert [t.cluster for t in corpus.testing] == [7, 9]
    task = corpus.retraining[0]
    assert said([*task.train, *task.held_out]) == [turns(3, n) for n in range(5)]
    (report,) = corpus.files
    assert report.counts == {"exact": 13, "partial": 0, "catch_all": 9, "unmatched": 0}
    assert report.clusters == 3 and not report.distractors_drawn
    assert set(report.sha256) == {"valid_self_original.txt", "valid_persona_map.json"}


def test_every_form_gives_the_same_tasks(file: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.mkdir()
    write_json_lines(lines / "valid.jsonl")
    bare = tmp_path / "bare"
    bare.mkdir()
    write_parlai(bare / "valid_self_original_no_cands.txt", lists=False)
    forms = [load(root, **OPTIONS) for root in (file.parent, bare, lines, lines / "valid.jsonl")]
    for corpus in forms[1:]:
        assert shape(corpus) == shape(forms[0])
        assert said(corpus.testing[0].train) == said(forms[0].testing[0].train)
        assert corpus.files[0].distractors_drawn
    # What is drawn depends on the place in the file, not on its form.
    assert forms[1].testing[0].train[0].turns == forms[2].testing[0].train[0].turns


def test_folders_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "cluster": cluster,
            "turns": turns(cluster, number),
            "candidates": [[a, "wrong 1", "wrong 2", "wrong 3"] for _, a in turns(cluster, number)],
            "match": None,
        }
        for cluster, number in ((3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (5, 0), (5, 1))
    ]
    train, valid = datasets.Dataset.from_list(rows[:5]), datasets.Dataset.from_list(rows[5:])
    datasets.DatasetDict({"train": train, "validation": valid}).save_to_disk(tmp_path / "both")
    corpus = load(tmp_path / "both", **OPTIONS | {"tasks": 2})
    assert [f.path.name for f in corpus.files] == ["train", "validation"]
    assert shape(corpus) == [(3, 2, 1), (4, 1, 1), (5, 1, 1)]
    corpus = load(tmp_path / "both" / "train", **OPTIONS)
    assert shape(corpus) == [(3, 2, 1), (4, 1, 1)]
    assert set(corpus.testing[0].train[0].turns[0].candidates) == set(rows[3]["candidates"][0])
    (arrow,) = (tmp_path / "both" / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train is damaged \(.*save the dataset again$"):
        load(tmp_path / "both", **OPTIONS)


def test_two_files_give_the_largest_tasks_of_each(file: Path) -> None:
    write_json_lines(file.with_name("train.jsonl"), "t")
    write_json_lines(file.with_name("other.jsonl"), "o", match="partial")
    corpus = load(file.parent, **OPTIONS | {"tasks": 3, "test_tasks": 3})
    assert [f.path.name for f in corpus.files] == ["train.jsonl", file.name]
    assert shape(corpus) == [(3, 4, 1), (7, 3, 1), (9, 3, 1)] * 2
    with pytest.raises(DataError, match=r"other\.jsonl: wanted 1 tasks, but only 0 persona"):
        load(file.parent, retrain_file="other.jsonl", **OPTIONS)


def test_dialogues_of_a_test_task_from_the_other_side_are_not_retrained_on(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "valid.jsonl")
    own = turns(7, 0)
    other = [[SILENCE, own[0][0]], [own[0][1], own[1][0]], [own[1][1], own[2][0]]]
    with path.open("a") as out:
        for cluster, heard in ((3, other), (3, turns(3, 9)), (9, other)):
            out.write(json.dumps({"cluster": cluster, "turns": heard}) + "\n")
    corpus = load(tmp_path, **OPTIONS | {"tasks": 2, "test_tasks": 1})
    assert shape(corpus) == [(3, 5, 1), (9, 3, 1), (7, 3, 1)] and corpus.other_sides == 2


def test_what_a_test_task_holds_out_is_not_trained_on_from_the_other_side(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "valid.jsonl")
    last = turns(9, SIZES[9] - 1)
    other = [[SILENCE, last[0][0]], [last[0][1], last[1][0]], [last[1][1], last[2][0]]]
    path.write_text(f"{json.dumps({'cluster': 9, 'turns': other})}\n{path.read_text()}")
    corpus = load(tmp_path, **OPTIONS | {"tasks": 1, "test_tasks": 2})
    tested = next(task for task in corpus.testing if task.cluster == 9)
    assert said(tested.held_out) == [last] and other not in said(tested.train)
    assert len(tested.train) == SIZES[9] - 1 and corpus.other_sides == 1


def test_what_a_retraining_task_holds_out_is_not_trained_on_from_the_other_side(
    tmp_path: Path,
) -> None:
    path = write_json_lines(tmp_path / "valid.jsonl")
    last = turns(7, SIZES[7] - 1)
    other = [[SILENCE, last[0][0]], [last[0][1], last[1][0]], [last[1][1], last[2][0]]]
    first = json.dumps({"cluster": 3, "turns": other})
    path.write_text(f"{first}\n{path.read_text()}")
    corpus = load(tmp_path, **OPTIONS | {"tasks": 2})
    assert shape(corpus) == [(3, 4, 1), (7, 3, 1), (9, 3, 1)] and corpus.other_sides == 1
    assert said(corpus.retraining[0].train) == [turns(3, n) for n in range(4)]
    assert said(corpus.retraining[1].held_out) == [last]


def test_twenty_candidates_the_right_one_once_others_of_other_dialogues(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "valid.jsonl")
    corpus = load(tmp_path, **OPTIONS | {"per_turn": 20})
    every = {r for c, n in SIZES.items() for i in range(n) for _, r in turns(c, i)}
    places = Counter[int]()
    for task in (*corpus.retraining, *corpus.testing):
        for dialogue in (*task.train, *task.held_out):
            own = {turn.response for turn in dialogue.turns}
            for turn in dialogue.turns:
                assert len(set(turn.candidates)) == len(turn.candidates) == 20
                assert set(turn.candidates) <= every
                assert set(turn.candidates) & own == {turn.response}
                places[turn.answer] += 1
    assert len(places) > 10 and max(places.values()) < 8  # 27 turns


def test_candidates_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "valid.jsonl")
    first = load(tmp_path, **OPTIONS)
    assert load(tmp_path, **OPTIONS) == first
    assert load(tmp_path, seed=1, **OPTIONS).testing != first.testing
    swapped = load(tmp_path, **OPTIONS | {"tasks": 2, "held_out": 2})
    assert swapped.retraining[1].train == first.testing[0].train[:2]


def test_lists_that_came_with_the_file_are_shuffled(file: Path) -> None:
    corpus = load(file.parent, **OPTIONS)
    made = [turn for d in corpus.retraining[0].train for turn in d.turns]
    assert {frozenset(t.candidates) - {t.response} for t in made} == {
        frozenset({"wrong 0", "wrong 1", "wrong 2"})
    }
    assert {turn.answer for turn in made} == {0, 1, 2, 3}


def test_too_few_responses_to_draw_from(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "valid.jsonl")
    load(tmp_path, **OPTIONS | {"per_turn": 64})
    with pytest.raises(DataError, match=r"64 distractors cannot be drawn from its 66 different"):
        load(tmp_path, **OPTIONS | {"per_turn": 65})


PERSONA = "1 your persona: i am a cook."
DAMAGE = [
    (8, "3 question ?\tanswer", r":8: wanted 4 fields separated by tabs .* got 2; is the line cut"),
    (5, "5 question ?", r":5: wanted 4 fields .* got 1; is the line cut off\?"),
    (5, "5", r":5: wanted a number and text; is the line cut off\?"),
    (4, "4 u\tr\t\ta|b|c", r":4: wanted 4 candidates, got 3; is the line cut off\?"),
    (4, "4 u\tr\t\ta|b|c|d", r":4: the response 'r' is not among its 4 candidates"),
    (4, "4 u\t \t\ta|b|c|d", r":4: the response is empty"),
    (4, "4 \tr\t\ta|b|c|r", r":4: the utterance is empty"),
    (4, "4 u\tr\t\ta||c|r", r":4: the candidate is empty"),
    (7, "3 your persona: i'm 30.", r":7: wanted line number 2 .* got 3; lines are missing"),
    (8, "2 u\tr\t\ta|b|c|r", r":8: wanted line number 3 .* got 2; lines are missing or repeated"),
    (1, "2 your persona: i am a cook.", r":1: wanted line number 1 .* got 2"),
    (8, None, r":8: wanted line number 3 .* got 4"),
    (6, f"{PERSONA}\n{PERSONA}", r":6: the dialogue has no turns; is the file cut off\?"),
    (3, "3 u\tr\t0", r":3: wanted 2 or 4 fields .* got 3"),
]


@pytest.mark.parametrize(("line", "text", "message"), DAMAGE)
def test_damaged_lines_of_a_parlai_file(
    file: Path, line: int, text: str | None, message: str
) -> None:
    edit(file, line, text)
    before = sorted(file.parent.iterdir())
    with pytest.raises(DataError, match=rf"valid_self_original\.txt{message}") as caught:
        load(file.parent, **OPTIONS)
    assert "\n" not in str(caught.value)
    assert sorted(file.parent.iterdir()) == before


@pytest.mark.parametrize("lists", [True, False])
def test_a_file_cut_anywhere_in_its_last_line(tmp_path: Path, lists: bool) -> None:
    file = write_parlai(tmp_path / "valid_self_original.txt", lists)
    whole = file.read_text()
    assert len(read_parlai(file, 4)) == sum(SIZES.values())
    begin = whole.rstrip("\n").rfind("\n") + 1
    for end in range(begin + 1, len(whole)):
        file.write_text(whole[:end])
        with pytest.raises(DataError, match=r":110: .*cut off"):
            read_parlai(file, 4)


def test_files_that_are_no_text_or_hold_nothing(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data.replace(b"answer 7.0.1", "réponse".encode("latin-1")))
    with pytest.raises(DataError, match=r"original\.txt:4: not UTF-8; convert"):
        load(file.parent, **OPTIONS)
    file.write_bytes("\ufeff".encode() + data.replace(b"\n", b"\r\n") + b"\r\n")
    assert said(read_parlai(file, 4))[0] == turns(7, 0)
    file.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"original\.txt holds no dialogues"):
        load(file.parent, **OPTIONS)


def test_personas_that_match_no_cluster_are_counted(file: Path) -> None:
    edit(file, 1, "1 your persona: i fly planes.")
    edit(file, 2, "2 your persona: i never land.")
    report = load(file.parent, **OPTIONS).files[0]
    assert report.counts == {"exact": 12, "partial": 0, "catch_all": 9, "unmatched": 1}
    assert report.unmatched == (f"{file}:1",)
    with pytest.raises(
        DataError, match=rf"only 3 persona .* \(1 match none, first {file}:1\); ask"
    ):
        load(file.parent, **OPTIONS | {"tasks": 9})


def test_partial_matches_are_left_out(file: Path) -> None:
    for line in (1, 6):  # two of cluster 7's; of the others only "i am 30", as of every cluster
        edit(file, line + 1, "2 your persona: i've a boat.")
    found = load(file.parent, **OPTIONS)
    assert shape(found) == [(3, 4, 1), (9, 3, 1)]
    assert found.files[0].counts == {"exact": 11, "partial": 2, "catch_all": 9, "unmatched": 0}


def test_sentences_are_compared_without_contractions_and_punctuation(tmp_path: Path) -> None:
    assert plain("I'm sure , we won't!") == plain("i am sure we will not.")
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"5": [["a", "b", "c"], ["a", "b", "d"]], "2": [["e", "f"]]}))
    personas = PersonaMap(path)
    assert personas.match(["b .", "A", "d"]) == (5, "exact")
    assert personas.match(["a", "b", "c", "d"]) == (5, "partial")  # of two variants
    assert personas.match(["e", "a", "x"]) == (2, "partial")  # as many in both: the smaller
    assert personas.match(["e", "x", "y"]) == (2, "partial")
    assert personas.match(["e", "x", "y", "z"]) == (None, "unmatched")
    assert personas.match([]) == (None, "unmatched")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": [["a"]', r"is damaged \(line 1\): wanted a JSON object"),
        ("[]", r"is damaged \(no map\): wanted a JSON object"),
        ('{"one": [["a"]]}', r"is damaged \(no map\)"),
        ('{"1": [["a"]], "2": ["b"]}', "is damaged: cluster 2 is not a list of personas"),
        ('{"1": [["a", 3]]}', "is damaged: cluster 1 is not a list of personas"),
        (None, "is missing: dialogues in ParlAI's format need the persona map"),
    ],
)
def test_damaged_persona_maps(file: Path, text: str | None, message: str) -> None:
    path = file.with_name("valid_persona_map.json")
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=f"valid_persona_map.json {message}"):
        load(file.parent, **OPTIONS)


def test_a_partners_persona_is_that_of_the_other_side(tmp_path: Path) -> None:
    path = tmp_path / "valid_other_original.txt"
    lines = ["partner's persona: i am a cook.", "a ?\tb .", "c ?\td ."]
    silent = ["partner's persona: i am a cook.", f"{SILENCE}\tb .", "c ?\td ."]
    both = ["your persona: i have two dogs.", *lines]
    text = [f"{i} {line}" for part in (lines, silent, both) for i, line in enumerate(part, 1)]
    path.write_text("\n".join([*text, ""]))
    first, second, third = read_parlai(path, 4)
    assert said([first]) == [[[SILENCE, "a ?"], ["b .", "c ?"]]]
    assert said([second]) == [[["b .", "c ?"]]]
    assert said([third]) == [[["a ?", "b ."], ["c ?", "d ."]]]
    assert third.persona == ("i have two dogs.",) and first.persona == ("i am a cook.",)


GOOD = {"cluster": 3, "turns": [["a", "b"]], "candidates": [["b", "x", "y", "z"]]}
RECORDS = [
    ('{"cluster": 3, "turns": [["a"', "no JSON .*; is the line cut off"),
    ("3", "wanted an object with fields cluster and turns"),
    (GOOD | {"cluster": "3"}, "field cluster must be a whole number, got '3'"),
    (GOOD | {"match": "some"}, 'field match must be "exact" or "partial", got \'some\''),
    (GOOD | {"persona": "a cook"}, "field persona must be a list of sentences"),
    (GOOD | {"turns": []}, "field turns must be a list of"),
    (GOOD | {"turns": [["a", "b", "c"]]}, r"turn 1 must be \[utterance, response\]"),
    (GOOD | {"turns": [["a", 1]]}, r"turn 1 must be \[utterance, response\]"),
    (GOOD | {"turns": [["a", "b"]] * 2}, "field candidates must be a list of 2 lists"),
    (GOOD | {"candidates": [["b", "x"]]}, "turn 1: wanted 4 candidates, got 2"),
    (GOOD | {"candidates": [["w", "x", "y", "z"]]}, "turn 1: the response 'b' is not among"),
    (GOOD | {"turns": [["a\ud83d", "b"]]}, r"turn 1: the utterance has half a UTF-16 pair"),
    (GOOD | {"candidates": ["bxyz"]}, "the candidates of turn 1 must be a list of texts"),
    ({"cluster": 3, "turns": [["a", "b"]]}, "field candidates must be in all dialogues .* or in"),
]


@pytest.mark.parametrize(("record", "message"), RECORDS)
def test_damaged_records(tmp_path: Path, record: Any, message: str) -> None:
    text = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / "valid.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    with pytest.raises(DataError, match=rf"valid\.jsonl:3[:,] {message}") as caught:
        load(tmp_path, **OPTIONS)
    assert "\n" not in str(caught.value)


def test_fewer_or_smaller_tasks_than_asked_for(file: Path) -> None:
    with pytest.raises(DataError, match=r"wanted 4 tasks, but only 3 persona clusters"):
        load(file.parent, **OPTIONS | {"tasks": 2, "test_tasks": 2})
    with pytest.raises(DataError, match=r"cluster 7 has 4 dialogues .* 4 of them to hold out"):
        load(file.parent, **OPTIONS | {"tasks": 2, "held_out": 4})


def test_folders_and_names_without_dialogues(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dialogues in .*: none of train_self_original\.txt"):
        load(tmp_path)
    with pytest.raises(DataError, match="gone does not exist; give the folder"):
        load(tmp_path / "gone")
    with pytest.raises(DataError, match=r"x\.txt is no file of dialogues"):
        load(tmp_path, test_file="x.txt")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"x\.csv is no file of dialogues"):
        load(tmp_path / "x.csv")
    write_json_lines(tmp_path / "valid.jsonl")
    with pytest.raises(DataError, match=r"valid\.jsonl is one file; give the folder"):
        load(tmp_path / "valid.jsonl", test_file="valid.jsonl")


@pytest.fixture(scope="module")
def at_hand() -> Corpus:
    return load(SHARED)


@real_data
def test_the_data_at_hand_have_the_known_numbers_of_dialogues(at_hand: Corpus) -> None:
    (report,) = at_hand.files
    assert report.path.name == "valid_both_sides.jsonl" and report.distractors_drawn
    # 1,802 exact and 198 partial ones, of which 46 and 8 are of the catch-all cluster.
    assert report.counts == {"exact": 1756, "partial": 190, "catch_all": 54, "unmatched": 0}
    tested = {task.cluster for task in at_hand.testing}
    retrained = {task.cluster for task in at_hand.retraining}
    assert len(tested) == len(retrained) == 10 and not tested & retrained
    assert [len((*t.train, *t.held_out)) for t in at_hand.testing] == [21] * 4 + [20] * 6
    assert at_hand.other_sides == 19 + 3  # of a test task, held out by a retraining task


@real_data
def test_matching_finds_the_clusters_that_the_json_lines_have() -> None:
    path = SHARED / "valid_both_sides.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    personas = PersonaMap(SHARED / "valid_persona_map.json")
    for side in ("self", "other"):
        dialogues = read_parlai(SHARED / f"valid_{side}_original_no_cands.txt", 20)
        known = [r for r in records if r["side"] == side]
        found = [personas.match(d.persona) for d in dialogues]
        assert found == [(r["cluster"], r["match"]) for r in known]
        # The same turns as well, but for the spelling of contractions.
        assert [[list(map(plain, turn)) for turn in d] for d in said(dialogues)] == [
            [list(map(plain, turn)) for turn in r["turns"]] for r in known
        ]


@real_data
def test_json_lines_and_candidate_files_are_the_same_dialogues(at_hand: Corpus) -> None:
    given = load(SHARED, test_file="valid_both_sides_sampled_cands.txt")
    assert not given.files[0].distractors_drawn
    for one, other in zip(
        (*at_hand.retraining, *at_hand.testing), (*given.retraining, *given.testing), strict=True
    ):
        assert one.cluster == other.cluster
        assert said(one.train) == said(other.train) and said(one.held_out) == said(other.held_out)


@real_data
def test_the_training_subset_can_be_named() -> None:
    corpus = load(SHARED, retrain_file="train_subset.jsonl", held_out=1)
    assert corpus.files[0].counts == {
        "exact": 2089,
        "partial": 267,
        "catch_all": 0,
        "unmatched": 0,
    }
    assert shape(corpus)[:2] == [(3, 9, 1), (291, 6, 1)] and corpus.other_sides == 0
