"""A small vision-language model: patches -> transformer blocks -> projector -> tokens before the text of a Llama.

Shapes: B rows, C colours, P patches, D width of the encoder, H width of the Llama, T text tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finitune.models.tiny import tiny_llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

COLOURS, SIDE, PATCH = 3, 8, 4
NUM_PATCHES = (SIDE // PATCH) ** 2
_WIDTH, _HEADS, _BLOCKS = 32, 2, 2


class Attention(nn.Module):
    """Every patch looks at every patch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BPD).chunk(3, -1))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al. 2020, An Image is Worth 16x16 Words)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        x_BPD = x_BPD + self.attention(self.norm1(x_BPD))
        out: Tensor = x_BPD + self.fc2(F.gelu(self.fc1(self.norm2(x_BPD))))
        return out


class Encoder(nn.Module):
    """Images to one vector a patch."""

    def __init__(self, width: int = _WIDTH, heads: int = _HEADS, blocks: int = _BLOCKS) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(COLOURS * PATCH * PATCH, width)
        self.positions = nn.Parameter(torch.randn(NUM_PATCHES, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, side, side) -> (B, P, D)."""
        patches_BPX = F.unfold(pixel_values, PATCH, stride=PATCH).transpose(1, 2)
        x_BPD = self.patch_embed(patches_BPX) + self.positions
        for block in self.blocks:
            x_BPD = block(x_BPD)
        out: Tensor = self.norm(x_BPD)
        return out


class VisionLanguage(nn.Module):
    """The encoder's patches, projected, stand before the text."""

    def __init__(self, language: LlamaForCausalLM) -> None:
        super().__init__()
        hidden = int(language.config.hidden_size)
        self.config = language.config
        self.vision = Encoder()
        self.projector = nn.Sequential(nn.Linear(_WIDTH, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.language = language

    def get_input_embeddings(self) -> Any:
        """Of the text."""
        return self.language.get_input_embeddings()

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Mean loss over supervised text tokens, ()."""
        image_BPH = self.projector(self.vision(pixel_values))
        text_BTH = self.get_input_embeddings()(input_ids)
        embeds = torch.cat([image_BPH.to(text_BTH.dtype), text_BTH], 1)
        mask = torch.cat([attention_mask.new_ones(len(input_ids), NUM_PATCHES), attention_mask], 1)
        targets = torch.cat([labels.new_full((len(labels), NUM_PATCHES), -100), labels], 1)
        language: Any = self.language
        mean: Tensor = language(inputs_embeds=embeds, attention_mask=mask, labels=targets, use_cache=False).loss
        return mean


def tiny_vision(seed: int, vocab: int) -> VisionLanguage:
    """Random weights, the same for the same seed; the global random state is not touched."""
    language = tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionLanguage(language)
