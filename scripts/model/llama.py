"""The decoder that is trained: a Llama in plain PyTorch, and its export in the published layout.

Forward without a cache, for training only; answers are generated through `transformers` from the
exported files (`evaluate.py`), so that what is measured is what is published.
Invariant: parameter names and shapes are those of the published layout, but for the tied head,
which has no tensor of its own.
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 640,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu",
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": [2, 6], "pad_token_id": 0, "torch_dtype": "bfloat16", "use_cache": True,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 6], "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.95}


class Attention(nn.Module):
    """Grouped-query attention: x [batch, time, hidden] -> the same shape."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        hidden = c["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def forward(self, x, cos, sin):
        batch, time, _ = x.shape
        q = self.q_proj(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))


def rotate(x, cos, sin):
    """Rotary embedding, halves paired as in the published layout: x [batch, heads, time, head_dim]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Mlp(nn.Module):
    """SwiGLU: x [.., hidden] -> the same shape."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer, norms before each half."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.mlp = Mlp(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens [batch, time] -> hidden states [batch, time, hidden]; `loss` adds the tied head."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        half = c["head_dim"] // 2
        frequency = c["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(c["max_position_embeddings"]), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c["num_hidden_layers"]) ** 0.5 if deep else 0.02 if "embed" in name else 0.04)

    def forward(self, tokens):
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def loss(self, tokens, counts):
        """Mean cross-entropy of the next token where `counts` [batch, time] says that it counts."""
        x = self(tokens[:, :-1])
        keep = counts[:, 1:].reshape(-1).nonzero().squeeze(1)
        x = x.reshape(-1, x.shape[-1])[keep]
        return F.cross_entropy(x @ self.embed_tokens.weight.T, tokens[:, 1:].reshape(-1)[keep])


def export(model, out):
    """Writes config.json, generation_config.json and model.safetensors (bf16, no head: it is tied)."""
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {"model." + name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
