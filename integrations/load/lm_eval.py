"""`lm_eval` with `local-completions`: scores of given answers, and generated answers, on a task written here."""

import json
from pathlib import Path

from checks import Server, check, run_checks
from load.tool import newest, run_block

CAPITALS = (("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Spain", "Madrid"))
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: TASKS/capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: ["Paris", "Rome", "Tokyo", "Madrid"]
doc_to_target: "{{capital}}"
metric_list: [{metric: acc}]
"""


@check("multiple choice", limit_s=280)
def multiple_choice(server: Server) -> None:
    """The model knows these capitals, so wrong log-probabilities show in the score."""
    folder = Path("TASKS")
    folder.mkdir()
    rows = [json.dumps({"country": country, "capital": capital}) for country, capital in CAPITALS]
    (folder / "capitals.jsonl").write_text("\n".join(rows))
    (folder / "capitals.yaml").write_text(TASK)
    run_block("lm-eval", 1, server, limit_s=270)
    found = json.loads(newest("results_*.json").read_text())["results"]["capitals"]
    assert found["acc,none"] == 1.0, found


if __name__ == "__main__":
    run_checks()
