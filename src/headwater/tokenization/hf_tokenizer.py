"""Load the tokenizer of a model in Hugging Face's layout: a local folder, or a repository of the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from headwater.tokenization.tokenizer_parts import TokenizerParts, set_begin_and_end_tokens

_HUB_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def load_hf_tokenizer(source: str) -> TokenizerParts:
    """The tokenizer of a folder or a hub id, from `tokenizer.json` where there is one.

    Without that file transformers converts what there is; that imports torch. ValueError if there is no such
    folder or repository, or its tokenizer cannot be read.
    """
    folder = Path(source) if Path(source).is_dir() else _download(source)
    if (folder / "tokenizer.json").is_file():
        return _load_tokenizer_json(folder)
    return _convert_with_transformers(folder)


def _download(repository: str) -> Path:
    """The repository's small files, in the hub's local cache; that cache alone without a network."""
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model: {repository!r} is no local folder, no .gguf file, and not to be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _load_tokenizer_json(folder: Path) -> TokenizerParts:
    path = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer ({error})") from error
    # A file saved after training may cut or pad; a server does neither.
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
    _add_missing_tokens(backend, config, special_tokens)
    _apply_begin_and_end(backend, config, special_tokens)
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=_eos_token_ids(folder, backend.token_to_id(special_tokens.get("eos_token", ""))),
        chat_templates=_chat_templates(folder, config),
    )


def _convert_with_transformers(folder: Path) -> TokenizerParts:
    # Imported here: it takes seconds and brings torch, which an API process does not need otherwise.
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(folder))
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: has no tokenizer that can be loaded ({error})") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{folder}: its tokenizer ({type(converted).__name__}) has no fast version")
    backend.no_truncation()
    backend.no_padding()
    return TokenizerParts(
        backend=backend,
        special_tokens={name: str(token) for name, token in converted.special_tokens_map.items()},
        eos_token_ids=_eos_token_ids(folder, converted.eos_token_id),
        chat_templates=_chat_templates(folder, _read_json(folder / "tokenizer_config.json")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; a token is a string or an object with `content`."""
    contents = {
        name: value.get("content") if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Add tokens that only `tokenizer_config.json` knows, in the order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    for _, token in listed:
        if token["content"] not in known:
            known.add(token["content"])
            flags = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word", "special")}
            normalized = bool(token.get("normalized", not flags["special"]))
            backend.add_tokens([tokenizers.AddedToken(token["content"], normalized=normalized, **flags)])
    missing = [content for content in dict.fromkeys(special_tokens.values()) if content not in known]
    backend.add_special_tokens([tokenizers.AddedToken(content, normalized=False) for content in missing])


def _apply_begin_and_end(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """`add_bos_token` and `add_eos_token` of the config win over what `tokenizer.json` does."""
    bos_token, eos_token = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    around = backend.encode("").ids
    adds_bos = bos_token is not None and backend.token_to_id(bos_token) in around[:1]
    adds_eos = eos_token is not None and backend.token_to_id(eos_token) in around[-1:]
    if bos_token == eos_token and len(around) == 1:
        adds_eos = False
    wanted_bos = config.get("add_bos_token", adds_bos) and bos_token is not None
    wanted_eos = config.get("add_eos_token", adds_eos) and eos_token is not None
    if (wanted_bos, wanted_eos) != (adds_bos, adds_eos):
        set_begin_and_end_tokens(
            backend, bos_token=bos_token if wanted_bos else None, eos_token=eos_token if wanted_eos else None
        )


def _eos_token_ids(folder: Path, own_id: int | None) -> tuple[int, ...]:
    """The tokenizer's own EOS, and those of the generation config (chat models have several)."""
    ids = [] if own_id is None else [own_id]
    config = _read_json(folder / "generation_config.json") or _read_json(folder / "config.json")
    configured = config.get("eos_token_id")
    ids += configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; files win over the config."""
    configured = config.get("chat_template")
    if isinstance(configured, list):  # several named ones
        templates = {entry["name"]: entry["template"] for entry in configured}
    else:
        templates = {"default": configured} if isinstance(configured, str) else {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    elif isinstance(source := _read_json(folder / "chat_template.json").get("chat_template"), str):
        templates["default"] = source
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    return templates
