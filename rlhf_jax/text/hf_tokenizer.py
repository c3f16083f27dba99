"""Tokenizers and chat templates of Hugging Face checkpoints, through transformers (which needs no torch for them)."""

import datetime
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from rlhf_jax.text.tokenizer import BOS, CONFIG_FILE, EOS, PAD, TOKENIZER_FILE, UNKNOWN, Messages, Tokenizer
from rlhf_jax.types import RlhfError

GENERATION_FILE = "generation_config.json"
_FILES = ["tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "added_tokens.json", "special_tokens_map.json"]
_TODAY = datetime.date(2024, 7, 26)  # in templates that ask for the date: Llama's own where there is no clock


class PretrainedTokenizer(Tokenizer):
    """A checkpoint's tokenizer. Unlike one of ours it finds special tokens within texts, as transformers does.

    Special tokens within the content of a message are found too, as they are by transformers.
    """

    def __init__(self, wrapped: Any, stop_ids: tuple[int, ...], suppressed: tuple[int, ...] = ()) -> None:
        """Wraps a fast tokenizer of transformers. Raises RlhfError where nothing could end a response.

        Args: stop_ids, of the checkpoint's generation config, end a response as EOS does. So does the special token
            that ends the assistant's turn in the chat template. Those suppressed, of the same file, are never emitted.
        """
        self.wrapped = wrapped
        self.backend = wrapped.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.chat_template = _template(wrapped)
        ends = [wrapped.eos_token_id, *stop_ids, *self._turn_ends()]
        self.stop_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
        if not self.stop_ids:
            raise RlhfError(f"the tokenizer has no token that ends a text: name one as eos_token in its {CONFIG_FILE}")
        self.eos_id = self.stop_ids[0]
        self.pad_id = self.eos_id if wrapped.pad_token_id is None else wrapped.pad_token_id
        self.start_id = self.eos_id if wrapped.bos_token_id is None else wrapped.bos_token_id
        self.prefix = self._prefix()
        self.suppressed = suppressed
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        # GPT-2's tokenizer calls EOS its unknown token, SmolLM2's the end of a document, but bytes hold every word.
        model: Any = self.backend.model
        emitted = isinstance(model, tokenizers.models.Unigram) or model.unk_token is not None
        named = {*self.stop_ids, self.pad_id, self.start_id}
        self.unknown_id = wrapped.unk_token_id if emitted and wrapped.unk_token_id not in named else None

    def save(self, directory: Path) -> None:
        """Writes the files that transformers reads, and a generation config where one says more and there is none.

        The file that makes it a tokenizer of Hugging Face's comes last.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as name:
            temporary = Path(name)
            self.wrapped.save_pretrained(temporary)
            if (len(self.stop_ids) > 1 or self.suppressed) and not (directory / GENERATION_FILE).exists():
                content = {"eos_token_id": self.stop_ids, **suppression(self.suppressed)}
                (temporary / GENERATION_FILE).write_text(json.dumps(content) + "\n")
            for file in sorted(temporary.rglob("*"), key=lambda file: file.name == CONFIG_FILE):
                target = directory / file.relative_to(temporary)
                if file.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    file.replace(target)

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The text of a conversation. The date in it, where the template asks for one, is always 26 July 2024.

        Otherwise a run that is started again on another day would read other prompts.
        """
        return self._apply(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def encode_turns(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a rendered conversation, and which of them the assistant is to write.

        Where the template marks them by `{% generation %}`, it has the last word. Otherwise they are what follows the
        beginning of an answer, turn by turn, up to the end of the turn.

        Raises: RlhfError where the template writes a turn otherwise once others follow it, so that this finds nothing.
        """
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template or ""):
            encoded = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return encoded["input_ids"], [bool(written) for written in encoded["assistant_masks"]]
        encoding = self.backend.encode(self.render(messages, add_generation_prompt=False), add_special_tokens=False)
        written = [False] * len(encoding.ids)
        for first, stop in self._turns(messages, encoding):
            written[first:stop] = [True] * (stop - first)
        return encoding.ids, written

    def _apply(self, messages: Messages, **arguments: Any) -> Any:
        from jinja2 import TemplateError

        if self.chat_template is None:
            raise RlhfError(
                "the tokenizer has no chat template, which chat messages need: put the template of the checkpoint's "
                f"authors beside its {CONFIG_FILE} as chat_template.jinja, or give texts"
            )
        try:
            return self.wrapped.apply_chat_template(
                messages, chat_template=_without_clock(self.chat_template), **arguments
            )
        except (TemplateError, TypeError, LookupError, ValueError) as error:
            raise RlhfError(
                f"the chat template refuses these messages ({error}): give the roles that it knows, in its order"
            ) from error

    def _turns(self, messages: Messages, whole: tokenizers.Encoding) -> Iterator[tuple[int, int]]:
        """The tokens of each answer: from its first to the one that ends it."""
        text = self.render(messages, add_generation_prompt=False)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:number], add_generation_prompt=True)
                so_far = self.encode(self.render(messages[: number + 1], add_generation_prompt=False))
                pairs = zip(so_far, whole.ids, strict=False)
                shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
                # A template may end a conversation with a special token that does not stand within it, as Phi-3's does.
                if not text.startswith(before) or self.decode(so_far[len(shared) :]).strip():
                    raise RlhfError(
                        f"the chat template writes message {number + 1} otherwise within the whole conversation than "
                        "at its end, so that the assistant's turns cannot be told apart: use a template that marks "
                        "them by {% generation %}, or data.loss_on = 'completion'"
                    )
                # A token that lies across the beginning of a turn counts, as it does for transformers.
                first = next((i for i, (_, stop) in enumerate(whole.offsets) if stop > len(before)), len(shared))
                yield first, first + len(self.trim(shared[first:]))

    def _turn_ends(self) -> list[int]:
        """The special token that follows an answer in the chat template, if there is one."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        if self.chat_template is None:
            return []
        try:
            end = self.render(messages, add_generation_prompt=False).rpartition("answer")[2]
        except RlhfError:  # a template for other roles
            return []
        special = {token for token, added in self.wrapped.added_tokens_decoder.items() if added.special}
        return [token for token in self.encode(end) if token in special][:1]

    def _prefix(self) -> tuple[int, ...]:
        """What the tokenizer's own post-processor puts before a text."""
        alone, whole = self.encode("a"), self.backend.encode("a", add_special_tokens=True).ids
        starts = [start for start in range(len(whole)) if whole[start : start + len(alone)] == alone]
        return tuple(whole[: starts[0]]) if alone and starts else ()


def suppression(ids: tuple[int, ...]) -> dict[str, list[int]]:
    """What a generation config says of tokens that are never emitted."""
    return {"suppress_tokens": list(ids)} if ids else {}


def as_pretrained(tokenizer: Tokenizer) -> PretrainedTokenizer:
    """A tokenizer of ours as transformers has it: the same ids, BOS before every text, special tokens never in one."""
    _quieten()
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.start_id)]
    )
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=True, clean_up_tokenization_spaces=False, **names
    )
    return PretrainedTokenizer(wrapped, (), tokenizer.suppressed)


