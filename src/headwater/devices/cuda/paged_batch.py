"""A step's attention batch on the device: what the Triton kernels read instead of AttentionBatch's host arrays."""

from dataclasses import dataclass

import torch

RotaryTables = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]  # cos and sin, of each of a model's angles


@dataclass(frozen=True, slots=True)
class Contexts:
    """The contexts of P chunks (cached prefixes and tokens of this step), one after another."""

    slots: torch.Tensor  # int32[P], their page tables
    starts: torch.Tensor  # int32[P + 1], first token of each and the end of the last
    num_tokens: int  # of all
    longest: int


@dataclass(frozen=True, slots=True)
class ExternalChunks:
    """The last of a step's chunks, whose attention an external backend computes, which knows no pages. P rows."""

    first_token: int  # among the step's T, of which they are the last
    starts: torch.Tensor  # int32[P + 1], first token of each behind `first_token`, and their end
    longest: int  # tokens
    contexts: Contexts | None  # None: they are whole prompts, which need nothing from pages


@dataclass(frozen=True, slots=True)
class PromptChunks:
    """The rows of a step that compute more than one token. C rows; all int32, on the device.

    `tiles` and `joins` are those of prefill_tiles.PrefillTiles. A token at position -1 is padding, as are lines of
    zeros in `tiles` and `joins`: kernels read and write nothing for padding, and its output is undefined. Every tensor
    begins at an aligned address, because kernels are compiled for the alignment that they are given.
    """

    token_slots: torch.Tensor  # [T - num_decodes], the page table of each token
    positions: torch.Tensor  # [T - num_decodes]
    rotary_rows: torch.Tensor  # [T - num_decodes], rows of cos and sin
    slots: torch.Tensor  # [C]
    starts: torch.Tensor  # [C], first token among the step's T
    lens: torch.Tensor  # [C], tokens of this step
    contexts: torch.Tensor  # [C], tokens of this step included
    tiles: torch.Tensor  # [M, 5]
    joins: torch.Tensor  # [J, 4]
    external: ExternalChunks | None = None  # rows that `tiles` leaves out


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Which tokens a step computes and where their sequences lie. T tokens, decodes (one token a row) first.

    A decode at position -1 is padding: it reads and writes nothing, and its output is undefined.
    """

    num_decodes: int
    decode_slots: torch.Tensor  # int32[num_decodes], their page tables
    positions: torch.Tensor  # int32[num_decodes], of these
    rotary_rows: torch.Tensor  # int32[num_decodes], rows of cos and sin
    tables: torch.Tensor  # int32[slots, pages]
    cos: tuple[torch.Tensor, ...]  # float32[rows, D / 2], of each of the model's RotaryAngles
    sin: tuple[torch.Tensor, ...]
    chunks: PromptChunks | None = None
