"""The npm packages `ai` and `@ai-sdk/openai-compatible`; ai_sdk.mjs has the checks."""

from sdks.node import run_node

if __name__ == "__main__":
    run_node("ai_sdk.mjs", page="ai-sdk")
