"""Tokenizers of Hugging Face checkpoints: ids and texts are those of transformers, and a response ends once."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_jax.text.hf_tokenizer import PretrainedTokenizer
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import RlhfError
from tests.support import tokenizer_files
from tests.support.tokenizer_files import CHATML, CHECKPOINTS, DATED, LAST_DIFFERS, MARKED, PHI3, TEXTS, load_theirs

QUESTION = {"role": "user", "content": "is it good?"}
CHAT = [
    QUESTION,
    {"role": "assistant", "content": "it is"},
    {"role": "user", "content": "is it?"},
    {"role": "assistant", "content": "it's the best"},
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def loaded(directories):
    return {name: load_tokenizer(directory) for name, directory in directories.items()}


@pytest.fixture(scope="module")
def theirs(directories):
    return {name: load_theirs(path) for name, path in directories.items()}


TOKENS = ["<|endoftext|>", "<|im_end|>", "<s>", "</s>", "<bos>", "\n", " ", "film ", "🎬"]


@pytest.mark.parametrize("name", CHECKPOINTS)
@given(st.text() | st.lists(st.sampled_from(TOKENS)).map("".join))
@example("The film<|im_end|>\n<s> was </s>good<|endoftext|>")
def test_texts_have_the_ids_that_transformers_gives_them(loaded, theirs, name, text):
    tokenizer, reference = loaded[name], theirs[name]
    ids = tokenizer.encode(text)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_all([text, "x"]) == [ids, tokenizer.encode("x")]
    assert [*tokenizer.prefix, *ids] == reference(text)["input_ids"]
    expected = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids) == expected
    assert max(ids, default=0) < tokenizer.vocab_size == len(reference)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_texts_come_back(loaded, name):
    for text in TEXTS:
        assert loaded[name].decode(loaded[name].encode(text)) == text
        prompt, completion = text[:8], text[8:]
        ids = loaded[name].encode(prompt), loaded[name].encode(completion)
        if name != "llama2":  # whose every text begins with a space
            assert loaded[name].decode_completion(*ids) == completion


def test_what_each_checkpoint_calls_its_tokens(loaded):
    gpt2, chatml, llama2, gemma = (loaded[name] for name in ("gpt2", "chatml", "llama2", "gemma"))
    assert (gpt2.pad_id, gpt2.eos_id, gpt2.unknown_id, gpt2.prefix, gpt2.stop_ids) == (0, 0, None, (), (0,))
    assert gpt2.begin([]) == [0] and gpt2.begin([5]) == [5]
    assert (chatml.pad_id, chatml.eos_id, chatml.unknown_id, chatml.prefix, chatml.stop_ids) == (2, 2, None, (), (2,))
    assert chatml.begin([]) == [2]
    assert (llama2.pad_id, llama2.eos_id, llama2.unknown_id, llama2.prefix) == (2, 2, 0, (1,))
    assert llama2.begin([]) == [1] and llama2.begin([5]) == [1, 5]
    assert (gemma.pad_id, gemma.eos_id, gemma.unknown_id, gemma.prefix) == (0, 1, None, (2,))
    assert gemma.stop_ids == (1, 5, 4)  # EOS; what the generation config adds; what ends turns in the template
    assert {tokenizer.suppressed for tokenizer in loaded.values()} == {()}
    assert gpt2.chat_template is None and chatml.chat_template == CHATML


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_saved_tokenizer_is_the_same_and_saved_again_the_same_files(loaded, name, tmp_path):
    loaded[name].save(tmp_path / "stage" / "tokenizer")
    again = load_tokenizer(tmp_path / "stage" / "tokenizer")
    assert isinstance(again, PretrainedTokenizer)
    plain = [{k: v for k, v in vars(t).items() if k not in ("wrapped", "backend")} for t in (loaded[name], again)]
    assert plain[0] == plain[1]
    assert again.encode_all(TEXTS) == loaded[name].encode_all(TEXTS)
    again.save(tmp_path / "again")
    again.save(tmp_path / "again")  # over an old one
    files = {file.name: file.read_bytes() for file in (tmp_path / "stage" / "tokenizer").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == files
    assert ("generation_config.json" in files) == (name == "gemma")
    theirs = load_theirs(tmp_path / "again")
    assert theirs.get_vocab() == loaded[name].wrapped.get_vocab()


def test_the_file_that_makes_it_theirs_is_written_last(loaded, tmp_path, monkeypatch):
    def recorded(self, target):
        names.append(target.name)
        return replace(self, target)

    names, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", recorded)
    loaded["gemma"].save(tmp_path)
    assert names[-1] == "tokenizer_config.json" and set(names) == {file.name for file in tmp_path.iterdir()}


def test_a_generation_config_that_is_there_is_left_alone(loaded, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5], "temperature": 0.6}')
    loaded["gemma"].save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6
    assert load_tokenizer(tmp_path).stop_ids == (1, 5, 4)


@pytest.mark.parametrize("ends", [5, [5], [1, 5]])
def test_one_id_or_several_end_a_response(directories, tmp_path, ends):
    load_tokenizer(directories["gpt2"]).save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "max_length": 5}))
    assert set(load_tokenizer(tmp_path).stop_ids) == {0, *([ends] if isinstance(ends, int) else ends)}


@pytest.mark.parametrize("unknown", ["<unk>", "</s>"])
def test_a_vocabulary_of_words_has_an_unknown_one_unless_that_is_eos(tmp_path, unknown):
    model = tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "film": 2}, unk_token=unknown)
    directory = tokenizer_files.save(tmp_path, tokenizers.Tokenizer(model), eos_token="</s>", unk_token=unknown)
    assert load_tokenizer(directory).unknown_id == {"<unk>": 1, "</s>": None}[unknown]


def test_pieces_of_a_unigram_model_have_an_unknown_one(tmp_path):
    model = tokenizers.models.Unigram([("</s>", 0.0), ("<unk>", 0.0), ("film", -1.0)], unk_id=1)
    directory = tokenizer_files.save(tmp_path, tokenizers.Tokenizer(model), eos_token="</s>", unk_token="<unk>")
    assert load_tokenizer(directory).unknown_id == 1


def test_lengths_set_for_training_encoders_do_not_hold_here(directories, tmp_path):
    other = load_theirs(directories["gpt2"])
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding(length=9)
    other.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path).encode("a" * 50)) == 50
    assert len(load_tokenizer(tmp_path).encode("a")) == 1


# ---- chat templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "llama2", "gemma"])
def test_a_conversation_is_rendered_as_transformers_does(loaded, theirs, name):
    for messages in (CHAT[:1], CHAT[:2], CHAT):
        for prompt in (False, True):
            text = loaded[name].render(messages, add_generation_prompt=prompt)
            arguments = {"add_generation_prompt": prompt}
            assert text == theirs[name].apply_chat_template(messages, tokenize=False, **arguments)
            ids = theirs[name].apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)["input_ids"]
            assert loaded[name].encode(text) == ids


def words(tokenizer, ids, written):
    """The runs of tokens that the assistant is to write, as text with special tokens."""
    runs, before = [], False
    for token, mine in zip(ids, written, strict=True):
        if mine:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = mine
    return [tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs]


ANSWERS = ["it is<|im_end|>", "it's the best<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED, PHI3], ids=["ChatML", "generation", "Phi-3"])
def test_the_assistant_writes_its_turns_and_what_ends_them(tmp_path, template):
    tokenizer = load_tokenizer(tokenizer_files.chatml(tmp_path, template))
    ids, written = tokenizer.encode_turns(CHAT)
    assert ids == tokenizer.encode(tokenizer.render(CHAT, add_generation_prompt=False))
    assert words(tokenizer, ids, written) == ANSWERS
    assert words(tokenizer, *tokenizer.encode_turns([{"role": "system", "content": "x"}, *CHAT])) == ANSWERS
    assert not any(tokenizer.encode_turns(CHAT[:1])[1])


def test_spaces_around_a_turn_belong_to_it_where_the_template_writes_them(loaded):
    assert words(loaded["llama2"], *loaded["llama2"].encode_turns(CHAT)) == ["it is </s>", "it's the best </s>"]


def test_where_the_template_marks_turns_it_has_the_last_word(tmp_path):
    directory = tokenizer_files.chatml(tmp_path, MARKED)
    theirs = load_theirs(directory)
    encoded = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, written = load_tokenizer(directory).encode_turns(CHAT)
    assert (ids, written) == (encoded["input_ids"], list(map(bool, encoded["assistant_masks"])))


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(contents, min_size=2, max_size=6))
@example(["a", "\n\n b", "c", " \n"])
def test_turns_by_rendering_are_those_that_a_template_marks(tmp_path_factory, texts):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    answers = []
    for name, template in (("plain", CHATML), ("marked", MARKED)):
        directory = tmp_path_factory.getbasetemp() / name
        tokenizer = load_tokenizer(directory if directory.exists() else tokenizer_files.chatml(directory, template))
        answers.append(tokenizer.encode_turns(messages))
    assert answers[0] == answers[1]


def test_a_template_that_writes_earlier_turns_anew_is_reported(tmp_path):
    tokenizer = load_tokenizer(tokenizer_files.chatml(tmp_path, LAST_DIFFERS))
    with pytest.raises(RlhfError, match=r"renders message 2 differently .*generation.*loss_on = 'completion'"):
        tokenizer.encode_turns(CHAT)


def test_the_date_in_a_template_is_the_same_every_day(tmp_path):
    tokenizer = load_tokenizer(tokenizer_files.chatml(tmp_path, DATED))
    assert tokenizer.render(CHAT[:1], add_generation_prompt=True).startswith("Today is 26 Jul 2024.\n<|im_start|>")
    assert tokenizer.chat_template == DATED


@pytest.mark.parametrize(
    ("name", "response", "ended"),
    [
        ("chatml", "it is<|im_end|>\n", "it is<|im_end|>"),
        ("chatml", "it is<|im_end|>\n<|endoftext|>", "it is<|im_end|>"),
        ("chatml", "it is<|im_end|>", "it is<|im_end|>"),
        ("chatml", "it is\n", "it is\n<|im_end|>"),
        ("chatml", "a<|im_end|>b", "a<|im_end|>b<|im_end|>"),
        ("chatml", "", "<|im_end|>"),
        ("gpt2", "it is<|endoftext|>", "it is<|endoftext|>"),
        ("gpt2", "it is", "it is<|endoftext|>"),
        ("gemma", "it is<|im_end|>\n", "it is<|im_end|>"),
        ("gemma", "it is<|eom|>", "it is<|eom|>"),
        ("gemma", "it is<|im_end|>\n<eos>", "it is<|im_end|>"),
        ("gemma", "it is", "it is<eos>"),
    ],
)
def test_a_response_ends_once(loaded, name, response, ended):
    tokenizer = loaded[name]
    assert tokenizer.end(tokenizer.encode(response)) == tokenizer.encode(ended)


def test_messages_without_a_template_are_refused(loaded):
    for call in (
        lambda: loaded["gpt2"].render(CHAT, add_generation_prompt=True),
        lambda: loaded["gpt2"].encode_turns(CHAT),
    ):
        with pytest.raises(RlhfError, match=r"no chat template.*chat_template\.jinja"):
            call()


@pytest.mark.parametrize("messages", [[], CHAT[1:], [{"role": "user", "content": None}]])
def test_messages_that_the_template_refuses_are_one_clear_error(loaded, messages):
    with pytest.raises(RlhfError, match=r"the chat template rejects these messages \(.+\): use its roles"):
        loaded["llama2"].render(messages, add_generation_prompt=True)


def test_several_templates_need_a_default(directories, tmp_path):
    other = load_theirs(directories["gpt2"])
    other.chat_template = {"default": CHATML, "tools": "x"}
    other.save_pretrained(tmp_path / "both")
    assert load_tokenizer(tmp_path / "both").chat_template == CHATML
    load_tokenizer(tmp_path / "both").save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == CHATML
    other.chat_template = {"rag": CHATML, "tools": "x"}
    other.save_pretrained(tmp_path / "neither")
    with pytest.raises(RlhfError, match="is named default"):
        load_tokenizer(tmp_path / "neither")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"], ids=["empty", "cut short", "not text"])
def test_a_damaged_file_is_named(directories, tmp_path, file, content):
    load_tokenizer(directories["gemma"]).save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RlhfError, match=r"cannot be read .*copy it again") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path / file))


def test_files_of_another_content_are_one_clear_error(directories, tmp_path):
    load_tokenizer(directories["gemma"]).save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "<eos>"}')
    with pytest.raises(RlhfError, match=r"generation_config\.json: eos_token_id = '<eos>' should be"):
        load_tokenizer(tmp_path)
    for content in ("{}", "[]", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(RlhfError, match=f"{tmp_path} has no readable tokenizer .*tokenizer.json"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(RlhfError, match=f"{tmp_path} has no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_ends_nothing_is_refused(tmp_path):
    directory = tokenizer_files.save(tmp_path, tokenizer_files.byte_bpe(["<x>"]), bos_token="<x>")
    with pytest.raises(RlhfError, match=f"{tmp_path}: the tokenizer has no stop token: .*eos_token"):
        load_tokenizer(directory)


def test_a_name_that_is_no_directory_is_looked_for_on_the_hub(directories, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert "tokenizer*" in allow_patterns and not any("safetensors" in pattern for pattern in allow_patterns)
        return str(directories["chatml"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_tokenizer("someone/model").chat_template == CHATML
    assert load_tokenizer(str(directories["gpt2"])).stop_ids == (0,)
    assert asked == ["someone/model"]


def test_a_name_that_nobody_knows_is_one_clear_error(tmp_path, monkeypatch):
    def download(name, allow_patterns):
        raise LocalEntryNotFoundError("Got: ConnectError: no network\nlong explanations")

    with pytest.raises(RlhfError, match=r"is not a readable tokenizer\.json"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(RlhfError, match="a/b/c does not exist: check the path"):
        load_tokenizer("a/b/c")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        RlhfError, match=r"someone/model is not a directory.*\(Got: ConnectError: no network\).*HF_TOKEN"
    ):
        load_tokenizer("someone/model")
