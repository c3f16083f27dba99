"""Tokenizers and chat templates of Hugging Face checkpoints, through transformers (without torch)."""

import datetime
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from rlhf_jax.text.tokenizer import BOS, CONFIG_FILE, EOS, PAD, TOKENIZER_FILE, UNKNOWN, Messages, Tokenizer
from rlhf_jax.types import RlhfError

GENERATION_FILE = "generation_config.json"
_FILES = ["tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "added_tokens.json", "special_tokens_map.json"]
_TODAY = datetime.date(2024, 7, 26)  # date for templates that ask for it; the default of Llama's template


class PretrainedTokenizer(Tokenizer):
    """Tokenizer of a checkpoint.

    Unlike TrainedTokenizer, it recognises special tokens within texts and message contents, as transformers does.
    """

    def __init__(self, wrapped: Any, stop_ids: tuple[int, ...], suppressed: tuple[int, ...] = ()) -> None:
        """Wrap a fast tokenizer of transformers. Raises RlhfError if it has no stop token.

        Args: stop_ids, from the checkpoint's generation config, end a response like EOS, as does the special token
            that ends the assistant's turn in the chat template; suppressed ids, from the same file, are never sampled.
        """
        self.wrapped = wrapped
        self.backend = wrapped.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.chat_template = _template(wrapped)
        ends = [wrapped.eos_token_id, *stop_ids, *self._turn_ends()]
        self.stop_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
        if not self.stop_ids:
            raise RlhfError(f"the tokenizer has no stop token: set eos_token in its {CONFIG_FILE}")
        self.eos_id = self.stop_ids[0]
        self.pad_id = self.eos_id if wrapped.pad_token_id is None else wrapped.pad_token_id
        self.start_id = self.eos_id if wrapped.bos_token_id is None else wrapped.bos_token_id
        self.prefix = self._prefix()
        self.suppressed = suppressed
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        # Byte-level tokenizers have no unknown words, but GPT-2 and SmolLM2 name a special token as their unk_token.
        model: Any = self.backend.model
        has_unknown = isinstance(model, tokenizers.models.Unigram) or model.unk_token is not None
        other_roles = {*self.stop_ids, self.pad_id, self.start_id}
        self.unknown_id = wrapped.unk_token_id if has_unknown and wrapped.unk_token_id not in other_roles else None

    def save(self, directory: Path) -> None:
        """Write the files that transformers reads, and a generation config if one is needed and does not exist.

        tokenizer_config.json, which marks the directory as a Hugging Face tokenizer, is written last.
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
        """Render a conversation. A template that asks for the date always gets 26 July 2024, for reproducibility."""
        return self._apply(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def encode_turns(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Encode a rendered conversation, with a mask of the tokens that the assistant writes.

        The mask follows the template's `{% generation %}` markers if it has any. Otherwise it covers, in each turn of
        the assistant, the tokens from the end of the generation prompt to the end of the turn.

        Raises: RlhfError if the template renders a turn differently when others follow, so that turns cannot be
        located.
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
        if self.chat_template is None:
            raise RlhfError(
                "the tokenizer has no chat template, which chat messages need: save the template of the checkpoint's "
                f"authors as chat_template.jinja next to its {CONFIG_FILE}, or give texts"
            )
        try:
            return self.wrapped.apply_chat_template(
                messages, chat_template=_without_clock(self.chat_template), **arguments
            )
        except Exception as error:  # the template is code of the checkpoint's authors
            raise RlhfError(
                f"the chat template rejects these messages ({error}): use its roles, in its order"
            ) from error

    def _turns(self, messages: Messages, whole: tokenizers.Encoding) -> Iterator[tuple[int, int]]:
        """Yield the token range of each of the assistant's turns, including the stop token."""
        text = self.render(messages, add_generation_prompt=False)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:number], add_generation_prompt=True)
                so_far = self.encode(self.render(messages[: number + 1], add_generation_prompt=False))
                pairs = zip(so_far, whole.ids, strict=False)
                shared = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
                # A template may add a special token only at the end of a conversation, as Phi-3's does.
                if not text.startswith(before) or self.decode(so_far[len(shared) :]).strip():
                    raise RlhfError(
                        f"the chat template renders message {number + 1} differently when others follow it, so that "
                        "the assistant's turns cannot be located: use a template that marks them by "
                        "{% generation %}, or data.loss_on = 'completion'"
                    )
                # A token that spans the start of a turn belongs to the turn, as in transformers.
                first = next((i for i, (_, stop) in enumerate(whole.offsets) if stop > len(before)), len(shared))
                yield first, first + len(self.trim(shared[first:]))

    def _turn_ends(self) -> list[int]:
        """Find the special token that ends an answer in the chat template; at most one id."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        if self.chat_template is None:
            return []
        try:
            end = self.render(messages, add_generation_prompt=False).rpartition("answer")[2]
        except RlhfError:  # the template has other roles
            return []
        special = {token for token, added in self.wrapped.added_tokens_decoder.items() if added.special}
        return [token for token in self.encode(end) if token in special][:1]

    def _prefix(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer's post-processor puts before a text."""
        plain, framed = self.encode("a"), self.backend.encode("a", add_special_tokens=True).ids
        starts = [start for start in range(len(framed)) if framed[start : start + len(plain)] == plain]
        return tuple(framed[: starts[0]]) if plain and starts else ()


