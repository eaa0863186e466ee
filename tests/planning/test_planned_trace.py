"""Traces: what a line means, and which line is wrong."""

import numpy as np
import pytest

from headwater.planning.synthetic import SyntheticWorkload
from headwater.planning.trace import PlannedRequest, read_trace, tokens_of


def read(tmp_path, *lines):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    return read_trace(file)


def test_lines_are_sorted_by_arrival_and_prompts_are_made_of_their_parts(tmp_path):
    later, sooner = read(
        tmp_path,
        '{"arrival_s": 2.0, "output_tokens": 5, "prompt_ids": [7, 8, 9]}',
        "",
        '{"arrival_s": 0.5, "output_tokens": 1, "pieces": [["system", 10], ["tools", 4]], "new_tokens": 3}',
    )[::-1]
    assert later.own_tokens(0).tolist() == [7, 8, 9] and later.num_own_tokens == 3
    prompt = sooner.own_tokens(1)
    assert len(prompt) == sooner.num_own_tokens == 17
    assert prompt[:10].tolist() == tokens_of("system", 10).tolist()
    assert not np.array_equal(prompt[-3:], sooner.own_tokens(2)[-3:])  # those are its own


def test_what_has_the_same_name_begins_alike():
    assert tokens_of("a", 100)[:40].tolist() == tokens_of("a", 40).tolist()
    assert tokens_of("a", 40).tolist() != tokens_of("b", 40).tolist()


def test_mooncake_lines_share_their_blocks(tmp_path):
    first, second = read(
        tmp_path,
        '{"timestamp": 0, "input_length": 1000, "output_length": 52, "hash_ids": [46, 47]}',
        '{"timestamp": 3052, "input_length": 700, "output_length": 9, "hash_ids": [46, 48]}',
    )
    assert (second.arrival_s, first.num_output_tokens) == (3.052, 52)
    one, two = first.own_tokens(0), second.own_tokens(1)
    assert (len(one), len(two)) == (1000, 700)
    assert one[:512].tolist() == two[:512].tolist() and one[512] != two[512]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"arrival_s": 1.0}', "line 2: .*output_tokens"),
        ('{"arrival_s": -1, "output_tokens": 1, "new_tokens": 1}', "line 2: arrival_s must be at least 0"),
        ('{"arrival_s": 1, "output_tokens": 1}', "line 2: one of prompt_ids, pieces and new_tokens"),
        ('{"arrival_s": 1, "output_tokens": 1, "prompt_ids": [1], "pieces": [["a", 1]]}', "exclude"),
        ('{"arrival_s": 1, "output_tokens": 1, "pieces": [["a", 0]]}', "at least 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, '{"arrival_s": 0, "output_tokens": 1, "new_tokens": 1}', line)


def test_a_file_without_requests_and_one_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="holds no request"):
        read(tmp_path, "")
    with pytest.raises(ValueError, match="trace"):
        read_trace(tmp_path / "nowhere")


def test_synthetic_workloads_are_what_was_asked_for():
    workload = SyntheticWorkload(num_requests=2000, requests_per_s=5.0, num_prefixes=10, zipf=1.2, seed=3)
    requests = workload.requests()
    assert requests == workload.requests() and len(requests) == 2000
    assert 2000 / requests[-1].arrival_s == pytest.approx(5.0, rel=0.15)
    assert np.mean([request.new_tokens for request in requests]) == pytest.approx(100, rel=0.1)
    firsts = [request.pieces[0].name for request in requests if request.pieces]
    assert len(firsts) == pytest.approx(2000 / 3, abs=1)
    assert firsts.count("prefix 0") > 2 * firsts.count("prefix 3") > 0


@pytest.mark.parametrize("wrong", [{"num_requests": 0}, {"requests_per_s": 0.0}, {"zipf": -1.0}, {"output_tokens": 0}])
def test_synthetic_workloads_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticWorkload(**wrong)


def test_an_empty_piece_list_needs_tokens_of_its_own():
    request = PlannedRequest(arrival_s=0.0, num_output_tokens=1, new_tokens=4)
    request.check()
    assert len(request.own_tokens(0)) == 4
