"""The types of a GGUF file's tensors. The gguf package has the same table, and takes 0.1 s to import."""

from typing import NamedTuple


class GGUFType(NamedTuple):
    """Numbers of one type lie in blocks: `block_size` numbers in `block_bytes` bytes.

    `form` is the format of a HostTensor that holds them. It is empty for integers, which are no weights, and for blocks
    that nothing reads.
    """

    name: str
    block_size: int
    block_bytes: int
    form: str = ""


GGUF_TYPES = {
    0: GGUFType("F32", 1, 4, "float32"),
    1: GGUFType("F16", 1, 2, "float16"),
    2: GGUFType("Q4_0", 32, 18, "Q4_0"),
    3: GGUFType("Q4_1", 32, 20, "Q4_1"),
    6: GGUFType("Q5_0", 32, 22, "Q5_0"),
    7: GGUFType("Q5_1", 32, 24, "Q5_1"),
    8: GGUFType("Q8_0", 32, 34, "Q8_0"),
    9: GGUFType("Q8_1", 32, 40),
    10: GGUFType("Q2_K", 256, 84, "Q2_K"),
    11: GGUFType("Q3_K", 256, 110, "Q3_K"),
    12: GGUFType("Q4_K", 256, 144, "Q4_K"),
    13: GGUFType("Q5_K", 256, 176, "Q5_K"),
    14: GGUFType("Q6_K", 256, 210, "Q6_K"),
    15: GGUFType("Q8_K", 256, 292),
    16: GGUFType("IQ2_XXS", 256, 66, "IQ2_XXS"),
    17: GGUFType("IQ2_XS", 256, 74, "IQ2_XS"),
    18: GGUFType("IQ3_XXS", 256, 98, "IQ3_XXS"),
    19: GGUFType("IQ1_S", 256, 50, "IQ1_S"),
    20: GGUFType("IQ4_NL", 32, 18, "IQ4_NL"),
    21: GGUFType("IQ3_S", 256, 110, "IQ3_S"),
    22: GGUFType("IQ2_S", 256, 82, "IQ2_S"),
    23: GGUFType("IQ4_XS", 256, 136, "IQ4_XS"),
    24: GGUFType("I8", 1, 1),
    25: GGUFType("I16", 1, 2),
    26: GGUFType("I32", 1, 4),
    27: GGUFType("I64", 1, 8),
    28: GGUFType("F64", 1, 8, "float64"),
    29: GGUFType("IQ1_M", 256, 56, "IQ1_M"),
    30: GGUFType("BF16", 1, 2, "bfloat16"),
    34: GGUFType("TQ1_0", 256, 54, "TQ1_0"),
    35: GGUFType("TQ2_0", 256, 66, "TQ2_0"),
    39: GGUFType("MXFP4", 32, 17, "MXFP4"),
    40: GGUFType("NVFP4", 64, 36, "NVFP4"),
    41: GGUFType("Q1_0", 128, 18),
}
