"""The network: dense Qwen2.5, Qwen3 and Llama models in one file, from tokens to hidden states and token losses.

Qwen2.5 adds a bias to queries, keys and values; Qwen3 normalizes queries and keys; Llama does neither. Parameter names
and arithmetic are those of transformers, so weights load both ways and gradients agree. There is no batch axis: a batch
is one flat axis of tokens with documents that cannot attend to each other. There is no key-value cache:
`engine/sample.py` generates through transformers on the same layers.

Shapes: T tokens, D hidden, N heads, K key-value heads, H head size, F feed-forward, V vocabulary.
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trivium.model.head import cross_entropy_sum, token_logprobs
from trivium.model.shape import QwenShape
from trivium.model.tokens import TrainableTokens

INIT_STD = 0.02


@dataclass(frozen=True)
class Documents:
    """The boundaries of the documents on the token axis, on the device and on the host (to avoid a sync).

    `cu_seqlens`: int32, boundaries from 0 to T, padded by repeating T so that few different lengths occur.
    `bounds`: the same without padding. `max_len`: tokens of the longest document, or an upper bound.
    """

    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    max_len: int


class Linear(nn.Linear):
    """A projection whose fp32 master weight is cast to the dtype of its input."""

    def reset_parameters(self) -> None:
        """Leave the weight uninitialized: `init_weights` or `load_weights` sets every value."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Embedding(nn.Embedding):
    """The token table; uninitialized until `init_weights` or `load_weights`."""

    def reset_parameters(self) -> None:
        """Leave the weight uninitialized: `init_weights` or `load_weights` sets every value."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the mean of squares in fp32. Source: arXiv:1910.07467."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one batch: cosine and sine, (T, 1, H/2), computed in fp32 and cast to the compute dtype."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> "Rope":
        """Source: arXiv:2104.09864, with the channel pairs (i, i + H/2) as transformers lays them out."""
        even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device)
        angles = positions_T.float()[:, None, None] * (1.0 / theta ** (even / head_dim))
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def rotate(self, x_TNH: Tensor) -> Tensor:
        left, right = x_TNH.chunk(2, dim=-1)
        return torch.cat((left * self.cos - right * self.sin, right * self.cos + left * self.sin), dim=-1)


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, (T, N, H); the cost grows with the documents, not with the batch.

    On a GPU in 16 bits one varlen kernel processes the whole token axis. Elsewhere the fused kernel runs on views of
    each document, so no mask is built. On a CPU it runs in fp32: in bf16 it compiles and caches code for every document
    length, which costs more time than it saves and unbounded memory.
    """
    on_gpu = q_TNH.is_cuda and q_TNH.dtype != torch.float32
    if on_gpu and torch.cuda.get_device_capability(q_TNH.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn  # takes a second to import

        cu, longest = documents.cu_seqlens, documents.max_len
        out = varlen_attn(q_TNH, k_TKH, v_TKH, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, Tensor)
        return out
    dtype = torch.float32 if q_TNH.device.type == "cpu" else q_TNH.dtype
    lengths = [stop - start for start, stop in pairwise(documents.bounds)]
    outs = []
    for document in zip(*(x.to(dtype).split(lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in document)
        out_1NtH = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(out_1NtH.squeeze(0).transpose(0, 1))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(q_TNH.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention: N query heads share K key-value heads. Source: arXiv:2305.13245."""

    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        query_size = shape.num_attention_heads * shape.head_dim
        key_value_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden_size, query_size, bias=shape.qkv_bias)
        self.k_proj = Linear(shape.hidden_size, key_value_size, bias=shape.qkv_bias)
        self.v_proj = Linear(shape.hidden_size, key_value_size, bias=shape.qkv_bias)
        self.o_proj = Linear(query_size, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rope: Rope, documents: Documents) -> Tensor:
        q_TNH = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TKH = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_TNH = rope.rotate(self.q_norm(q_TNH))
        k_TKH = rope.rotate(self.k_norm(k_TKH))
        return self.o_proj(attend(q_TNH, k_TKH, v_TKH, documents).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each with a norm before it, added to the residual stream."""

    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x_TD: Tensor, rope: Rope, documents: Documents) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, documents)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Decoder(nn.Module):
    """Everything except the head, under the `model.` prefix of Hugging Face parameter names."""

    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Qwen(nn.Module):
    """A dense Qwen or Llama model. Weights are uninitialized until `init_weights` or `hf.load_weights`.

    Weights are fp32 by default; activations have `compute_dtype`. With `activation_checkpointing` each layer stores
    only its input and recomputes the rest in backward. Source: Chen et al. 2016, arXiv:1604.06174.
    """

    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.shape = shape
        self.compute_dtype = torch.float32
        self.activation_checkpointing = False
        self.model = Decoder(shape)
        if not shape.tie_word_embeddings:
            self.lm_head = Linear(shape.hidden_size, shape.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output head, (V, D): logits are hidden @ head_weight.T."""
        return self.model.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight

    @property
    def head_rows(self) -> tuple[Tensor, Tensor] | None:
        """Trainable tokens of the head: ids, int64 (k,), and rows, fp32 (k, D); None without trainable tokens."""
        head = self.model.embed_tokens if self.shape.tie_word_embeddings else self.lm_head
        return (head.ids, head.rows) if isinstance(head, TrainableTokens) else None

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits, (T, V), in the dtype of `hidden_TD`; for generation, since training never holds all logits."""
        logits_TV = F.linear(hidden_TD, self.head_weight.to(hidden_TD.dtype))
        if self.head_rows is None:
            return logits_TV
        ids, rows_KD = self.head_rows
        return logits_TV.index_copy(-1, ids, F.linear(hidden_TD, rows_KD.to(hidden_TD.dtype)))

    def token_loss_sum(self, hidden_MD: Tensor, labels_M: Tensor, weights_M: Tensor | None = None) -> Tensor:
        """Weighted sum of the tokens' cross entropies, fp32 scalar in nats; see `head.cross_entropy_sum`."""
        return cross_entropy_sum(hidden_MD, self.head_weight, labels_M, weights_M, self.head_rows)

    def token_logprobs(self, hidden_MD: Tensor, labels_M: Tensor) -> Tensor:
        """Log-probability of every token's label, fp32 (M,), without a gradient; see `head.token_logprobs`."""
        return token_logprobs(hidden_MD, self.head_weight, labels_M, self.head_rows)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, documents: Documents) -> Tensor:
        """Hidden states after the final norm, (T, D), in the compute dtype.

        tokens, positions: int64 (T,); positions restart at 0 in every document.
        """
        x_TD = self.model.embed_tokens(tokens_T).to(self.compute_dtype)
        rope = Rope.at(positions_T, self.shape.head_dim, self.shape.rope_theta, self.compute_dtype)
        for block in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, rope, documents, use_reentrant=False)
            else:
                x_TD = block(x_TD, rope, documents)
        return self.model.norm(x_TD)


def empty_model(shape: QwenShape) -> Qwen:
    """A model on the meta device: its parameters have shapes and no values."""
    with torch.device("meta"):
        return Qwen(shape)


def own_seed(seed: int, name: str) -> int:
    """The seed of one tensor, which makes initial values independent of device and construction order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


@torch.no_grad()
def init_weights(model: Qwen, seed: int) -> None:
    """Initialize from scratch: normal weights with standard deviation 0.02, norms 1, biases 0.

    Projections that write to the residual stream are smaller by sqrt(2 * layers), so that its variance does not grow
    with depth. Each tensor has its own CPU generator, see `own_seed`.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    residual_std = INIT_STD / math.sqrt(2 * model.shape.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
            generator = torch.Generator().manual_seed(own_seed(seed, name))
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
