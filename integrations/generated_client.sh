#!/usr/bin/env bash
# A client that is generated from /openapi.json (openapi-python-client), and calls a server of the default model.
#
#   integrations/generated_client.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${HEADWATER_INTEGRATIONS_CACHE:-$HOME/.cache/headwater-integrations}/generated-client
python=${PYTHON:-$here/../.venv/bin/python}
version=0.29.1
if [ "$(cat "$cache/installed" 2>/dev/null)" != "$version" ]; then
  "$python" -m venv --clear "$cache"
  "$cache/bin/pip" install -q --disable-pip-version-check "openapi-python-client==$version" ruff
  echo "$version" > "$cache/installed"
fi

folder=$(mktemp -d)
port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
cd "$folder"
PYTHONPATH=$here/../src "$python" -m headwater serve --port "$port" > server.log 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true; rm -rf "$folder"' EXIT
for _ in $(seq 600); do
  curl -sf "$url/health" > /dev/null && break
  kill -0 $server || { cat server.log; exit 1; }
  sleep 0.5
done
curl -sf "$url/openapi.json" > openapi.json
PATH=$cache/bin:$PATH openapi-python-client generate --path openapi.json --output-path generated --meta none --fail-on-warning
"$cache/bin/python" - "$url" <<'CODE'
import sys

from generated import Client
from generated.api.openai import chat_completions, completions, list_models
from generated.models import ChatCompletion, ChatCompletionRequest, Completion, CompletionRequest, ErrorAnswer

client = Client(base_url=sys.argv[1], timeout=120)
messages = [{"role": "user", "content": "Say hello."}]
request = ChatCompletionRequest.from_dict({"messages": messages, "max_tokens": 8})
chat = chat_completions.sync(client=client, body=request)
assert isinstance(chat, ChatCompletion) and chat.choices[0].message.content and chat.usage.completion_tokens <= 8, chat
text = completions.sync(client=client, body=CompletionRequest.from_dict({"prompt": "Once", "max_tokens": 4}))
assert isinstance(text, Completion) and text.choices[0].text, text
models = list_models.sync(client=client)
assert models.data[0].id == chat.model, models
wrong = ChatCompletionRequest.from_dict({"messages": messages, "model": "no such model"})
error = chat_completions.sync(client=client, body=wrong)
assert isinstance(error, ErrorAnswer) and error.error.code == "model_not_found", error
print("the generated client chats, completes, lists models and reads errors")
CODE
