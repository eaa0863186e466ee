"""Load the tokenizer of a model in Hugging Face's layout, from a local folder or a repository of the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from headwater.models.end_tokens import folder_end_ids, union
from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError, is_there, open_regular, read_json_if_there, read_text
from headwater.models.vocabulary import added_tokens_of
from headwater.tokenization.sentencepiece_tokenizer import load_sentencepiece
from headwater.tokenization.tokenizer_parts import TokenizerParts, set_begin_and_end_tokens

_HUB_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def load_hf_tokenizer(source: str) -> TokenizerParts:
    """The tokenizer of a folder or a hub id, from `tokenizer.json` if there is one.

    Otherwise a SentencePiece `tokenizer.model` is read. All other kinds are converted by transformers, an extra.
    ValueError if there is no such folder or repository, ModelFileError if its tokenizer cannot be read.
    """
    path = Path(source).expanduser() if source.startswith("~/") else Path(source)
    if is_there(path) and not path.is_dir():
        raise ModelFileError(source, "is no folder with a tokenizer, and no .gguf file")
    folder = path if path.is_dir() else _download(source)
    if is_there(folder / "tokenizer.json"):
        return _load_tokenizer_json(folder)
    if is_there(folder / "tokenizer.model"):
        return _load_sentencepiece(folder)
    return _convert_with_transformers(folder)


def _download(repository: str) -> Path:
    """Folder with the repository's small files, in the hub's local cache. Without a network, only the cache is used."""
    from huggingface_hub import snapshot_download  # slow to import, and most models are local
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model: {repository!r} is no local folder, no .gguf file, and not to be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _load_tokenizer_json(folder: Path) -> TokenizerParts:
    path = folder / "tokenizer.json"
    open_regular(path).close()
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  the library raises nothing narrower, its panics are not Exceptions
        raise ModelFileError(path, f"is no tokenizer ({error})") from None
    config = read_json_if_there(folder / "tokenizer_config.json")
    return _finished(backend, folder, config, special_tokens=_special_tokens(_named(folder, config)))


def _load_sentencepiece(folder: Path) -> TokenizerParts:
    """The tokenizer of a folder with only `tokenizer.model`, as in the first Llama and Mistral models."""
    path = folder / "tokenizer.model"
    backend, own_tokens = load_sentencepiece(path)
    config = read_json_if_there(folder / "tokenizer_config.json")
    special_tokens = {**own_tokens, **_special_tokens(_named(folder, config))}
    set_begin_and_end_tokens(backend, bos_token=own_tokens.get("bos_token"), eos_token=None)
    return _finished(backend, folder, config, special_tokens=special_tokens)


def _finished(
    backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any], *, special_tokens: Mapping[str, str]
) -> TokenizerParts:
    # A file saved after training may truncate or pad; a server does neither.
    backend.no_truncation()
    backend.no_padding()
    fields = Fields(config, source=str(folder / "tokenizer_config.json"))
    _add_missing_tokens(backend, fields, special_tokens)
    _apply_begin_and_end(backend, fields, special_tokens)
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=folder_end_ids(folder),
        chat_templates=_chat_templates(folder, fields),
    )


def _convert_with_transformers(folder: Path) -> TokenizerParts:
    try:
        from transformers import AutoTokenizer  # takes seconds and imports torch if that is installed
    except ImportError as error:
        reason = (
            "has neither tokenizer.json nor tokenizer.model, and transformers, which converts other tokenizers, is "
            "not installed: pip install 'headwater[transformers]' (in a clone: EXTRAS=transformers make setup)"
        )
        raise ModelFileError(folder, reason) from error
    try:
        converted = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelFileError(folder, f"has no tokenizer that can be loaded ({error})") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ModelFileError(folder, f"its tokenizer ({type(converted).__name__}) has no fast version")
    backend.no_truncation()
    backend.no_padding()
    config = read_json_if_there(folder / "tokenizer_config.json")
    own = () if converted.eos_token_id is None else (converted.eos_token_id,)
    return TokenizerParts(
        backend=backend,
        special_tokens={name: str(token) for name, token in converted.special_tokens_map.items()},
        eos_token_ids=union(own, folder_end_ids(folder)),
        chat_templates=_chat_templates(folder, Fields(config, source=str(folder / "tokenizer_config.json"))),
    )


def _named(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    return {**read_json_if_there(folder / "special_tokens_map.json"), **config}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; a token is a string or an object with `content`."""
    contents = {
        name: value.get("content") if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str) and content}


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Fields, special_tokens: Mapping[str, str]) -> None:
    """Add the tokens that only `tokenizer_config.json` has, in the order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(added_tokens_of(config), key=lambda entry: entry[0]):
        if token["content"] not in known:
            known.add(token["content"])
            flags = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word", "special")}
            normalized = bool(token.get("normalized", not flags["special"]))
            backend.add_tokens([tokenizers.AddedToken(token["content"], normalized=normalized, **flags)])
            if backend.token_to_id(token["content"]) != token_id:
                reason = f"added_tokens_decoder gives {token['content']!r} the id {token_id}, which is not free"
                raise config.refuse(reason)
    missing = [content for content in dict.fromkeys(special_tokens.values()) if content not in known]
    backend.add_special_tokens([tokenizers.AddedToken(content, normalized=False) for content in missing])


def _apply_begin_and_end(backend: tokenizers.Tokenizer, config: Fields, special_tokens: Mapping[str, str]) -> None:
    """Apply the config's `add_bos_token` and `add_eos_token`, which win over `tokenizer.json`."""
    bos_token, eos_token = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    around = backend.encode("").ids
    adds_bos = bos_token is not None and backend.token_to_id(bos_token) in around[:1]
    adds_eos = eos_token is not None and backend.token_to_id(eos_token) in around[-1:]
    if bos_token == eos_token and len(around) == 1:
        adds_eos = False
    wanted_bos = config.flag("add_bos_token", adds_bos) and bos_token is not None
    wanted_eos = config.flag("add_eos_token", adds_eos) and eos_token is not None
    if (wanted_bos, wanted_eos) != (adds_bos, adds_eos):
        set_begin_and_end_tokens(
            backend, bos_token=bos_token if wanted_bos else None, eos_token=eos_token if wanted_eos else None
        )


def _chat_templates(folder: Path, config: Fields) -> dict[str, str]:
    """Chat templates by name; files win over the config."""
    configured = config.raw("chat_template")
    templates = {"default": configured} if isinstance(configured, str) else _named_templates(config)
    file = folder / "chat_template.jinja"
    if is_there(file):
        templates["default"] = read_text(file)
    else:
        path = folder / "chat_template.json"
        source = Fields(read_json_if_there(path), source=str(path)).text("chat_template", "")
        templates |= {"default": source} if source else {}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = read_text(file)
    return templates


def _named_templates(config: Fields) -> dict[str, str]:
    """The templates of a config with several: a list of objects with `name` and `template`."""
    configured = config.raw("chat_template")
    entries = [] if configured is None else configured
    if isinstance(entries, dict):
        entries = [{"name": name, "template": template} for name, template in entries.items()]
    if not isinstance(entries, list):
        raise config.refuse("chat_template must be a string or a list of named templates")
    for entry in entries:
        keys = ("name", "template")
        if not (isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys)):
            raise config.refuse("chat_template holds an entry without a name and a template")
    return {entry["name"]: entry["template"] for entry in entries}
