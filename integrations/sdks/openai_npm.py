"""The npm package `openai`; openai_npm.mjs has the checks."""

from sdks.node import run_node

if __name__ == "__main__":
    run_node("openai_npm.mjs", page="openai-npm")