def suppression(ids: tuple[int, ...]) -> dict[str, list[int]]:
    """Generation-config entry for tokens that are never sampled; empty if there are none."""
    return {"suppress_tokens": list(ids)} if ids else {}


def as_pretrained(tokenizer: Tokenizer) -> PretrainedTokenizer:
    """Convert a TrainedTokenizer: same ids, BOS before every text, special tokens not recognised within texts."""
    quieten_transformers()
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
    """Load the tokenizer of a checkpoint directory, or of a Hub repository if the string is not a directory.

    Args: generation is a directory whose generation config is used instead.
    Raises: RlhfError, naming the file, if one is missing or malformed, or if the Hub cannot be reached.
    """
    directory = Path(source) if isinstance(source, Path) or Path(source).exists() else _download(source)
    for file in sorted(directory.glob("*.json")):
        if file.name in (CONFIG_FILE, TOKENIZER_FILE, GENERATION_FILE):
            _check_json(file)
    quieten_transformers()
    from transformers import AutoTokenizer

    try:
        wrapped: Any = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # damaged files raise many types in transformers, and bare Exception in tokenizers
        reason = str(error).partition("\n")[0]
        raise RlhfError(
            f"{directory} has no readable tokenizer ({reason}): copy its {TOKENIZER_FILE} and {CONFIG_FILE} again, or "
            "convert an older format with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    if not wrapped.is_fast:
        raise RlhfError(f"{directory} has a slow tokenizer without a {TOKENIZER_FILE}: convert it with transformers")
    try:
        ids = [_ids(generation or directory, name) for name in ("eos_token_id", "suppress_tokens")]
        return PretrainedTokenizer(wrapped, *ids)
    except RlhfError as error:
        raise RlhfError(f"{directory}: {error}") from error


def quieten_transformers() -> None:
    """Silence two warnings of its import: PyTorch was not found, and a notebook has no ipywidgets for tqdm's bars."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", "IProgress not found")


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
            f"{name} is not a directory, and the Hugging Face Hub did not return it ({reason}): check the path, or the "
            "repository's name and the network; private and gated repositories need HF_TOKEN"
        ) from error


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RlhfError(f"{file} cannot be read ({error}): copy it again from the checkpoint") from error


def _ids(directory: Path, name: str) -> tuple[int, ...]:
    """Read the ids in a field of the generation config, which may be absent, an id or a list."""
    if not (directory / GENERATION_FILE).exists():
        return ()
    content = json.loads((directory / GENERATION_FILE).read_bytes())
    value = content.get(name) if isinstance(content, dict) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise RlhfError(f"{directory / GENERATION_FILE}: {name} = {value!r} should be an id or a list of ids")
    return tuple(ids)


def _template(wrapped: Any) -> str | None:
    if not wrapped.chat_template:
        return None
    try:
        return wrapped.get_chat_template()  # if there are several, the one named "default"
    except ValueError as error:
        raise RlhfError(f"none of the tokenizer's chat templates is named default: {error}") from error


def _without_clock(template: str) -> str:
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda match: repr(_TODAY.strftime(match[2])), template)
