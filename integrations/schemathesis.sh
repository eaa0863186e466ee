#!/usr/bin/env bash
# schemathesis against every route of /openapi.json: no answer is a 5xx, none has another shape than documented, none hangs.
#
#   integrations/schemathesis.sh                  # 10 minutes
#   SECONDS_TO_RUN=60 integrations/schemathesis.sh --include-path /v1/chat/completions
#
# It makes an environment of its own, and starts and ends a server of the default model with a short context in an empty
# folder. Arguments go to schemathesis. Not run:
# - pause, sleep and release of memory, after which requests wait by order; the two routes that wait for a trainer to
#   join its group, until their own deadline;
# - two checks. Requests that fit the schema may be rejected: rules between fields ("exactly one of text and input_ids")
#   are not in it. Requests that do not fit may be taken: like SGLang, the server reads "1" and 1.0 as numbers, 0 as false.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${HEADWATER_INTEGRATIONS_CACHE:-$HOME/.cache/headwater-integrations}/schemathesis
python=${PYTHON:-$here/../.venv/bin/python}
seconds=${SECONDS_TO_RUN:-600}
version=4.32.5
if [ "$(cat "$cache/installed" 2>/dev/null)" != "$version" ]; then
  "$python" -m venv --clear "$cache"
  "$cache/bin/pip" install -q --disable-pip-version-check "schemathesis==$version"
  echo "$version" > "$cache/installed"
fi

folder=$(mktemp -d)
port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
cd "$folder"  # stores are attached at made-up folders
PYTHONPATH=$here/../src "$python" -m headwater serve --port "$port" --enable-hierarchical-cache \
  --context-length 512 --max-total-tokens 8192 > server.log 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true; rm -rf "$folder"' EXIT
for _ in $(seq 600); do
  curl -sf "$url/health" > /dev/null && break
  kill -0 $server || { cat server.log; exit 1; }
  sleep 0.5
done

result=0
NO_PROXY=127.0.0.1 "$cache/bin/schemathesis" run "$url/openapi.json" --max-time "$seconds" --workers 2 \
  --checks all --exclude-checks positive_data_acceptance,negative_data_rejection --continue-on-failure \
  --request-timeout 60 --max-response-time 60 --warnings off \
  --exclude-operation-id pause_generation --exclude-operation-id sleep \
  --exclude-operation-id init_weights_update_group --exclude-operation-id init_weight_transfer_engine \
  --exclude-operation-id-regex '^release_memory_occupation' "$@" || result=$?
curl -sf "$url/health_generate" > /dev/null || { echo "the server no longer generates"; result=1; }
if grep -qE 'Traceback|ERROR' server.log; then
  grep -E -A20 'Traceback|ERROR' server.log | head -60
  result=1
fi
exit $result
