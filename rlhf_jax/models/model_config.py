"""Transformer architecture: one dataclass whose fields cover all model families."""

import dataclasses
from typing import Annotated, Literal

from rlhf_jax.config import Count, Finite, NonNegative, Positive, Range, check_ranges

Remat = bool | Literal["dots"]
"""Activations to recompute in the backward pass: none (False), all but the inputs of blocks (True), or all but these
and the products with weights ('dots')."""
DType = Literal["float32", "bfloat16", "float16"]
AttentionBy = Literal["xla", "cudnn", "splash"]
"""Attention implementation: XLA on any device, cuDNN's flash attention on NVIDIA GPUs, or splash attention on TPUs."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): rotated channels and their frequencies.

    The first `int(fraction * K)` of a head's K channels are rotated in pairs (i, i + pairs). Pair i has the frequency
    `theta ** (-2 i / channels) / factors[i]`. An odd number of channels is rounded up to full pairs, but the exponents
    use the odd number, as in transformers: 3 channels of GPT-NeoX become 4 with exponents over 3. If sequences may grow
    beyond `short_context` tokens, `long_factors` replace `factors` (LongRoPE, Ding et al. 2024, arXiv:2402.13753).
    """

    theta: Positive = 10_000.0  # base of the frequencies
    # Fraction of a head's channels that are rotated; the others are unchanged.
    fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    factors: tuple[Positive, ...] | None = None  # divisors of the frequencies, one per pair of channels; None: 1
    # Divisors for sequences that may be longer than short_context (LongRoPE); None: factors.
    long_factors: tuple[Positive, ...] | None = None
    short_context: Count | None = None  # maximum sequence length for factors; None: no maximum
    amplitude: Positive = 1.0  # factor of the rotated queries and keys
    limit: Count | None = None  # maximum sequence length; None: unlimited

    def channels(self, head_width: int) -> int:
        """Number of rotated channels of a head, before rounding up to pairs."""
        return int(head_width * self.fraction)

    def pairs(self, head_width: int) -> int:
        """Number of rotated pairs of channels."""
        return (self.channels(head_width) + 1) // 2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer. Defaults: pre-norm with RMSNorm, rotary positions, plain MLP."""

    d_model: Count  # width of the residual stream
    n_layers: Count  # number of blocks
    n_heads: Count  # query heads per block
    d_ff: Count  # hidden width of the MLP
    # Activation of the MLP; gelu is the tanh approximation.
    activation: Literal["relu", "relu2", "gelu", "gelu_exact", "silu"]
    param_dtype: DType  # dtype of the parameters
    compute_dtype: DType  # dtype of the matrix products
    # Recompute activations in the backward pass, and store only the inputs of blocks (True), or also the products with
    # weights ('dots'); False: store all.
    remat: Remat = False
    # Run the blocks outside of decoding as a loop over their stacked weights, which are a copy: the compile time does
    # not depend on the depth.
    scan_layers: bool = False
    attention: AttentionBy = "xla"  # implementation of attention: XLA's, cuDNN's on GPUs, or splash attention on TPUs
    n_kv_heads: Count | None = None  # key-value heads, shared by groups of query heads; None: n_heads
    head_dim: Count | None = None  # channels per head; None: d_model / n_heads
    gated: bool = False  # multiply the activation by a second projection (GLU)
    parallel: bool = False  # give attention and MLP the same input (GPT-NeoX)
    qkv_bias: bool = False  # biases in the projections to queries, keys and values
    out_bias: bool = False  # bias in attention's output projection
    mlp_bias: bool = False  # biases in the MLP
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_epsilon: NonNegative = 1e-6  # constant added to a norm's variance
    norm_offset: Finite = 0.0  # constant added to the scales of RMSNorm (Gemma stores scale - 1)
    # Position of the norms relative to each attention and MLP.
    norm_placement: Literal["before", "after", "around"] = "before"
    # RMSNorm of queries and keys: none, over each head, or over all heads.
    qk_norm: Literal["none", "head", "all"] = "none"
    positions: Literal["rotary", "learned"] = "rotary"  # position encoding: rotary, or a learned table
    # Maximum number of tokens in a sequence, and size of the table of learned positions; None: no bound.
    context: Count | None = None
    rope: Rope = Rope()  # rotary positions of all layers
    local_rope: Rope | None = None  # rotary positions of layers with a window; None: rope
    # Attention window of each layer in tokens, including the token itself (None: unlimited); None: no windows.
    windows: tuple[Count | None, ...] | None = None
    query_scale: Positive | None = None  # factor of the attention logits; None: head_dim ** -0.5
    # Soft cap c of the attention logits, which become c tanh(logits / c) (Gemma 2); None: no cap.
    attention_softcap: Positive | None = None
    logit_softcap: Positive | None = None  # soft cap of the output logits; None: no cap
    embedding_scale: Positive = 1.0  # factor of the embeddings (Gemma: square root of d_model)
    tied: bool = True  # use the transposed embedding as the head

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model = {self.d_model} must be a multiple of n_heads = {self.n_heads}")
        for rope in (self.rope, self.local_rope):
            if self.positions == "rotary" and rope is not None and 2 * rope.pairs(self.head_width) > self.head_width:
                raise ValueError(
                    f"rotary positions rotate pairs of channels, but a head has an odd number of them, "
                    f"{self.head_width} (d_model = {self.d_model}, n_heads = {self.n_heads}, head_dim = "
                    f"{self.head_dim}): make it even"
                )
        if self.positions == "learned" and self.context is None:
            raise ValueError("positions = 'learned' needs context, the number of positions")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.kv_heads}")
        if self.attention == "cudnn":
            self._require_cudnn()
        if self.windows is not None and len(self.windows) != self.n_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for n_layers = {self.n_layers}")

    def _require_cudnn(self) -> None:
        """Check the limits of cuDNN attention in JAX (before Hopper, heads have at most 128 channels)."""
        limits = {
            f"compute_dtype = {self.compute_dtype!r}, only bfloat16 and float16": self.compute_dtype == "float32",
            f"heads of {self.head_width} channels, only multiples of 8 up to 256": self.head_width % 8
            or self.head_width > 256,
            f"attention_softcap = {self.attention_softcap}": self.attention_softcap is not None,
        }
        for limit, exceeded in limits.items():
            if exceeded:
                raise ValueError(f"attention = 'cudnn' does not support {limit}: set attention to 'xla'")

    @property
    def head_width(self) -> int:
        """Number of channels of one head."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def period(self) -> int:
        """Number of layers after which windows and rotary positions repeat."""
        kinds = [(self.window(i), self.layer_rope(i)) for i in range(self.n_layers)]
        return next(n for n in range(1, self.n_layers + 1) if kinds[n:] == kinds[:-n] and self.n_layers % n == 0)

    def window(self, layer: int) -> int | None:
        """Attention window of a layer in tokens, including the token itself; None for full attention."""
        return self.windows[layer] if self.windows is not None else None

    def layer_rope(self, layer: int) -> Rope:
        """Rotary positions of a layer."""
        return self.local_rope if self.local_rope is not None and self.window(layer) is not None else self.rope
