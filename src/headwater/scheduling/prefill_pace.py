"""How much of a prompt is computed beside running streams."""

CPU_MAX_GAP_S = 0.2  # the default on a CPU: a stream that pauses longer seems to hang
LEAST_TOKENS = 16  # so that prompts get on
GPU_LEAST_TOKENS = 256  # a GPU reads the weights for them as for decodes, and takes hardly longer
_FIRST_TOKENS = 64  # before any step was measured
_LEAST_SAMPLE = 16  # tokens of a step that says what a token takes
_UNIT = 8  # tokens; what the kernels of products compute together
_WEIGHT = 0.3  # of a new sample in the running average


class PrefillPace:
    """The number of prompt tokens in a step with decodes, so that it takes about `max_gap_s`.

    It follows from the measured time of steps, decodes included. So it suits the model, the machine, and what else
    runs there. None: no limit.
    """

    def __init__(self, max_gap_s: float | None, *, least_tokens: int = LEAST_TOKENS) -> None:
        self._max_gap_s = max_gap_s
        self._least_tokens = least_tokens
        self._token_s: float | None = None  # of a step, by prompt token

    def saw(self, num_tokens: int, seconds: float) -> None:
        """A step with `num_tokens` prompt tokens has taken so long."""
        if num_tokens >= _LEAST_SAMPLE:
            token_s = seconds / num_tokens
            self._token_s = token_s if self._token_s is None else self._token_s + _WEIGHT * (token_s - self._token_s)

    def limit(self, num_tokens: int) -> int:
        """How many of `num_tokens` a step with decodes may compute."""
        if self._max_gap_s is None:
            return num_tokens
        if not self._token_s:
            return min(num_tokens, max(self._least_tokens, _FIRST_TOKENS))
        return min(num_tokens, max(self._least_tokens, int(self._max_gap_s / self._token_s) // _UNIT * _UNIT))
