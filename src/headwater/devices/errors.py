"""What a device refuses."""


class UnsupportedError(ValueError):
    """The device cannot do what a parameter asks for.

    `parameter` and `value` are the names of this package: "device", "attention", "kv_dtype". `reason` follows them
    ("needs compute capability 8.9"). A launcher whose users know the parameter by another name can say it anew.
    """

    def __init__(self, parameter: str, value: str, reason: str) -> None:
        super().__init__(f"{parameter} {value} {reason}")
        self.parameter = parameter
        self.value = value
        self.reason = reason


class MixedFormatsError(ValueError):
    """The experts of a layer differ in format or shape, so that no kernel multiplies by all of them."""
