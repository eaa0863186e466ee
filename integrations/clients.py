"""The clients that are run against Headwater: what each installs, what it checks, and how long it may take.

Versions are pinned, so that a result says something about the server and not about this week's release.
"""

from dataclasses import dataclass

CPU_TORCH = "torch==2.13.0"  # the pin of constraints.txt, so that an index with CPU builds is enough


@dataclass(frozen=True, slots=True)
class Client:
    """One client. `script` runs inside the client's environment; its first package gives the version shown."""

    name: str
    script: str
    packages: tuple[str, ...] = ()  # for pip, into a virtual environment
    alone: tuple[str, ...] = ()  # for pip without their dependencies
    environment: str = ""  # its folder, if several clients share one; by default the client's name
    npm: tuple[str, ...] = ()  # for npm; the script still runs in Python and starts node
    servers: tuple[str, ...] = ("model", "scripted")  # which it needs: see servers.py
    needs_tokenizer: bool = False  # a folder with the served model's
    limit_s: float = 300.0  # of all checks, without the installation

    @property
    def main_package(self) -> str:
        return (self.alone or self.npm or self.packages)[0]


OPENAI = "openai==3.54.0"
ANTHROPIC = "anthropic==2.10.0"
HTTP = "httpx==0.28.1"
# what the load tool and the test kits of SGLang import; the rest of its dependencies need a GPU
SGLANG = (
    *("aiohttp", "apache-tvm-ffi", "compressed_tensors", "datasets", "fastapi", "gguf", "IPython", "msgspec", "numpy"),
    *("orjson", "partial_json_parser", "pillow", "psutil", "pybase64", "pyzmq", "requests", "sentencepiece"),
    *("starlette", "tqdm", "triton", "transformers==5.23.0", CPU_TORCH, OPENAI, ANTHROPIC),
)
DYNAMO = (
    *("aiohttp", "certifi", "kubernetes", "msgspec", "prometheus-client", "pyzmq", "redis", "tqdm"),
    *("transformers==5.23.0", "typing-extensions", "uvloop", "zstandard", HTTP),
)

CLIENTS = (
    Client("openai-python", "sdks/openai_python.py", (OPENAI,)),
    Client("openai-npm", "sdks/openai_npm.py", npm=("openai@6.49.0",)),
    Client("ai-sdk", "sdks/ai_sdk.py", npm=("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.87", "zod@4.1.12")),
    Client("litellm", "sdks/litellm_sdk.py", ("litellm==1.106.2", "mcp")),
    Client("langchain-openai", "sdks/langchain_openai_sdk.py", ("langchain-openai==1.7.4",)),
    Client("anthropic", "sdks/anthropic_sdk.py", (ANTHROPIC,)),
    Client("ollama", "sdks/ollama_client.py", ("ollama==0.6.3",)),
    Client("llm", "sdks/llm_cli.py", ("llm==0.36",)),
    Client("instructor", "sdks/instructor_sdk.py", ("instructor==1.17.0",)),
    Client("pydantic-ai", "sdks/pydantic_ai_sdk.py", ("pydantic-ai-slim[openai,anthropic]==2.68.0",)),
    Client("openai-agents", "sdks/openai_agents.py", ("openai-agents==0.24.0",)),
    Client(
        "sglang-bench",
        "load/sglang_bench.py",
        SGLANG,
        environment="sglang",
        alone=("sglang==0.5.23",),
        servers=("model",),
        needs_tokenizer=True,
        limit_s=600.0,
    ),
    Client("aiperf", "load/aiperf.py", ("aiperf==0.13.0",), servers=("model",), needs_tokenizer=True),
    Client("guidellm", "load/guidellm.py", ("guidellm==0.8.1", CPU_TORCH), servers=("model",), needs_tokenizer=True),
    Client("genai-bench", "load/genai_bench.py", ("genai-bench==0.0.5",), servers=("model",), needs_tokenizer=True),
    Client("evalscope", "load/evalscope.py", ("evalscope[perf]==1.14.1",), servers=("model",), needs_tokenizer=True),
    Client(
        "lm-eval",
        "load/lm_eval.py",
        ("lm-eval[api]==0.4.13", "transformers==5.23.0", "datasets"),
        servers=("model",),
        needs_tokenizer=True,
    ),
    Client("sglang-router", "gateways/sglang_router.py", ("sglang-router==0.3.2", HTTP), servers=("model", "second")),
    Client(
        "dynamo",
        "gateways/dynamo_frontend.py",
        DYNAMO,
        alone=("ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1"),  # a simulator that they name is not on PyPI
        servers=("model", "second"),
        needs_tokenizer=True,
    ),
    Client("smg", "gateways/smg.py", ("smg==1.13.0", HTTP), servers=("model", "second")),
    Client(
        "sglang-kits",
        "kits/sglang_kits.py",
        SGLANG,
        environment="sglang",
        alone=("sglang==0.5.23",),
        servers=("model",),
        limit_s=600.0,
    ),
)


def client_named(name: str) -> Client:
    for client in CLIENTS:
        if client.name == name:
            return client
    raise ValueError(f"no client {name!r}; there are {', '.join(client.name for client in CLIENTS)}")
