"""Products with weights that stay codes of 4 or 8 bits: one token, tiles of some tokens, and back to plain numbers.

A number is code * scale + offset, with a scale for each group of inputs of an output. A product is a sum of codes times
inputs within each group, in float32, then times the scale; codes are exact in every dtype. The sum of a group's inputs
takes the offset, or the 8 that codes of 4 bits are above their number. A code of 4 bits becomes a float by its bits,
without a conversion (Kim et al., arXiv 2211.10017).
"""
