"""The names, sizes and plans of measured steps."""

import pytest

from headwater.profiling.step_cases import StepCase


def test_cases_are_written_as_decodes_or_as_chunks() -> None:
    assert StepCase.parse("16x200") == StepCase(num_rows=16, context=200)
    assert StepCase.parse("512+1288") == StepCase(num_rows=1, context=1288, num_new=512)
    assert StepCase.parse("16x200").name == "decode, 16 x 200"
    assert StepCase.parse("512+0").name == "prefill, 512 after 0"


@pytest.mark.parametrize("text", ["", "16", "x200", "0x200", "16x", "16y200", "-1x5", "1x2x3", "1.5x2"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ROWSxCONTEXT"):
        StepCase.parse(text)


def test_what_a_step_reads_and_computes() -> None:
    """A floor of other sizes than the step's would make every ratio wrong."""
    decode, chunk = StepCase(3, 10), StepCase(1, 10, num_new=4)
    assert (decode.num_tokens, decode.num_read, decode.num_scores) == (3, 33, 33)
    assert (chunk.num_tokens, chunk.num_read, chunk.num_scores) == (4, 14, 11 + 12 + 13 + 14)
    assert decode.num_pages(4) == 9
    assert chunk.num_pages(4) == 4
