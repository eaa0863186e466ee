"""Numbers of MXFP4 in the kernels of experts: two codes of 4 bits a byte, of which 16 bytes share an exponent.

A code is a sign, two bits of exponent and one of mantissa (E2M1). Moved to their places in float16 they are the number
times 2^-14, subnormal ones too.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def low_inputs(byte):
    """The input of the low bits of each byte of a row; that of the high bits comes 16 later."""
    return byte // 16 * 32 + byte % 16


@triton.jit
def load_fp4(codes, exponents, mask):
    """The numbers of the low and of the high bits in float32, exactly the file's where scales are below 2^114.

    `exponents`: where each byte's is.
    """
    pair = tl.load(codes, mask=mask, other=0).to(tl.int16)
    power = tl.load(exponents, mask=mask, other=0).to(tl.int32)
    scale = ((power + 14) << 23).to(tl.float32, bitcast=True)  # 2^(power - 127) times 2^14
    low = (((pair & 7) << 9) | ((pair & 8) << 12)).to(tl.float16, bitcast=True)
    high = (((pair & 112) << 5) | ((pair & 128) << 8)).to(tl.float16, bitcast=True)
    return low.to(tl.float32) * scale, high.to(tl.float32) * scale