def load_pretrained_tokenizer(source: str | Path, *, generation: Path | None = None) -> PretrainedTokenizer:
    """The tokenizer of a checkpoint's directory, or of a repository on the Hub (where a string is no directory).

    Args: generation is another directory, whose generation config counts.
    Raises: RlhfError, naming the file, where one is missing or does not parse; where the Hub cannot be reached.
    """
    directory = Path(source) if isinstance(source, Path) or Path(source).exists() else _download(source)
    for file in sorted(directory.glob("*.json")):
        if file.name in (CONFIG_FILE, TOKENIZER_FILE, GENERATION_FILE):
            _check_json(file)
    _quieten()
    from transformers import AutoTokenizer

    try:
        wrapped: Any = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # whatever a damaged file brings about in transformers, and tokenizers' bare Exception
        reason = str(error).partition("\n")[0]
        raise RlhfError(
            f"{directory} holds no tokenizer that can be read ({reason}): copy its {TOKENIZER_FILE} and {CONFIG_FILE} "
            "again, or convert an older form with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    if not wrapped.is_fast:
        raise RlhfError(f"{directory} has a slow tokenizer, without a {TOKENIZER_FILE}: convert it with transformers")
    try:
        ids = [_ids(generation or directory, name) for name in ("eos_token_id", "suppress_tokens")]
        return PretrainedTokenizer(wrapped, *ids)
    except RlhfError as error:
        raise RlhfError(f"{directory}: {error}") from error


def _quieten() -> None:
    """Before transformers is imported, which says that it found no PyTorch, which nobody here misses."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=[*_FILES, "config.json", GENERATION_FILE]))
    except HFValidationError as error:
        raise RlhfError(f"{name} does not exist: check the path") from error
    except OSError as error:  # the Hub's own errors are OSErrors too
        reason = str(error).strip().partition("\n")[0]
        raise RlhfError(
            f"{name} is no directory here, and the Hugging Face Hub does not give it ({reason}): check the path, or "
            "the repository's name and the network; HF_TOKEN opens private and gated ones"
        ) from error


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RlhfError(f"{file} cannot be read ({error}): copy it again from the checkpoint") from error


def _ids(directory: Path, name: str) -> tuple[int, ...]:
    """What a field of the generation config names: nothing, one id or several."""
    if not (directory / GENERATION_FILE).exists():
        return ()
    content = json.loads((directory / GENERATION_FILE).read_bytes())
    found = content.get(name) if isinstance(content, dict) else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ids):
        raise RlhfError(f"{directory / GENERATION_FILE}: {name} = {found!r} should be an id or a list of ids")
    return tuple(ids)


def _template(wrapped: Any) -> str | None:
    if not wrapped.chat_template:
        return None
    try:
        return wrapped.get_chat_template()  # of several, the one named default
    except ValueError as error:
        raise RlhfError(f"the tokenizer's chat templates have none named default: {error}") from error


def _without_clock(template: str) -> str:
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda match: repr(_TODAY.strftime(match[2])), template)
