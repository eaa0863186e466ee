"""LoRA adapters (https://arxiv.org/abs/2106.09685) in the layout of PEFT, read and checked against a model."""
